"""The links under a mesh: what a collective over some of its axes has of the torus.

Physical axes add up: a collective uses all of those along which its chips differ, at once. Where other groups of the same
collective lie on the same links, they share them.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math

import numpy as np

from t5x_inference_ext.sharding import torus
from t5x_inference_ext.sharding.collective import Collective
from t5x_inference_ext.sharding.mesh import AXES

Mesh = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class LinkPath:
  """What each group of a collective has along one physical axis.

  Attributes:
    chips: of a group, along it.
    ring: whether they go all around it.
    load: groups whose data the busiest link carries.
    step: links from one chip of a group to the next, where they are most.
  """

  chips: int
  ring: bool
  load: int = 1
  step: int = 1

  @property
  def links(self) -> float:
    """That bring data to a chip: two directions of a ring. Where others' chips lie between, they share the links."""
    return (2 if self.ring else 1) / self.load

  @property
  def hops(self) -> int:
    """To the farthest chip; around a ring data goes both ways."""
    return (self.chips // 2 if self.ring else self.chips - 1) * self.step

  @property
  def exchange(self) -> float:
    """Link times an all-to-all takes, for each byte of a chip's array: half of all bytes cross the middle."""
    return self.chips * self.load / (8 if self.ring else 4)


def paths(
  shape: Sequence[int], wraps: Sequence[bool], mesh: Mesh, axes: Sequence[str]
) -> tuple[LinkPath, ...]:
  """Where a collective over these mesh axes runs on the torus.

  Args:
    shape, wraps: of the slice: chips along each physical axis, and whether its ends are linked.
    mesh: (X, Y, Z), whose chips lie as torus.device_grid has them.
    axes: mesh axes, not all of one chip.
  """
  return _paths(tuple(shape), tuple(wraps), tuple(mesh), tuple(sorted(axes)))


def bytes_through_a_link(move: Collective, found: Sequence[LinkPath]) -> float:
  """The bytes that go through one link, one after the other, while a collective runs on these paths; hops come on top."""
  if move.kind == 'all_to_all':
    return max(p.exchange for p in found) * move.bytes
  return move.moved / sum(p.links for p in found)


@functools.lru_cache(maxsize=256)
def grid(shape: tuple[int, ...], wraps: tuple[bool, ...], mesh: Mesh) -> np.ndarray:
  """[X, Y, Z] chips, counted through the slice's shape; where there is but one physical axis, in order."""
  if sum(n > 1 for n in shape) < 2:
    return np.arange(math.prod(shape)).reshape(mesh)
  coordinates = np.stack(np.unravel_index(np.arange(math.prod(shape)), shape), axis=-1)
  return torus.device_grid(coordinates, mesh, wraps)


@functools.lru_cache(maxsize=4096)
def _paths(shape, wraps, mesh: Mesh, axes) -> tuple[LinkPath, ...]:
  kept = [a not in axes for a in AXES]
  place = np.unravel_index(np.arange(math.prod(mesh)), mesh)
  groups = np.empty(shape, int).ravel()
  groups[grid(shape, wraps, mesh).ravel()] = np.ravel_multi_index(
    [p * k for p, k in zip(place, kept)], mesh
  )
  groups = groups.reshape(shape)
  found = []
  for axis, size in enumerate(shape):
    lines = np.unique(_renumbered(np.moveaxis(groups, axis, -1).reshape(-1, size)), axis=0)
    on_lines = [_on_line(line, wraps[axis]) for line in lines]
    chips = max(p.chips for p in on_lines)
    if chips > 1:
      found.append(
        LinkPath(
          chips,
          all(p.ring for p in on_lines),
          max(p.load for p in on_lines),
          max(p.step for p in on_lines),
        )
      )
  size = math.prod(n for n, k in zip(mesh, kept) if not k)
  if math.prod(p.chips for p in found) != size:
    # A line that winds through several axes: one link in each direction.
    return (LinkPath(size, all(p.ring for p in found)),)
  return tuple(found)


def _renumbered(lines: np.ndarray) -> np.ndarray:
  """Each line's groups by their first chip on it, so that lines that are alike are equal."""
  return (lines[:, :, None] == lines[:, None, :]).argmax(axis=-1)


def _on_line(line: np.ndarray, wrap: bool) -> LinkPath:
  """The groups on one line of chips, each going from chip to chip the short way; the way that is longest is left out."""
  size, groups = len(line), set(line.tolist())
  if len(groups) == 1:
    return LinkPath(size, bool(wrap))
  carried, chips, longest = np.zeros(size, int), 1, 1  # link i is from chip i to the next
  for group in groups:
    places = np.flatnonzero(line == group)
    gaps = np.diff(places, append=places[0] + size)
    first = (gaps.argmax() if wrap else len(places) - 1) + 1  # the walk begins behind the gap
    for step in range(len(places) - 1):
      i = (first + step) % len(places)
      carried[np.arange(places[i], places[i] + gaps[i]) % size] += 1
      longest = max(longest, int(gaps[i]))
    chips = max(chips, len(places))
  return LinkPath(chips, False, max(1, int(carried.max())), longest)
