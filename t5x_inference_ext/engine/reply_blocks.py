"""Copies of finished replies from slots to the prefix store, for the next turns of chats.

A prompt's blocks are saved from the prompts' own cache (engine/prefix_store.py). A reply's keys and
values are written by decode steps, so they are only in the slot's pages, in the decode layout. The
copy moves them to the prefill layout, in which the store has its blocks: insertion backwards.
"""

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from t5x_inference_ext.engine import cache_rows, prefix_store
from t5x_inference_ext.engine.prefix_store import BlockCopies, PrefixStore
from t5x_inference_ext.engine.slots import Slots
from t5x_inference_ext.model import cache as kv_cache
from t5x_inference_ext.model.cache import KeysValues
from t5x_inference_ext.model.pages import PagedCache
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights

REPLY_BLOCKS = 8  # maximum number of blocks in one copy; a longer reply takes several


def save_reply(
  model: Model,
  store: PrefixStore,
  weights: Weights,
  slots: Slots,
  slot: jax.Array,
  copies: BlockCopies,
  prompt_rows: int,
) -> PrefixStore:
  """Copy blocks of a slot's row into the store.

  Args:
    model: Decides mesh and layouts.
    store: The store.
    weights: Weights, for their shapes and shardings.
    slots: The slots.
    slot: The row's slot. If the row has failed, its blocks are marked as broken.
    copies: Up to REPLY_BLOCKS blocks to copy, all in the row's own pages.
    prompt_rows: R, rows of the prompts, as for the store. Static.
  """
  size = store.block_size
  kv = _gathered(model, weights, slots.cache, slot, copies, size)
  # The prefill layout may repeat and pad key heads differently from the decode layout.
  held = model.cache_sharding(slots.cache.lengths.shape[0]).heads.cached()
  wanted = model.prefilling.cache_sharding(prompt_rows).heads.cached()
  kv = jax.tree.map(lambda x: kv_cache.with_heads(x, held, wanted), kv)
  spec = prefix_store.store_spec(model, weights, prompt_rows)

  def run(store: KeysValues, kv: KeysValues, copies: BlockCopies) -> KeysValues:
    def write(i: jax.Array, store: KeysValues) -> KeysValues:
      block = cache_rows.read_block(kv, 0, i * size, size)
      return cache_rows.write_block(store, block, copies.blocks[i], 0)

    return lax.fori_loop(0, copies.count, write, store)

  specs = spec.keys, spec.values
  save = cache_rows.per_shard(model, run, (specs, specs, P()), specs)
  keys, values = save((store.keys, store.values), kv, copies)
  valid = jnp.arange(REPLY_BLOCKS) < copies.count
  blocks = jnp.where(valid, copies.blocks, store.broken.shape[0])  # others are dropped
  broken = store.broken.at[blocks].set(slots.state.failed[slot], mode='drop')
  return prefix_store.constrained(model, PrefixStore(keys, values, broken), spec)


def _gathered(
  model: Model, weights: Weights, cache: PagedCache, row: jax.Array, copies: BlockCopies, size: int
) -> KeysValues:
  """Return a row's blocks one after the other, [.., 1, K, M * P, Q], with heads as in `cache`."""
  axes, spec, row_spec = cache_rows.specs(model, cache, weights)

  def run(pool: KeysValues, lengths: jax.Array, row: jax.Array, copies: BlockCopies) -> KeysValues:
    _, mine = cache_rows.local_index(lengths.shape[0], axes, row)

    def read(i: jax.Array, found: KeysValues) -> KeysValues:
      # The multiplication comes last, so that the compiler can see that the start is tile-aligned.
      block = cache_rows.read_block(pool, copies.rows[i], copies.indices[i] * size, size)
      return cache_rows.write_block(found, block, 0, i * size)

    def empty(x: jax.Array) -> jax.Array:
      shape = *x.shape[:-4], 1, x.shape[-3], REPLY_BLOCKS * size, x.shape[-1]
      return jnp.zeros(shape, x.dtype)

    found = lax.fori_loop(0, copies.count, read, jax.tree.map(empty, pool))
    return jax.tree.map(lambda x: cache_rows.from_owner(x, axes, mine), found)

  inputs = (spec.keys, spec.values), spec.lengths, P(), P()
  gather = cache_rows.per_shard(model, run, inputs, (row_spec.keys, row_spec.values))
  return gather((cache.keys, cache.values), cache.lengths, row, copies)
