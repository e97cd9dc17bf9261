"""Matmuls of a block part, weight-stationary (sections 3.2.1, 3.2.2) or weight-gathered (3.2.3).

WeightStationary and WeightGathered have one interface. `inputs` maps the residual stream, split
from [B, T, E], to columns (`inputs_of_two_norms` where attention and MLP have a norm each);
`outputs` maps columns back to the residual stream. Columns are partial sums over the embed axes,
except where all columns of a block part are reduced into rows, or all into positions
(ActivationSharding.reduce_scatter_dim): then they arrive summed, and split in that dimension.
"""

from collections.abc import Mapping
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_inference_ext.config import BlockPart, ModelConfig
from t5x_inference_ext.model.adapters import RowAdapters, with_terms
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.collectives.weight_gather import Gatherer
from t5x_inference_ext.model.norm import scaled_by_two_norms
from t5x_inference_ext.model.weight_gathered import Columns, WeightGathered
from t5x_inference_ext.model.weights import BlockPartWeights
from t5x_inference_ext.quantization import int8
from t5x_inference_ext.sharding.activations import ActivationSharding


@dataclasses.dataclass(frozen=True)
class WeightStationary:
  """Moves activations to the weights; one fused matmul for inputs, one for outputs.

  Attributes:
    sharding: Sharding of the pass's activations.
    block_part: The block part.
    overlaps: Whether other products can run while columns are summed.
    adapters: Adapters of the rows, whose low-rank terms are added; None: none.
  """

  sharding: ActivationSharding
  block_part: BlockPart
  overlaps: bool = False
  adapters: RowAdapters | None = None

  def _gathered(self, y: Float[Array, 'b t e']) -> Float[Array, 'rows positions width']:
    """Gather all tokens, or features, that the hidden axes split."""
    split = self.sharding.residual_dim
    return y if split is None else ops.all_gather(y, self.sharding.layout.hidden_axes, split)

  def _sum_columns(self, y: Float[Array, 'b t columns'], dim: int | None) -> jax.Array:
    """Sum columns over the mesh's embed axes, each shard its slice of dimension `dim`.

    The result is a reduce-scatter's. If `dim` is None, return y, the partial sums.
    """
    if dim is None:
      return y
    return ops.reduce_scatter(y, self.sharding.layout.embed_axes, dim, self.overlaps)

  def inputs(
    self, y: Float[Array, 'b t e'], w: BlockPartWeights, widths: Mapping[str, int]
  ) -> Columns:
    """Multiply y, this shard's part of the normed residual stream, by w_in.

    Args:
      y: The part.
      w: The weights.
      widths: Number of columns by name.
    """
    y = self._gathered(y)
    y = with_terms(int8.matmul(y, w.w_in, w.in_scale), self._terms(y, w))
    dim = self.sharding.reduce_scatter_dim(self.block_part)
    y = self._sum_columns(y, dim)  # all columns at once, before they are cut
    # If MLP and attention columns are one array, attention's output is later written into it,
    # beside the MLP's. So the MLP's slice keeps the columns after it as room; their values are
    # ignored.
    room = w.w_out.shape[0] - widths.get('linear', 0) if len(widths) > 1 and dim is not None else 0
    columns, offset = {}, 0
    for name, width in widths.items():
      columns[name] = y[..., offset : offset + width + (0 if name == 'attention' else room)]
      offset += width
    return columns

  def _terms(
    self, y: Float[Array, 'b t e'], w: BlockPartWeights, columns: slice = slice(None)
  ) -> jax.Array | None:
    """Return the low-rank terms of some columns; y is gathered."""
    return None if self.adapters is None else self.adapters.input_terms(y, w, columns)

  def inputs_of_two_norms(
    self, y: Float[Array, 'b t e'], w: BlockPartWeights, widths: Mapping[str, int]
  ) -> Columns:
    """Scale y by the norms of attention and of the MLP, and multiply by their columns of w_in.

    One gather of y serves both norms.

    Args:
      y: This shard's part of the normalized residual stream, not yet scaled.
      w: The weights.
      widths: Number of columns by name.
    """
    dim = self.sharding.reduce_scatter_dim(self.block_part)
    attention, mlp = scaled_by_two_norms(self._gathered(y), w)
    last = w.w_in.shape[1] - widths['attention']
    products = []
    for normed, block in (mlp, slice(0, last)), (attention, slice(last, None)):
      x = int8.matmul(normed, w.w_in[:, block])
      x = x if w.in_scale is None else int8.rescale(x, w.in_scale[block])
      x = with_terms(x, self._terms(normed, w, block))
      products.append(self._sum_columns(x, dim))
    columns, offset = {'attention': products[1]}, 0
    for name, width in widths.items():
      if name != 'attention':
        columns[name] = products[0][..., offset : offset + width]
        offset += width
    return columns

  def outputs(self, columns: list[jax.Array], w: BlockPartWeights) -> Float[Array, 'b t e']:
    """Multiply `columns`, joined in the order of w_out's rows, by w_out, without out_scale.

    Args:
      columns: The columns: the MLP's, then attention's, as far as the block part has them.
      w: The weights.
    """
    layout = self.sharding.layout
    y = side_by_side(columns, w.w_out.shape[0])
    dim = self.sharding.reduce_scatter_dim(self.block_part)
    if dim is not None:
      y = ops.all_gather(y, layout.embed_axes, dim)
    terms = None if self.adapters is None else self.adapters.output_terms(y, w)
    y, split = with_terms(int8.matmul(y, w.w_out), terms), self.sharding.residual_dim
    if split is None:
      return ops.all_reduce(y, layout.hidden_axes)
    return ops.reduce_scatter(y, layout.hidden_axes, split)


