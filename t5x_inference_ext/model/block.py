"""One layer on one shard, in any layout (the paper's sections 3.2 to 3.4 and appendix A.2).

In the parallel block one norm feeds attention and MLP. One matmul computes query, key, value and
both MLP inputs; another computes the sum of both outputs. A serial block has two block parts, one
with only attention and one with only the MLP.
"""

from collections.abc import Mapping
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_inference_ext.config import BlockPart, ModelConfig
from t5x_inference_ext.model.activations import activate
from t5x_inference_ext.model.adapters import SCALING, RowAdapters, head_factors, scaled_columns
from t5x_inference_ext.model.attention import attend
from t5x_inference_ext.model.attention_columns import AttentionColumns
from t5x_inference_ext.model.attention_rules import AttentionRules
from t5x_inference_ext.model.cache import KVCache
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.heads import prepare_heads
from t5x_inference_ext.model.kernel_attention import AttentionKernel
from t5x_inference_ext.model.norm import norm, normalized
from t5x_inference_ext.model.paged_attention import PagedContext, attend_pages
from t5x_inference_ext.model.pages import PagedCache
from t5x_inference_ext.model.positions import RotaryAngles, chosen_angles
from t5x_inference_ext.model.projections import (
  Columns,
  WeightGathered,
  WeightStationary,
  keep_slices_apart,
  projections,
)
from t5x_inference_ext.model.token_parts import TokenParts
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
    angles: Rotary angles of the new tokens in global and in local layers, or None without rotary
      positions.
    cache: This shard's part of the KV cache, or None. The layer reads only the rows' lengths from
      it.
    read: Number of cached positions per row that attention reads, from the first on; None: all.
    rules: Rules for attention's logits, or None.
    kernel: The kernel that attends to cached positions, or None: plain JAX.
    parts: How the tokens are cut into parts that go through the products one after the other.
    adapter_rows: [B] int32. Number of the adapter of each row of the pass; None: no row has one.
  """

  config: ModelConfig
  sharding: ActivationSharding
  cache_dtype: str
  angles: tuple[RotaryAngles, RotaryAngles] | None
  cache: KVCache | PagedCache | None
  read: int | None = None
  rules: AttentionRules | None = None
  kernel: AttentionKernel | None = None
  parts: TokenParts = TokenParts()
  adapter_rows: Int[Array, ' B'] | None = None

  def __call__(
    self,
    x: tuple[Float[Array, 'b t e'], ...],
    inputs: tuple[LayerWeights, tuple[KV, ...] | Int[Array, ''] | None, jax.Array | bool],
  ) -> tuple[tuple[Float[Array, 'b t e'], ...], tuple[KV, KV]]:
    """Run the layer.

    Args:
      x: The parts [b, t, e] of this shard's residual stream.
      inputs: This shard's part of the layer's weights, with vectors cut (vectors.local_vectors);
        the cache's element of `by_layer`, or None without a cache; and whether the layer is local.

    Returns:
      The new x, and the new tokens' (keys, values) in the cache's dtype.
    """
    weights, cached, local = inputs
    sharding, kv = self.sharding, None
    angles = chosen_angles(self.angles, local)
    rules = self.rules and dataclasses.replace(self.rules, local=local)
    context = None
    if self.cache is not None and cached is not None and self.read != 0:
      context = self.cache.context(cached, self.read)
    for part in self.config.block_parts:
      w = keep_slices_apart(weights[part.name], part, sharding, self.config)
      summed = sharding.reduce_scatter_dim(part) is not None
      adapters = self._adapters(part)
      projects = [self._projections(part, each) for each in adapters]
      columns = [self._columns(each, project, w, part) for each, project in zip(x, projects)]
      outputs: list[list[jax.Array]] = [[] for _ in x]
      if part.attention:
        reshard = AttentionColumns(sharding, self.config, summed)
        attention = self.parts.join([each['attention'] for each in columns])
        q, k, v = prepare_heads(
          *reshard.to_attention(attention),
          w.vectors,
          self.config,
          sharding,
          angles,
          head_factors(w.adapters),
          self._rows(sharding.attention_rows),
        )
        # In the cache, and in attention's products, heads come before positions.
        of_heads = jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1)
        kv = to_cache(of_heads[0], self.cache_dtype), to_cache(of_heads[1], self.cache_dtype)
        first_query = reshard.first_query(k.shape[1])
        if self.kernel is not None and context is not None:
          attended = self.kernel.attend(q, *kv, context, first_query)
        elif isinstance(context, PagedContext):
          attended = attend_pages(q, *kv, context, first_query, rules)
        else:
          attended = attend(q, *kv, context, first_query, rules)
        outputs = [[each] for each in self.parts.split(reshard.from_attention(attended))]
      if part.mlp:  # MLP first: w_out's rows are [MLP | attention]
        factors = w.adapters.get(f'{SCALING}mlp_output')
        for out, inputs_of_mlp, own in zip(outputs, columns, adapters):
          out.insert(0, mlp(inputs_of_mlp, w.vectors, self.config, sharding, summed, factors, own))
      x = tuple(
        each + self._finished(project.outputs(out, w), w)
        for each, out, project in zip(x, outputs, projects)
      )
    assert kv is not None, 'a layer has one block part with attention'
    return x, kv

  def _projections(
    self, part: BlockPart, adapters: RowAdapters | None
  ) -> WeightStationary | WeightGathered:
    """Return the matmuls of a block part."""
    return projections(self.sharding, part, self.parts.count > 1, adapters)

  def _rows(self, axes: Axes) -> Int[Array, ' b'] | None:
    """Return the adapters of this shard's rows, which `axes` split."""
    rows = self.adapter_rows
    return None if rows is None else ops.local_slice(rows, axes, 0)

  def _adapters(self, part: BlockPart) -> list[RowAdapters | None]:
    """Return the adapters of the rows of each part of the tokens, in a block part's products."""
    rows = self._rows(self.sharding.rows)
    if rows is None:
      return [None] * self.parts.count
    of_parts = (rows[:, None],) * self.parts.count
    if self.parts.dim == 0:
      of_parts = self.parts.split(rows[:, None])
    return [RowAdapters.of(each[:, 0], self.config, part, self.sharding) for each in of_parts]

  def _columns(
    self,
    x: Float[Array, 'b t e'],
    project: WeightStationary | WeightGathered,
    w: BlockPartWeights,
    part: BlockPart,
  ) -> Columns:
    """Normalize x, and return the columns of its product with a block part's input weights."""
    config, features = self.config, self.sharding.residual[2]
    widths = column_widths(config, part, self.sharding.heads.stored.shards)
    if config.has_two_norms(part):
      y = normalized(x, config, features).astype(x.dtype)
      return project.inputs_of_two_norms(y, w, widths)
    y = x if w.norm is None else norm(x, w.norm, w.norm_bias, config, features)
    return project.inputs(y, w, widths)

  def _finished(self, y: Float[Array, 'b t e'], w: BlockPartWeights) -> Float[Array, 'b t e']:
    """Apply int8 scales, biases and a norm to a block part's output product.

    The product is already summed over devices, so biases are added once.
    """
    y = y if w.out_scale is None else int8.rescale(y, w.out_scale)
    for name in ('attention_output_bias', 'mlp_output_bias'):
      if name in w.vectors:
        y = (y.astype(jnp.float32) + w.vectors[name][None, None]).astype(y.dtype)
    if 'post_norm' not in w.vectors:
      return y
    scale, bias = w.vectors['post_norm'], w.vectors.get('post_norm_bias')
    return norm(y, scale, bias, self.config, self.sharding.residual[2])


