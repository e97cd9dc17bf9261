"""Prefill in chunks, which bounds the memory of activations; construction of empty caches."""

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from t5x_inference_ext.model.cache import KVCache, LayersKV
from t5x_inference_ext.model.pages import UNUSED, AnyCache, PagedCache, SharedPages, check_page_size
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.quantization.kv import KV, empty_kv, whole_tiles
from t5x_inference_ext.sharding.layout import num_shards


def empty_cache(model: Model, weights: Weights, rows: int, size: int) -> KVCache:
  """Make an empty cache in the model's decode layout.

  Args:
    model: The model whose prefill_chunk and decode_step will use the cache.
    weights: Weights. If they are stacked, the cache is too; else it has an array per layer.
    rows: B.
    size: S, positions of each row.
  """
  keys, values = (_empty(model, weights, rows, rows, size) for _ in range(2))
  cache = KVCache(keys, values, jnp.zeros(rows, jnp.int32))
  return constrain_cache(model, cache, weights)


def empty_pages(
  model: Model,
  weights: Weights,
  rows: int,
  pages: int,
  page_size: int,
  table_width: int,
  shared_pages: int = 0,
) -> PagedCache:
  """Make a paged cache in the model's decode layout; no row owns a page yet.

  Args:
    model: The model whose decode_step will use the cache.
    weights: Weights. If they are stacked, the cache is too; else it has an array per layer.
    rows: B.
    pages: Number of pages on each device that splits rows, including page 0 (scratch).
    page_size: S, positions of a page.
    table_width: M, maximum number of pages of a row.
    shared_pages: NS, number of pages that rows can share.

  Raises:
    RequestError: Pages cannot have this size.
  """
  check_page_size(page_size, model.cache_dtype)
  count = pages * page_shards(model, rows)
  keys, values = (_empty(model, weights, rows, count, page_size) for _ in range(2))
  shared = None
  if shared_pages:
    of_one = functools.partial(_empty, model, weights, rows, shared_pages, page_size)
    ours = [of_one(heads_first=True) for _ in range(2)]
    visible, starts = jnp.zeros((rows, shared_pages), bool), jnp.zeros(shared_pages, jnp.int32)
    shared = SharedPages(ours[0], ours[1], visible, starts)
  cache = PagedCache(
    keys,
    values,
    lengths=jnp.zeros(rows, jnp.int32),
    table=jnp.zeros((rows, table_width), jnp.int32),
    owners=jnp.zeros(count, jnp.int32),
    starts=jnp.full(count, UNUSED, jnp.int32),
    shared=shared,
    read=pages,
    read_shared=shared_pages,
  )
  return constrain_cache(model, cache, weights)


def page_shards(model: Model, rows: int) -> int:
  """Return how many devices split a cache's rows; each has its own pool of pages."""
  return num_shards(model.cache_sharding(rows).attention_rows, model.mesh.shape)


def _empty(
  model: Model, weights: Weights, rows: int, count: int, size: int, heads_first: bool = False
) -> LayersKV:
  """Return keys (or values) of zeros: `count` rows or pages of `size` positions.

  Args:
    model, weights: Decide heads, dtype and form.
    rows: B. The sharding of heads may depend on it.
    count: Number of rows or pages.
    size: Positions of each.
    heads_first: Whether heads come before the pages, as in shared ones.
  """
  heads, config = len(model.cache_sharding(rows).heads.cached()), model.config
  shape = (heads, count) if heads_first else (count, heads)
  lead = (config.num_layers,) if weights.stacked else ()

  def zeros() -> KV:
    positions = whole_tiles(size, model.cache_dtype)
    return empty_kv((*lead, *shape, positions, config.d_head), model.cache_dtype)

  return zeros() if weights.stacked else tuple(zeros() for _ in range(config.num_layers))


def constrain_cache(model: Model, cache: AnyCache, weights: Weights) -> AnyCache:
  """Constrain the cache to the sharding of the model's decode layout."""
  return model.constrained(cache, model.cache_sharding(cache.lengths.shape[0]), weights)


def abstract_cache(model: Model, cache: AnyCache, weights: Weights) -> AnyCache:
  """Add the decode layout's shardings to a cache of abstract arrays (from jax.eval_shape)."""
  specs = model.cache_spec(model.cache_sharding(cache.lengths.shape[0]), weights, cache)

  def with_sharding(spec: P, arrays: Any) -> Any:  # `arrays`: a layer's keys, or values
    sharding = NamedSharding(model.mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)

  return jax.tree.map(with_sharding, specs, cache)


def with_layout_of(model: Model, cache: KVCache, weights: Weights, to: Model) -> KVCache:
  """Convert a cache from the decode layout of `model` to that of `to`."""
  rows = cache.lengths.shape[0]
  held, wanted = (m.cache_sharding(rows) for m in (model, to))
  keys, values = to.reshard_kv((cache.keys, cache.values), cache.size, held, wanted)
  return constrain_cache(to, KVCache(keys, values, cache.lengths), weights)


def prefill_in_chunks(
  model: Model,
  weights: Weights,
  tokens: Int[Array, 'B T'],
  lengths: Int[Array, ' B'],
  size: int,
  chunk: int,
) -> tuple[Float[Array, 'B V'], KVCache]:
  """Run prompts like Model.prefill, but in passes of `chunk` positions of every row.

  Activations take only the memory of one chunk, however long the prompts are.

  Args:
    model: The model.
    weights: Weights on the model's mesh.
    tokens: [B, T] int32. Model inputs.
    lengths: [B] int32. Number of valid tokens in each row.
    size: S, the positions of the new cache.
    chunk: Positions of each row in one pass.

  Returns:
    Logits [B, V] float32 after each row's last token, and the cache in the decode layout.
  """
  rows, length = tokens.shape
  prefill = model.prefilling
  chunk = min(chunk, length)
  steps = -(-length // chunk)
  tokens = jnp.pad(tokens, ((0, 0), (0, steps * chunk - length)))
  # The cache needs at least `chunk` positions: every pass writes a whole chunk, with its padding.
  cache = empty_cache(prefill, weights, rows, max(size, chunk))

  def step(state: tuple[jax.Array, KVCache], i: jax.Array) -> tuple[Any, None]:
    logits, cache = state
    new = lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, 1)
    counts = jnp.clip(lengths - i * chunk, 0, chunk)
    chunk_logits, cache = prefill.prefill_chunk(weights, cache, new, counts)
    # A row keeps NaN logits. Its later chunks would look sound, because values that are not
    # finite are replaced in the cache.
    new_logits = (counts[:, None] > 0) & ~jnp.isnan(logits[:, :1])
    return (jnp.where(new_logits, chunk_logits, logits), cache), None

  logits = jnp.zeros((rows, model.config.vocab_size), jnp.float32)
  (logits, cache), _ = lax.scan(step, (logits, cache), jnp.arange(steps))
  positions = whole_tiles(size, model.cache_dtype)
  keys, values = jax.tree.map(lambda x: x[..., :positions, :], (cache.keys, cache.values))
  cache = dataclasses.replace(cache, keys=keys, values=values)
  return logits, with_layout_of(prefill, cache, weights, model)
