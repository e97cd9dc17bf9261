"""A sublayer's matmuls, with weights that stay (section 3.2.1, 3.2.2) or are gathered (section 3.2.3).

Both give the same: from the residual stream's split of [B, T, E] the columns of each part, and from columns back to it.
Columns are partial sums over the embed axes; where all of a sublayer's go into rows, or all into positions
(ActivationSharding.sums_into), they come summed and split.
"""

from collections.abc import Mapping
import dataclasses

import jax
import jax.numpy as jnp

from t5x_inference_ext.config import BlockPart, ModelConfig
from t5x_inference_ext.model.collectives import looped, ops
from t5x_inference_ext.model.collectives.weight_gather import Gatherer
from t5x_inference_ext.model.weights import BlockPartWeights
from t5x_inference_ext.quantization import int8
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.heads import HeadSplit, kv_columns, query_columns

Parts = dict[str, jax.Array]


def column_widths(config: ModelConfig, block_part: BlockPart, stored: HeadSplit) -> dict[str, int]:
  """The parts of a stored shard's columns, in order: 'gate', 'linear', 'attention' (queries, then keys and values)."""
  widths = dict.fromkeys(config.mlp_inputs, config.d_ff // stored.shards) if block_part.mlp else {}
  if block_part.attention:
    widths['attention'] = query_columns(config, stored) + kv_columns(config, stored)[1]
  return widths


@dataclasses.dataclass(frozen=True)
class WeightStationary:
  """Activations move to the weights: one fused product in, one out."""

  sharding: ActivationSharding
  block_part: BlockPart

  def inputs(self, y: jax.Array, w: BlockPartWeights, widths: Mapping[str, int]) -> Parts:
    hidden, directions = self.sharding.layout.hidden_axes, self.sharding.layout.ring_directions
    if directions:
      y = looped.all_gather_matmul(y, w.w_in, hidden, directions)
      y = y if w.in_scale is None else int8.rescale(y, w.in_scale)
    else:
      y = ops.all_gather(y, hidden, self.sharding.residual_dim)  # [B, T, E/embed]
      y = int8.matmul(y, w.w_in, w.in_scale)
    if (
      dim := self.sharding.sums_into(self.block_part)
    ) is not None:  # before anything is cut out of it
      y = ops.reduce_scatter(y, self.sharding.layout.embed_axes, dim)
    # Where attention follows the MLP in one array, its output is written beside the MLP's: there is room for it, the next
    # columns, whose values don't count.
    room = w.w_out.shape[0] - widths.get('linear', 0) if len(widths) > 1 and dim is not None else 0
    parts, offset = {}, 0
    for name, width in widths.items():
      parts[name] = y[..., offset : offset + width + (0 if name == 'attention' else room)]
      offset += width
    return parts

  def outputs(self, parts: list[jax.Array], w: BlockPartWeights) -> jax.Array:
    """parts, columns [B, T, rows of w_out] in order -> the residual stream's split of [B, T, E], not yet scaled."""
    hidden, directions = self.sharding.layout.hidden_axes, self.sharding.layout.ring_directions
    y = _side_by_side(parts, w.w_out.shape[0])
    if (dim := self.sharding.sums_into(self.block_part)) is not None:
      y = ops.all_gather(y, self.sharding.layout.embed_axes, dim)
    if directions:
      return looped.matmul_reduce_scatter(y, w.w_out, hidden, directions)
    return ops.reduce_scatter(int8.matmul(y, w.w_out), hidden, self.sharding.residual_dim)


def _side_by_side(parts: list[jax.Array], width: int) -> jax.Array:
  """Concatenates columns; where the first part has room for all, `width` in all, by writing the others into it.

  For a TPU concatenating is one more pass over everything, and so is making room afterwards.
  """
  first, *rest = parts
  if first.shape[-1] < width:
    return jnp.concatenate(parts, axis=-1)
  offset = width - sum(p.shape[-1] for p in rest)
  for part in rest:
    first = jax.lax.dynamic_update_slice_in_dim(first, part, offset, part.ndim - 1)
    offset += part.shape[-1]
  return first


@dataclasses.dataclass(frozen=True)
class WeightGathered:
  """Weights move to the activations: matrix by matrix, since a whole layer would not fit beside the stored weights."""

  sharding: ActivationSharding
  gatherer: Gatherer

  @property
  def _gathered_embed(self):
    return tuple(
      a for a in self.sharding.layout.stored_embed if a in self.sharding.layout.gathered_axes
    )

  @property
  def _gathered_hidden(self):
    return tuple(
      a for a in self.sharding.layout.stored_hidden if a in self.sharding.layout.gathered_axes
    )

  def inputs(self, y: jax.Array, w: BlockPartWeights, widths: Mapping[str, int]) -> Parts:
    y = ops.all_gather(y, self.sharding.layout.hidden_axes, self.sharding.residual_dim)  # [B, T, E]
    parts, offset = {}, 0
    for name, width in reversed(
      widths.items()
    ):  # attention's first: it has most to do before the output product
      offset -= width
      columns = slice(w.w_in.shape[1] + offset, w.w_in.shape[1] + offset + width)
      part = self.gatherer.matmul(
        y, w.w_in[:, columns], self._gathered_embed, self._gathered_hidden
      )
      if w.in_scale is not None:
        part = int8.rescale(part, ops.all_gather(w.in_scale[columns], self._gathered_hidden, 0))
      parts[name] = part
    return parts

  def outputs(self, parts: list[jax.Array], w: BlockPartWeights) -> jax.Array:
    offset, y = 0, None
    copies = ops.axis_size(self._gathered_hidden)
    for part in parts:
      rows = part.shape[-1] // copies  # of the stored shard
      product = self.gatherer.matmul(
        part, w.w_out[offset : offset + rows], self._gathered_hidden, self._gathered_embed
      )
      y = product if y is None else y + product
      offset += rows
    return ops.reduce_scatter(y, self.sharding.layout.hidden_axes, self.sharding.residual_dim)


def in_pieces(w: BlockPartWeights, sharding: ActivationSharding) -> BlockPartWeights:
  """The weights of a layer, of its own where its matrices are gathered or multiplied in pieces.

  Of a piece of a slice of all layers the TPU compiler makes one cut, for which it lays all layers out anew.
  """
  if not (sharding.layout.gathered_axes or sharding.layout.ring_directions):
    return w
  w_in, w_out = jax.lax.optimization_barrier((w.w_in, w.w_out))
  return dataclasses.replace(w, w_in=w_in, w_out=w_out)


def projections(
  sharding: ActivationSharding, block_part: BlockPart
) -> WeightStationary | WeightGathered:
  if sharding.layout.gathered_axes:
    return WeightGathered(sharding, Gatherer(sharding.layout.ring_directions))
  return WeightStationary(sharding, block_part)
