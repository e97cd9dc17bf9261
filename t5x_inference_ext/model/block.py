"""One layer on one shard, in any layout (the paper's sections 3.2 to 3.4 and appendix A.2).

In the parallel block one norm feeds attention and MLP; query, key, value and both MLP inputs are
one matmul, and both outputs are another. A serial block has two block parts, one with attention
alone and one with the MLP alone.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.model.attention import attend
from t5x_inference_ext.model.attention_columns import AttentionColumns
from t5x_inference_ext.model.cache import KVCache
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.norm import norm
from t5x_inference_ext.model.paged_attention import PagedContext, attend_pages
from t5x_inference_ext.model.pages import PagedCache
from t5x_inference_ext.model.positions import RotaryAngles, rotate
from t5x_inference_ext.model.projections import keep_slices_apart, projections
from t5x_inference_ext.model.weights import BlockPartWeights, LayerWeights
from t5x_inference_ext.quantization import int8
from t5x_inference_ext.quantization.kv import KV, to_cache
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.columns import column_widths
from t5x_inference_ext.sharding.layout import Axes


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, since its fields hold tracers
class Layer:
  """One layer as a function of x and its weights: the body of lax.scan, or of the unrolled loop.

  Attributes:
    config: Shape of the model.
    sharding: Sharding of the pass's activations.
    cache_dtype: Dtype of the KV cache: a float dtype or 'int8'. Attention reads keys and values as
      the cache holds them, rounded.
    angles: Rotary angles of the new tokens.
    cache: This shard's part of the KV cache, or None. Here only the rows' lengths are read from it.
    read: Cached positions of each row that attention reads, the first ones; None for all.
  """

  config: ModelConfig
  sharding: ActivationSharding
  cache_dtype: str
  angles: RotaryAngles
  cache: KVCache | PagedCache | None
  read: int | None = None

  def __call__(
    self,
    x: Float[Array, 'b t e'],
    inputs: tuple[LayerWeights, tuple[KV, ...] | Int[Array, ''] | None],
  ) -> tuple[Float[Array, 'b t e'], tuple[KV, KV]]:
    """Run the layer.

    Args:
      x: [b, t, e]. This shard's part of the residual stream.
      inputs: This shard's part of the layer's weights, with vectors [e] cut as x is (see
        local_vectors); and the cache's element of `by_layer`, or None without a cache.

    Returns:
      The new x, and the new tokens' (keys, values) as the cache holds them.
    """
    weights, cached = inputs
    sharding, kv = self.sharding, None
    context = None
    if self.cache is not None and cached is not None:
      context = self.cache.context(cached, self.read)
    for part in self.config.block_parts:
      project = projections(sharding, part)
      w = keep_slices_apart(weights[part.name], sharding)
      summed = sharding.sums_into(part) is not None
      y = norm(x, w.norm, w.norm_bias, self.config, sharding.residual[2])
      widths = column_widths(self.config, part, sharding.heads.stored.shards)
      columns = project.inputs(y, w, widths)
      outputs = []
      if part.attention:
        reshard = AttentionColumns(sharding, self.config, summed)
        q, k, v = reshard.to_attention(columns['attention'])
        q, k = rotate(q, *self.angles.queries), rotate(k, *self.angles.keys)
        kv = to_cache(k, self.cache_dtype), to_cache(v, self.cache_dtype)
        first_query = reshard.first_query(k.shape[1])
        if isinstance(context, PagedContext):
          attended = attend_pages(q, *kv, context, first_query)
        else:
          attended = attend(q, *kv, context, first_query)
        outputs.append(reshard.from_attention(attended))
      if part.mlp:  # MLP first: w_out's rows are [MLP | attention]
        outputs.insert(0, mlp(columns, self.config, sharding, summed))
      y = project.outputs(outputs, w)
      x = x + (y if w.out_scale is None else int8.rescale(y, w.out_scale))
    assert kv is not None, 'a layer has one block part with attention'
    return x, kv


def mlp(
  columns: Mapping[str, jax.Array], config: ModelConfig, sharding: ActivationSharding, summed: bool
) -> Float[Array, 'b t f']:
  """Apply the MLP's nonlinearity to its columns.

  Args:
    columns: 'linear', and with SwiGLU 'gate', each [b, t, f]. Other columns are ignored.
    config: Shape of the model.
    sharding: Sharding of the pass's activations.
    summed: Whether the columns are already summed over the embed axes. Otherwise they are partial
      sums, which are reduced, and the result is gathered again.
  """
  axes, dim = () if summed else sharding.layout.embed_axes, sharding.mlp_dim
  linear, *gate = (
    ops.reduce_scatter(columns[name], axes, dim) for name in reversed(config.mlp_inputs)
  )
  y = jax.nn.swish(gate[0]) * linear if gate else jax.nn.gelu(linear, approximate=True)
  return ops.all_gather(y, axes, dim)


def local_vectors(layers: Any, axes: Axes) -> Any:
  """Cut the vectors [.., E] of all layers to this shard's features [.., e] of the residual stream.

  The cut is made once for all layers, outside the loop over layers.

  Args:
    layers: Weights.layers.
    axes: Mesh axes that split the features of the residual stream.
  """

  def cut(x: jax.Array) -> jax.Array:
    return ops.local_slice(x, axes, x.ndim - 1)

  def cut_part(w: BlockPartWeights) -> BlockPartWeights:
    return dataclasses.replace(
      w,
      norm=cut(w.norm),
      norm_bias=None if w.norm_bias is None else cut(w.norm_bias),
      out_scale=None if w.out_scale is None else cut(w.out_scale),
    )

  return jax.tree.map(cut_part, layers, is_leaf=lambda x: isinstance(x, BlockPartWeights))
