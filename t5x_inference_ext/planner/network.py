"""The time of a collective in one of two conventions: 'paper' or 'torus'.

Both take a sharding.collective.Collective from sharding/traffic.py, and give its time at full rate;
efficiency.py has the share of the links' bandwidth that programs reach. K is the number of chips of
the collective, and each hop adds the chip's hop latency.

  paper   Sections 3.2 and 3.3: bytes over the bandwidth of all links of a chip (270 GB/s on v4),
          for all mesh axes alike. (K-1)/K is taken as 1. Latency is left out.
  torus   A collective uses only the links along its own axes (sharding/links.py). A physical axis
          with wraparound (torus.wraparound) adds two links; one without, or a part of an axis, adds
          one. (K-1)/K is included (appendix A.1). Each link on the way is a hop.
          GPUs have no torus: NVLink joins the chips of a node, each chip's network card reaches
          other nodes, and the latency is that of log2 K hops.
"""

import dataclasses

from t5x_inference_ext.errors import UserError
from t5x_inference_ext.planner.machine import Machine, Mesh
from t5x_inference_ext.sharding import links
from t5x_inference_ext.sharding.collective import Collective
from t5x_inference_ext.sharding.layout import Axes
from t5x_inference_ext.sharding.mesh import AXES

CONVENTIONS = ('torus', 'paper')


@dataclasses.dataclass(frozen=True)
class Network:
  """The links of a mesh, in one of the two conventions.

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
      return passes * self._through_switches(collective)
    return links.collective_seconds(
      collective, self.paths(collective.axes), chip.link_bandwidth, chip.hop_latency
    )

  def _through_switches(self, collective: Collective) -> float:
    """Return the time in seconds of one pass of data over GPUs.

    Within a node data travels over NVLink. Between nodes each chip sends its share through its own
    network card. Any chip is one hop from any other, so log2 K rounds of pairwise exchanges reach
    all chips.
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
    return inside + between + (len(ids) - 1).bit_length() * chip.hop_latency

  def paths(self, axes: Axes) -> tuple[links.LinkPath, ...]:
    """Return a collective's paths over mesh axes, one for each physical axis of the torus."""
    return links.paths(self.machine.shape, self.machine.wraps, self.mesh, axes)


def axis_sizes(mesh: Mesh) -> dict[str, int]:
  """Return a mesh as axis name -> size, the form used in sharding/."""
  return dict(zip(AXES, mesh))
