"""Collectives of the paper's appendix A.1, inside shard_map. Over axes of size 1 they do nothing.

Axes are a sequence of mesh axis names. Shards are ordered with the first axis slowest, as in a
PartitionSpec.
"""

from collections.abc import Sequence
import math

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from t5x_inference_ext.hardware import LANES

# XLA:TPU lowers some tiled reduce-scatters to all-reduce + slice, which sends twice the bytes. Two
# things avoid that. (1) A separate dimension for the shards. XLA copies the array for it if it is
# small or if slices are no whole tiles of 8 by LANES, so this is done above _LARGE elements. (2)
# Features in groups of LANES, if a shard keeps at most _ROWS rows.
_LARGE = 2**21
_ROWS = 8
# XLA:TPU also lowers gathers and reduce-scatters over this many axes (all axes of a mesh) to
# all-reduces. Here they run in two steps, which move the same bytes.
_ALL = 3


def axis_size(axes: Sequence[str]) -> int:
  """Return the number of shards along the axes."""
  return math.prod(lax.axis_size(a) for a in axes)


def _used(axes: Sequence[str]) -> tuple[str, ...]:
  return tuple(a for a in axes if lax.axis_size(a) > 1)


def all_reduce(x: Shaped[Array, '*s'], axes: Sequence[str]) -> Shaped[Array, '*s']:
  """Sum over the axes; every shard gets the sum."""
  axes = _used(axes)
  return lax.psum(x, axes) if axes else x


def all_gather(x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
  """Concatenate the shards along `dim`; every shard gets the whole array."""
  axes = _used(axes)
  if not axes:
    return x
  if len(axes) == _ALL:
    return all_gather(all_gather(x, axes[-1:], dim), axes[:-1], dim)
  if dim == x.ndim - 1 and x.shape[dim] % LANES:
    # If shards are parts of tiles, XLA:TPU gathers them into an array with features slowest and
    # then transposes it, which takes ten times as long as the gather. A separate dimension for the
    # shards avoids that.
    return jnp.moveaxis(lax.all_gather(x, axes), 0, -2).reshape(*x.shape[:-1], -1)
  return lax.all_gather(x, axes, axis=dim, tiled=True)


def reduce_scatter(
  x: jax.Array, axes: Sequence[str], dim: int, overlaps: bool = False
) -> jax.Array:
  """Sum over the axes; each shard keeps its slice of `dim`.

  Args:
    x: Each shard's summand.
    axes: Mesh axes to sum over.
    dim: Dimension of x that the axes split.
    overlaps: Whether independent work can run at the same time. XLA:TPU runs no reduce-scatter
      beside other work, but collective-permutes. So two shards then exchange the halves that they
      do not keep.
  """
  axes = _used(axes)
  if not axes:
    return x
  if overlaps and axis_size(axes) == 2:
    sent = lax.ppermute(_pair_slice(x, axes, dim, True), axes[0], [(0, 1), (1, 0)])
    return _pair_slice(x, axes, dim, False) + sent
  if len(axes) == _ALL:
    return reduce_scatter(reduce_scatter(x, axes[:-1], dim), axes[-1:], dim)
  shards, last = axis_size(axes), dim == x.ndim - 1
  shape = (*x.shape[:dim], x.shape[dim] // shards, *x.shape[dim + 1 :])
  kept: tuple[int, ...]  # the shape after the shards' dimension
  if (
    not last
    and math.prod(shape[dim:-1]) <= _ROWS
    and shape[-1] % LANES == 0
    and x.shape[dim] % shards == 0
  ):
    # Of many tokens XLA makes an all-reduce and a slice again unless features are one dimension.
    kept = (-1,) if x.size > _LARGE else (-1, LANES)
    # Without the barrier, XLA:TPU also tiles the product that computes x, and for that copies its
    # weights into another layout.
    x = lax.optimization_barrier(x)
  elif x.size >= _LARGE and x.shape[dim] % (shards * (LANES if last else _ROWS)) == 0:
    kept = shape[dim:]
  else:
    return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
  x = x.reshape(*x.shape[:dim], shards, *kept)
  return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=False).reshape(shape)


def _pair_slice(x: jax.Array, axes: Sequence[str], dim: int, other: bool) -> jax.Array:
  """Return the half of `dim` that this shard of two keeps, or the one that the other keeps."""
  index = shard_index(axes)
  width = x.shape[dim] // 2
  return lax.dynamic_slice_in_dim(x, (1 - index if other else index) * width, width, dim)


def all_to_all(x: jax.Array, axes: Sequence[str], split: int, concat: int) -> jax.Array:
  """Move the sharding from dimension `concat` (gathered) to dimension `split` (scattered)."""
  axes = _used(axes)
  return lax.all_to_all(x, axes, split_axis=split, concat_axis=concat, tiled=True) if axes else x


def shard_index(axes: Sequence[str]) -> Int[Array, ''] | int:
  """Return this shard's position along the axes, first axis slowest; 0 without axes."""
  index: jax.Array | int = 0
  for a in axes:
    index = index * lax.axis_size(a) + lax.axis_index(a)
  return index


def local_slice(x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
  """Return this shard's slice, along `dim`, of an array that every shard has. Sends nothing."""
  shards = axis_size(axes)
  if shards == 1:
    return x
  width = x.shape[dim] // shards
  return lax.dynamic_slice_in_dim(x, shard_index(axes) * width, width, dim)
