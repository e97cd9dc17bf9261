"""Decode slots: rows of one cache that prompts enter and leave while the other rows go on.

The module holds the functions of the devices; engine/programs.py compiles them, and
engine/scheduler.py calls them.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_inference_ext.engine import cache_rows
from t5x_inference_ext.engine.state import (
  ChosenTokens,
  DecodeState,
  RowParams,
  advance,
  initial_state,
)
from t5x_inference_ext.engine.state_rows import constrain_state, put_state_row
from t5x_inference_ext.model import cache as kv_cache
from t5x_inference_ext.model.cache import KVCache, Shared
from t5x_inference_ext.model.chunks import constrain_cache, empty_cache
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.sharding import activations


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """B rows, each in use or free. A free row is marked as ended.

  Attributes:
    cache: Keys and values of each row's tokens, except its last token.
    rows: Parameters of the rows.
    state: State of the rows.
  """

  cache: KVCache
  rows: RowParams
  state: DecodeState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillState:
  """R prompts that are being prefilled, in the prefill layout.

  Attributes:
    cache: Keys and values of the prompts' tokens so far.
    logits: [R, V] float32. Logits after each prompt's last token so far.
  """

  cache: KVCache
  logits: jax.Array


class StepsOutput(NamedTuple):
  """The tokens of some decode steps.

  Attributes:
    chosen: Chosen tokens of each step, [N, B] and [N, B, top]; 0 for rows that had ended.
    counts: [B] int32. In how many of the N steps the row got a token; these steps come first.
    ended: [B] bool. Whether the row has ended after the N steps.
  """

  chosen: ChosenTokens
  counts: jax.Array
  ended: jax.Array


def empty_slots(
  model: Model, weights: Weights, row_params: RowParams, rows: int, size: int, shared: Shared | None
) -> Slots:
  """Return slots that are all free.

  Args:
    model: Decides mesh and layouts.
    weights: Weights, for their shapes and shardings.
    row_params: [1] Parameters with the structure and shapes that all requests have.
    rows: B, the number of slots.
    size: S, cache positions of each slot.
    shared: The stored prefix in the decode layout, or None.
  """
  row_params = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (rows, *x.shape[1:])), row_params)
  nothing = jnp.zeros((rows, 1), jnp.int32)
  state = initial_state(row_params, nothing, nothing[:, 0], model.config.vocab_size)
  state = dataclasses.replace(state, ended=jnp.ones(rows, bool))
  cache = empty_cache(model, weights, rows, size, shared)
  return Slots(cache, replicated(model, row_params), constrain_state(model, state))


def empty_prefill(
  model: Model, weights: Weights, rows: int, size: int, shared: Shared | None
) -> PrefillState:
  """Return a prefill state without prompts.

  Args:
    model: Decides mesh and layouts.
    weights: Weights, for their shapes and shardings.
    rows: R, prompts that are prefilled together.
    size: Cache positions of each prompt.
    shared: The stored prefix in the prefill layout, or None.
  """
  logits = jnp.zeros((rows, model.config.vocab_size), jnp.float32)
  cache = empty_cache(model.prefilling, weights, rows, size, shared)
  return PrefillState(cache, _constrain_logits(model, logits))


def _constrain_logits(model: Model, logits: jax.Array) -> jax.Array:
  # Logits get one sharding in every call: another one would recompile the program that takes them.
  spec = P(model.sampling_axes(len(logits)))
  return lax.with_sharding_constraint(logits, NamedSharding(model.mesh, spec))


def prompt_room(model: Model, rows: int, length: int) -> int:
  """Return the cache positions of a chunk of `length`, padded for the prefill layout."""
  return activations.padded_length(model.prefill_layout, model.mesh.shape, rows, length)


def free_slots(model: Model, slots: Slots) -> Slots:
  """Free all slots."""
  del model
  state = dataclasses.replace(slots.state, ended=jnp.ones_like(slots.state.ended))
  return dataclasses.replace(slots, state=state)


def start_prefill(
  model: Model, prompts: PrefillState, weights: Weights, shared: jax.Array
) -> PrefillState:
  """Reset the state for new prompts. Their first `shared` [R] positions are the stored prefix."""
  cache = prompts.cache
  prefix = None if cache.shared is None else dataclasses.replace(cache.shared, lengths=shared)
  cache = dataclasses.replace(cache, lengths=jnp.zeros_like(cache.lengths), shared=prefix)
  return PrefillState(constrain_cache(model.prefilling, cache, weights), prompts.logits)


def prefill_chunk(
  model: Model, prompts: PrefillState, weights: Weights, tokens: jax.Array, counts: jax.Array
) -> PrefillState:
  """Run the next tokens [R, T] of the prompts. counts [R] of them, possibly 0, are valid."""
  logits, cache = model.prefilling.prefill_chunk(weights, prompts.cache, tokens, counts)
  logits = jnp.where(counts[:, None] > 0, logits, prompts.logits)
  return PrefillState(cache, _constrain_logits(model, logits))


def insert(
  model: Model,
  slots: Slots,
  weights: Weights,
  prompts: PrefillState,
  row: jax.Array,
  slot: jax.Array,
  row_params: RowParams,
  prompt: jax.Array,
  length: jax.Array,
) -> tuple[Slots, ChosenTokens]:
  """Put a prefilled prompt into a free slot, and choose its first new token.

  Args:
    model: Decides mesh and layouts.
    slots: The slots. `slot` must be free.
    weights: Weights, for their shapes and shardings.
    prompts: Prefilled prompts. They stay there: a prompt may enter several slots.
    row: Row of `prompts`.
    slot: Slot to enter.
    row_params: [1] Parameters of the row.
    prompt: [1, T] int32. The whole prompt, BOS first. Only penalties read it.
    length: [1] int32. Number of valid tokens in `prompt`.
  """
  one = cache_rows.gather_cache_row(model.prefilling, prompts.cache, weights, row)
  # The decode layout may repeat and pad key heads differently from the prefill layout.
  held = model.prefilling.cache_sharding(prompts.logits.shape[0]).heads.cached()
  wanted = model.cache_sharding(slots.cache.lengths.shape[0]).heads.cached()
  keys, values = jax.tree.map(
    lambda x: kv_cache.with_heads(x, held, wanted), (one.keys, one.values)
  )
  one = dataclasses.replace(one, keys=keys, values=values)
  cache = cache_rows.scatter_cache_row(model, slots.cache, weights, slot, one)
  axes = model.sampling_axes(prompts.logits.shape[0])
  logits = cache_rows.gather_row(model, prompts.logits, axes, row)
  state = initial_state(row_params, prompt, length, model.config.vocab_size)
  state, chosen = advance(row_params, state, logits, length)
  rows, states = put_state_row(model, slots.rows, slots.state, slot, row_params, state)
  cache = constrain_cache(model, cache, weights)
  return Slots(cache, replicated(model, rows), states), replicated(model, chosen)


# State of the loop in decode_steps: step, state, cache, chosen tokens so far.
_Carry = tuple[jax.Array, DecodeState, KVCache, ChosenTokens]


def decode_steps(
  model: Model, slots: Slots, weights: Weights, steps: jax.Array, until_free: jax.Array, most: int
) -> tuple[Slots, StepsOutput]:
  """Run decode steps until all rows have ended or `steps` of them are done.

  Args:
    model: Decides mesh and layouts.
    slots: The slots, at least one in use.
    weights: Weights on the mesh.
    steps: Scalar int32. Steps to run, at most `most`.
    until_free: Scalar bool. Whether to stop as soon as a row ends.
    most: N, steps that the output has room for. Static.
  """
  before, count, top = slots.state, len(slots.state.ended), slots.rows.top_width
  out = ChosenTokens(
    jnp.zeros((most, count), jnp.int32),
    jnp.zeros((most, count)),
    jnp.zeros((most, count, top), jnp.int32),
    jnp.zeros((most, count, top)),
  )

  def running(carry: _Carry) -> jax.Array:
    i, state, _, _ = carry
    freed = until_free & jnp.any(state.ended & ~before.ended)
    return (i < steps) & ~jnp.all(state.ended) & ~freed

  def step(carry: _Carry) -> _Carry:
    i, state, cache, out = carry
    lengths = cache.lengths
    logits, cache = model.decode_step(weights, cache, state.tokens)
    # A free slot's keys go beyond its length, where the next step overwrites them.
    cache = dataclasses.replace(cache, lengths=jnp.where(state.ended, lengths, cache.lengths))
    state, chosen = advance(slots.rows, state, logits, cache.positions, model)
    out = jax.tree.map(
      lambda x, new: lax.dynamic_update_slice_in_dim(x, new[None], i, 0), out, chosen
    )
    return i + 1, state, cache, out

  _, state, cache, out = lax.while_loop(running, step, (jnp.asarray(0), before, slots.cache, out))
  output = replicated(model, StepsOutput(out, state.counts - before.counts, state.ended))
  cache = constrain_cache(model, cache, weights)
  return Slots(cache, slots.rows, constrain_state(model, state)), output


def replicated(model: Model, tree: Any) -> Any:
  """Make arrays whole on every device: every process can read them, and no step moves them."""
  whole = NamedSharding(model.mesh, P())
  return jax.tree.map(lambda x: lax.with_sharding_constraint(x, whole), tree)
