"""Every program that the engine compiles, in one place.

Each is a plain function of this package under `jax.jit`. The model and sizes are static arguments:
each new value compiles another program. Donated arguments are updated in place, so callers must not
use them afterwards.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_inference_ext.compiler_options import compiler_options
from t5x_inference_ext.engine import (
  masked_drafts,
  prefix_store,
  prompts,
  reply_blocks,
  slot_steps,
  slots,
  static_batch,
)
from t5x_inference_ext.engine import speculative_steps as speculative_steps_module
from t5x_inference_ext.engine.saved_generation import GenerationShape, SavedGeneration
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model import chunks, long_scoring
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights


@contextlib.contextmanager
def stated_dtypes() -> Iterator[None]:
  """Override JAX settings that change dtypes: programs then compute in the dtypes as written.

  JAX_ENABLE_X64 would turn some constants into float64; JAX_NUMPY_DTYPE_PROMOTION=strict would
  refuse them.
  """
  with jax.enable_x64(False), jax.numpy_dtype_promotion('standard'):
    yield


class Program:
  """A jitted function of a model that computes in the stated dtypes.

  Attributes:
    jitted: Kind of device and quantized tables -> the function as jax.jit returned it, with the
      options for these (compiler_options.py). An entry is added at its first use.
  """

  def __init__(self, function: Callable, **jit: Any) -> None:
    """Take `function(model, ...)`, and arguments of jax.jit."""
    self.jitted: dict[tuple[str, tuple[str, ...]], Any] = {}
    self._function, self._jit = function, jit

  def __call__(self, model: Model, *arguments: Any, **options: Any) -> Any:
    """Run the function."""
    with stated_dtypes():
      return self._jitted_for(model, arguments)(model, *arguments, **options)

  def lower(self, model: Model, *arguments: Any, **options: Any) -> jax.stages.Lowered:
    """Lower the function, as the jitted function's own method does."""
    with stated_dtypes():
      return self._jitted_for(model, arguments).lower(model, *arguments, **options)

  @property
  def compiled(self) -> int:
    """Number of programs that were compiled, for any kind of device."""
    return sum(jitted._cache_size() for jitted in self.jitted.values())

  def _jitted_for(self, model: Model, arguments: tuple[Any, ...]) -> Any:
    device = model.mesh.devices.flat[0]
    tables = next((a.scaled_tables for a in arguments if isinstance(a, Weights)), ())
    key = device.device_kind, tables
    if key not in self.jitted:
      options = compiler_options(device, tables)
      self.jitted[key] = jax.jit(self._function, compiler_options=options, **self._jit)
    return self.jitted[key]


def _compiled(
  function: Callable, static: tuple[str, ...] = (), donated: tuple[str, ...] = ()
) -> Program:
  return Program(function, static_argnames=('model', *static), donate_argnames=donated)


def _replicated(function: Callable, *static: str) -> Program:
  """Compile a function of a model so that its result is replicated on every device and process."""

  def run(model: Model, *arguments: Any, **options: Any) -> Any:
    whole = NamedSharding(model.mesh, P())
    return jax.lax.with_sharding_constraint(function(model, *arguments, **options), whole)

  return Program(run, static_argnames=('model', *static))


def put(model: Model, *arrays: Any) -> Any:
  """Copy host arrays, or pytrees of arrays, to every device (replicated), for use by programs."""
  with stated_dtypes():
    return jax.device_put(arrays, NamedSharding(model.mesh, P()))


