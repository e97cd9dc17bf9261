"""One pass of the model on one shard, up to the residual stream after the last layer."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_inference_ext.model.attention_rules import TokenPositions, pass_rules
from t5x_inference_ext.model.block import Layer
from t5x_inference_ext.model.cache import KeysValues, KVCache
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.embedding import embed
from t5x_inference_ext.model.kernel_attention import attention_kernel
from t5x_inference_ext.model.pages import PagedCache
from t5x_inference_ext.model.positions import pass_angles
from t5x_inference_ext.model.shardings import ShardedModel
from t5x_inference_ext.model.token_parts import token_parts
from t5x_inference_ext.model.vectors import local_vectors
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.sharding.activations import ActivationSharding

# (weights, cache, x [b, t, e], (keys, values), *inputs) -> the outputs of the pass, on one shard.
Finish = Callable[..., Any]


def forward(
  model: ShardedModel,
  sharding: ActivationSharding,
  finish: Finish,
  read: int | None,
  weights: Weights,
  cache: KVCache | PagedCache | None,
  tokens: Int[Array, 'B T'] | Int[Array, ' B'],
  *inputs: Any,
) -> Any:
  """Run a pass on one shard.

  Args:
    model: Gives the config and dtypes.
    sharding: Sharding of the pass's activations.
    finish: Computes the outputs of the pass from the residual stream and the new tokens' keys and
      values.
    read: Number of cached positions per row that attention reads, from the first on; None: all.
    weights: This shard's part of the weights.
    cache: This shard's part of the KV cache that the tokens continue, or None if rows begin with
      the tokens.
    tokens: [B, T] int32. All tokens of the pass, on every shard. A decode step passes [B], which is
      reshaped to [B, 1] here, because reshaping outside of shard_map would be an extra operation.
    *inputs: Further per-shard arguments of `finish`.
  """
  if tokens.ndim == 1:
    tokens = tokens[:, None]
  if cache is None:
    start = jnp.zeros(tokens.shape[0] // ops.axis_size(sharding.attention_rows), jnp.int32)
  else:
    start = cache.lengths
  positions = start[:, None] + jnp.arange(tokens.shape[1])[None, :]
  config, query_axes = model.config, sharding.attention_positions
  angles = pass_angles(positions, config, query_axes)
  rules = pass_rules(
    config,
    sharding,
    weights.relative_bias,
    TokenPositions(ops.local_slice(positions, query_axes, 1), positions),
  )
  parts = token_parts(config, sharding, model.mesh, *tokens.shape)
  x = parts.split(embed(weights, tokens, None if cache is None else start, model, sharding))
  kernel = attention_kernel(model.attention, model.mesh)
  layer = Layer(
    config,
    sharding,
    model.cache_dtype,
    angles,
    cache,
    read,
    rules,
    kernel,
    parts,
    weights.adapter_rows,
  )
  layers = local_vectors(weights.layers, config, sharding)
  cached = None if cache is None else cache.by_layer(read)
  local = config.local_layers
  kv: KeysValues
  if weights.stacked and len(set(local)) == 1:
    x, kv = jax.lax.scan(lambda x, inputs: layer(x, (*inputs, local[0])), x, (layers, cached))
  elif weights.stacked:
    x, kv = jax.lax.scan(layer, x, (layers, cached, jnp.asarray(local)))
  else:
    by_layer = []
    for i, layer_weights in enumerate(layers):
      x, layer_kv = layer(x, (layer_weights, None if cached is None else cached[i], local[i]))
      by_layer.append(layer_kv)
    keys, values = zip(*by_layer)
    kv = keys, values
    if cache is not None:
      cache = _written_after(cache, x[0])
  return finish(weights, cache, parts.join(x), kv, *inputs)


def _written_after(cache: KVCache | PagedCache, x: Float[Array, 'b t e']) -> KVCache | PagedCache:
  """Return the cache with lengths that, to the compiler, depend on x, the residual stream.

  So new tokens are written after the last layer has read its cache. Otherwise XLA:CPU copies that
  layer's cache twice in order to write earlier. An optimization barrier does not help: XLA:CPU
  drops it.
  """
  never = (x[0, 0, 0] > jnp.inf).astype(jnp.int32)
  return dataclasses.replace(cache, lengths=cache.lengths + never)
