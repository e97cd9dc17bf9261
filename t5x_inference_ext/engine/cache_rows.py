"""One row out of arrays whose rows are split over a mesh, and into them: only the shards that hold it read or write.

A dynamic slice along a split dimension, left to the partitioner, gathers the whole array on every device, and an update
there rewrites each device's part.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from t5x_inference_ext.model import cache as kv_cache
from t5x_inference_ext.model.cache import KVCache
from t5x_inference_ext.model.chunks import cache_sharding
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.sharding.layout import Axes


def gather_row(model: Model, x: jax.Array, axes: Axes, row: jax.Array) -> jax.Array:
  """x [B, ...] with its rows split over `axes` -> [1, ...] of one row, on every device."""

  def run(x, row):
    at, mine = _here(x.shape[0], axes, row)
    return _from_owner(lax.dynamic_slice_in_dim(x, at, 1, 0), axes, mine)

  return _per_shard(model, run, (P(axes), P()), P())(x, row)


def gather_cache_row(model: Model, cache: KVCache, weights: Weights, row: jax.Array) -> KVCache:
  """One row of a cache, as a cache of one whose heads lie as they did. It shares what the cache does."""
  axes, spec, one_spec = _specs(model, cache, weights)

  def run(cache, row):
    at, mine = _here(cache.lengths.shape[0], axes, row)
    return jax.tree.map(lambda x: _from_owner(x, axes, mine), kv_cache.local_row(cache, at))

  one = _per_shard(model, run, (spec, P()), one_spec)(dataclasses.replace(cache, shared=None), row)
  if cache.shared is None:
    return one
  lengths = gather_row(model, cache.shared.lengths, axes, row)
  return dataclasses.replace(one, shared=dataclasses.replace(cache.shared, lengths=lengths))


def scatter_cache_row(
  model: Model, cache: KVCache, weights: Weights, row: jax.Array, one: KVCache
) -> KVCache:
  """The cache with a cache of one, no longer than it, in the place of a row. Both share the same, or nothing."""
  axes, spec, one_spec = _specs(model, cache, weights)

  def run(cache, one, row):
    at, mine = _here(cache.lengths.shape[0], axes, row)
    if (
      ops.axis_size(axes) > 1
    ):  # others write what they have there, which leaves the update in place
      there = kv_cache.local_row(cache, at)
      one = jax.tree.map(
        lambda x, old: jnp.where(mine, x, old[tuple(slice(n) for n in x.shape)]), one, there
      )
    return kv_cache.with_local_row(cache, at, one)

  strip = lambda c: dataclasses.replace(c, shared=None)
  new = _per_shard(model, run, (spec, one_spec, P()), spec)(strip(cache), strip(one), row)
  if cache.shared is None:
    return new
  lengths = lax.dynamic_update_slice_in_dim(cache.shared.lengths, one.shared.lengths, row, 0)
  return dataclasses.replace(new, shared=dataclasses.replace(cache.shared, lengths=lengths))


def _specs(model, cache, weights) -> tuple[Axes, Any, Any]:
  """The axes that split a cache's rows, its PartitionSpecs, and those of a cache of one of its rows."""
  sharding = cache_sharding(model, cache.lengths.shape[0])
  spec = model.cache_spec(sharding, weights)
  axes = lambda part: (part,) if isinstance(part, str) else part
  whole = lambda s: P(*(None if axes(part) == sharding.attention_rows else part for part in s))
  return (
    sharding.attention_rows,
    spec,
    jax.tree.map(whole, spec, is_leaf=lambda s: isinstance(s, P)),
  )


def _here(rows: int, axes: Axes, row: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The place of a row among this shard's `rows` (any, if it has not the row), and whether it has it."""
  sharding = row - ops.shard_index(axes) * rows
  return jnp.clip(sharding, 0, rows - 1), (sharding >= 0) & (sharding < rows)


def _from_owner(x: jax.Array, axes: Axes, mine: jax.Array) -> jax.Array:
  return (
    x if ops.axis_size(axes) == 1 else ops.all_reduce(jnp.where(mine, x, jnp.zeros_like(x)), axes)
  )


def _per_shard(model: Model, run: Callable, in_specs: Any, out_specs: Any) -> Callable:
  return jax.shard_map(
    run, mesh=model.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )
