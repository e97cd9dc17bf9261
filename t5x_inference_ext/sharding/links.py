"""The torus links that a collective over some mesh axes uses.

A collective uses all physical axes along which its chips differ, at the same time. If several
groups of chips use the same links, they share the bandwidth.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math

import numpy as np

from t5x_inference_ext.sharding import torus
from t5x_inference_ext.sharding.collective import Collective
from t5x_inference_ext.sharding.mesh import AXES, MeshShape


@dataclasses.dataclass(frozen=True)
class LinkPath:
  """The links along one physical axis that each group of chips in a collective uses.

  Attributes:
    chips: Chips of a group along the axis.
    ring: Whether a group goes all around the axis.
    load: Number of groups whose data the busiest link carries.
    step: Maximum number of links between neighbouring chips of a group.
  """

  chips: int
  ring: bool
  load: int = 1
  step: int = 1

  @property
  def links(self) -> float:
    """Number of links into a chip (two in a ring, one in a chain), divided by `load`."""
    return (2 if self.ring else 1) / self.load

  @property
  def hops(self) -> int:
    """Number of links to the farthest chip of a group. In a ring data travels both ways."""
    return (self.chips // 2 if self.ring else self.chips - 1) * self.step

  @property
  def exchange(self) -> float:
    """Bytes through the busiest link in an all-to-all, per byte of a chip's array.

    The busiest link is in the middle (bisection), which half of all bytes cross.
    """
    return self.chips * self.load / (8 if self.ring else 4)


def paths(
  shape: Sequence[int], wraps: Sequence[bool], mesh: MeshShape, axes: Sequence[str]
) -> tuple[LinkPath, ...]:
  """Return the paths of a collective over some mesh axes, one for each physical axis it uses.

  Args:
    shape: Chips of the slice along each physical axis.
    wraps: For each physical axis, whether its ends are linked.
    mesh: (X, Y, Z). Chips are arranged by torus.device_grid.
    axes: Mesh axes, at least one of them longer than 1.
  """
  return _paths(tuple(shape), tuple(wraps), mesh, tuple(sorted(axes)))


def group_paths(groups: np.ndarray, wraps: Sequence[bool]) -> tuple[LinkPath, ...]:
  """Return the paths of a collective, one for each physical axis that its groups extend along.

  Args:
    groups: [the slice's shape] int. The number of each chip's group.
    wraps: For each physical axis, whether its ends are linked.
  """
  found = []
  for axis, size in enumerate(groups.shape):
    lines = np.unique(_renumbered(np.moveaxis(groups, axis, -1).reshape(-1, size)), axis=0)
    line_paths = [_line_path(line, wraps[axis]) for line in lines]
    path = LinkPath(
      max(p.chips for p in line_paths),
      all(p.ring for p in line_paths),
      max(p.load for p in line_paths),
      max(p.step for p in line_paths),
    )
    if path.chips > 1:
      found.append(path)
  size = int(np.unique(groups, return_counts=True)[1].max())
  if math.prod(path.chips for path in found) != size:
    # A mesh axis that winds through several physical axes has one link in each direction.
    return (LinkPath(size, all(path.ring for path in found)),)
  return tuple(found)


def collective_seconds(
  collective: Collective, found: Sequence[LinkPath], link_bandwidth: float, hop_latency: float
) -> float:
  """Return the time in seconds of a collective on its paths, with no other traffic on the links.

  The planner's costs, the estimate for compiled programs and the choice of a mesh (which counts
  only bytes) all use this link model.

  Args:
    collective: The collective.
    found: The paths of the collective's groups.
    link_bandwidth: Bytes per second over one link in one direction.
    hop_latency: Seconds from a chip to the next. An all-reduce passes all hops twice.
  """
  passes = 2 if collective.kind == 'all_reduce' else 1
  latency = passes * sum(path.hops for path in found) * hop_latency
  return bytes_through_a_link(collective, found) / link_bandwidth + latency


def bytes_through_a_link(collective: Collective, found: Sequence[LinkPath]) -> float:
  """Return the bytes that the busiest link carries during a collective on these paths.

  The latency of hops is not included.
  """
  if collective.kind in ('all_to_all', 'permute'):  # of a permute, at most
    return max(path.exchange for path in found) * collective.bytes
  return collective.moved / sum(path.links for path in found)


@functools.lru_cache(maxsize=256)
def grid(shape: tuple[int, ...], wraps: tuple[bool, ...], mesh: tuple[int, ...]) -> np.ndarray:
  """Return [X, Y, Z] indices of chips, in row-major order of the slice's shape."""
  if sum(size > 1 for size in shape) < 2:
    return np.arange(math.prod(shape)).reshape(mesh)
  coordinates = np.stack(np.unravel_index(np.arange(math.prod(shape)), shape), axis=-1)
  return torus.device_grid(coordinates, mesh, wraps)


@functools.lru_cache(maxsize=4096)
def _paths(
  shape: tuple[int, ...], wraps: tuple[bool, ...], mesh: MeshShape, axes: tuple[str, ...]
) -> tuple[LinkPath, ...]:
  # A group's number is its position along the mesh axes that the collective does not run over.
  kept = [a not in axes for a in AXES]
  places = np.unravel_index(np.arange(math.prod(mesh)), mesh)
  numbers = np.ravel_multi_index(
    tuple(place * keep for place, keep in zip(places, kept, strict=True)), mesh
  )
  groups = np.empty(math.prod(shape), int)
  groups[grid(shape, wraps, mesh).ravel()] = numbers
  return group_paths(groups.reshape(shape), wraps)


def _renumbered(lines: np.ndarray) -> np.ndarray:
  """Renumber the groups on each line in the order of their first chips, to find equal lines."""
  return (lines[:, :, None] == lines[:, None, :]).argmax(axis=-1)


def _line_path(line: np.ndarray, wrap: bool) -> LinkPath:
  """Return the path of the groups on one line of chips.

  The path of a group visits its chips along the line. Around a ring, it leaves out the longest gap
  between two chips.
  """
  size, groups = len(line), set(line.tolist())
  if len(groups) == 1:
    return LinkPath(size, bool(wrap))
  carried, chips, longest = np.zeros(size, int), 1, 1  # link i: from chip i to i + 1
  for group in groups:
    places = np.flatnonzero(line == group)
    gaps = np.diff(places, append=places[0] + size)
    first = (gaps.argmax() if wrap else len(places) - 1) + 1  # the path begins after the gap
    for step in range(len(places) - 1):
      i = (first + step) % len(places)
      carried[np.arange(places[i], places[i] + gaps[i]) % size] += 1
      longest = max(longest, int(gaps[i]))
    chips = max(chips, len(places))
  return LinkPath(chips, False, max(1, int(carried.max())), longest)
