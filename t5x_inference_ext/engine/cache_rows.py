"""Reads and writes of single rows of sharded arrays: only the shard that holds a row does work.

XLA's partitioner would gather the whole array on every device for a dynamic slice along a split
dimension, and rewrite each device's part for a dynamic update. So these functions use shard_map.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from t5x_inference_ext.model import cache as kv_cache
from t5x_inference_ext.model.cache import KeysValues, KVCache, RowIndex
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.pages import PagedCache, copy_pages
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.sharding.layout import Axes


def gather_row(model: Model, x: jax.Array, axes: Axes, row: jax.Array) -> jax.Array:
  """Return row `row` of x [B, ...] as [1, ...], replicated; `axes` split the rows of x."""

  def run(x: jax.Array, row: jax.Array) -> jax.Array:
    local, mine = local_index(x.shape[0], axes, row)
    return from_owner(lax.dynamic_slice_in_dim(x, local, 1, 0), axes, mine)

  return per_shard(model, run, (P(axes), P()), P())(x, row)


def scatter_row(
  model: Model, x: jax.Array, axes: Axes, row: jax.Array, one: jax.Array
) -> jax.Array:
  """Replace row `row` of x [B, ...] by `one` [1, ...]. `axes` split the rows of x."""

  def run(x: jax.Array, one: jax.Array, row: jax.Array) -> jax.Array:
    local, mine = local_index(x.shape[0], axes, row)
    if ops.axis_size(axes) > 1:
      # Other shards write back what they already have, so that the update stays in place.
      one = jnp.where(mine, one, lax.dynamic_slice_in_dim(x, local, 1, 0))
    return lax.dynamic_update_slice_in_dim(x, one.astype(x.dtype), local, 0)

  return per_shard(model, run, (P(axes), P(), P()), P(axes))(x, one, row)


def gather_cache_row(model: Model, cache: KVCache, weights: Weights, row: jax.Array) -> KVCache:
  """Return one row of a cache, as a cache of one row. Heads stay split as in `cache`."""
  axes, spec, row_spec = specs(model, cache, weights)

  def run(cache: KVCache, row: jax.Array) -> KVCache:
    local, mine = local_index(cache.lengths.shape[0], axes, row)
    return jax.tree.map(lambda x: from_owner(x, axes, mine), kv_cache.read_local_row(cache, local))

  return per_shard(model, run, (spec, P()), row_spec)(cache, row)


def insert_row(
  model: Model,
  cache: PagedCache,
  weights: Weights,
  row: jax.Array,
  one: KVCache,
  pages: Int[Array, ' M'],
  first: Int[Array, ''],
  shared_ids: Int[Array, ' M'] | None = None,
  shared_range: tuple[Any, Any] = (0, 0),
) -> PagedCache:
  """Copy a dense row into pages of `cache`, in place, and set the row's length; return the cache.

  The host has already allocated the pages.

  Args:
    model: Decides mesh and layouts.
    cache: PagedCache.
    weights: Weights, for their shapes.
    row: Scalar int32. The row of `cache` to fill.
    one: A cache of a single row, with heads as in `cache`. Its length is the position of the row's
      next token.
    pages: [M] int32. The page for each S positions of the row, numbered on the row's device.
    first: Scalar int32. Index of the first page of the row to copy; earlier pages are shared.
    shared_ids: [M] int32, or None. The shared page for each S positions of the row; only
      entries within shared_range are read.
    shared_range: Two scalars int32. Pages [begin, end) of the row to copy into shared pages.
  """
  sharding = model.cache_sharding(cache.lengths.shape[0])
  axes, spec = sharding.attention_rows, model.cache_spec(sharding, weights, cache)
  _, _, row_spec = specs(model, cache, weights)
  copied = pages if shared_ids is None else shared_ids

  def run(
    cache: PagedCache,
    one: KVCache,
    row: jax.Array,
    pages: jax.Array,
    first: jax.Array,
    shared_ids: jax.Array,
    begin: jax.Array,
    end: jax.Array,
  ) -> PagedCache:
    local, mine = local_index(cache.lengths.shape[0], axes, row)
    # Only the row's own device copies pages; on other devices the loop has no iterations.
    stop = jnp.where(mine, -(-one.lengths[0] // cache.page_size), first)
    kv = copy_pages((cache.keys, cache.values), (one.keys, one.values), pages, first, stop)
    lengths = cache.lengths
    length = jnp.where(mine, one.lengths, lax.dynamic_slice_in_dim(lengths, local, 1))
    lengths = lax.dynamic_update_slice_in_dim(lengths, length, local, 0)
    shared = cache.shared
    if shared is not None:
      keys, values = copy_pages(
        (shared.keys, shared.values), (one.keys, one.values), shared_ids, begin, end, axis=-3
      )
      index = jnp.arange(shared_ids.shape[0])
      ids = jnp.where((index >= begin) & (index < end), shared_ids, shared.starts.shape[0])
      starts = shared.starts.at[ids].set(index * cache.page_size, mode='drop')
      shared = dataclasses.replace(shared, keys=keys, values=values, starts=starts)
    return dataclasses.replace(cache, keys=kv[0], values=kv[1], lengths=lengths, shared=shared)

  begin, end = (jnp.asarray(x, jnp.int32) for x in shared_range)
  scalars = (P(),) * 6
  return per_shard(model, run, (spec, row_spec, *scalars), spec)(
    cache, one, row, pages, first, copied, begin, end
  )


def read_block(kv: KeysValues, row: RowIndex, start: RowIndex, size: int) -> KeysValues:
  """Return `size` positions of one row, block or page on this shard: [.., 1, K, size, Q]."""

  def read(x: jax.Array) -> jax.Array:
    lead = x.ndim - 4
    shape = (*x.shape[:lead], 1, x.shape[-3], size, x.shape[-1])
    return lax.dynamic_slice(x, (*(0,) * lead, row, 0, start, 0), shape)

  return jax.tree.map(read, kv)


def write_block(kv: KeysValues, new: KeysValues, row: RowIndex, start: RowIndex) -> KeysValues:
  """Write the result of `read_block` to a row or block on this shard, from position `start` on."""

  def write(x: jax.Array, new: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(x, new, (*(0,) * (x.ndim - 4), row, 0, start, 0))

  return jax.tree.map(write, kv, new)


def specs(model: Model, cache: KVCache | PagedCache, weights: Weights) -> tuple[Axes, Any, Any]:
  """Return the axes that split a cache's rows, and PartitionSpecs of the cache and of one row."""
  sharding = model.cache_sharding(cache.lengths.shape[0])
  spec = model.cache_spec(sharding, weights)

  def without_rows(spec: P) -> P:
    axes = [(part,) if isinstance(part, str) else part for part in spec]
    return P(*(None if a == sharding.attention_rows else part for a, part in zip(axes, spec)))

  row_spec = jax.tree.map(without_rows, spec, is_leaf=lambda s: isinstance(s, P))
  return sharding.attention_rows, spec, row_spec


def local_index(rows: int, axes: Axes, row: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return a row's index among this shard's `rows`, and whether the shard has the row.

  On a shard without the row, the index is arbitrary but valid.
  """
  index = row - ops.shard_index(axes) * rows
  return jnp.clip(index, 0, rows - 1), (index >= 0) & (index < rows)


def from_owner(x: jax.Array, axes: Axes, mine: jax.Array) -> jax.Array:
  """Return, on every shard, the x of the one shard where `mine` is true."""
  if ops.axis_size(axes) == 1:
    return x
  return ops.all_reduce(jnp.where(mine, x, jnp.zeros_like(x)), axes)


def per_shard(model: Model, run: Callable, in_specs: Any, out_specs: Any) -> Callable:
  """Wrap `run` in jax.shard_map; return a function of global arrays."""
  return jax.shard_map(
    run, mesh=model.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )
