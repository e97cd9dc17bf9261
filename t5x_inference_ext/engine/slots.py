"""Decode slots: rows of one cache that prompts enter and leave one by one, while the others go on."""

import dataclasses
from typing import NamedTuple

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
from t5x_inference_ext.model import cache as kv_cache
from t5x_inference_ext.model.cache import KVCache, Shared
from t5x_inference_ext.model.chunks import cache_sharding, constrain_cache, empty_cache
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.sharding import activations
from t5x_inference_ext.sharding.layout import Axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """B rows, each in use or free: a free one has ended.

  Attributes:
    cache: what they have seen but for their last token.
    rows: what they ask for.
    progress: how far they are.
  """

  cache: KVCache
  rows: RowParams
  progress: DecodeState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillState:
  """Prompts on their way to a slot, as the prefill layout has them.

  Attributes:
    cache: of R rows.
    logits: [R, V] float32, after the last token of each so far.
  """

  cache: KVCache
  logits: jax.Array


class StepsOutput(NamedTuple):
  """What some decode steps gave.

  Attributes:
    chosen: of each step, [N, B] and [N, B, top]; 0 for rows that had ended.
    counts: [B] int32, how many of the N are the row's: the first ones.
    ended: [B] bool, after them.
  """

  chosen: ChosenTokens
  counts: jax.Array
  ended: jax.Array


def empty_slots(
  model: Model, weights: Weights, asks: RowParams, rows: int, size: int, shared: Shared | None
) -> Slots:
  """All free. asks [1] is of the form of what they will be asked for; see empty_cache for the rest."""
  asks = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (rows, *x.shape[1:])), asks)
  nothing = jnp.zeros((rows, 1), jnp.int32)
  progress = initial_state(asks, nothing, nothing[:, 0], model.config.vocab_size)
  progress = dataclasses.replace(progress, ended=jnp.ones(rows, bool))
  return Slots(
    empty_cache(model, weights, rows, size, shared), *replicated(model, (asks, progress))
  )


def empty_prefill(
  model: Model, weights: Weights, rows: int, size: int, shared: Shared | None
) -> PrefillState:
  """No prompts yet, for `rows` at a time. `shared` is in the prefill layout."""
  logits = jnp.zeros((rows, model.config.vocab_size), jnp.float32)
  return PrefillState(
    empty_cache(model.prefilling, weights, rows, size, shared), _placed(model, logits)
  )


def logits_axes(model: Model, rows: int) -> Axes:
  """The axes that split the logits of so many prompts by rows, as the model makes them."""
  return activations.sampling_axes(model.prefill_layout, rows, model.mesh.shape)


def _placed(model: Model, logits: jax.Array) -> jax.Array:
  # One sharding at every call, or the next would be compiled for another.
  return lax.with_sharding_constraint(
    logits, NamedSharding(model.mesh, P(logits_axes(model, len(logits))))
  )


def prompt_room(model: Model, rows: int, length: int) -> int:
  """The positions of a cache of so many prompts that a chunk of `length`, padded as the prefill layout needs, fits into."""
  return activations.padded_length(model.prefill_layout, model.mesh.shape, rows, length)


def free_slots(model: Model, slots: Slots) -> Slots:
  """All of them free, whoever was in them."""
  del model
  progress = dataclasses.replace(slots.progress, ended=jnp.ones_like(slots.progress.ended))
  return dataclasses.replace(slots, progress=progress)


def start_prefill(
  model: Model, prompts: PrefillState, weights: Weights, shared: jax.Array
) -> PrefillState:
  """New prompts in the place of the last, that begin with so many shared positions, [R]."""
  cache = prompts.cache
  own = None if cache.shared is None else dataclasses.replace(cache.shared, lengths=shared)
  cache = dataclasses.replace(cache, lengths=jnp.zeros_like(cache.lengths), shared=own)
  return PrefillState(constrain_cache(model.prefilling, cache, weights), prompts.logits)


