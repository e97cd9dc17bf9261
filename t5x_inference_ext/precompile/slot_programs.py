"""The programs of slot refill (engine.slots), and the shapes of their arguments.

There are four programs: a prefill chunk of prompts, decode steps of slots, the model's pass in a
step that checks drafts, and the insertion of a prompt into a slot.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t5x_inference_ext.engine import prompts, slot_steps
from t5x_inference_ext.engine import slots as engine_slots
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.sampling_arrays import end_id_array, stack_params
from t5x_inference_ext.engine.scheduler_config import LENGTH_MULTIPLE, SchedulerConfig
from t5x_inference_ext.engine.slot_table import SlotTable
from t5x_inference_ext.engine.state import RowParams
from t5x_inference_ext.engine.state_rows import state_shardings
from t5x_inference_ext.model.chunks import abstract_cache, page_shards
from t5x_inference_ext.model.pages import PagedCache
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights


def slot_program(
  phase: str,
  model: Model,
  weights: Weights,
  batch: int,
  context: int,
  length: int,
  sampling: SamplingParams,
  *,
  read: int | None = None,
) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
  """Return a phase's jitted function, which updates its state in place, and its arguments' shapes.

  extend: (weights, prompts, tokens [B, T], counts [B]) -> prompts.
  slots: (weights, slots, pages, alive, steps, until_free) -> (slots, engine.slots.StepsOutput),
    with at most one step.
  verify: (weights, cache, tokens [B, T], counts [B]) -> (next tokens [B, T], cache), with the
    pages of slots.
  admit: (weights, slots, prompts, place, slot, pages, row_params, prompt [1, T], length,
    generated) -> (slots, engine.slots.StepsOutput).

  Args:
    phase: str. 'extend', 'slots', 'verify' or 'admit'.
    model: Model. Decides mesh and layouts.
    weights: Weights. Shapes with shardings.
    batch: int. B: number of prompts for 'extend', else of slots.
    context: int. Positions of each row's cache; for slots, rounded up to whole pages.
    length: int. T: tokens of a chunk, of a draft plus the last token, or of the inserted prompt.
    sampling: SamplingParams. How tokens are chosen. Features that it does not use are left out of
      the program; a scheduler's programs contain all features, and skip unused ones at run time.
    read: int or None. Pages of each shard that a step of 'slots' reads; None: all.
  """
  if phase == 'extend':
    state = _abstract_prompts(model, weights, batch, context)
    chunk = _replicated(model.mesh, (_ints(batch, length), _ints(batch)))
    return _jitted(prompts.prefill_chunk, model), (weights, state, *chunk)
  params = RowParams(
    stack_params([sampling], model.config.vocab_size),
    jnp.zeros(1, jnp.uint32),
    jnp.ones(1, jnp.int32),
    end_id_array(1, 1),
    jnp.zeros(1, jnp.int32),
  )
  rest: tuple[Any, ...]
  config = slot_config(model, batch, context)
  row = _replicated(model.mesh, params)
  slots = _abstract_slots(model, weights, row, config)
  if phase == 'verify':
    rest = _replicated(model.mesh, (_ints(batch, length), _ints(batch)))
    return _verify_program(model), (weights, slots.cache, *rest)
  table = SlotTable(config, page_shards(model, batch))
  if phase == 'slots':
    rest = table.pages(), table.alive, np.int32(0), np.bool_(False)
    sizes = dict(read=read or table.pool.pages, read_shared=0)
    run = _jitted(slot_steps.decode_steps, model, most=config.decode_steps, **sizes)
    return run, (weights, slots, *_replicated(model.mesh, rest))
  state = _abstract_prompts(model, weights, model.prefilling.padded_batch(1), length)
  # The prompt's tokens are an argument only because penalties read them.
  tokens = _ints(1, length if sampling.penalizes else 1)
  places, pages = (np.int32(0), np.int32(0)), table.pages_to_write(0, [])
  rest = *places, pages, row, tokens, np.int32(0), np.int32(0)
  return _jitted(engine_slots.insert, model), (
    weights,
    slots,
    state,
    *_replicated(model.mesh, rest),
  )


def _verify_program(model: Model) -> jax.stages.Wrapped:
  """Jit the pass over drafts, with the choice of the most likely token after each draft token."""

  def verify(
    weights: Weights, cache: PagedCache, tokens: jax.Array, counts: jax.Array
  ) -> tuple[jax.Array, PagedCache]:
    logits, cache = model.verify(weights, cache, tokens, counts)
    chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    whole = NamedSharding(model.mesh, P())
    return jax.lax.with_sharding_constraint(chosen, whole), cache

  return jax.jit(verify, donate_argnames='cache')


def slot_config(model: Model, slots: int, context: int) -> SchedulerConfig:
  """Return the config of a scheduler whose rows have room for `context` positions, in pages."""
  page_size = min(SchedulerConfig.page_size, -(-context // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
  return SchedulerConfig(slots, -(-context // page_size) * page_size, page_size=page_size)


def _jitted(function: Callable[..., Any], model: Model, **static: Any) -> jax.stages.Wrapped:
  """Jit an engine function with the weights as first argument, which is kept even if unused."""
  run = lambda weights, state, *arguments: function(model, state, weights, *arguments, **static)
  return jax.jit(run, donate_argnums=1, keep_unused=True)


def _abstract_slots(
  model: Model, weights: Weights, row: RowParams, config: SchedulerConfig
) -> engine_slots.Slots:
  """Return the shapes and shardings of slots whose rows have parameters like `row`."""
  shards = page_shards(model, config.slots)
  empty = functools.partial(engine_slots.empty_slots, model, config=config, shards=shards)
  made = jax.eval_shape(empty, weights, row)
  cache = abstract_cache(model, made.cache, weights)
  state = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    made.state,
    state_shardings(model, made.state),
  )
  return engine_slots.Slots(cache, _replicated(model.mesh, made.rows), state)


def _abstract_prompts(model: Model, weights: Weights, rows: int, size: int) -> prompts.PrefillState:
  """Return the shapes and shardings of `rows` prompts with room for `size` positions."""
  room = prompts.prompt_room(model, rows, size)
  empty = functools.partial(prompts.empty_prefill, model, rows=rows, size=room)
  made = jax.eval_shape(empty, weights)
  sharding = NamedSharding(model.mesh, P(model.sampling_axes(rows)))
  logits: Any = jax.ShapeDtypeStruct(made.logits.shape, made.logits.dtype, sharding=sharding)
  cache = abstract_cache(model.prefilling, made.cache, weights)
  return prompts.PrefillState(cache, logits, _replicated(model.mesh, made.broken))


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def _replicated(mesh: Mesh, tree: Any) -> Any:
  """Return the shapes of a tree of arrays, with replicated shardings."""
  whole = NamedSharding(mesh, P())
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)
