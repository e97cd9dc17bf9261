"""One collective and what it moves, as the paper's appendix A.1 counts, and what the moves of one pass share."""

from collections.abc import Mapping
import dataclasses

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.sharding.heads import HeadSplit, stored_heads
from t5x_inference_ext.sharding.layout import Axes, Layout, num_shards

# Norm moments, scales and logits are float32 whatever the activations are.
FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective, as the paper's appendix A.1 counts it.

  Attributes:
    name: what is moved: 'input', 'weights: gate', 'scales: gate', 'query', 'output', ...
    kind: 'all_gather', 'reduce_scatter', 'all_reduce' or 'all_to_all'.
    axes: the mesh axes that it runs over, those of size 1 left out.
    shards: K, the devices along them.
    bytes: of the array on one device where it is largest: an all-gather's output, a reduce-scatter's input, what is
      all-reduced, what an all-to-all takes and gives.
    directions: 0: one collective; 1 or 2: a ring of K - 1 steps, each of which sends bytes / K to the neighbours, in so
      many collective-permutes (section 3.5).
  """

  name: str
  kind: str
  axes: Axes
  shards: int
  bytes: int
  directions: int = 0

  @property
  def moved(self) -> float:
    """Bytes that a device sends: bytes (K-1)/K, of an all-reduce twice that (a reduce-scatter and an all-gather).

    The paper gives no formula for an all-to-all: each device keeps a K-th of its array and sends the rest, (K-1)/K too.
    """
    return self.bytes * (self.shards - 1) / self.shards * (2 if self.kind == 'all_reduce' else 1)

  @property
  def steps(self) -> int:
    """Collective-permutes, one after the other, of a looped collective; 0 of a plain one."""
    return self.shards - 1 if self.directions else 0


@dataclasses.dataclass(frozen=True)
class Pass:
  """Makes the moves of one pass; those over one device come to nothing.

  Attributes:
    config, layout, mesh: of the pass.
    tokens: B T / N, in the residual stream on one device.
    activation, weight: bytes of an element; a weight of 1 byte is int8 and has float32 scales.
  """

  config: ModelConfig
  layout: Layout
  mesh: Mapping[str, int]
  tokens: int
  activation: int
  weight: int

  @classmethod
  def of(
    cls,
    config: ModelConfig,
    layout: Layout,
    mesh: Mapping[str, int],
    tokens: int,
    activation: int,
    weight: int,
  ) -> 'Pass':
    """Of B T `tokens` in all. Raises ValueError where they do not divide over N."""
    devices = num_shards(layout.gathered_axes, mesh)
    if tokens % devices:
      raise ValueError(f'{layout} splits tokens over {devices} devices, and {tokens} do not divide')
    return cls(config, layout, mesh, tokens // devices, activation, weight)

  def move(
    self, name: str, kind: str, axes: Axes, count: int, width: int, looped: bool = False
  ) -> list[Collective]:
    """`count` elements of `width` bytes, as Move.bytes counts them."""
    axes = tuple(a for a in axes if self.mesh[a] > 1)
    directions = self.layout.ring_directions if looped else 0
    return (
      [Collective(name, kind, axes, self.size(axes), count * width, directions)] if axes else []
    )

  def activations(
    self, name: str, kind: str, axes: Axes, count: int, looped: bool = False
  ) -> list[Collective]:
    """`count` elements of activations."""
    return self.move(name, kind, axes, count, self.activation, looped)

  def size(self, axes: Axes) -> int:
    return num_shards(axes, self.mesh)

  @property
  def blocks(self) -> int:
    """Stored shards' blocks of columns on one device, weights gathered."""
    return self.size(self.layout.stored_hidden) // self.size(self.layout.hidden_axes)

  @property
  def stored_heads(self) -> HeadSplit:
    return stored_heads(self.config, self.size(self.layout.stored_hidden))
