"""Queries, keys and values before attention: biases, clipping, norms, rotary positions.

All of them are applied to whole heads, after the sums over devices are complete.
"""

from collections.abc import Callable, Mapping
import types

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.model.adapters import scaled_heads
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.positions import RotaryAngles, rotate
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.layout import Axes


def prepare_heads(
  q: Float[Array, 'b m h q'],
  k: Float[Array, 'b t k q'],
  v: Float[Array, 'b t k q'],
  vectors: Mapping[str, jax.Array],
  config: ModelConfig,
  sharding: ActivationSharding,
  angles: RotaryAngles | None,
  factors: Mapping[str, jax.Array] = types.MappingProxyType({}),
  rows: Int[Array, ' b'] | None = None,
) -> tuple[Float[Array, 'b m h q'], Float[Array, 'b t k q'], Float[Array, 'b t k q']]:
  """Apply biases, clipping, norms and rotary positions to queries, keys and values.

  Args:
    q, k, v: Products with the matrices, summed.
    vectors: Biases and norms of this shard's heads, [heads, q] (vectors.local_vectors).
    config: The model.
    sharding: Sharding of the pass's activations.
    angles: Rotary angles of the new tokens, or None without rotary positions.
    factors: Factors [n, heads, q] by adapter of 'query', 'key' or 'value', bias included.
    rows: [b] int32. Number of each row's adapter; None: no row has one.
  """

  def finished(name: str, x: jax.Array) -> jax.Array:
    x = _biased(x, vectors.get(f'{name}_bias'))
    if rows is not None and name in factors:
      x = scaled_heads(x, factors[name], rows)
    return x if config.qkv_clip is None else jnp.clip(x, -config.qkv_clip, config.qkv_clip)

  q, k, v = finished('query', q), finished('key', k), finished('value', v)
  if config.qk_norm != 'none':
    q, k = _normed(q, k, vectors, config, sharding)
  if angles is None:
    return q, k, v
  return rotate(q, *angles.queries), rotate(k, *angles.keys), v


def _biased(x: jax.Array, bias: jax.Array | None) -> jax.Array:
  """Add a bias [heads, q], if there is one."""
  return x if bias is None else (x.astype(jnp.float32) + bias[None, None]).astype(x.dtype)


def _normed(
  q: jax.Array,
  k: jax.Array,
  vectors: Mapping[str, jax.Array],
  config: ModelConfig,
  sharding: ActivationSharding,
) -> tuple[jax.Array, jax.Array]:
  """Normalize queries and keys [b, t, heads, q], each head separately or all heads together."""
  pair = q.astype(jnp.float32), k.astype(jnp.float32)

  def means(values: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    queries, keys = (jnp.mean(x, axis=-1, keepdims=True) for x in values)
    if not config.qk_norm.endswith('_all'):
      return queries, keys
    return _means_of_all_heads(queries, keys, sharding)

  if config.qk_norm.startswith('layer'):
    pair = _each(jnp.subtract, pair, means(pair))
  variances = means(_each(jnp.multiply, pair, pair))
  found = []
  for name, x, y, variance in zip(('query_norm', 'key_norm'), (q, k), pair, variances):
    y = y * lax.rsqrt(variance + config.norm_epsilon) * vectors[name][None, None]
    bias = vectors.get(f'{name}_bias')
    found.append((y if bias is None else y + bias[None, None]).astype(x.dtype))
  return found[0], found[1]


def _each(
  function: Callable[[jax.Array, jax.Array], jax.Array],
  first: tuple[jax.Array, jax.Array],
  second: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
  return function(first[0], second[0]), function(first[1], second[1])


def _means_of_all_heads(
  queries: jax.Array, keys: jax.Array, sharding: ActivationSharding
) -> tuple[jax.Array, jax.Array]:
  """Average means of heads [b, t, heads, 1] over all heads of the model, on all devices.

  Padding heads are left out. Copies of one key head on several devices count once.
  """
  axes, heads = sharding.axes, sharding.heads

  def local_sum(x: jax.Array, heads: tuple[int | None, ...], axes: Axes) -> jax.Array:
    counts = np.asarray([0.0 if h is None else 1 / heads.count(h) for h in heads], np.float32)
    shares = ops.local_slice(jnp.asarray(counts / np.sum(counts)), axes, 0)
    return jnp.sum(x * shares[None, None, :, None], axis=2, keepdims=True)

  queries = local_sum(queries, heads.queries(), axes['attention_heads'])
  keys = local_sum(keys, heads.cached(), axes['kv_heads'])
  if axes['kv_heads'] != axes['attention_heads']:  # every device has the only key head
    return ops.all_reduce(queries, axes['attention_heads']), keys
  both = ops.all_reduce(jnp.concatenate([queries, keys], axis=1), axes['attention_heads'])
  return both[:, : queries.shape[1]], both[:, queries.shape[1] :]
