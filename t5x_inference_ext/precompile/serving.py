"""The programs of slot refill (engine.slots) and the shapes that they take: a chunk of prompts, decode steps of slots, and
a prompt's way into a slot.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t5x_inference_ext.engine import slots as device
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.sampling_arrays import stack_params
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.state import RowParams
from t5x_inference_ext.model.chunks import abstract_cache
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights

SLOT_PHASES = ('extend', 'slots', 'admit')
CHUNK = (
  SchedulerConfig.prefill_chunk
)  # positions that one pass of prefill takes, where nobody says otherwise
SLOT_STEPS = SchedulerConfig.decode_steps  # decode steps of a call, at most


def program(
  phase: str,
  model: Model,
  weights: Weights,
  batch: int,
  context: int,
  length: int,
  sampling: SamplingParams,
) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
  """A phase's jitted function, and the shapes of what it takes. What it changes is changed in place.

  extend: (weights, prompts, tokens [B, T], counts [B]) -> prompts.
  slots: (weights, slots, steps, until_free) -> (slots, engine.slots.Steps), of STEPS steps at most.
  admit: (weights, slots, prompts, row, slot, asks, prompt [1, T], its length [1]) -> (slots, the first token).

  Args:
    phase: one of PHASES.
    model: decides mesh and layouts.
    weights: their shapes, with shardings.
    batch: B: prompts of an extend, else slots.
    context: S, positions of the cache.
    length: T, of a chunk or of the prompt that enters.
    sampler: what slots and prompts ask for.
  """
  if phase == 'extend':
    tokens, counts = _whole(model.mesh, (_ints(batch, length), _ints(batch)))
    return _jitted(device.prefill_chunk, model), (
      weights,
      _prompts(model, weights, batch, context),
      tokens,
      counts,
    )
  asks = _whole(
    model.mesh,
    RowParams(
      stack_params([sampling], model.config.vocab_size),
      np.zeros(1, np.uint32),
      np.ones(1, np.int32),
      eos_id=1,
    ),
  )
  slots = _slots(model, weights, asks, batch, context)
  if phase == 'slots':
    scalars = _whole(model.mesh, (np.int32(0), np.bool_(False)))
    return _jitted(device.decode_steps, model, most=SLOT_STEPS), (weights, slots, *scalars)
  prompts = _prompts(model, weights, model.prefilling.padded_batch(1), length)
  # The prompt's own tokens are looked at for penalties alone.
  rest = (np.int32(0), np.int32(0), asks, _ints(1, length if sampling.penalizes else 1), _ints(1))
  return _jitted(device.insert, model), (weights, slots, prompts, *_whole(model.mesh, rest))


def _jitted(function: Callable, model: Model, **static: Any) -> jax.stages.Wrapped:
  """A function of engine.slots, weights first. Weights that it does not use are where they are nonetheless."""
  run = lambda weights, state, *arguments: function(model, state, weights, *arguments, **static)
  return jax.jit(run, donate_argnums=1, keep_unused=True)


def _slots(model: Model, weights: Weights, asks: RowParams, rows: int, size: int) -> device.Slots:
  made = jax.eval_shape(
    functools.partial(device.empty_slots, model, rows=rows, size=size, shared=None), weights, asks
  )
  cache = abstract_cache(model, made.cache, weights)
  return device.Slots(cache, *_whole(model.mesh, (made.rows, made.state)))


def _prompts(model: Model, weights: Weights, rows: int, size: int) -> device.PrefillState:
  room = device.prompt_room(model, rows, size)
  made = jax.eval_shape(
    functools.partial(device.empty_prefill, model, rows=rows, size=room, shared=None), weights
  )
  sharding = NamedSharding(model.mesh, P(device.logits_axes(model, rows)))
  logits = jax.ShapeDtypeStruct(made.logits.shape, made.logits.dtype, sharding=sharding)
  return device.PrefillState(abstract_cache(model.prefilling, made.cache, weights), logits)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def _whole(mesh: Mesh, tree: Any) -> Any:
  """The shapes of arrays that every device has whole."""
  whole = NamedSharding(mesh, P())
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)
