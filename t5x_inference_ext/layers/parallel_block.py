"""The parallel block, per shard, in the 2D weight-stationary layout (the paper's sections 3.2, 3.4 and appendix A.2).

One norm feeds attention and MLP; query, key, value and both MLP inputs are one matmul, both outputs another.
"""

import jax
import jax.numpy as jnp

from t5x_inference_ext.collectives import plain
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.layers.attention import Context, attend
from t5x_inference_ext.layers.norm import rms_norm
from t5x_inference_ext.layers.rotary import rotate
from t5x_inference_ext.layers.sharding import BatchSharding
from t5x_inference_ext.quantization import int8
from t5x_inference_ext.weights import LayerWeights


def parallel_block(
    x: jax.Array,
    w: LayerWeights,
    angles: tuple[jax.Array, jax.Array],
    context: Context | None,
    config: ModelConfig,
    batch: BatchSharding,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """One layer on one shard.

  Args:
    x: [B, T, E_xyz], the residual stream.
    w: the shard's part of the layer's weights.
    angles: rotary (sin, cos) of the new tokens, [B/axes, T, Q/2].
    context: the layer's cache, the shard's part of the batch, or None.
    config: the model.
    batch: how attention splits the batch.

  Returns:
    The new x, and the new tokens' (keys, values), each [B/axes, T, K, Q].
  """
  layout = batch.layout
  embed, hidden = layout.embed_axes, layout.hidden_axes
  shards = plain.axis_size(hidden)
  f = config.d_ff // shards
  y = rms_norm(x, w.norm, config.norm_epsilon, config.d_model)  # [B, T, E_xyz]
  y = plain.all_gather(y, hidden, 2)  # [B, T, E_x]
  y = int8.matmul(y, w.w_in, w.in_scale)  # [B, T, columns/yz], partial sums over x
  mlp, qkv = y[..., :2 * f], y[..., 2 * f:]

  attention, keys, values = _attention(qkv, angles, context, config, batch)

  gate_linear = mlp.reshape(*mlp.shape[:2], 2, f)
  gate_linear = plain.reduce_scatter(gate_linear, embed, 3)  # [B, T, 2, F_yzx]
  mlp = jax.nn.swish(gate_linear[:, :, 0]) * gate_linear[:, :, 1]
  mlp = plain.all_gather(mlp, embed, 2)  # [B, T, F_yz]

  y = jnp.concatenate([mlp, attention], axis=-1)
  y = int8.matmul(y, w.w_out)  # [B, T, E_x], partial sums over yz
  y = plain.reduce_scatter(y, hidden, 2)  # [B, T, E_xyz]
  if w.out_scale is not None:
    y = int8.rescale(y, w.out_scale)
  return x + y, (keys, values)


def _attention(qkv, angles, context, config, batch):
  """qkv [B, T, (query, key, value columns)/yz], partial over x -> ([B, T, H*Q/yz], keys, values [B/axes, T, K, Q])."""
  heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.d_head
  qkv = batch.to_batch(qkv)  # [B/axes, T, yz, columns/yz]
  b, t, shards, _ = qkv.shape
  width = -(-heads * d // shards)  # query columns of a shard, padding included
  query = qkv[..., :width].reshape(b, t, -1)
  kv = qkv[..., width:].reshape(b, t, -1)[..., :2 * kv_heads * d]
  query = query[..., :heads * d].reshape(b, t, heads, d)
  keys, values = (part.reshape(b, t, kv_heads, d) for part in jnp.split(kv, 2, axis=-1))
  query, keys = rotate(query, *angles), rotate(keys, *angles)
  out = attend(query, keys, values, context).reshape(b, t, heads * d)
  out = jnp.pad(out, ((0, 0), (0, 0), (0, width * shards - heads * d)))
  return batch.from_batch(out), keys, values