def prefill_chunk(
  model: Model, prompts: PrefillState, weights: Weights, tokens: jax.Array, counts: jax.Array
) -> PrefillState:
  """The next tokens of prompts, [R, T] of which counts [R] are real, maybe none."""
  logits, cache = model.prefilling.prefill_chunk(weights, prompts.cache, tokens, counts)
  return PrefillState(cache, _placed(model, jnp.where(counts[:, None] > 0, logits, prompts.logits)))


def insert(
  model: Model,
  slots: Slots,
  weights: Weights,
  prompts: PrefillState,
  row: jax.Array,
  slot: jax.Array,
  asks: RowParams,
  prompt: jax.Array,
  length: jax.Array,
) -> tuple[Slots, ChosenTokens]:
  """Puts a prompt whose tokens are all in the cache into a slot, and chooses its first new token.

  Args:
    model: decides layouts.
    slots: one of which is free.
    weights: for their form.
    prompts: holds the prompt, which stays there: it may enter several slots.
    row: of prompts.
    slot: that is free.
    asks: [1] what the row asks for.
    prompt: [1, T] int32 the whole of it, BOS first, for penalties of what it holds.
    length: [1] int32, how many of these count.
  """
  cache, everyone = slots.cache, slots.cache.lengths.shape[0]
  held = cache_sharding(model.prefilling, prompts.logits.shape[0]).heads.cached()
  wanted = cache_sharding(model, everyone).heads.cached()
  one = cache_rows.gather_cache_row(model.prefilling, prompts.cache, weights, row)
  keys, values = jax.tree.map(
    lambda x: kv_cache.with_heads(x, held, wanted), (one.keys, one.values)
  )
  cache = cache_rows.scatter_cache_row(
    model, cache, weights, slot, dataclasses.replace(one, keys=keys, values=values)
  )
  logits = cache_rows.gather_row(
    model, prompts.logits, logits_axes(model, prompts.logits.shape[0]), row
  )
  progress, chosen = advance(
    asks, initial_state(asks, prompt, length, model.config.vocab_size), logits, length
  )
  put = lambda x, new: lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), slot, 0)
  rows, progress = jax.tree.map(put, (slots.rows, slots.progress), (asks, progress))
  return Slots(
    constrain_cache(model, cache, weights), *replicated(model, (rows, progress))
  ), replicated(model, chosen)


def decode_steps(
  model: Model, slots: Slots, weights: Weights, steps: jax.Array, until_free: jax.Array, most: int
) -> tuple[Slots, StepsOutput]:
  """Decode steps: `steps` of them, `most` at most; fewer if all rows end, or, with until_free, as soon as one does."""
  before, count = slots.progress, len(slots.progress.ended)
  top = slots.rows.top
  out = ChosenTokens(
    jnp.zeros((most, count), jnp.int32),
    jnp.zeros((most, count)),
    jnp.zeros((most, count, top), jnp.int32),
    jnp.zeros((most, count, top)),
  )

  def running(state):
    i, progress, _, _ = state
    freed = until_free & jnp.any(progress.ended & ~before.ended)
    return (i < steps) & ~jnp.all(progress.ended) & ~freed

  def step(state):
    i, progress, cache, out = state
    lengths = cache.lengths
    logits, cache = model.decode_step(weights, cache, progress.tokens)
    # What a free slot wrote is beyond its end, and is written over.
    cache = dataclasses.replace(cache, lengths=jnp.where(progress.ended, lengths, cache.lengths))
    progress, chosen = advance(slots.rows, progress, logits, cache.positions)
    out = jax.tree.map(
      lambda x, new: lax.dynamic_update_slice_in_dim(x, new[None], i, 0), out, chosen
    )
    return i + 1, progress, cache, out

  _, progress, cache, out = lax.while_loop(running, step, (0, before, slots.cache, out))
  told = replicated(model, StepsOutput(out, progress.counts - before.counts, progress.ended))
  return Slots(
    constrain_cache(model, cache, weights), slots.rows, replicated(model, progress)
  ), told


def replicated(model, tree):
  """Whole on every device: every process can read it, and every step finds it alike."""
  return jax.tree.map(
    lambda x: lax.with_sharding_constraint(x, NamedSharding(model.mesh, P())), tree
  )