def mlp(
  columns: Mapping[str, jax.Array],
  vectors: Mapping[str, jax.Array],
  config: ModelConfig,
  sharding: ActivationSharding,
  summed: bool,
  factors: Float[Array, 'n columns'] | None = None,
  adapters: RowAdapters | None = None,
) -> Float[Array, 'b t f']:
  """Apply the MLP's biases and nonlinearity to its columns.

  Args:
    columns: 'linear', and with a gated MLP 'gate', each [b, t, f]. Other columns are ignored.
    vectors: Biases [f'] of this shard's columns, by name (vectors.local_vectors).
    config: Shape of the model.
    sharding: Sharding of the pass's activations.
    summed: Whether the columns are already summed over the embed axes. Otherwise they are partial
      sums; they are reduce-scattered first, and the result is gathered again.
    factors: Factors of the activated columns by adapter, or None.
    adapters: Adapters of the rows before that; None: no row has one.
  """
  axes, dim = () if summed else sharding.layout.embed_axes, sharding.mlp_dim

  def column(name: str) -> jax.Array:
    x, bias = ops.reduce_scatter(columns[name], axes, dim), vectors.get(f'{name}_bias')
    if bias is None:
      return x
    # Columns may end in spare room whose values are ignored (WeightStationary.inputs), so pad.
    bias = jnp.pad(bias, (0, x.shape[-1] - bias.shape[0]))
    return (x.astype(jnp.float32) + bias[None, None]).astype(x.dtype)

  y = activate(config.mlp, *map(column, reversed(config.mlp_inputs)))
  if adapters is not None and factors is not None:
    rows = adapters.rows
    if dim == 0:
      rows = ops.local_slice(rows, sharding.layout.embed_axes, 0)
    y = scaled_columns(y, factors, rows)
  return ops.all_gather(y, axes, dim)
