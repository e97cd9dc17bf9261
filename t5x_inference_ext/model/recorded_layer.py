"""A layer that records the inputs of its products, for calibration."""

from collections.abc import Mapping
import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from t5x_inference_ext.config import BlockPart
from t5x_inference_ext.model.adapters import RowAdapters
from t5x_inference_ext.model.block import Layer
from t5x_inference_ext.model.norm import scaled_by_two_norms
from t5x_inference_ext.model.projections import WeightStationary, side_by_side
from t5x_inference_ext.model.weight_gathered import Columns
from t5x_inference_ext.model.weights import BlockPartWeights

# Name of a product's inputs, 'BLOCK PART/w_in' or 'BLOCK PART/w_out', -> sum of x x' over them. In
# a block part with two norms, 'BLOCK PART/w_in' is that of the MLP's columns, and the columns of
# attention have 'BLOCK PART/attention'.
Hessians = dict[str, Float[Array, 'inputs inputs']]


@dataclasses.dataclass(frozen=True, eq=False)
class RecordedLayer(Layer):
  """A layer on a mesh of one device that sums x x' over the inputs x of each of its products.

  Attributes:
    counted: [B, T] bool. The tokens whose inputs count: no padding.
    hessians: The sums, filled when the layer is called.
  """

  counted: Bool[Array, 'B T'] | None = None
  hessians: Hessians = dataclasses.field(default_factory=dict)

  def _projections(self, part: BlockPart, adapters: RowAdapters | None) -> WeightStationary:
    assert adapters is None, 'models with adapters are not calibrated'
    return _Recording(self.sharding, part, layer=self)

  def record(self, name: str, x: Float[Array, 'b t inputs']) -> None:
    """Record the inputs of a product."""
    assert self.counted is not None
    x = jnp.where(self.counted[..., None], x, 0).reshape(-1, x.shape[-1])
    self.hessians[name] = jnp.matmul(x.T, x, precision=lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class _Recording(WeightStationary):
  layer: RecordedLayer | None = None

  def _record(self, name: str, x: jax.Array) -> None:
    assert self.layer is not None
    self.layer.record(f'{self.block_part.name}/{name}', x)

  def inputs(
    self, y: Float[Array, 'b t e'], w: BlockPartWeights, widths: Mapping[str, int]
  ) -> Columns:
    self._record('w_in', y)
    return super().inputs(y, w, widths)

  def inputs_of_two_norms(
    self, y: Float[Array, 'b t e'], w: BlockPartWeights, widths: Mapping[str, int]
  ) -> Columns:
    attention, mlp = scaled_by_two_norms(y, w)
    self._record('attention', attention)
    self._record('w_in', mlp)
    return super().inputs_of_two_norms(y, w, widths)

  def outputs(self, columns: list[jax.Array], w: BlockPartWeights) -> Float[Array, 'b t e']:
    self._record('w_out', side_by_side(columns, w.w_out.shape[0]))
    return super().outputs(columns, w)
