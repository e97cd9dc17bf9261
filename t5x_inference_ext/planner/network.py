"""How long a collective takes: the paper's one bandwidth, or each axis of the torus with its links and hops.

Both take what sharding/traffic.py says is moved (sharding.collective.Collective), and both are at full rate: how much of the links'
bandwidth a program reaches is efficiency.py's to say.

  paper   Sections 3.2 and 3.3: bytes over the bandwidth of all links of a chip (270 GB/s on v4), whatever axes the
          collective runs over; (K-1)/K counts as 1; no hops.
  torus   A collective uses the links along its own axes alone (sharding/links.py). A physical axis with wraparound
          (torus.wraparound) brings two links, one without, or a part of an axis, brings one; several add up. (K-1)/K
          counts (appendix A.1). Each chip passed is a hop. GPUs have no torus: NVLink within a node, each chip's network
          card across nodes, log2 K hops.
"""

from collections.abc import Mapping
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
      raise UserError(
        f'no bandwidth convention is called {self.convention!r}: there are {", ".join(CONVENTIONS)}'
      )

  def seconds(self, move: Collective) -> float:
    """The time of one collective, alone on the links, at their full rate."""
    chip = self.machine.chip
    passes = 2 if move.kind == 'all_reduce' else 1
    if self.convention == 'paper':
      return passes * move.bytes / chip.network_bandwidth
    if not chip.torus:
      return self._through_switches(move)
    paths = self.paths(move.axes)
    latency = passes * sum(p.hops for p in paths) * chip.hop_latency
    return links.bytes_through_a_link(move, paths) / chip.link_bandwidth + latency

  def _through_switches(self, move: Collective) -> float:
    """Within nodes over NVLink; between them each chip of a node sends its share through its own network card.

    Any chip is one hop from any other, so that log2 K exchanges between pairs reach all.
    """
    chip = self.machine.chip
    grid = links.grid(self.machine.shape, self.machine.wraps, self.mesh)
    ids = grid[tuple(slice(None) if a in move.axes else 0 for a in AXES)].ravel()
    nodes = len(set((ids // chip.node).tolist()))
    local = max(1, len(ids) // nodes)
    passes = 2 if move.kind == 'all_reduce' else 1
    inside = move.bytes * (local - 1) / local / chip.link_bandwidth
    # An all-gather's data comes in once for the node; an all-to-all's is each chip's own.
    share = 1 if move.kind == 'all_to_all' else local
    between = move.bytes / share * (nodes - 1) / nodes / chip.node_bandwidth
    return passes * (inside + between + (len(ids) - 1).bit_length() * chip.hop_latency)

  def paths(self, axes: Axes) -> tuple[links.LinkPath, ...]:
    """Where a collective over these mesh axes runs on the torus."""
    return links.paths(self.machine.shape, self.machine.wraps, self.mesh, axes)


def sizes(mesh: Mesh) -> Mapping[str, int]:
  """Axis name -> size, as layouts take it."""
  return dict(zip(AXES, mesh))
