"""Log-probabilities of long sequences, in chunks over a KV cache.

One pass over T positions needs attention logits for T * T pairs. Chunks need a cache of T positions
and the logits of one chunk, so memory grows linearly with T.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from t5x_inference_ext.model import cache as kv_cache
from t5x_inference_ext.model.cache import KeysValues, KVCache
from t5x_inference_ext.model.chunks import empty_cache
from t5x_inference_ext.model.embedding import unembed
from t5x_inference_ext.model.log_probs import RankedTokens, target_log_probs
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.sharding.layout import num_shards

LONG = 1024  # up to this many positions, one pass is used: it is a little faster
# Maximum number of attention logits of a chunk on a device (16 MiB in float32), unless a chunk of
# LEAST_CHUNK positions has more.
MOST_LOGITS = 2**22
LEAST_CHUNK = 128


def chunk_size(model: Model, rows: int, length: int) -> int:
  """Return how many positions of a row one pass takes: `length`, or a multiple of LEAST_CHUNK."""
  logits = rows * model.config.num_heads * length / model.mesh.size  # of one position
  if length <= LONG or logits * length <= MOST_LOGITS:
    return length
  return max(1, int(MOST_LOGITS / logits) // LEAST_CHUNK) * LEAST_CHUNK


def score_sequences(
  model: Model,
  weights: Weights,
  tokens: Int[Array, 'B T'],
  targets: Int[Array, 'B T'],
  top: int = 0,
) -> Float[Array, 'B T'] | RankedTokens:
  """Return log p(target | inputs so far) at each position: Model.target_scores for long rows.

  Args:
    model: The model.
    weights: Weights on the model's mesh.
    tokens: [B, T] int32. Model inputs (BOS first).
    targets: [B, T] int32. Target of each position.
    top: How many of the most likely tokens are returned too, as RankedTokens.
  """
  rows, length = tokens.shape
  size = chunk_size(model, rows, length)
  if size >= length:
    return model.target_scores(weights, tokens, targets, top)
  steps = -(-length // size)
  padding = (0, 0), (0, steps * size - length)
  chunks = (jnp.pad(ids, padding).reshape(rows, steps, size) for ids in (tokens, targets))
  prefill = model.prefilling
  cache = empty_cache(prefill, weights, rows, steps * size)

  def step(cache: KVCache, chunk: Any) -> tuple[KVCache, Any]:
    tokens, targets = chunk
    found, cache = score_chunk(prefill, weights, cache, tokens, targets, top)
    return cache, found

  def whole(found: jax.Array) -> jax.Array:
    joined = jnp.moveaxis(found, 0, 1).reshape(rows, steps * size, *found.shape[3:])
    return joined[:, :length]

  _, found = lax.scan(step, cache, tuple(jnp.moveaxis(ids, 1, 0) for ids in chunks))
  return jax.tree.map(whole, found)


def score_chunk(
  model: Model,
  weights: Weights,
  cache: KVCache,
  tokens: Int[Array, 'B T'],
  targets: Int[Array, 'B T'],
  top: int = 0,
) -> tuple[Float[Array, 'B T'] | RankedTokens, KVCache]:
  """Run T more tokens per row after the cached ones; return their targets' log-probabilities.

  Args:
    model: The model. The pass runs in its decode layout.
    weights: Weights on the model's mesh.
    cache: KVCache with room for T more positions in each row.
    tokens: [B, T] int32. Model inputs.
    targets: [B, T] int32. Target of each position.
    top: How many of the most likely tokens are returned too, as RankedTokens.

  Returns:
    [B, T] float32 or RankedTokens, and the cache with the tokens in it.
  """
  rows, length = tokens.shape
  sharding = model.chunk_sharding(rows, length)
  sampling, shape = model.sampling_axes(rows), model.mesh.shape
  shards = min(num_shards(model.prefill_layout.stored_hidden, shape), num_shards(sampling, shape))
  width = rows * model.config.vocab_size // shards  # see Model.log_probs
  position_axes = sharding.residual[1]

  def finish(
    weights: Weights,
    cache: KVCache,
    x: jax.Array,
    kv: KeysValues,
    targets: jax.Array,
    counts: jax.Array,
  ) -> tuple[Any, KVCache]:
    def logits(x: jax.Array) -> jax.Array:
      return unembed(model, sharding, weights, x, position_axes, rows)

    found = target_log_probs(x, targets, logits, position_axes, width, top)
    return found, kv_cache.append(cache, *kv, counts)

  spec = model.cache_spec(sharding, weights, cache)
  tokens, targets = (model.pad_tokens(ids, sharding.layout) for ids in (tokens, targets))
  found, cache = model.on_shards(
    sharding,
    finish,
    weights,
    spec,
    inputs=(P(sampling), P(sharding.attention_rows)),
    outputs=(P(sampling), spec),
  )(weights, cache, tokens, targets, jnp.full(rows, length, jnp.int32))
  return jax.tree.map(lambda each: each[:, :length], found), cache
