"""Norms and biases of all layers: each shard's slices, taken before the loop over layers.

Vectors are replicated on every device. A shard takes the slice that matches its part of the
activation. The vector is added to the activation, or multiplied by it, after the sums over devices
are complete, so a bias is added once.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_inference_ext.config import BlockPart, ModelConfig
from t5x_inference_ext.model.adapters import SCALING
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.weights import BlockPartWeights
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.layout import Axes

# Fields whose vectors belong to query heads, and to key heads. A vector is cut to [.., heads, Q]
# for the shard's heads.
_QUERY_VECTORS = ('query_bias', 'query_norm', 'query_norm_bias')
_KEY_VECTORS = ('key_bias', 'key_norm', 'key_norm_bias', 'value_bias')
_HEAD_VECTORS = _QUERY_VECTORS + _KEY_VECTORS
_MLP_VECTORS = ('gate_bias', 'linear_bias')


def local_vectors(layers: Any, config: ModelConfig, sharding: ActivationSharding) -> Any:
  """Cut the vectors of all layers to this shard's part, once, outside the loop over layers.

  Args:
    layers: Weights.layers.
    config: The model.
    sharding: Sharding of the pass's activations.

  Returns:
    Like `layers`. Vectors over E features become [.., e], split like the residual stream; vectors
    over MLP columns become [.., f]; vectors over queries or keys become [.., heads, Q]. Adapters'
    factors of columns are cut likewise.
  """
  parts = {part.name: part for part in config.block_parts}

  def cut_layer(layer: dict[str, BlockPartWeights]) -> dict[str, BlockPartWeights]:
    return {name: _cut_part(w, parts[name], config, sharding) for name, w in layer.items()}

  return tuple(map(cut_layer, layers)) if isinstance(layers, tuple) else cut_layer(layers)


def _cut_part(
  w: BlockPartWeights, part: BlockPart, config: ModelConfig, sharding: ActivationSharding
) -> BlockPartWeights:
  def cut(x: jax.Array | None, axes: Axes = sharding.residual[2]) -> jax.Array | None:
    return None if x is None else ops.local_slice(x, axes, x.ndim - 1)

  input_axes = input_norm_axes(part, config, sharding)
  by_field: dict[str, Any] = {'mlp_norm': input_axes, 'mlp_norm_bias': input_axes}
  by_field |= dict.fromkeys(_MLP_VECTORS, mlp_axes(part, sharding))
  heads = sharding.heads
  key_axes = sharding.axes['kv_heads']
  vectors: dict[str, Any] = {}
  for field, x in w.vectors.items():
    by_head = x.reshape(*x.shape[:-1], -1, config.d_head) if field in _HEAD_VECTORS else x
    if field in _QUERY_VECTORS:
      vectors[field] = take_heads(by_head, heads.queries(), sharding.attention_heads)
    elif field in _KEY_VECTORS:
      vectors[field] = take_heads(by_head, heads.cached(), key_axes)
    else:
      vectors[field] = cut(x, by_field.get(field, sharding.residual[2]))
  adapters: dict[str, Any] = dict(w.adapters)
  for name, factors in adapters.items():
    field = name.removeprefix(SCALING)
    if field == name:  # a low-rank term, split like its matrix
      continue
    if field == 'mlp_output':
      adapters[name] = cut(factors, mlp_axes(part, sharding))
    else:
      by_head = factors.reshape(*factors.shape[:-1], -1, config.d_head)
      own = field == 'query'
      adapters[name] = take_heads(
        by_head,
        heads.queries() if own else heads.cached(),
        sharding.attention_heads if own else key_axes,
      )
  return dataclasses.replace(
    w,
    adapters=adapters,
    norm=cut(w.norm, input_axes),
    norm_bias=cut(w.norm_bias, input_axes),
    out_scale=cut(w.out_scale),
    vectors=vectors,
  )


def input_norm_axes(part: BlockPart, config: ModelConfig, sharding: ActivationSharding) -> Axes:
  """Return the axes that split the features to which a block part's input norms are applied.

  A parallel block with two norms gathers its normalized input once, and applies both norms'
  scales to the gathered features.
  """
  return sharding.layout.embed_axes if config.has_two_norms(part) else sharding.residual[2]


def mlp_axes(part: BlockPart, sharding: ActivationSharding) -> Axes:
  """Return the axes that split the MLP's columns when its nonlinearity is applied."""
  layout = sharding.layout
  split = sharding.mlp_dim == 2 and sharding.reduce_scatter_dim(part) is None
  return layout.hidden_axes + (layout.embed_axes if split else ())


def take_heads(
  x: Float[Array, '*lead H n'], heads: Sequence[int | None], axes: Axes
) -> Float[Array, '*lead h n']:
  """Return the vectors in x of this shard's heads, with zeros for padding heads.

  Args:
    x: Vectors of all heads of the model.
    heads: For each head position over all devices along `axes`, its index in the model; None for
      padding.
    axes: Mesh axes that split the heads.
  """
  if None in heads:
    x = jnp.concatenate([x, jnp.zeros_like(x[..., :1, :])], axis=-2)
  indices = [x.shape[-2] - 1 if head is None else head for head in heads]
  if indices == [*range(x.shape[-2])]:  # in order, without padding or repeats
    return ops.local_slice(x, axes, x.ndim - 2)
  local = ops.local_slice(jnp.asarray(indices, jnp.int32), axes, 0)
  return jnp.take(x, local, axis=-2)
