"""Attention of new tokens over pages of a pool, over shared pages, and over themselves.

Pages are the batch axis of the products: each page meets the queries of the row that owns it. The
partial softmaxes of a row's pages are then combined. So the time is proportional to the number of
pages read. Shapes are per shard, with the letters of model.attention; there are n pages of s
positions.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_inference_ext.model.attention import (
  grouped_queries,
  largest_logits,
  masked_logits,
  mix,
  ungrouped,
  with_segments,
)
from t5x_inference_ext.model.attention_rules import AttentionRules
from t5x_inference_ext.quantization.kv import KV


class PagedContext(NamedTuple):
  """Keys and values of one layer that were cached in pages before the new tokens.

  Attributes:
    keys: [n, k, s, q], or more pages, of which only the first n are read.
    values: Like keys.
    lengths: [b] int32. Filled positions of each row.
    owners: [n] int32. The row that each page belongs to.
    starts: [n] int32. Position in the owner's row at which each page begins.
    shared_keys: [k, p, q], or None. Keys of all shared pages.
    shared_values: [k, p, q], or None.
    shared_visible: [b, pages] bool, or None. Which rows see which shared pages.
    shared_starts: [pages] int32, or None. Position in the rows at which each shared page begins.
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
  """Attend from each new token to its row's context in pages, and to the new tokens up to itself.

  A row whose logits or sums are not finite gets NaN; other rows are not affected. One
  product takes all pages, whatever their number: for few new tokens, the logits are smaller than
  the cache.

  Args:
    q: [b, m, h, q]. Queries, rotated, not yet scaled.
    k: [b, k, t, q]. Rotated keys of the new tokens, rounded to the cache's precision.
    v: [b, k, t, q]. Values, rounded to the cache's precision.
    context: Keys and values cached before these tokens.
    first_query: Index of the shard's first query among the t new tokens.
    rules: The layer's rules for logits, or None.
  """
  grouped, causal = grouped_queries(q, k.shape[2], k.shape[1], first_query)
  owners, starts = context.owners, context.starts
  queries, new = (None, None) if rules is None else rules.positions
  # Segments whose batch axis is the rows: the new tokens and the shared pages.
  segments = [(masked_logits(grouped, k, causal, rules, queries, new), v)]
  if context.shared_keys is not None:
    segments.append(shared_segment(grouped, context, rules))
  positions = starts[:, None] + jnp.arange(context.keys.shape[2])[None, :]  # [n, s]
  visible = positions < _of_owners(context.lengths, owners)[:, None]
  keys, values = jax.tree.map(lambda x: x[: len(owners)], (context.keys, context.values))
  logits = masked_logits(
    _of_owners(grouped, owners),
    keys,
    visible[:, None, None, :],
    rules,
    None if queries is None else _of_owners(queries, owners),
    positions,
  )
  # [b, n, 1, 1]: whether row b owns page n.
  mine = (jnp.arange(len(q))[:, None] == owners[None, :])[:, :, None, None]
  largest = jnp.max(jnp.where(mine, jnp.max(logits, axis=-1)[None], -jnp.inf), axis=1)
  largest = largest_logits(largest, segments)  # finite: a new token sees itself
  # [b, k, m * group], like all sums here. Pages are summed by a product with zeros and ones, in
  # which 0 times NaN would break other rows; so pages that are not finite get weight 0. Cached
  # values are small enough that their sum is finite.
  sound = _of_owners(jnp.isfinite(largest), owners)[..., None]
  weights = jnp.exp(logits - _of_owners(largest, owners)[..., None])
  weights = jnp.where(sound, weights, 0)
  total = jnp.sum(jnp.where(mine, jnp.sum(weights, axis=-1)[None], 0), axis=1)
  out = lax.dot_general(
    mine[:, :, 0, 0].astype(jnp.float32),
    mix(weights, values, q.dtype),
    (((1,), (0,)), ((), ())),
    precision=lax.Precision.HIGHEST,
  )
  return ungrouped(with_segments(out, total, largest, segments, q.dtype), q)


def shared_segment(
  grouped: Float[Array, 'b k n q'], context: PagedContext, rules: AttentionRules | None = None
) -> tuple[Float[Array, 'b k n s'], KV]:
  """Return the logits of all rows at the keys of all shared pages, and those pages' values.

  Args:
    grouped: [b, k, n, q]. Queries, scaled and grouped by key head.
    context: A context with shared pages.
    rules: The layer's rules for logits, or None.
  """
  assert context.shared_keys is not None and context.shared_values is not None
  assert context.shared_visible is not None
  size = context.shared_keys.shape[1] // context.shared_visible.shape[1]
  visible = jnp.repeat(context.shared_visible, size, axis=1)[:, None, None, :]
  positions: jax.Array | None = None
  if rules is not None:
    assert context.shared_starts is not None
    positions = (context.shared_starts[:, None] + jnp.arange(size)[None, :]).reshape(1, -1)
  queries = None if rules is None else rules.positions.queries
  logits = masked_logits(grouped, context.shared_keys, visible, rules, queries, positions)
  return logits, context.shared_values


def _of_owners(x: Array, owners: Int[Array, ' n']) -> Array:
  """Return, for each page, the element of x [b, ...] for the row that owns the page."""
  return jnp.take(x, owners, axis=0, mode='clip')
