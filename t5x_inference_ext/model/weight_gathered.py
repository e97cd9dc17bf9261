"""Matmuls of a block part by weights that are gathered to the activations (section 3.2.3).

projections.py describes the interface, which WeightStationary shares.
"""

from collections.abc import Mapping
import dataclasses

import jax
from jaxtyping import Array, Float

from t5x_inference_ext.model.adapters import RowAdapters, with_terms
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.collectives.weight_gather import Gatherer
from t5x_inference_ext.model.norm import scaled_by_two_norms
from t5x_inference_ext.model.weights import BlockPartWeights
from t5x_inference_ext.quantization import int8
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.layout import Axes

# Columns [b, t, width] by name: 'gate', 'linear', 'attention'.
Columns = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class WeightGathered:
  """Gathers weights to the activations, one matrix at a time: a whole layer would not fit.

  Attributes:
    sharding: Sharding of the pass's activations.
    gatherer: Multiplies by gathered matrices.
    adapters: Adapters of the rows, whose low-rank terms are added; None: none.
  """

  sharding: ActivationSharding
  gatherer: Gatherer
  adapters: RowAdapters | None = None

  @property
  def _residual_dim(self) -> int:
    dim = self.sharding.residual_dim
    assert dim is not None, 'layouts that gather weights split the residual stream over all axes'
    return dim

  def _gathered(self, stored: Axes) -> Axes:
    return tuple(a for a in stored if a in self.sharding.layout.gathered_axes)

  @property
  def _embed(self) -> Axes:
    return self._gathered(self.sharding.layout.stored_embed)

  @property
  def _hidden(self) -> Axes:
    return self._gathered(self.sharding.layout.stored_hidden)

  def inputs(
    self, y: Float[Array, 'b t e'], w: BlockPartWeights, widths: Mapping[str, int]
  ) -> Columns:
    """Multiply y, this shard's part of the normed residual stream, by w_in.

    The arguments are those of WeightStationary.inputs.
    """
    y = ops.all_gather(y, self.sharding.layout.hidden_axes, self._residual_dim)  # [b, t, E]
    return self._columns(dict.fromkeys(widths, y), w, widths)

  def inputs_of_two_norms(
    self, y: Float[Array, 'b t e'], w: BlockPartWeights, widths: Mapping[str, int]
  ) -> Columns:
    """Scale y by two norms, and multiply by w_in; see WeightStationary."""
    y = ops.all_gather(y, self.sharding.layout.hidden_axes, self._residual_dim)  # [b, t, E]
    attention, mlp = scaled_by_two_norms(y, w)
    inputs = {**dict.fromkeys(widths, mlp), 'attention': attention}
    return self._columns(inputs, w, widths)

  def _columns(
    self, inputs: Mapping[str, jax.Array], w: BlockPartWeights, widths: Mapping[str, int]
  ) -> Columns:
    columns, stop = {}, w.w_in.shape[1]
    # Attention's columns are computed first, because attention takes longest before the output
    # matmul.
    for name, width in reversed([*widths.items()]):
      block = slice(stop - width, stop)
      x = self.gatherer.matmul(inputs[name], w.w_in[:, block], self._embed, self._hidden)
      if w.in_scale is not None:
        x = int8.rescale(x, ops.all_gather(w.in_scale[block], self._hidden, 0))
      if self.adapters is not None:
        y, embed, hidden = inputs[name], self._embed, self._hidden
        x = with_terms(x, self.adapters.gathered_input_terms(y, w, block, embed, hidden))
      columns[name] = x
      stop -= width
    return columns

  def outputs(self, columns: list[jax.Array], w: BlockPartWeights) -> Float[Array, 'b t e']:
    """Multiply `columns` by w_out, without out_scale; see WeightStationary."""
    products, start = [], 0
    copies = ops.axis_size(self._hidden)
    for x in columns:
      rows = x.shape[-1] // copies  # rows of one stored shard
      block = w.w_out[start : start + rows]
      products.append(self.gatherer.matmul(x, block, self._hidden, self._embed))
      start += rows
    y = products[0]
    for product in products[1:]:
      y = y + product
    if self.adapters is not None:
      embed, hidden = self._embed, self._hidden
      y = with_terms(y, self.adapters.gathered_output_terms(columns, w, embed, hidden))
    layout = self.sharding.layout
    return ops.reduce_scatter(y, layout.hidden_axes, self._residual_dim)
