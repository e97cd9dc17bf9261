"""The collectives of the paper's appendix A.1, inside shard_map. Over axes of size 1 they are the identity.

Axes are given as a tuple of mesh axis names; shards are ordered with the first axis slowest, as in a PartitionSpec.
"""

from collections.abc import Sequence
import math

import jax
from jax import lax
import jax.numpy as jnp

from t5x_inference_ext.hardware import LANES

# Of some reduce-scatters the TPU compiler makes an all-reduce and a slice, which takes twice the time. Not where the shards
# have a dimension of their own; but that costs copies where arrays are small, or where it cuts tiles of 8 by LANES. So they
# have it in arrays of more elements than this, and, of at most a tile of rows on each shard, with tiles of the features
# in place of the rows.
_LARGE = 2**21
_ROWS = 8
# Gathers and reduce-scatters over this many axes, all of a mesh, become all-reduces too. They are done in two steps, which
# move as many bytes.
_ALL = 3


def axis_size(axes: Sequence[str]) -> int:
  return math.prod(lax.axis_size(a) for a in axes)


def _used(axes: Sequence[str]) -> tuple[str, ...]:
  return tuple(a for a in axes if lax.axis_size(a) > 1)


def all_reduce(x: jax.Array, axes: Sequence[str]) -> jax.Array:
  """Sums over the axes; every shard gets the sum."""
  axes = _used(axes)
  return lax.psum(x, axes) if axes else x


def all_gather(x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
  """Concatenates the shards along `dim`."""
  axes = _used(axes)
  if not axes:
    return x
  if len(axes) == _ALL:
    return all_gather(all_gather(x, axes[-1:], dim), axes[:-1], dim)
  if dim == x.ndim - 1 and x.shape[dim] % LANES:
    # Of parts of tiles the TPU compiler would make an array that lies features first, and turn that around: ten times the
    # gather itself.
    return jnp.moveaxis(lax.all_gather(x, axes), 0, -2).reshape(*x.shape[:-1], -1)
  return lax.all_gather(x, axes, axis=dim, tiled=True)


def reduce_scatter(x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
  """Sums over the axes; each shard keeps its slice of `dim`."""
  axes = _used(axes)
  if not axes:
    return x
  if len(axes) == _ALL:
    return reduce_scatter(reduce_scatter(x, axes[:-1], dim), axes[-1:], dim)
  shards, last = axis_size(axes), dim == x.ndim - 1
  shape = (*x.shape[:dim], x.shape[dim] // shards, *x.shape[dim + 1 :])
  if (
    not last
    and math.prod(shape[dim:-1]) <= _ROWS
    and shape[-1] % LANES == 0
    and x.shape[dim] % shards == 0
  ):
    kept = (-1, LANES)
    # Or the product that x comes from would be made of tiles already, and its weights be laid out for that.
    x = lax.optimization_barrier(x)
  elif x.size >= _LARGE and x.shape[dim] % (shards * (LANES if last else _ROWS)) == 0:
    kept = shape[dim:]
  else:
    return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
  x = x.reshape(*x.shape[:dim], shards, *kept)
  return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=False).reshape(shape)


def all_to_all(x: jax.Array, axes: Sequence[str], split: int, concat: int) -> jax.Array:
  """Moves the sharding from dimension `concat` (gathered) to dimension `split` (scattered)."""
  axes = _used(axes)
  return lax.all_to_all(x, axes, split_axis=split, concat_axis=concat, tiled=True) if axes else x


def shard_index(axes: Sequence[str]) -> jax.Array:
  """This shard's position along the axes, first axis slowest."""
  index = 0
  for a in axes:
    index = index * lax.axis_size(a) + lax.axis_index(a)
  return index


def local_slice(x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
  """This shard's slice of `dim` of an array that all shards have: no communication."""
  shards = axis_size(axes)
  if shards == 1:
    return x
  width = x.shape[dim] // shards
  return lax.dynamic_slice_in_dim(x, shard_index(axes) * width, width, dim)
