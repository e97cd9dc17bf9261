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
from t5x_inference_ext.sharding.activations import padded_length
from t5x_inference_ext.sharding.layout import num_shards

LONG = 1024  # up to this many positions, one pass is used: it is a little faster
# Maximum number of attention logits of a chunk on a device (16 MiB in float32), unless a chunk of
# LEAST_CHUNK positions has more.
MOST_LOGITS = 2**22
LEAST_CHUNK = 128


def chunk_size(model: Model, rows: int, length: int) -> int:
  """Return how many positions of a row one pass takes: `length`, or a multiple of LEAST_CHUNK."""
  logits = rows * model.config.num_heads * length / model.mesh.size  # of one position, on a device
  if length <= LONG or logits * length <= MOST_LOGITS:
    return length
  return max(1, int(MOST_LOGITS / logits) // LEAST_CHUNK) * LEAST_CHUNK


def score_sequences(
  model: Model, weights: Weights, tokens: Int[Array, 'B T'], targets: Int[Array, 'B T']
) -> Float[Array, 'B T']:
  """Return log p(target | inputs so far) at each position, as Model.log_probs does.

  Args:
    model: The model.
    weights: Weights on the model's mesh.
    tokens: [B, T] int32. Model inputs (BOS first).
    targets: [B, T] int32. Target of each position.
  """
  rows, length = tokens.shape
  size = chunk_size(model, rows, length)
  if size >= length:
    return model.log_probs(weights, tokens, targets)
  steps = -(-length // size)
  padding = (0, 0), (0, steps * size - length)
  tokens, targets = (jnp.pad(ids, padding) for ids in (tokens, targets))
  found = score_chunks(model, weights, tokens, targets, steps, size)
  assert isinstance(found, jax.Array)
  return found[:, :length]


def score_chunks(
  model: Model,
  weights: Weights,
  tokens: Int[Array, 'B T'],
  targets: Int[Array, 'B T'],
  count: int | jax.Array,
  size: int,
  top: int = 0,
) -> Float[Array, 'B T'] | RankedTokens:
  """Return log p(target | inputs so far) at each position of the first chunks of rows.

  Args:
    model: The model.
    weights: Weights on the model's mesh.
    tokens: [B, T] int32. Model inputs (BOS first). T is a multiple of `size`.
    targets: [B, T] int32. Target of each position.
    count: Chunks of each row to run, at least 1. The results of other positions are 0.
    size: Positions of a chunk.
    top: How many of the most likely tokens are returned too, as RankedTokens.

  Returns:
    [B, T] float32 or RankedTokens. Log-probabilities are NaN as in Model.logits.
  """
  prefill, (rows, length) = model.prefilling, tokens.shape
  room = padded_length(model.prefill_layout, model.mesh.shape, rows, length)
  cache = empty_cache(prefill, weights, rows, room)

  def run(i: int | jax.Array, cache: KVCache, read: int | None) -> tuple[Any, KVCache]:
    inputs, wanted = (lax.dynamic_slice_in_dim(ids, i * size, size, 1) for ids in (tokens, targets))
    return score_chunk(prefill, weights, cache, inputs, wanted, top, read)

  def step(i: jax.Array, carry: tuple[KVCache, Any]) -> tuple[KVCache, Any]:
    cache, found = carry
    new, cache = run(i, cache, None)
    return cache, jax.tree.map(
      lambda x, new: lax.dynamic_update_slice_in_dim(x, new, i * size, 1), found, new
    )

  # The first chunk is a pass of its own, in which attention reads no cached positions.
  first, cache = run(0, cache, 0)
  padding = (0, 0), (0, length - size)
  found = jax.tree.map(lambda x: jnp.pad(x, (*padding, *((0, 0),) * (x.ndim - 2))), first)
  _, found = lax.fori_loop(1, count, step, (cache, found))
  # In later chunks, attention reads finite values in the place of broken ones.
  log_probs = found.log_probs if top else found
  log_probs = jnp.where(jnp.cumsum(jnp.isnan(log_probs), axis=1) > 0, jnp.nan, log_probs)
  return found._replace(log_probs=log_probs) if top else log_probs


def score_chunk(
  model: Model,
  weights: Weights,
  cache: KVCache,
  tokens: Int[Array, 'B T'],
  targets: Int[Array, 'B T'],
  top: int = 0,
  read: int | None = None,
) -> tuple[Float[Array, 'B T'] | RankedTokens, KVCache]:
  """Run T more tokens per row after the cached ones; return their targets' log-probabilities.

  Args:
    model: The model. The pass runs in its decode layout.
    weights: Weights on the model's mesh.
    cache: KVCache with room for T more positions in each row.
    tokens: [B, T] int32. Model inputs.
    targets: [B, T] int32. Target of each position.
    top: How many of the most likely tokens are returned too, as RankedTokens.
    read: Number of cached positions per row that attention reads, from the first on; None: all.

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
    read=read,
  )(weights, cache, tokens, targets, jnp.full(rows, length, jnp.int32))
  return jax.tree.map(lambda each: each[:, :length], found), cache
