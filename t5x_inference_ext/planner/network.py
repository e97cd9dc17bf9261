"""The time of a collective in one of three conventions: 'torus', 'compiled' or 'paper'.

All take a sharding.collective.Collective from sharding/traffic.py, and give its time at full rate;
efficiency.py has the share of the links' bandwidth that programs reach. K is the number of chips of
the collective.

  torus     The program that was measured on TPUs, the authors' own (google-research,
            scaling_transformer_inference_efficiency). It gathers and reduce-scatters along one
            physical axis after the other, over the links of that axis alone (sharding/links.py): an
            axis with wraparound (torus.wraparound) has two links, one without, or a part of an
            axis, has one. It passes gathered weights from chip to chip, through one link, beside
            the products. (K-1)/K is included (appendix A.1). Each link on the way is a hop. Each
            collective along an axis takes the chip's collective latency in addition.
  compiled  This package's program, priced as precompile prices it: all links of all axes at once,
            and no latency but hops. A gather or reduce-scatter over all three axes
            (model/collectives/ops.py), and a gather of weights over x and other axes, whose
            dimensions differ, are two. Nothing overlaps.
  paper     Sections 3.2 and 3.3: bytes over the bandwidth of all links of a chip (270 GB/s on v4),
            for all mesh axes alike. (K-1)/K is taken as 1. Latency is left out.

GPUs have no torus: NVLink joins the chips of a node, each chip's network card reaches other nodes,
and latencies are those of NCCL's trees.
"""

import dataclasses
import functools
import itertools
import math

from t5x_inference_ext.errors import UserError
from t5x_inference_ext.planner.machine import Machine, Mesh
from t5x_inference_ext.sharding import links
from t5x_inference_ext.sharding.collective import Collective
from t5x_inference_ext.sharding.layout import Axes
from t5x_inference_ext.sharding.mesh import AXES

CONVENTIONS = ('torus', 'compiled', 'paper')


@dataclasses.dataclass(frozen=True)
class Network:
  """The links of a mesh, in one of the conventions.

  Attributes:
    machine: The chips.
    mesh: (X, Y, Z) over all chips.
    convention: One of CONVENTIONS.

  Raises:
    UserError: The convention is unknown.
  """

  machine: Machine
  mesh: Mesh
  convention: str = 'torus'

  def __post_init__(self) -> None:
    if self.convention not in CONVENTIONS:
      raise UserError(
        f'no bandwidth convention is called {self.convention!r}: there are {", ".join(CONVENTIONS)}'
      )

  def seconds(self, collective: Collective) -> float:
    """Return the time in seconds of a collective with no other traffic, at the links' full rate."""
    chip = self.machine.chip
    passes = 2 if collective.kind == 'all_reduce' else 1
    if self.convention == 'paper':
      return passes * collective.bytes / chip.network_bandwidth
    if not chip.torus:
      return self._through_switches(collective, passes)
    if self.convention == 'compiled':
      return self._as_compiled(collective)
    if collective.of_weights:
      steps = (collective.shards - 1) * (chip.hop_latency + chip.collective_latency)
      return collective.moved / chip.link_bandwidth + steps
    if collective.kind in ('all_to_all', 'permute'):
      return self._at_once(collective) + chip.collective_latency
    each_byte, latency = _axis_by_axis(self, collective.axes)
    return passes * (collective.bytes * each_byte + latency)

  def _at_once(self, collective: Collective) -> float:
    """Return the time in seconds over the links of all the collective's axes together."""
    chip = self.machine.chip
    return links.collective_seconds(
      collective, self.paths(collective.axes), chip.link_bandwidth, chip.hop_latency
    )

  def _as_compiled(self, collective: Collective) -> float:
    """Return the time in seconds of the collectives that the program has for this one."""
    axes = collective.axes
    if collective.of_weights and 'x' in axes and len(axes) > 1:
      first: Axes = ('x',)  # that of d_model, another dimension than the other axes'
    elif len(axes) == len(AXES) and collective.kind in ('all_gather', 'reduce_scatter'):
      first = axes[-1:]
    else:
      return self._at_once(collective)
    rest, sizes = tuple(a for a in axes if a not in first), axis_sizes(self.mesh)
    chips, others = (math.prod(sizes[a] for a in some) for some in (first, rest))
    return self._at_once(dataclasses.replace(collective, axes=rest, shards=others)) + self._at_once(
      dataclasses.replace(collective, axes=first, shards=chips, bytes=collective.bytes // others)
    )

  def _through_switches(self, collective: Collective, passes: int) -> float:
    """Return the time in seconds of a collective over GPUs.

    Within a node data travels over NVLink. Between nodes each chip sends its share through its own
    network card. NCCL's trees are chains within a node, and binary between nodes.

    Args:
      collective: The collective.
      passes: How often the data passes all chips; twice in an all-reduce.
    """
    chip = self.machine.chip
    grid = links.grid(self.machine.shape, self.machine.wraps, self.mesh)
    ids = grid[tuple(slice(None) if a in collective.axes else 0 for a in AXES)].ravel()
    nodes = len(set((ids // chip.node).tolist()))
    local = max(1, len(ids) // nodes)
    inside = collective.bytes * (local - 1) / local / chip.link_bandwidth
    # In an all-gather, data enters a node once for all its chips; in an all-to-all, once per chip.
    share = 1 if collective.kind == 'all_to_all' else local
    between = collective.bytes / share * (nodes - 1) / nodes / chip.node_bandwidth
    steps = (local - 1) * chip.hop_latency + (nodes - 1).bit_length() * chip.node_latency
    latency = 0.0 if self.convention == 'compiled' else chip.collective_latency
    return passes * (inside + between + steps) + latency

  def paths(self, axes: Axes) -> tuple[links.LinkPath, ...]:
    """Return a collective's paths over mesh axes, one for each physical axis of the torus."""
    return links.paths(self.machine.shape, self.machine.wraps, self.mesh, axes)


@functools.lru_cache(maxsize=4096)
def _axis_by_axis(network: Network, axes: Axes) -> tuple[float, float]:
  """Return seconds per byte, and seconds of latency, of a gather along one axis after the other.

  The axes are the physical ones that the mesh axes lie on. The bytes are those of the gathered
  array: the last axis carries it whole, each axis before it as much less as the axes after it have
  chips. The order with the fewest bytes on a link is taken. A reduce-scatter takes the opposite
  order, and as long.
  """
  chip, found = network.machine.chip, network.paths(axes)

  def each_byte(order: tuple[links.LinkPath, ...]) -> float:
    seconds, share = 0.0, 1.0
    for path in order:  # the one that carries most first
      seconds += share * (path.chips - 1) / path.chips / (path.links * chip.link_bandwidth)
      share /= path.chips
    return seconds

  hops = sum(path.hops for path in found)
  latency = hops * chip.hop_latency + len(found) * chip.collective_latency
  return min(map(each_byte, itertools.permutations(found))), latency


def axis_sizes(mesh: Mesh) -> dict[str, int]:
  """Return a mesh as axis name -> size, the form used in sharding/."""
  return dict(zip(AXES, mesh))
