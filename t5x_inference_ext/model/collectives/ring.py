"""A ring of shards over one or several mesh axes, inside shard_map: the path of the looped collectives."""

from collections.abc import Sequence
import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from t5x_inference_ext.hardware import LANES
from t5x_inference_ext.model.collectives import ops


class Ring:
  """The shards of some mesh axes in a closed loop whose neighbours are mesh neighbours.

  Attributes:
    axes: mesh axis names, the first the slowest in a shard's linear index, as in a PartitionSpec. Those of size 1 drop
      out.
    size: how many shards there are, 1 if no axis is left.
    order: the linear shard indices around the ring.
  """

  def __init__(self, axes: Sequence[str]):
    self.axes = tuple(a for a in axes if lax.axis_size(a) > 1)
    self.size = ops.axis_size(self.axes)
    self.order = snake(tuple(lax.axis_size(a) for a in self.axes))
    # lax.ppermute counts shards in the order of the mesh's axes, whatever the order of the axes it is given.
    self._mesh_axes = tuple(
      a for a in jax.sharding.get_abstract_mesh().axis_names if a in self.axes
    )
    by_axis = (
      np.unravel_index(self.order, [lax.axis_size(a) for a in self.axes]) if self.axes else ()
    )
    in_mesh = [by_axis[self.axes.index(a)] for a in self._mesh_axes]
    self._senders = sum(
      p * math.prod(lax.axis_size(b) for b in self._mesh_axes[i + 1 :])
      for i, p in enumerate(in_mesh)
    )

  def permute(self, x: jax.Array, direction: int = 1) -> jax.Array:
    """Every shard sends x to the next one around the ring (direction 1) or to the one before (-1)."""
    if self.size == 1:
      return x
    receivers = np.roll(self._senders, -direction)
    return lax.ppermute(x, self._mesh_axes, list(zip(self._senders.tolist(), receivers.tolist())))

  def shard_at(self, step: int, direction: int = 1) -> jax.Array | int:
    """The linear index of the shard that is here once every shard has moved `step` times in this direction."""
    if self.size == 1:
      return 0
    held = np.empty(self.size, np.int32)
    held[list(self.order)] = np.roll(self.order, step * direction)
    return lax.dynamic_index_in_dim(jnp.asarray(held), ops.shard_index(self.axes), keepdims=False)


@functools.cache
def snake(sizes: tuple[int, ...]) -> tuple[int, ...]:
  """A walk through a grid, one step at a time: linear indices (first dimension slowest), each a neighbour of the last.

  The reflected mixed-radix order. One dimension is walked once, forth, while the others are walked forth and back;
  where its size is even the walk ends above its beginning, and is closed by that dimension's wraparound (which two
  shards need not have). So it is a dimension of 2 if there is one, or else an even one.
  """
  slowest = min(range(len(sizes)), key=lambda i: (sizes[i] != 2, sizes[i] % 2), default=0)
  dims = sorted(range(len(sizes)), key=lambda i: i != slowest)
  walk = [()]
  for i in reversed(dims):
    # A walk of the faster dimensions, forth at even positions of this one and back at odd ones.
    walk = [(p, *w) for p in range(sizes[i]) for w in (walk if p % 2 == 0 else walk[::-1])]
  strides = {i: math.prod(sizes[i + 1 :]) for i in dims}
  return tuple(sum(p * strides[i] for p, i in zip(position, dims)) for position in walk)


def lanes(size: int, directions: int) -> list[tuple[int, int, int]]:
  """How a slice of this size travels: (offset, size, direction of the ring) of each part.

  Args:
    size: of the dimension that is cut.
    directions: 1: the whole slice goes one way; 2: it is cut in two that go opposite ways, in halves (the first the
      larger if the size is odd) or, if there are two tiles, where tiles meet nearest to the middle. A slice of size 1
      goes one way.

  Raises:
    ValueError: other directions.
  """
  if directions not in (1, 2):
    raise ValueError(f'a ring has 1 or 2 directions, got {directions}')
  if directions == 1 or size == 1:
    return [(0, size, 1)]
  first = round(size / 2 / LANES) * LANES if size >= 2 * LANES else -(-size // 2)
  return [(0, first, 1), (first, size - first, -1)]