# Slots (engine.slots, engine.slot_steps, engine.masked_drafts), and prompts that wait for a slot
# (engine.prompts).
empty_slots = _compiled(slots.empty_slots, static=('config', 'shards', 'drafter'))
empty_prefill = _compiled(prompts.empty_prefill, static=('rows', 'size'))
start_prefill = _compiled(prompts.start_prefill, donated=('prompts',))
prefill_chunk = _compiled(prompts.prefill_chunk, static=('read',), donated=('prompts',))
insert = _compiled(slots.insert, static=('drafter',), donated=('slots',))
decode_steps = _compiled(
  slot_steps.decode_steps, static=('most', 'read', 'read_shared'), donated=('slots',)
)
speculative_steps = _compiled(
  speculative_steps_module.speculative_steps,
  static=('drafter', 'most', 'read', 'read_shared'),
  donated=('slots',),
)
decode_logits = _compiled(
  slot_steps.decode_logits, static=('read', 'read_shared'), donated=('slots',)
)
choose_masked = _compiled(slot_steps.choose_masked, donated=('slots',))
make_drafts = _compiled(masked_drafts.make_drafts, static=('drafter',), donated=('slots',))
verify_drafts = _compiled(
  masked_drafts.verify_drafts, static=('read', 'read_shared'), donated=('slots',)
)
choose_drafted = _compiled(masked_drafts.choose_drafted, static=('drafter',), donated=('slots',))

# The prefix cache (engine.prefix_store).
empty_store = _compiled(prefix_store.empty_store, static=('rows', 'blocks', 'block_size'))
start_with_blocks = _compiled(prefix_store.start_with_blocks, donated=('prompts', 'store'))
save_reply = _compiled(reply_blocks.save_reply, static=('prompt_rows',), donated=('store',))

# A static batch (engine.static_batch).
STATIC_BATCH_OPTIONS = (
  'sampling',
  'max_new_tokens',
  'eos_id',
  'cache_size',
  'max_length',
  'prefill_chunk',
)
generate_batch = _compiled(static_batch.generate_batch, static=STATIC_BATCH_OPTIONS)


def generation_program(
  model: Model, shape: GenerationShape, weights: Weights
) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
  """Return generate_batch for one shape, and the shapes of its arguments.

  Args:
    model: Decides mesh and layouts.
    shape: The limits that are fixed when the program is compiled.
    weights: Weights, or their shapes and shardings.

  Returns:
    A jitted function of (weights, tokens, lengths, seeds), and the shapes of these four.
  """
  whole = NamedSharding(model.mesh, P())
  tokens = jax.ShapeDtypeStruct((shape.batch, shape.prompt + 1), jnp.int32, sharding=whole)
  lengths, seeds = (
    jax.ShapeDtypeStruct((shape.batch,), dtype, sharding=whole) for dtype in (jnp.int32, jnp.uint32)
  )
  generate = functools.partial(static_batch.generate_batch, model, **shape.options())
  return jax.jit(generate), (weights, tokens, lengths, seeds)


def generation_for(
  model: Model,
  weights: Weights,
  shape: GenerationShape,
  executable: SavedGeneration | None,
  per_row: bool,
  prefill_chunk: int | None,
) -> Callable[..., static_batch.Generation]:
  """Return generate_batch for one shape, or the saved executable that replaces it.

  Args:
    model: Decides mesh and layouts.
    weights: Weights on that mesh.
    shape: The limits that are fixed when the program is compiled.
    executable: A saved generation, or None.
    per_row: Whether rows have limits or sampling parameters of their own.
    prefill_chunk: Maximum number of prompt positions in one pass; None: all.

  Raises:
    RequestError: The run has per-row settings or a chunked prefill, which no executable supports.
    SavedError: The executable was compiled for another run.
  """
  if executable is None:
    return functools.partial(generate_batch, model, **shape.options(), prefill_chunk=prefill_chunk)
  if per_row or prefill_chunk is not None:
    what = 'one set of sampling parameters and one limit' if per_row else 'prompts in one pass'
    raise RequestError(f'the executable {executable.path} was compiled for {what}: run without it')
  executable.check_run(shape)
  return executable.load(*generation_program(model, shape, weights), model.mesh)


# Conversion of a cache from one model's layout to another's.
move_cache = _compiled(chunks.with_layout_of, static=('to',))

# Passes over whole sequences; one score_chunks program serves all lengths (engine.ranking).
log_probs = _replicated(long_scoring.score_sequences)
score_chunks = _replicated(long_scoring.score_chunks, 'size', 'top')
logits = _replicated(Model.logits)
