"""A stored kernel of flaxformer's layers, and its map to canonical matrices."""

from collections.abc import Mapping
import dataclasses

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.arrays import KernelLayout, KernelPart
from t5x_inference_ext.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A stored kernel of one layer, of shape inputs + outputs.

  Attributes:
    module: Path of the kernel's module in a layer's subtree.
    inputs: Sizes of the axes that a matmul sums over.
    outputs: Sizes of the axes that a matmul keeps.
    parts: (canonical name, width) of each matrix on the part axis, in order.
    axis: Position of the part axis in inputs + outputs.
  """

  module: str
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  parts: tuple[tuple[str, int], ...]
  axis: int

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of one layer's kernel."""
    return self.inputs + self.outputs

  def layout(
    self, num_layers: int, layer_axis: int, factors: Mapping[str, float] | None = None
  ) -> KernelLayout:
    """Return the map from the stored kernel of all layers to its canonical matrices.

    Args:
      num_layers: L.
      layer_axis: Position of the layer axis in the stored kernel.
      factors: Canonical name -> factor by which stored values are multiplied; 1 if missing.
    """
    parts, start = [], 0
    for name, width in self.parts:
      parts.append(KernelPart(name, start, width, (factors or {}).get(name, 1.0)))
      start += width
    return KernelLayout(num_layers, layer_axis, self.inputs, self.outputs, tuple(parts), self.axis)

  def scale_layout(
    self, config: ModelConfig, layer_axis: int, factors: Mapping[str, float]
  ) -> KernelLayout:
    """Return the map from the stored `qscale` of a quantized kernel to canonical scales.

    AQT stores the number that a weight is multiplied by before rounding: the reciprocal of the
    canonical scale. In `qscale`, axes that a matmul sums over have size 1; parts that are
    concatenated on such an axis share one scale.

    Args:
      config: The model.
      layer_axis: Position of the layer axis in `qscale`.
      factors: As in `layout`, applied to the scale of a quantized matrix.
    """
    matrices = params.parameters(config)
    is_summed = self.axis < len(self.inputs)
    parts, start = dict[str, KernelPart](), 0
    for name, width in self.parts:
      scale = matrices[name].scale
      assert scale is not None
      first, size = (0, 1) if is_summed else (start, width)
      parts.setdefault(scale, KernelPart(scale, first, size, factors.get(name, 1.0), True))
      start += width
    inputs = (1,) * len(self.inputs)
    return KernelLayout(
      config.num_layers, layer_axis, inputs, self.outputs, tuple(parts.values()), self.axis
    )
