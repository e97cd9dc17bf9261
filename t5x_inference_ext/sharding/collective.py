"""One collective and the bytes it moves, as the paper's appendix A.1 counts them."""

from collections.abc import Mapping
import dataclasses
import math

from t5x_inference_ext.config import BlockPart, ModelConfig
from t5x_inference_ext.sharding import columns
from t5x_inference_ext.sharding.layout import Axes, Layout, num_shards

# Bytes of a float32 element. Norm moments, scales and logits are float32 in every run.
FLOAT32 = 4
# Bytes of a weight element: of all matrices, or of each array by name.
WeightBytes = float | Mapping[str, float]
# Bytes of an int32 element, such as a row's length.
INT32 = 4


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective.

  Attributes:
    name: The array that moves: 'input', 'weights: gate', 'scales: gate', 'query', 'output', ...
    kind: 'all_gather', 'reduce_scatter', 'all_reduce', 'all_to_all', or 'permute': each device
      sends its array to another one.
    axes: The mesh axes that it runs over, without axes of size 1.
    shards: K, the number of devices along these axes.
    bytes: Bytes on one device of the larger of input and output: the output of an all-gather, the
      input of a reduce-scatter; of an all-reduce or all-to-all, both are equal.
  """

  name: str
  kind: str
  axes: Axes
  shards: int
  bytes: int

  @property
  def of_weights(self) -> bool:
    """Whether weights or their scales are gathered, which does not depend on activations."""
    return self.name.startswith(('weights: ', 'scales: '))

  @property
  def moved(self) -> float:
    """Bytes that a device sends: bytes * (K-1)/K, twice that in an all-reduce; all in a permute.

    An all-reduce is a reduce-scatter and an all-gather. The paper gives no formula for an
    all-to-all: each device keeps 1/K of its array and sends the rest, which also gives (K-1)/K.
    """
    if self.kind == 'permute':
      return self.bytes
    return self.bytes * (self.shards - 1) / self.shards * (2 if self.kind == 'all_reduce' else 1)


@dataclasses.dataclass(frozen=True)
class Pass:
  """One pass through the model whose collectives are counted.

  Attributes:
    config: The model.
    layout: The layout of the pass.
    mesh: Axis name -> size.
    total: B T, the tokens of all devices together.
    activation: Bytes of one activation element.
    weight: Bytes of one weight element, for all matrices or for each array by name ('mlp/w_in').
      A weight of at most 1 byte is quantized and has float32 scales.

  Raises:
    ValueError: The tokens do not divide over the devices that weights are gathered over.
  """

  config: ModelConfig
  layout: Layout
  mesh: Mapping[str, int]
  total: int
  activation: int
  weight: WeightBytes

  def __post_init__(self) -> None:
    devices = self.size(self.layout.gathered_axes)
    if self.total % devices:
      raise ValueError(
        f'{self.layout} splits tokens over {devices} devices, and {self.total} do not divide'
      )

  @property
  def tokens(self) -> int:
    """B T / N, tokens on one device, where weights are gathered over N devices."""
    return self.total // self.size(self.layout.gathered_axes)

  def weight_width(self, block_part: BlockPart, field: str) -> float:
    """Return the bytes of one weight element of a block part's array, 'w_in' or 'w_out'."""
    if isinstance(self.weight, Mapping):
      return self.weight[f'{block_part.name}/{field}']
    return self.weight

  def collective(
    self, name: str, kind: str, axes: Axes, count: int, width: float
  ) -> list[Collective]:
    """Return a list with this collective; an empty list if the axes have only one device.

    Args:
      name: The array that moves.
      kind: The kind of Collective.
      axes: Mesh axes. They may have size 1.
      count: Elements of the array, counted as for Collective.bytes.
      width: Bytes of an element; half a byte for int4.
    """
    axes = tuple(a for a in axes if self.mesh[a] > 1)
    if not axes:
      return []
    return [Collective(name, kind, axes, self.size(axes), math.ceil(count * width))]

  def activations(self, name: str, kind: str, axes: Axes, count: int) -> list[Collective]:
    """Return the collective of `count` activation elements, in a list; see `collective`."""
    return self.collective(name, kind, axes, count, self.activation)

  def size(self, axes: Axes) -> int:
    """Return the number of devices along the axes."""
    return num_shards(axes, self.mesh)

  @property
  def blocks(self) -> int:
    """Number of stored shards whose columns are on one device after weights are gathered."""
    return self._shards // self.size(self.layout.hidden_axes)

  def columns(self, block_part: BlockPart) -> dict[str, int]:
    """Return the number of input-matrix columns on one device by name (see column_widths)."""
    widths = columns.column_widths(self.config, block_part, self._shards)
    return {name: self.blocks * width for name, width in widths.items()}

  def rows(self, block_part: BlockPart) -> dict[str, int]:
    """Return the number of output-matrix rows on one device by name (see row_widths)."""
    widths = columns.row_widths(self.config, block_part, self._shards)
    return {name: self.blocks * width for name, width in widths.items()}

  @property
  def _shards(self) -> int:
    return self.size(self.layout.stored_hidden)
