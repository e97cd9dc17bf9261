"""The prefix cache's blocks of keys and values, on the devices.

The blocks have the prefill layout, like the prompts that are being prefilled
(prompts.PrefillState), so a copy between the two moves no heads between devices. A store has no row
dimension: where shards split the prompts' rows, each shard has the whole store. Loading a block is
then a local copy, and saving a block sends it from the shard that has the row to the others.
engine/prefix_tree.py decides which tokens a block stands for; engine/programs.py compiles the
device functions.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t5x_inference_ext.engine import cache_rows
from t5x_inference_ext.engine.prompts import PrefillState, start_prefill
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.cache import KVCache, LayersKV
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.quantization.kv import KV, empty_kv, tile_positions
from t5x_inference_ext.sharding.layout import Axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixStore:
  """Keys (after rotary positions are applied) and values of all layers, in blocks of P positions.

  Attributes:
    keys: [L, N, K, P, Q], or a tuple of L arrays [N, K, P, Q] if the layers are unrolled. N is the
      number of blocks; K is as in the prompts' cache.
    values: Like keys.
    broken: [N] bool. Whether a value at or before the block's end was not finite.
  """

  keys: LayersKV
  values: LayersKV
  broken: jax.Array

  @property
  def block_size(self) -> int:
    """P, the positions of a block."""
    return jax.tree.leaves(self.keys)[0].shape[-2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCopies:
  """Up to M blocks to copy between rows and the store.

  Attributes:
    rows: [M] int32. Index of the prompt's row in the prefill state; for a reply, of the page,
      numbered on its device.
    indices: [M] int32. Index of the block in the row or page: it begins at position `index` * P.
    blocks: [M] int32. Index of the block in the store.
    count: Scalar int32. Number of copies to make: the first `count` entries are valid.
  """

  rows: Any
  indices: Any
  blocks: Any
  count: Any


def block_copies(copies: Sequence[tuple[int, int, int]], most: int) -> BlockCopies:
  """Return the argument of load_blocks, save_blocks or save_reply that makes all copies.

  Args:
    copies: (row, index, block) of each copy, in order.
    most: M, the maximum number of copies.
  """
  padded = np.zeros((most, 3), np.int32)
  padded[: len(copies)] = np.reshape(copies, (-1, 3))
  rows, indices, blocks = np.ascontiguousarray(padded.T)
  return BlockCopies(rows, indices, blocks, np.int32(len(copies)))


def empty_store(
  model: Model, weights: Weights, rows: int, blocks: int, block_size: int
) -> PrefixStore:
  """Return a store of zeros.

  Args:
    model: Decides mesh and layouts.
    weights: Weights. If they are stacked, the store is too; else it has an array per layer.
    rows: R, rows of the prompts. The sharding of heads may depend on them.
    blocks: N.
    block_size: P. For an int8 cache, a multiple of its tiles.

  Raises:
    RequestError: The block size is not a multiple of the tiles.
  """
  tile = tile_positions(model.cache_dtype)
  if block_size % tile:
    raise RequestError(
      f'blocks of {block_size} positions cut the tiles of an {model.cache_dtype} cache: use a '
      f'multiple of {tile}'
    )
  sharding, config = model.prefilling.cache_sharding(rows), model.config
  lead = (config.num_layers,) if weights.stacked else ()
  shape = (*lead, blocks, len(sharding.heads.cached()), block_size, config.d_head)

  def zeros() -> KV:
    return empty_kv(shape, model.cache_dtype)

  def layers() -> LayersKV:
    return zeros() if weights.stacked else tuple(zeros() for _ in range(config.num_layers))

  store = PrefixStore(layers(), layers(), jnp.zeros(blocks, bool))
  return constrained(model, store, store_spec(model, weights, rows))


def bytes_per_block(model: Model, weights: Weights, rows: int, block_size: int) -> int:
  """Return the bytes of one block on each device, not counting the chip's tile padding.

  Args:
    model: Decides mesh and layouts.
    weights: Weights, or their shapes.
    rows: R, rows of the prompts.
    block_size: P, positions of a block.
  """
  make = functools.partial(empty_store, model, rows=rows, blocks=1, block_size=block_size)

  def layer_bytes(spec: P, arrays: Any) -> int:  # `arrays`: a layer's keys, or values
    local = NamedSharding(model.mesh, spec).shard_shape
    return sum(math.prod(local(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))

  spec = store_spec(model, weights, rows)
  sizes = jax.tree.map(layer_bytes, spec, jax.eval_shape(make, weights))
  return sum(jax.tree.leaves(sizes))


def blocks_for(budget: int, model: Model, weights: Weights, rows: int, block_size: int) -> int:
  """Return how many blocks fit into `budget` bytes on each device. See bytes_per_block."""
  return max(0, budget) // bytes_per_block(model, weights, rows, block_size)


def start_with_blocks(
  model: Model,
  prompts: PrefillState,
  store: PrefixStore,
  weights: Weights,
  saves: BlockCopies,
  loads: BlockCopies,
) -> tuple[PrefillState, PrefixStore]:
  """Save blocks of the prompts so far, reset the state for new prompts, load their beginnings.

  So a prompt's first token does not wait until its blocks are saved. `saves` are the copies of
  save_blocks, `loads` those of load_blocks.
  """
  store = save_blocks(model, store, weights, prompts, saves)
  prompts = start_prefill(model, prompts, weights)
  return load_blocks(model, prompts, weights, store, loads), store


def load_blocks(
  model: Model, prompts: PrefillState, weights: Weights, store: PrefixStore, copies: BlockCopies
) -> PrefillState:
  """Copy blocks of the store to the first positions of prompts.

  A row's length becomes the end of the last block that is copied into it. Other rows stay as they
  are.

  Args:
    model: Decides mesh and layouts.
    prompts: The prompts.
    weights: Weights, for their shapes and shardings.
    store: The store.
    copies: Blocks to copy. The blocks of a row must be in the order of their indices, from 0 on.

  Raises:
    RequestError: A prompt has less room than a block.
  """
  axes, spec = _prompt_spec(model, weights, len(prompts.logits))
  blocks_spec = store_spec(model, weights, len(prompts.logits))
  size = _block_size(prompts, store)

  def run(cache: KVCache, store: PrefixStore, copies: BlockCopies) -> KVCache:
    rows = len(cache.lengths)

    def load(i: jax.Array, cache: KVCache) -> KVCache:
      row, mine = cache_rows.local_index(rows, axes, copies.rows[i])
      # The multiplication comes last, so that the compiler can see that the start is tile-aligned.
      start = copies.indices[i] * size
      old = cache_rows.read_block((cache.keys, cache.values), row, start, size)
      new = cache_rows.read_block((store.keys, store.values), copies.blocks[i], 0, size)
      # A shard without the row writes back its old values, so that the update stays in place.
      new = jax.tree.map(lambda x, old: jnp.where(mine, x, old), new, old)
      keys, values = cache_rows.write_block((cache.keys, cache.values), new, row, start)
      length = jnp.where(mine, start + size, cache.lengths[row])
      return KVCache(keys, values, cache.lengths.at[row].set(length))

    return lax.fori_loop(0, copies.count, load, cache)

  inputs = spec, blocks_spec, P()
  cache = cache_rows.per_shard(model, run, inputs, spec)(prompts.cache, store, copies)
  meant = jnp.arange(copies.rows.shape[0]) < copies.count
  broken = prompts.broken.at[copies.rows].max(meant & store.broken[copies.blocks])
  return dataclasses.replace(prompts, cache=constrained(model, cache, spec), broken=broken)


def save_blocks(
  model: Model, store: PrefixStore, weights: Weights, prompts: PrefillState, copies: BlockCopies
) -> PrefixStore:
  """Copy blocks of prompts into the store.

  Args:
    model: Decides mesh and layouts.
    store: The store.
    weights: Weights, for their shapes and shardings.
    prompts: The prompts.
    copies: Blocks to copy. Their positions must be prefilled.

  Raises:
    RequestError: A prompt has less room than a block.
  """
  axes, spec = _prompt_spec(model, weights, len(prompts.logits))
  blocks_spec = store_spec(model, weights, len(prompts.logits))
  size = _block_size(prompts, store)

  def run(
    store: PrefixStore, cache: KVCache, all_broken: jax.Array, copies: BlockCopies
  ) -> PrefixStore:
    rows = len(cache.lengths)

    def save(i: jax.Array, store: PrefixStore) -> PrefixStore:
      row, mine = cache_rows.local_index(rows, axes, copies.rows[i])
      block = cache_rows.read_block((cache.keys, cache.values), row, copies.indices[i] * size, size)
      block = jax.tree.map(lambda x: cache_rows.from_owner(x, axes, mine), block)
      keys, values = cache_rows.write_block((store.keys, store.values), block, copies.blocks[i], 0)
      broken = store.broken.at[copies.blocks[i]].set(all_broken[copies.rows[i]])
      return PrefixStore(keys, values, broken)

    return lax.fori_loop(0, copies.count, save, store)

  inputs = blocks_spec, spec, P(), P()
  save_all = cache_rows.per_shard(model, run, inputs, blocks_spec)
  store = save_all(store, prompts.cache, prompts.broken, copies)
  return constrained(model, store, blocks_spec)


def _block_size(prompts: PrefillState, store: PrefixStore) -> int:
  if store.block_size > prompts.cache.size:
    raise RequestError(
      f'a block of {store.block_size} positions does not fit into prompts of '
      f'{prompts.cache.size}: use smaller blocks, or no prefix cache'
    )
  return store.block_size


def store_spec(model: Model, weights: Weights, rows: int) -> PrefixStore:
  """Return PartitionSpecs of the store. One stands for all arrays of a layer's keys.

  Args:
    model: Decides mesh and layouts.
    weights: Weights, for their shapes.
    rows: R, rows of the prompts.
  """
  _, spec = _prompt_spec(model, weights, rows)

  def without_rows(spec: P) -> P:
    return P(*spec[:-4], None, *spec[-3:])

  kv = jax.tree.map(without_rows, spec.keys, is_leaf=lambda s: isinstance(s, P))
  return PrefixStore(kv, kv, P())  # type: ignore[arg-type]


def _prompt_spec(model: Model, weights: Weights, rows: int) -> tuple[Axes, KVCache]:
  """Return the mesh axes that split prompt rows, and PartitionSpecs of the prompts' cache.

  One spec stands for all arrays of a layer's keys: for int8, both units and scales.
  """
  sharding = model.prefilling.cache_sharding(rows)
  return sharding.attention_rows, model.prefilling.cache_spec(sharding, weights)


def constrained(model: Model, tree: Any, specs: Any) -> Any:
  """Return a tree of arrays constrained to a tree of PartitionSpecs."""

  def constrain(spec: P, x: Any) -> Any:  # x: an array of a layer's keys or values
    return lax.with_sharding_constraint(x, NamedSharding(model.mesh, spec))

  return jax.tree.map(constrain, specs, tree)
