"""The program of one phase, at full size and without weights, compiled for the devices of a mesh."""

import dataclasses
import functools
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_inference_ext.checkpoints.load import scans_layers
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine.programs import generation_program
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.saved_generation import GenerationShape, describe_run
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.cache import KVCache
from t5x_inference_ext.model.chunks import abstract_cache
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights, build_weights
from t5x_inference_ext.precompile import serving
from t5x_inference_ext.precompile.memory import CompiledMemory, memory_of
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.packing import packed_tensors, tensor_dtype

COMPILE_PHASES = ('decode', 'prefill', 'generate', *serving.SLOT_PHASES)
COMPILE_WEIGHTS = ('int8', 'bfloat16')
GREEDY = SamplingParams()


@dataclasses.dataclass(frozen=True)
class CompileCase:
  """What is compiled, but for the devices.

  Attributes:
    config: the model.
    weights: 'int8' or 'bfloat16'.
    phase: 'decode', one token for each row, or 'prefill', whole prompts; both with the choice of the next token. Or
      'generate', all of it: what infer runs for a batch. Or what slot refill runs: 'extend', a chunk of prompts on what is
      cached of them, 'slots', decode steps of slots, 'admit', a prompt's way into a slot.
    batch: B: rows, prompts of 'extend', slots.
    context: S, the positions that the cache has for each row.
    layout: of the phase; of a generation that of its prefill.
    prompt: T of a prefill, by default all of the context; of a generation, BOS not counted, by default what the new tokens
      leave of the context; of 'extend' by default a chunk as slot refill has it; of 'admit' the room for a prompt's
      positions, by default all of the context.
    other_layout: of the other phase, which shares the weights and hands over or takes the cache: by default ws_2d/batch,
      or ws_1d/batch beside ws_1d, whose weights lie otherwise.
    dtype: of activations and embedding.
    cache: what the KV cache holds: 'int8', or None: `dtype`.
    stacked: whether the layers are one loop; by default as loading a checkpoint onto a TPU has it.
    max_new_tokens: of a generation.
    sampler: of a generation, slots and admit.

  Raises:
    RequestError: a value out of its range.
    MeshError: two layouts that can't share weights.
  """

  config: ModelConfig
  weights: str
  phase: str
  batch: int
  context: int
  layout: Layout = Layout()
  prompt: int | None = None
  other_layout: Layout | None = None
  dtype: str = 'bfloat16'
  cache: str | None = None
  stacked: bool | None = None
  max_new_tokens: int = 64
  sampling: SamplingParams = GREEDY

  def __post_init__(self):
    object.__setattr__(self, 'stacked', scans_layers(self.config.num_layers, self.stacked))
    for name, known in (('phase', COMPILE_PHASES), ('weights', COMPILE_WEIGHTS)):
      if getattr(self, name) not in known:
        raise RequestError(f'{name} must be one of {", ".join(known)}, got {getattr(self, name)!r}')
    for name in ('batch', 'context', 'prompt'):
      value = getattr(self, name)
      if not (value is None and name == 'prompt') and (not isinstance(value, int) or value < 1):
        raise RequestError(f'{name} must be a whole number above 0, got {value!r}')
    if self.phase == 'generate':
      # BOS takes a position, the last new token none.
      if self.max_new_tokens < 1 or (self.prompt or 1) + self.max_new_tokens > self.context:
        raise RequestError(
          f'context={self.context} positions have no room for prompt={self.prompt or 1} and '
          f'max_new_tokens={self.max_new_tokens}'
        )
    elif self.length > self.context:
      raise RequestError(
        f'prompt={self.prompt} does not fit into context={self.context}, the positions of the cache'
      )

  @property
  def length(self) -> int:
    """T: the tokens of each row that one pass, of a generation the prefill, takes."""
    if self.phase == 'generate':
      return self.run.prompt + 1
    if self.phase == 'extend':
      return self.prompt or min(serving.CHUNK, self.context)
    return 1 if self.phase in ('decode', 'slots') else self.prompt or self.context

  @property
  def run(self) -> GenerationShape:
    """Of a generation."""
    prompt = self.prompt or self.context - self.max_new_tokens
    return GenerationShape(self.batch, prompt, self.context, self.max_new_tokens, self.sampling)

  @property
  def cache_dtype(self) -> str:
    """What the KV cache holds."""
    return self.cache or self.dtype

  @property
  def tokens(self) -> int:
    """Of the whole batch, in one pass."""
    return self.batch * self.length

  @property
  def layouts(self) -> tuple[Layout, Layout]:
    """Of prefill and of decode."""
    if self.phase == 'extend':  # the cache of prompts on their way lies as their layout has it
      return self.layout, self.layout
    other = self.other_layout or Layout('ws_1d' if self.layout.feedforward == 'ws_1d' else 'ws_2d')
    return (self.layout, other) if self.phase in ('prefill', 'generate') else (other, self.layout)

  def model(self, mesh: Mesh) -> Model:
    return Model(self.config, mesh, *self.layouts, self.dtype, self.cache)

  def to_dict(self) -> dict[str, Any]:
    """JSON-ready."""
    if self.phase == 'generate':
      return describe_run(
        self.config,
        self.weights,
        self.layouts,
        self.dtype,
        self.cache_dtype,
        self.stacked,
        self.run,
      )
    prefill, decode = map(str, self.layouts)
    sampled = (
      {'sampling': dataclasses.asdict(self.sampling)} if self.phase in ('slots', 'admit') else {}
    )
    return {
      'model': self.config.to_dict(),
      'weights': self.weights,
      'phase': self.phase,
      'batch': self.batch,
      'context': self.context,
      'prompt': self.length if self.phase in ('prefill', 'extend', 'admit') else None,
      'prefill_layout': prefill,
      'decode_layout': decode,
      'dtype': self.dtype,
      'cache': self.cache_dtype,
      'stacked': self.stacked,
      **sampled,
    }


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled phase.

  Attributes:
    case: what it is of.
    mesh: the devices that it is for.
    compiled: jax's own, with as_text(), memory_analysis() and cost_analysis().
    arguments: the shapes that it takes, as ShapeDtypeStructs with shardings.
    memory: of one chip.
    seconds: that compiling took.
  """

  case: CompileCase
  mesh: Mesh
  compiled: jax.stages.Compiled
  arguments: tuple[Any, ...]
  memory: CompiledMemory
  seconds: float

  @functools.cached_property
  def text(self) -> str:
    """The scheduled HLO after partitioning.

    Raises:
      RequestError: a program that neither jaxlib nor the compiler writes as text.
    """
    try:
      return self.compiled.as_text()
    except jax.errors.JaxRuntimeError as e:
      if text := _dumped_text(self.case, self.mesh):
        return text
      raise RequestError(
        f"compiled, but this jaxlib can't write the program of {self.case.phase} in {self.case.layout} as text, of which "
        f'the report is made ({str(e).splitlines()[0]}): ask for another layout or batch'
      ) from e


def _dumped_text(case: CompileCase, mesh: Mesh) -> str | None:
  """The text that the compiler itself leaves of a program, compiled once more; None where it leaves none.

  jaxlib can't read all that a newer compiler makes, such as the lookups that v5p and v6e leave to sparse cores.
  """
  function, arguments = phase_function(case, mesh)
  with tempfile.TemporaryDirectory() as directory:
    function.lower(*arguments).compile(
      compiler_options={'xla_dump_to': directory, 'xla_dump_hlo_as_text': True}
    )
    texts = sorted(
      pathlib.Path(directory).glob('*.after_codegen.txt'), key=lambda path: path.stat().st_size
    )
    return texts[-1].read_text(encoding='utf-8') if texts else None


def compile_case(case: CompileCase, mesh: Mesh, available: int | None = None) -> Program:
  """Compiles a phase for a mesh, of devices that need not be here.

  Args:
    case: what to compile.
    mesh: axes x, y, z.
    available: bytes that a program may take on a chip, if known: only kept.

  Raises:
    MeshError: the mesh does not divide the model, or the layout can't split the batch.
    jax.errors.JaxRuntimeError: the compiler refused; RESOURCE_EXHAUSTED is for want of memory.
  """
  function, arguments = phase_function(case, mesh)
  start = time.monotonic()
  compiled = function.lower(*arguments).compile()
  seconds = time.monotonic() - start
  return Program(
    case, mesh, compiled, arguments, memory_of(case.phase, arguments, compiled, available), seconds
  )


def phase_function(case: CompileCase, mesh: Mesh) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
  """The jitted function of a phase, and the shapes of what it takes.

  decode: (weights, cache, tokens [B]) -> (next tokens [B], cache), the cache in place.
  prefill: (weights, tokens [B, T], lengths [B]) -> (next tokens [B], cache).
  generate: (weights, tokens [B, T], lengths [B], seeds [B]) -> engine.static_batch.Generation.
  extend, slots, admit: see serving.program.
  """
  model = case.model(mesh)
  weights = abstract_weights(model, case.weights, case.stacked)
  if case.phase == 'generate':
    return generation_program(model, case.run, weights)
  if case.phase in serving.SLOT_PHASES:
    return serving.program(
      case.phase, model, weights, case.batch, case.context, case.length, case.sampling
    )
  whole = NamedSharding(mesh, P())
  row_of_ints = jax.ShapeDtypeStruct((case.batch,), jnp.int32, sharding=whole)

  def choose(logits, positions):
    # Whole on every device: the next step's embedding takes them so.
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.lax.with_sharding_constraint(tokens, whole)

  if case.phase == 'prefill':

    def prefill(weights, tokens, lengths):
      logits, cache = model.prefill(weights, tokens, lengths, case.context)
      return choose(logits, lengths), cache

    tokens = jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32, sharding=whole)
    return jax.jit(prefill), (weights, tokens, row_of_ints)

  def decode(weights, cache, tokens):
    logits, cache = model.decode_step(weights, cache, tokens)
    return choose(logits, cache.lengths), cache

  cache = abstract_decode_cache(model, weights, case.batch, case.context)
  return jax.jit(decode, donate_argnames='cache'), (weights, cache, row_of_ints)


def abstract_weights(model: Model, weights: str, stacked: bool = True) -> Weights:
  """The shapes and shardings of a model's weights, as checkpoints.load would make them.

  Args:
    model: decides mesh and layout.
    weights: 'int8', or anything else: of the compute dtype.
    stacked: one array for all layers.

  Raises:
    MeshError: the mesh does not divide the model.
  """
  tensors = packed_tensors(
    model.config, model.prefill_layout, dict(model.mesh.shape), weights == 'int8'
  )
  layers = model.config.num_layers

  def struct(name, owners):
    tensor, lead = tensors[name], (layers,) if isinstance(owners, slice) else ()
    sharding = NamedSharding(model.mesh, P(*(None,) * len(lead), *tensor.spec))
    return jax.ShapeDtypeStruct(
      lead + tensor.shape, tensor_dtype(tensor, weights, model.dtype), sharding=sharding
    )

  return build_weights(tensors, layers, stacked, struct)


def abstract_decode_cache(model: Model, weights: Weights, batch: int, context: int) -> KVCache:
  """The shapes and shardings of the cache that a decode step takes: those of what a prefill makes.

  Raises:
    MeshError: rows that the decode layout can't split.
  """
  row = jax.ShapeDtypeStruct((batch,), jnp.int32)
  made = jax.eval_shape(
    lambda w, tokens, lengths: model.prefill(w, tokens, lengths, context)[1],
    weights,
    jax.ShapeDtypeStruct((batch, 1), jnp.int32),
    row,
  )
  return abstract_cache(model, made, weights)
