"""Attention of new tokens over a cached context and over themselves, with one softmax.

This is the paper's section 3.3. All shapes are those of one shard: rows b, query heads h, key heads
k, head dimension q. There are t new tokens. The shard has the keys and values of all t tokens, and
the queries of m of them.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_inference_ext.hardware import MAX_ATTENTION_LOGITS
from t5x_inference_ext.model.attention_rules import AttentionRules, TokenPositions
from t5x_inference_ext.quantization.kv import KV, units_and_scales

# A single query is padded to so many, on TPUs, if it attends to LEAST_PADDED positions or more.
PADDED_QUERIES, LEAST_PADDED = 8, 32


class Context(NamedTuple):
  """Keys and values of one layer that were cached before the new tokens.

  Attributes:
    keys: [b, k, s, q]. Each row's own keys.
    values: [b, k, s, q]. Each row's own values.
    lengths: [b] int32. Filled positions of each row; later positions are not attended to.
  """

  keys: KV
  values: KV
  lengths: jax.Array


def attend(
  q: Float[Array, 'b m h q'],
  k: KV,
  v: KV,
  context: Context | None,
  first_query: Int[Array, ''] | int = 0,
  rules: AttentionRules | None = None,
) -> Float[Array, 'b m h q']:
  """Attend from each new token to its row's context and to the new tokens up to itself.

  Args:
    q: [b, m, h, q]. Queries, rotated, not yet scaled.
    k: [b, k, t, q]. Rotated keys, rounded to the cache's precision, so that results do not depend
      on the sizes of chunks.
    v: [b, k, t, q]. Values, rounded to the cache's precision.
    context: Keys and values cached before these tokens, or None.
    first_query: Index of the shard's first query among the t new tokens.
    rules: The layer's rules for logits, or None.

  Returns:
    [b, m, h, q] in q's dtype. The softmax is float32.
  """
  positions = k.shape[2] + (0 if context is None else context.keys.shape[2])
  rows = max(1, MAX_ATTENTION_LOGITS // (q.shape[1] * q.shape[2] * positions))
  # In an exported program the number of rows can be symbolic.
  if not isinstance(q.shape[0], int) or q.shape[0] <= rows:
    return _attend(q, k, v, context, first_query, rules)

  def attend_row(row: tuple[jax.Array, KV, KV, Context | None, TokenPositions | None]) -> jax.Array:
    q, k, v, context, positions = jax.tree.map(lambda x: x[None], row)
    return _attend(q, k, v, context, first_query, rules and rules.with_positions(positions))[0]

  mapped = q, k, v, context, rules and rules.positions
  return lax.map(attend_row, mapped, batch_size=None if rows == 1 else rows)


def _attend(
  q: jax.Array,
  k: KV,
  v: KV,
  context: Context | None,
  first_query: jax.Array | int,
  rules: AttentionRules | None,
) -> jax.Array:
  grouped, causal = grouped_queries(q, k.shape[2], k.shape[1], first_query)

  queries, new = (None, None) if rules is None else rules.positions
  segments = [(k, v, causal, new)]
  if context is not None:
    cached = jnp.arange(context.keys.shape[2])[None, :]  # positions, [1, s]
    filled = (cached < context.lengths[:, None])[:, None, None, :]
    segments.insert(0, (context.keys, context.values, filled, cached))
  logits = [
    (masked_logits(grouped, keys, visible, rules, queries, positions), values)
    for keys, values, visible, positions in segments
  ]
  return ungrouped(softmax_over(logits, q.dtype), q)


def softmax_over(segments: Sequence[tuple[jax.Array, KV]], dtype: jnp.dtype) -> jax.Array:
  """Return attention's output, with one softmax over several segments of positions.

  Args:
    segments: For each segment, logits [b, k, n, s] and values [b, k, s, q] (or shared [k, s, q]).
    dtype: Dtype of the operands of products.

  Returns:
    [b, k, n, q] float32.
  """
  # [b, k, n, 1]
  largest = functools.reduce(jnp.maximum, (jnp.max(x, axis=-1, keepdims=True) for x, _ in segments))
  weights = [jnp.exp(x - largest) for x, _ in segments]
  total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
  out = sum(mix(w, values, dtype) for w, (_, values) in zip(weights, segments)) / total
  assert isinstance(out, jax.Array)  # for the type checker: sum() of an empty list is the int 0
  return out


def largest_logits(
  largest: Float[Array, 'b k n'], segments: Sequence[tuple[jax.Array, KV]]
) -> Float[Array, 'b k n']:
  """Return the largest logits of `largest` and of segments; see softmax_over."""
  for logits, _ in segments:
    largest = jnp.maximum(largest, jnp.max(logits, axis=-1))
  return largest


def with_segments(
  out: Float[Array, 'b k n q'],
  total: Float[Array, 'b k n'],
  largest: Float[Array, 'b k n'],
  segments: Sequence[tuple[jax.Array, KV]],
  dtype: jnp.dtype,
) -> Float[Array, 'b k n q']:
  """Return attention's output over positions that are summed already and over further segments.

  Args:
    out: Sum of exp(logit - largest) * value over the former positions, float32.
    total: Sum of exp(logit - largest) over them.
    largest: The largest logit of all positions.
    segments: See softmax_over.
    dtype: Dtype of the operands of products.
  """
  for logits, values in segments:
    weights = jnp.exp(logits - largest[..., None])
    total += jnp.sum(weights, axis=-1)
    out += mix(weights, values, dtype)
  return out / total[..., None]


def grouped_queries(
  q: Float[Array, 'b m h q'], new: int, kv_heads: int, first_query: Int[Array, ''] | int
) -> tuple[Float[Array, 'b k n q'], Bool[Array, '1 1 n t']]:
  """Scale queries, and group them by key head, so that each group is one product.

  Args:
    q: [b, m, h, q]. Queries, not yet scaled.
    new: t, the new tokens.
    kv_heads: k.
    first_query: Index of the first of the m queries among the t new tokens.

  Returns:
    Scaled queries [b, k, n, q] with n = m * (h / k), heads fastest; and the causal mask
    [1, 1, n, t]: whether a query sees a new token.
  """
  b, m, h, d = q.shape
  group = h // kv_heads  # query heads that share a key head
  q = q * jnp.asarray(d**-0.5, q.dtype)
  q = jnp.moveaxis(q.reshape(b, m, kv_heads, group, d), 2, 1).reshape(b, kv_heads, -1, d)
  query = jnp.arange(m * group) // group  # row of the product -> position among the m queries
  causal = jnp.arange(new)[None, :] <= first_query + query[:, None]  # [m * group, t]
  return q, causal[None, None]


def ungrouped(out: Float[Array, 'b k n q'], q: Float[Array, 'b m h q']) -> Float[Array, 'b m h q']:
  """Return the grouped output in the shape and dtype of the queries q."""
  b, m, h, d = q.shape
  out = jnp.moveaxis(out.reshape(b, out.shape[1], m, -1, d), 1, 2)
  return out.reshape(b, m, h, d).astype(q.dtype)


def masked_logits(
  q: Float[Array, 'b k n q'],
  keys: KV,
  visible: Bool[Array, '#b 1 #n s'],
  rules: AttentionRules | None = None,
  query_positions: Int[Array, 'b m'] | None = None,
  key_positions: Int[Array, '#b s'] | None = None,
) -> Float[Array, 'b k n s']:
  """Return float32 logits at keys [b, k, s, q] or shared keys [k, s, q]; -inf if not visible.

  The positions of queries and keys are needed only if there are rules.
  """
  keys, scales = units_and_scales(keys, q.dtype)
  if keys.ndim == 3:  # one product for all rows, which reads the shared keys once
    logits = jnp.einsum('bknq,ksq->bkns', q, keys, preferred_element_type=jnp.float32)
  else:
    logits = product_of_rows(q, keys, 3)
  logits = _scaled(logits, scales)
  if rules is not None:
    assert query_positions is not None and key_positions is not None
    logits, visible = rules.apply(logits, visible, query_positions, key_positions)
  return jnp.where(visible, logits, -jnp.inf)


def _scaled(x: Float[Array, 'b k n s'], scales: jax.Array | None) -> Float[Array, 'b k n s']:
  """Multiply x by int8 scales [b, k, s] or shared [k, s]: cheaper than scaling keys or values."""
  if scales is None:
    return x
  scales = scales if scales.ndim == 3 else scales[None]
  return x * scales[:, :, None]


def mix(weights: Float[Array, 'b k n s'], values: KV, dtype: jnp.dtype) -> Float[Array, 'b k n q']:
  """Return the float32 weighted sum of values [b, k, s, q] or shared values [k, s, q].

  Both operands of the product are cast to `dtype`.
  """
  values, scales = units_and_scales(values, dtype)
  weights = _scaled(weights, scales).astype(dtype)
  if values.ndim == 3:
    return jnp.einsum('bkns,ksq->bknq', weights, values, preferred_element_type=jnp.float32)
  return product_of_rows(weights, values, 2)


def product_of_rows(x: Float[Array, 'b k n i'], y: Float[Array, 'b k s q'], axis: int) -> jax.Array:
  """Return for each row and key head the product of x with y over y's axis `axis`: [b, k, n, j].

  XLA:TPU computes the product of a single vector, as of a model with a key head for each query
  head, by multiplications and sums, without the matrix unit. Rows of zeros keep it from that.
  """

  def product(x: jax.Array, y: jax.Array) -> jax.Array:
    # dot_general keeps the operands in this order. On CPU, einsum would swap them and make a
    # transposed copy of the cache.
    dimensions = ((3,), (axis,)), ((0, 1), (0, 1))
    return lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)

  def padded(x: jax.Array, y: jax.Array) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, PADDED_QUERIES - 1), (0, 0)))
    return product(x, y)[:, :, :1]

  if x.shape[2] > 1 or y.shape[2] < LEAST_PADDED:
    return product(x, y)
  return lax.platform_dependent(x, y, tpu=padded, default=product)
