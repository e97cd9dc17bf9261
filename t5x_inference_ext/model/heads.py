"""Queries, keys and values before attention: biases, clipping, norms, rotary positions.

All are applied to whole heads, where the sums over devices are complete.
"""

from collections.abc import Mapping

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.positions import RotaryAngles, rotate
from t5x_inference_ext.sharding.activations import ActivationSharding


def prepare_heads(
  q: Float[Array, 'b m h q'],
  k: Float[Array, 'b t k q'],
  v: Float[Array, 'b t k q'],
  vectors: Mapping[str, jax.Array],
  config: ModelConfig,
  sharding: ActivationSharding,
  angles: RotaryAngles,
) -> tuple[Float[Array, 'b m h q'], Float[Array, 'b t k q'], Float[Array, 'b t k q']]:
  """Return queries, keys and values as attention takes them.

  Args:
    q, k, v: Products with the matrices, summed.
    vectors: Biases and norms of this shard's heads, [heads, q] (vectors.local_vectors).
    config: The model.
    sharding: Sharding of the pass's activations.
    angles: Rotary angles of the new tokens.
  """
  q, k, v = (
    _biased(x, vectors.get(f'{name}_bias'), config)
    for name, x in (('query', q), ('key', k), ('value', v))
  )
  if config.qk_norm != 'none':
    heads, axes = sharding.heads, sharding.axes
    q = _normed(q, 'query_norm', vectors, config, heads.queries(), axes['attention_heads'])
    k = _normed(k, 'key_norm', vectors, config, heads.cached(), axes['kv_heads'])
  return rotate(q, *angles.queries), rotate(k, *angles.keys), v


def _biased(x: jax.Array, bias: jax.Array | None, config: ModelConfig) -> jax.Array:
  """Add a bias [heads, q], and clip."""
  if bias is not None:
    x = (x.astype(jnp.float32) + bias[None, None]).astype(x.dtype)
  return x if config.qkv_clip is None else jnp.clip(x, -config.qkv_clip, config.qkv_clip)


def _normed(
  x: jax.Array,
  name: str,
  vectors: Mapping[str, jax.Array],
  config: ModelConfig,
  heads: tuple[int | None, ...],
  axes: tuple[str, ...],
) -> jax.Array:
  """Normalize queries or keys [b, t, heads, q], each head alone or all heads together.

  Args:
    x: Queries or keys of this shard's heads. Padding heads are zeros.
    name: 'query_norm' or 'key_norm'.
    vectors: As in prepare_heads.
    config: The model.
    heads: For each head on all devices along `axes`, its index in the model, None for padding.
    axes: Mesh axes that split the heads.
  """
  x32 = x.astype(jnp.float32)
  weights: jax.Array | None = None
  if config.qk_norm.endswith('_all'):
    # A device's share of the mean of all heads. Several devices may have copies of one key head.
    counts = np.asarray([0.0 if h is None else 1 / heads.count(h) for h in heads], np.float32)
    weights = ops.local_slice(jnp.asarray(counts / np.sum(counts)), axes, 0)[None, None, :, None]

  def mean(values: jax.Array) -> jax.Array:
    by_head = jnp.mean(values, axis=-1, keepdims=True)
    if weights is None:
      return by_head
    return ops.all_reduce(jnp.sum(by_head * weights, axis=2, keepdims=True), axes)

  if config.qk_norm.startswith('layer'):
    x32 = x32 - mean(x32)
  y = x32 * lax.rsqrt(mean(x32 * x32) + config.norm_epsilon) * vectors[name][None, None]
  bias = vectors.get(f'{name}_bias')
  return (y if bias is None else y + bias[None, None]).astype(x.dtype)
