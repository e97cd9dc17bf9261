"""How long a collective takes: the paper's one bandwidth, or each axis of the torus with its links and hops.

Both take what layouts/traffic.py says is moved (layouts/moves.Move), and both are at full rate: how much of the links'
bandwidth a program reaches is efficiency.py's to say.

  paper   Sections 3.2 and 3.3: bytes over the bandwidth of all links of a chip (270 GB/s on v4), whatever axes the
          collective runs over; (K-1)/K counts as 1; no hops.
  torus   A collective uses the links along its own axes alone. A physical axis with wraparound (torus.wraparound)
          brings two links, one without brings one; several add up. (K-1)/K counts (appendix A.1). Each chip passed is a
          hop. GPUs have no torus: NVLink within a node, each chip's network card across nodes, log2 K hops.
"""

import dataclasses
import functools
import math
from typing import Mapping

import numpy as np

from t5x_inference_ext.errors import UserError
from t5x_inference_ext.layouts import torus
from t5x_inference_ext.layouts.layout import Axes
from t5x_inference_ext.layouts.mesh import AXES
from t5x_inference_ext.layouts.moves import Move
from t5x_inference_ext.planner.machine import Machine, Mesh

CONVENTIONS = ('torus', 'paper')


@dataclasses.dataclass(frozen=True)
class Path:
  """What a group of chips has along one physical axis.

  Attributes:
    chips: of the group, along it.
    ring: whether they go all around it.
    stride: links from one to the next.
  """

  chips: int
  ring: bool
  stride: int

  @property
  def links(self) -> float:
    """That bring data to a chip: two directions of a ring. Where others' chips lie between, they share the links."""
    return (2 if self.ring else 1) / self.stride

  @property
  def hops(self) -> int:
    """To the farthest chip; around a ring data goes both ways."""
    return (self.chips // 2 if self.ring else self.chips - 1) * self.stride

  @property
  def exchange(self) -> float:
    """Link times an all-to-all takes, for each byte of a chip's array: half of all bytes cross the middle."""
    return self.chips * self.stride / (8 if self.ring else 4)


@dataclasses.dataclass(frozen=True)
class Network:
  """The links under a mesh, in one of the two conventions.

  Attributes:
    machine: whose.
    mesh: (X, Y, Z).
    convention: one of CONVENTIONS.
  """

  machine: Machine
  mesh: Mesh
  convention: str = 'torus'

  def __post_init__(self):
    if self.convention not in CONVENTIONS:
      raise UserError(f'no bandwidth convention is called {self.convention!r}: there are {", ".join(CONVENTIONS)}')

  def seconds(self, move: Move) -> float:
    """The time of one collective, alone on the links, at their full rate."""
    chip = self.machine.chip
    passes = 2 if move.kind == 'all_reduce' else 1
    if self.convention == 'paper':
      return passes * move.bytes / chip.network_bandwidth
    if not chip.torus:
      return self._through_switches(move)
    paths = self.paths(move.axes)
    latency = passes * sum(p.hops for p in paths) * chip.hop_latency
    if move.kind == 'all_to_all':
      return max(p.exchange for p in paths) * move.bytes / chip.link_bandwidth + latency
    return move.moved / (sum(p.links for p in paths) * chip.link_bandwidth) + latency

  def _through_switches(self, move: Move) -> float:
    """Within nodes over NVLink; between them each chip of a node sends its share through its own network card.

    Any chip is one hop from any other, so that log2 K exchanges between pairs reach all.
    """
    chip = self.machine.chip
    ids = self._group(move.axes)[:, 0]
    nodes = len(set((ids // chip.node).tolist()))
    local = max(1, len(ids) // nodes)
    passes = 2 if move.kind == 'all_reduce' else 1
    inside = move.bytes * (local - 1) / local / chip.link_bandwidth
    # An all-gather's data comes in once for the node; an all-to-all's is each chip's own.
    share = 1 if move.kind == 'all_to_all' else local
    between = move.bytes / share * (nodes - 1) / nodes / chip.node_bandwidth
    return passes * (inside + between + (len(ids) - 1).bit_length() * chip.hop_latency)

  def paths(self, axes: Axes) -> tuple[Path, ...]:
    """Where a collective over these mesh axes runs on the torus."""
    return _paths(self.machine.shape, self.machine.wraps, self.mesh, tuple(sorted(axes)))

  def _group(self, axes: Axes) -> np.ndarray:
    return _group(self.machine.shape, self.machine.wraps, self.mesh, tuple(sorted(axes)))


@functools.lru_cache(maxsize=4096)
def _paths(shape, wraps, mesh: Mesh, axes: Axes) -> tuple[Path, ...]:
  group, found = _group(shape, wraps, mesh, axes), []
  for axis, size in enumerate(shape):
    places = np.unique(group[:, axis])
    if len(places) > 1:
      found.append(Path(len(places), bool(wraps[axis]) and len(places) == size, int(np.diff(places).min())))
  if math.prod(p.chips for p in found) != len(group):
    # A line that winds through several axes: one link in each direction.
    return (Path(len(group), all(p.ring for p in found), 1),)
  return tuple(found)


@functools.lru_cache(maxsize=4096)
def _group(shape, wraps, mesh: Mesh, axes: Axes) -> np.ndarray:
  """[K, 3] physical coordinates of the chips that a collective over these mesh axes joins."""
  coordinates = np.stack(np.unravel_index(np.arange(math.prod(shape)), shape), axis=-1)
  grid = _grid(shape, wraps, mesh)
  return coordinates[grid[tuple(slice(None) if a in axes else 0 for a in AXES)].ravel()]


@functools.lru_cache(maxsize=256)
def _grid(shape, wraps, mesh: Mesh) -> np.ndarray:
  if sum(n > 1 for n in shape) < 2:
    return np.arange(math.prod(shape)).reshape(mesh)
  coordinates = np.stack(np.unravel_index(np.arange(math.prod(shape)), shape), axis=-1)
  return torus.device_grid(coordinates, mesh, wraps)


def sizes(mesh: Mesh) -> Mapping[str, int]:
  """Axis name -> size, as layouts take it."""
  return dict(zip(AXES, mesh))
