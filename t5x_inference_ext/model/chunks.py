"""Prompts in pieces: an empty cache to begin with, chunks of bounded memory, beginnings that rows share."""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from t5x_inference_ext.model.cache import KVCache, Shared, with_heads
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.quantization.kv import to_cache, whole_tiles
from t5x_inference_ext.sharding.activations import ActivationSharding


def empty_cache(
  model: Model, weights: Weights, rows: int, size: int, shared: Shared | None = None
) -> KVCache:
  """A cache with nothing in it but what its rows share, as the model's decode layout has it.

  Args:
    model: for whose extend and decode_step it is.
    weights: whether these are stacked decides the cache's form.
    rows: B.
    size: S, beside what is shared.
    shared: as `share` makes it for so many rows.
  """
  sharding, config = cache_sharding(model, rows), model.config
  shape = rows, whole_tiles(size, model.cache_dtype), len(sharding.heads.cached()), config.d_head
  shape = (config.num_layers, *shape) if weights.stacked else shape
  zeros = lambda: to_cache(jnp.zeros(shape), model.cache_dtype)
  make = lambda: zeros() if weights.stacked else tuple(zeros() for _ in range(config.num_layers))
  return constrain_cache(
    model, KVCache(make(), make(), jnp.zeros(rows, jnp.int32), shared), weights
  )


def cache_sharding(model: Model, rows: int) -> ActivationSharding:
  """Where a cache of so many rows lies in the decode layout. Prefill may take rows that a decode step can't split."""
  return model.chunk_sharding(rows, 1)


def constrain_cache(model: Model, cache: KVCache, weights: Weights) -> KVCache:
  """The cache, where the decode layout has it."""
  return model.constrained(cache, cache_sharding(model, cache.lengths.shape[0]), weights)


def abstract_cache(model: Model, cache: KVCache, weights: Weights) -> KVCache:
  """The shapes of a cache (jax.eval_shape), with the shardings that the decode layout gives it."""
  specs = model.cache_spec(cache_sharding(model, cache.lengths.shape[0]), weights, cache)

  def struct(spec, arrays):  # of keys or of values
    sharding = NamedSharding(model.mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)

  return jax.tree.map(struct, specs, cache)


def with_layout_of(model: Model, cache: KVCache, weights: Weights, to: Model) -> KVCache:
  """The rows of a cache of one model's decode layout, in another's. What they share is dropped: it is stored beside."""
  rows = cache.lengths.shape[0]
  held, wanted = (cache_sharding(m, rows).heads.cached() for m in (model, to))
  keys, values = jax.tree.map(lambda x: with_heads(x, held, wanted), (cache.keys, cache.values))
  return constrain_cache(to, KVCache(keys, values, cache.lengths), weights)


def share_row(
  model: Model, cache: KVCache, weights: Weights, row: int, length: int, to: Model, rows: int
) -> Shared:
  """The first positions of one row, for the rows of another cache to begin with.

  Args:
    model: whose decode layout the cache is in; `share` itself is to be jitted with it, row, length, to and rows static.
    cache: holds the row.
    weights: stacked or not.
    row: that begins as the others do.
    length: P, the positions to be shared.
    to: in whose decode layout the others' cache is.
    rows: theirs. None of them has anything of it yet: set the lengths.
  """
  held = cache_sharding(model, cache.lengths.shape[0]).heads.cached()
  wanted = cache_sharding(to, rows).heads.cached()

  def take(x):  # [.., B, S, K, Q] -> [.., P, K, Q]
    x = lax.index_in_dim(x, row, x.ndim - 4, keepdims=False)
    return with_heads(lax.slice_in_dim(x, 0, length, axis=-3), held, wanted)

  keys, values = jax.tree.map(take, (cache.keys, cache.values))
  shared = Shared(keys, values, jnp.zeros(rows, jnp.int32))
  return empty_cache(to, weights, rows, 1, shared).shared


def prefill_in_chunks(
  model: Model, weights: Weights, tokens: jax.Array, lengths: jax.Array, size: int, chunk: int
) -> tuple[jax.Array, KVCache]:
  """As Model.prefill, `chunk` positions at a time: activations take the memory of a chunk, however long the prompts.

  Args:
    model, weights, tokens, lengths, size: as Model.prefill's.
    chunk: positions of all rows that one pass takes.
  """
  rows, length = tokens.shape
  prefill = model.prefilling
  chunk = min(chunk, length)
  steps = -(-length // chunk)
  tokens = jnp.pad(tokens, ((0, 0), (0, steps * chunk - length)))
  # Room for the padding of the last chunk, which is beyond every row's end.
  cache = empty_cache(prefill, weights, rows, max(size, chunk))

  def step(state, i):
    logits, cache = state
    new = lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, 1)
    counts = jnp.clip(lengths - i * chunk, 0, chunk)
    found, cache = prefill.prefill_chunk(weights, cache, new, counts)
    return (jnp.where(counts[:, None] > 0, found, logits), cache), None

  logits = jnp.zeros((rows, model.config.vocab_size), jnp.float32)
  (logits, cache), _ = lax.scan(step, (logits, cache), jnp.arange(steps))
  cut = lambda x: x[..., : whole_tiles(size, model.cache_dtype), :, :]
  cache = dataclasses.replace(
    cache, keys=jax.tree.map(cut, cache.keys), values=jax.tree.map(cut, cache.values)
  )
  return logits, with_layout_of(prefill, cache, weights, model)
