"""A ring of shards over one or more mesh axes in shard_map: the path of looped collectives."""

from collections.abc import Sequence
import functools
import math
import operator

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped
import numpy as np

from t5x_inference_ext.hardware import LANES
from t5x_inference_ext.model.collectives import ops


class Ring:
  """The shards of some mesh axes, ordered as a closed loop in which neighbours are mesh neighbours.

  Attributes:
    axes: Mesh axis names, the first slowest in a shard's linear index, as in a PartitionSpec. Axes
      of size 1 are dropped.
    size: Number of shards, 1 if no axis is left.
    order: Linear shard indices in their order around the ring.
  """

  def __init__(self, axes: Sequence[str]) -> None:
    self.axes = tuple(a for a in axes if lax.axis_size(a) > 1)
    self.size = ops.axis_size(self.axes)
    sizes = tuple(lax.axis_size(a) for a in self.axes)
    self.order = gray_code(sizes)
    # lax.ppermute numbers shards by the mesh's order of axes, whatever the order of its argument.
    self._mesh_axes = tuple(
      a for a in jax.sharding.get_abstract_mesh().axis_names if a in self.axes
    )
    position = dict(zip(self.axes, np.unravel_index(self.order, sizes))) if self.axes else {}
    self._senders = np.zeros(self.size, int)
    for axis in self._mesh_axes:
      self._senders = self._senders * lax.axis_size(axis) + position[axis]

  def permute(self, x: Shaped[Array, '*s'], direction: int = 1) -> Shaped[Array, '*s']:
    """Send each shard's x to the next shard of the ring (direction 1), or to the previous (-1)."""
    if self.size == 1:
      return x
    receivers = np.roll(self._senders, -direction)
    return lax.ppermute(x, self._mesh_axes, list(zip(self._senders.tolist(), receivers.tolist())))

  def shard_at(self, step: int, direction: int = 1) -> Int[Array, ''] | int:
    """Return the linear index of the shard whose data is here after `step` permutes."""
    if self.size == 1:
      return 0
    held = np.empty(self.size, np.int32)
    held[list(self.order)] = np.roll(self.order, step * direction)
    return lax.dynamic_index_in_dim(jnp.asarray(held), ops.shard_index(self.axes), keepdims=False)


@functools.cache
def gray_code(sizes: tuple[int, ...]) -> tuple[int, ...]:
  """Return a walk through a grid from neighbour to neighbour, as linear indices (row-major).

  The order is the reflected mixed-radix order: one dimension is walked once, from its first to its
  last position, while the others are walked back and forth. If that dimension has an even size, the
  walk ends where the other dimensions began, and the dimension's wraparound closes the ring (a size
  of 2 needs no wraparound). So the walk prefers, as this dimension, one of size 2, or else one of
  even size.
  """
  slowest = min(range(len(sizes)), key=lambda i: (sizes[i] != 2, sizes[i] % 2), default=0)
  dims = sorted(range(len(sizes)), key=lambda i: i != slowest)
  walk: list[tuple[int, ...]] = [()]
  for i in reversed(dims):
    # The faster dimensions are walked forward at even positions of this dimension, backward at odd
    # ones.
    walk = [(p, *w) for p in range(sizes[i]) for w in (walk if p % 2 == 0 else walk[::-1])]
  strides = [math.prod(sizes[i + 1 :]) for i in dims]
  return tuple(sum(map(operator.mul, position, strides)) for position in walk)


def lanes(size: int, directions: int) -> list[tuple[int, int, int]]:
  """Split a slice into the parts that travel around a ring; return their (offset, size, direction).

  Args:
    size: Size of the dimension that is split.
    directions: 1: the whole slice travels one way. 2: two parts travel in opposite directions: its
      halves (the first is larger if the size is odd), or, from two tiles on, parts cut at the tile
      boundary nearest to the middle. A slice of size 1 travels one way.

  Raises:
    ValueError: The directions are neither 1 nor 2.
  """
  if directions not in (1, 2):
    raise ValueError(f'a ring has 1 or 2 directions, got {directions}')
  if directions == 1 or size == 1:
    return [(0, size, 1)]
  first = round(size / 2 / LANES) * LANES if size >= 2 * LANES else -(-size // 2)
  return [(0, first, 1), (first, size - first, -1)]
