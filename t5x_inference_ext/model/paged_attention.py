"""Attention of new tokens over pages of a pool, over shared pages, and over themselves.

Pages are the batch axis of the products: each page meets the queries of the row that owns it. The
partial softmaxes of a row's pages are then combined, so that time follows the pages that are read.
All shapes are those of one shard, with the letters of model.attention, and n pages of s positions.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_inference_ext.model.attention import grouped_queries, masked_logits, mix, ungrouped
from t5x_inference_ext.model.attention_rules import AttentionRules
from t5x_inference_ext.quantization.kv import KV


class PagedContext(NamedTuple):
  """Keys and values of one layer that were cached in pages before the new tokens.

  Attributes:
    keys: [n, s, k, q].
    values: [n, s, k, q].
    lengths: [b] int32. Filled positions of each row.
    owners: [n] int32. The row that each page belongs to.
    starts: [n] int32. Position in its row of each page's first one.
    shared_keys: [p, k, q], or None. Keys of all shared pages.
    shared_values: [p, k, q], or None.
    shared_visible: [b, pages] bool, or None. Which rows see which shared pages.
    shared_starts: [pages] int32, or None. Position in its rows of each shared page's first one.
  """

  keys: KV
  values: KV
  lengths: jax.Array
  owners: jax.Array
  starts: jax.Array
  shared_keys: KV | None = None
  shared_values: KV | None = None
  shared_visible: jax.Array | None = None
  shared_starts: jax.Array | None = None


def attend_pages(
  q: Float[Array, 'b m h q'],
  k: KV,
  v: KV,
  context: PagedContext,
  first_query: Int[Array, ''] | int = 0,
  rules: AttentionRules | None = None,
) -> Float[Array, 'b m h q']:
  """Attend as model.attention.attend does, to a context in pages.

  A row whose logits or sums are not finite gets NaN, and no other row does. Logits of few new
  tokens are smaller than the cache itself: there is no limit to pages in one product.

  Args:
    q: [b, m, h, q]. Queries, rotated, not yet scaled.
    k: [b, t, k, q]. Rotated keys of the new tokens, as the cache holds them.
    v: [b, t, k, q]. Values, as the cache holds them.
    context: Keys and values cached before these tokens.
    first_query: Index among the t new tokens of the shard's first query.
    rules: The layer's rules for logits, or None.
  """
  grouped, causal = grouped_queries(q, k.shape[1], k.shape[2], first_query)
  b, owners = len(q), context.owners
  queries, new = (None, None) if rules is None else rules.positions
  # New and shared tokens: segments with rows as the batch axis.
  segments = [(masked_logits(grouped, k, causal, rules, queries, new), v)]
  if context.shared_keys is not None:
    assert context.shared_values is not None and context.shared_visible is not None
    size = context.shared_keys.shape[0] // context.shared_visible.shape[1]
    visible = jnp.repeat(context.shared_visible, size, axis=1)[:, None, None, :]
    shared_positions: jax.Array | None = None
    if rules is not None:
      assert context.shared_starts is not None
      shared_positions = context.shared_starts[:, None] + jnp.arange(size)[None, :]
      shared_positions = shared_positions.reshape(1, -1)
    shared = masked_logits(grouped, context.shared_keys, visible, rules, queries, shared_positions)
    segments.append((shared, context.shared_values))
  # Own pages, as [n, k, m * group, s].
  position = context.starts[:, None] + jnp.arange(context.keys.shape[1])[None, :]
  visible = position < _of_owners(context.lengths, owners)[:, None]
  page_queries = None if queries is None else _of_owners(queries, owners)
  pages = masked_logits(
    _of_owners(grouped, owners),
    context.keys,
    visible[:, None, None, :],
    rules,
    page_queries,
    position,
  )

  mine = jnp.arange(b)[:, None] == owners[None, :]  # [b, n]
  largest = jnp.max(
    jnp.where(mine[:, :, None, None], jnp.max(pages, axis=-1)[None], -jnp.inf), axis=1
  )  # [b, k, m * group]
  for logits, _ in segments:
    largest = jnp.maximum(largest, jnp.max(logits, axis=-1))  # a new token sees itself: finite
  largest = largest[..., None]
  weights = jnp.exp(pages - _of_owners(largest, owners))
  total, out, broken = _sum_of_pages(
    jnp.sum(weights, axis=-1, keepdims=True), mix(weights, context.values, q.dtype), mine
  )
  for logits, values in segments:
    weights = jnp.exp(logits - largest)
    total += jnp.sum(weights, axis=-1, keepdims=True)
    out += mix(weights, values, q.dtype)
  out = jnp.where(broken[:, None, None, None], jnp.nan, out / total)
  return ungrouped(out, q)


def _of_owners(x: Array, owners: Int[Array, ' n']) -> Array:
  """Return, for each page, x [b, ...] of the row that owns it."""
  return jnp.take(x, owners, axis=0, mode='clip')


def _sum_of_pages(
  total: Float[Array, 'n k g 1'], out: Float[Array, 'n k g q'], mine: Bool[Array, 'b n']
) -> tuple[Float[Array, 'b k g 1'], Float[Array, 'b k g q'], Bool[Array, ' b']]:
  """Sum the partial sums of each row's pages. Also return which rows have one that is not finite.

  The sum is a product with zeros and ones, so what is not finite is left out of it: 0 times NaN
  would break the other rows.
  """
  parts = jnp.concatenate([out, total], axis=-1)
  finite = jnp.isfinite(parts)
  broken = jnp.any(mine & ~jnp.all(finite, axis=(1, 2, 3))[None, :], axis=1)
  summed = lax.dot_general(
    mine.astype(jnp.float32),
    jnp.where(finite, parts, 0),
    (((1,), (0,)), ((), ())),
    precision=lax.Precision.HIGHEST,
  )
  return summed[..., -1:], summed[..., :-1], broken
