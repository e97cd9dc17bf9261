"""One layer on one shard, in any layout: the paper's sections 3.2 to 3.4 and appendix A.2.

In the parallel block one norm feeds attention and MLP; query, key, value and both MLP inputs are one matmul, both
outputs another. The serial block is two such sublayers, with attention alone and with the MLP alone.
"""

import dataclasses
from typing import Any, NamedTuple

import jax

from t5x_inference_ext.config import BlockPart, ModelConfig
from t5x_inference_ext.model.attention import Context, attend
from t5x_inference_ext.model.attention_columns import AttentionColumns
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.norm import norm
from t5x_inference_ext.model.positions import rotate
from t5x_inference_ext.model.projections import column_widths, in_pieces, projections
from t5x_inference_ext.model.weights import BlockPartWeights, LayerWeights
from t5x_inference_ext.quantization import int8
from t5x_inference_ext.quantization.kv import KV, to_cache
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.layout import Axes


class Positions(NamedTuple):
  """Rotary (sin, cos) of the new tokens: of the shard's queries [B', T', Q/2] and of all keys [B', T, Q/2]."""

  queries: tuple[jax.Array, jax.Array]
  keys: tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Layer:
  """A layer's function, for a model and a placement.

  Attributes:
    config: the model.
    placement: where activations live.
    cache: the dtype of keys and values, a float's or 'int8': attention sees them as the cache will hold them.
  """

  config: ModelConfig
  sharding: ActivationSharding
  cache: str

  def __call__(
    self, x: jax.Array, w: LayerWeights, positions: Positions, context: Context | None
  ) -> tuple[jax.Array, tuple[KV, KV]]:
    """Runs the layer's sublayers.

    Args:
      x: [B, T, E], the shard's part of the residual stream.
      w: the shard's part of the layer's weights; of vectors [E] the part that x has.
      positions: of the new tokens.
      context: the layer's cache, the shard's part, or None.

    Returns:
      The new x, and the new tokens' (keys, values), each [B', T, K', Q].
    """
    kv = None
    for block_part in self.config.block_parts:
      x, new = self._sublayer(x, w[block_part.name], block_part, positions, context)
      kv = new if kv is None else kv
    return x, kv

  def _sublayer(self, x, w: BlockPartWeights, block_part: BlockPart, positions, context):
    project, w = projections(self.sharding, block_part), in_pieces(w, self.sharding)
    summed = self.sharding.sums_into(block_part) is not None
    y = norm(x, w.norm, w.norm_bias, self.config, self.sharding.residual[2])
    parts = project.inputs(y, w, column_widths(self.config, block_part, self.sharding.heads.stored))
    attention, kv, outputs = None, None, []
    if block_part.attention:
      attention, kv = self._attention(parts['attention'], summed, positions, context)
    if block_part.mlp:
      outputs.append(self._mlp(parts, summed))
    if attention is not None:
      outputs.append(attention)
    y = project.outputs(outputs, w)
    return x + (y if w.out_scale is None else int8.rescale(y, w.out_scale)), kv

  def _mlp(self, parts, summed):
    """The inputs [B, T, F/hidden], partial sums unless summed -> [B, T, F/hidden]."""
    embed, dim = () if summed else self.sharding.layout.embed_axes, self.sharding.mlp_dim
    linear, *gate = (
      ops.reduce_scatter(parts[n], embed, dim) for n in reversed(self.config.mlp_inputs)
    )
    y = jax.nn.swish(gate[0]) * linear if gate else jax.nn.gelu(linear, approximate=True)
    return ops.all_gather(y, embed, dim)

  def _attention(self, columns, summed, positions, context):
    moves = AttentionColumns(self.sharding, self.config, summed)
    q, k, v = moves.to_attention(columns)
    q, k = rotate(q, *positions.queries), rotate(k, *positions.keys)
    k, v = (to_cache(x, self.cache) for x in (k, v))
    out = attend(q, k, v, context, moves.query_positions(k.shape[1]))
    return moves.from_attention(out), (k, v)


def local_vectors(layers: Any, axes: Axes) -> Any:
  """Layers with the part of their vectors [.., E] that this shard's residual stream has; once, not layer by layer."""

  def local(block_part):
    vectors = {name: getattr(block_part, name) for name in ('norm', 'norm_bias', 'out_scale')}
    return dataclasses.replace(
      block_part,
      **{
        name: ops.local_slice(v, axes, v.ndim - 1) for name, v in vectors.items() if v is not None
      },
    )

  return jax.tree.map(local, layers, is_leaf=lambda x: isinstance(x, BlockPartWeights))
