"""The programs of slot refill (engine.slots), and the shapes of their arguments.

There are three: a prefill chunk of prompts, decode steps of slots, and the insertion of a prompt
into a slot.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t5x_inference_ext.engine import slots as engine_slots
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.sampling_arrays import end_id_array, stack_params
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.state import RowParams
from t5x_inference_ext.engine.state_rows import state_shardings
from t5x_inference_ext.model.chunks import abstract_cache
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights

SLOT_STEPS = SchedulerConfig.decode_steps  # most decode steps in one call


def slot_program(
  phase: str,
  model: Model,
  weights: Weights,
  batch: int,
  context: int,
  length: int,
  sampling: SamplingParams,
) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
  """Return a phase's jitted function, which updates its state in place, and its arguments' shapes.

  extend: (weights, prompts, tokens [B, T], counts [B]) -> prompts.
  slots: (weights, slots, steps, until_free) -> (slots, engine.slots.StepsOutput), with at most
    SLOT_STEPS steps.
  admit: (weights, slots, prompts, row, slot, row_params, prompt [1, T], length [1]) -> (slots,
    first token).

  Args:
    phase: str. 'extend', 'slots' or 'admit'.
    model: Model. Decides mesh and layouts.
    weights: Weights. Shapes with shardings.
    batch: int. B: number of prompts for 'extend', else of slots.
    context: int. S, positions of each row's cache.
    length: int. T, the tokens of a chunk, or of the inserted prompt.
    sampling: SamplingParams. How tokens are chosen.
  """
  if phase == 'extend':
    prompts = _abstract_prompts(model, weights, batch, context)
    chunk = _replicated(model.mesh, (_ints(batch, length), _ints(batch)))
    return _jitted(engine_slots.prefill_chunk, model), (weights, prompts, *chunk)
  params = RowParams(
    stack_params([sampling], model.config.vocab_size),
    jnp.zeros(1, jnp.uint32),
    jnp.ones(1, jnp.int32),
    end_id_array(1, 1),
    jnp.zeros(1, jnp.int32),
  )
  asks = _replicated(model.mesh, params)
  slots = _abstract_slots(model, weights, asks, batch, context)
  if phase == 'slots':
    scalars = _replicated(model.mesh, (np.int32(0), np.bool_(False)))
    run = _jitted(engine_slots.decode_steps, model, most=SLOT_STEPS)
    return run, (weights, slots, *scalars)
  prompts = _abstract_prompts(model, weights, model.prefilling.padded_batch(1), length)
  # Only penalties read the prompt's own tokens.
  tokens = _ints(1, length if sampling.penalizes else 1)
  rest = _replicated(model.mesh, (np.int32(0), np.int32(0), asks, tokens, _ints(1)))
  return _jitted(engine_slots.insert, model), (weights, slots, prompts, *rest)


def _jitted(function: Callable[..., Any], model: Model, **static: Any) -> jax.stages.Wrapped:
  """Jit a function of engine.slots with the weights as first argument, kept even if unused."""
  run = lambda weights, state, *arguments: function(model, state, weights, *arguments, **static)
  return jax.jit(run, donate_argnums=1, keep_unused=True)


def _abstract_slots(
  model: Model, weights: Weights, asks: RowParams, rows: int, size: int
) -> engine_slots.Slots:
  """Return the shapes and shardings of `rows` slots with caches of `size` positions."""
  empty = functools.partial(engine_slots.empty_slots, model, rows=rows, size=size, shared=None)
  made = jax.eval_shape(empty, weights, asks)
  cache = abstract_cache(model, made.cache, weights)
  state = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    made.state,
    state_shardings(model, made.state),
  )
  return engine_slots.Slots(cache, _replicated(model.mesh, made.rows), state)


def _abstract_prompts(
  model: Model, weights: Weights, rows: int, size: int
) -> engine_slots.PrefillState:
  """Return the shapes and shardings of `rows` prompts with room for `size` positions."""
  room = engine_slots.prompt_room(model, rows, size)
  empty = functools.partial(engine_slots.empty_prefill, model, rows=rows, size=room, shared=None)
  made = jax.eval_shape(empty, weights)
  sharding = NamedSharding(model.mesh, P(model.sampling_axes(rows)))
  logits: Any = jax.ShapeDtypeStruct(made.logits.shape, made.logits.dtype, sharding=sharding)
  return engine_slots.PrefillState(abstract_cache(model.prefilling, made.cache, weights), logits)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def _replicated(mesh: Mesh, tree: Any) -> Any:
  """Return the shapes of a tree of arrays that every device holds whole."""
  whole = NamedSharding(mesh, P())
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)