def side_by_side(columns: list[jax.Array], width: int) -> jax.Array:
  """Concatenate columns to a total of `width`, in place in the first array if it has room.

  On a TPU, a concatenation or padding the first array is one more pass over all the data. On a CPU,
  writing in place is slower: XLA:CPU runs the fusion that writes, and everything fused into it, on
  one core.
  """
  if columns[0].shape[-1] < width:
    return jnp.concatenate(columns, axis=-1)
  offset = width - sum(x.shape[-1] for x in columns[1:])

  def concatenated(first: jax.Array, *rest: jax.Array) -> jax.Array:
    return jnp.concatenate([first[..., :offset], *rest], axis=-1)

  def in_place(first: jax.Array, *rest: jax.Array) -> jax.Array:
    start = offset
    for x in rest:
      first = jax.lax.dynamic_update_slice_in_dim(first, x, start, x.ndim - 1)
      start += x.shape[-1]
    return first

  return jax.lax.platform_dependent(*columns, cpu=concatenated, default=in_place)


def keep_slices_apart(
  w: BlockPartWeights, block_part: BlockPart, sharding: ActivationSharding, config: ModelConfig
) -> BlockPartWeights:
  """Keep XLA:TPU from merging two slices of the stacked weights into one.

  The first slice takes a layer's matrix out of the stack, the second the pieces to gather or
  multiply. Merged, they make the compiler copy the whole stack into another layout. A barrier
  between them prevents that.
  """
  if not (sharding.layout.gathered_axes or config.has_two_norms(block_part)):
    return w
  w_in, w_out = jax.lax.optimization_barrier((w.w_in, w.w_out))
  return dataclasses.replace(w, w_in=w_in, w_out=w_out)


def projections(
  sharding: ActivationSharding,
  block_part: BlockPart,
  overlaps: bool = False,
  adapters: RowAdapters | None = None,
) -> WeightStationary | WeightGathered:
  """Return the matmuls of a block part, WeightStationary or WeightGathered as the layout says.

  Args:
    sharding: Sharding of the pass's activations.
    block_part: The block part.
    overlaps: Whether other products can run while columns are summed.
    adapters: Adapters of the rows of the pass; None: no row has one.
  """
  if sharding.layout.gathered_axes:
    return WeightGathered(sharding, Gatherer(), adapters)
  return WeightStationary(sharding, block_part, overlaps, adapters)
