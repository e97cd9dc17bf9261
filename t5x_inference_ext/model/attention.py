"""Attention of new tokens over a cached context and over themselves, with one softmax (the paper's section 3.3).

Shapes are those of one shard: B, H and K are its rows and heads; of the new tokens T are all, and M those that the
shard's queries are.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from t5x_inference_ext.quantization.kv import KV, units_and_scales

# Logits [B, H, M, T] of more elements than this (1 GiB in float32) are not made at once, but some rows at a time.
MAX_ATTENTION_LOGITS = 2**28


class Context(NamedTuple):
  """One layer's cached keys and values [B, S, K, Q]; the first lengths [B] positions of each row count.

  Before them may come positions that rows share, [P, K, Q], of which each row has the first shared_lengths [B].
  """

  keys: KV
  values: KV
  lengths: jax.Array
  shared_keys: KV | None = None
  shared_values: KV | None = None
  shared_lengths: jax.Array | None = None


def attend(
  q: jax.Array, k: KV, v: KV, context: Context | None, first: jax.Array | int = 0
) -> jax.Array:
  """Each new token sees its row's context and the new tokens up to itself.

  Args:
    q: [B, M, H, Q], rotated, not yet scaled.
    k, v: [B, T, K, Q], keys rotated, as the cache holds them: chunks of any size then give the same.
    context: what was cached before these tokens, or None.
    first: of the new tokens, the one that the first query is.

  Returns:
    [B, M, H, Q] in q's dtype. The softmax is float32.
  """
  seen = k.shape[1]
  if context is not None:
    seen += context.keys.shape[1] + (
      0 if context.shared_keys is None else context.shared_keys.shape[0]
    )
  rows = max(1, MAX_ATTENTION_LOGITS // (q.shape[1] * q.shape[2] * seen))
  if (
    not isinstance(q.shape[0], int) or q.shape[0] <= rows
  ):  # an exported program has any number of rows
    return _attend(q, k, v, context, first)
  shared = (
    {}
    if context is None
    else dict(shared_keys=context.shared_keys, shared_values=context.shared_values)
  )
  own = context and context._replace(
    shared_keys=None, shared_values=None
  )  # of rows; the rest is not mapped over

  def one(row):
    q, k, v, own = jax.tree.map(lambda x: x[None], row)
    return _attend(q, k, v, own and own._replace(**shared), first)[0]

  return lax.map(one, (q, k, v, own), batch_size=None if rows == 1 else rows)


def _attend(q, k, v, context, first):
  b, m, h, d = q.shape
  kv = k.shape[2]
  q = q * jnp.asarray(d**-0.5, q.dtype)
  # Query heads that share a key head lie above each other, as the rows of one product: [B, K, H/K * M, Q].
  q = jnp.moveaxis(q.reshape(b, m, kv, h // kv, d), 2, 1).reshape(b, kv, -1, d)
  row = jnp.arange(m * (h // kv)) // (h // kv)  # the token that a row of the product is of
  causal = jnp.arange(k.shape[1])[None, :] <= first + row[:, None]  # [M * H/K, T]
  segments = [(k, v, causal[None, None])]
  if context is not None:
    filled = jnp.arange(context.keys.shape[1])[None, :] < context.lengths[:, None]  # [B, S]
    segments.insert(0, (context.keys, context.values, filled[:, None, None, :]))
    if context.shared_keys is not None:
      begins = (
        jnp.arange(context.shared_keys.shape[0])[None, :] < context.shared_lengths[:, None]
      )  # [B, P]
      segments.insert(0, (context.shared_keys, context.shared_values, begins[:, None, None, :]))
  logits = [_logits(q, keys, visible) for keys, _, visible in segments]
  top = functools.reduce(
    jnp.maximum, (jnp.max(x, axis=-1, keepdims=True) for x in logits)
  )  # [B, K, M * H/K, 1]
  weights = [jnp.exp(x - top) for x in logits]
  total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
  out = sum(_mix(w, values, q.dtype) for w, (_, values, _) in zip(weights, segments)) / total
  return jnp.moveaxis(out.reshape(b, kv, m, h // kv, d), 1, 2).reshape(b, m, h, d).astype(q.dtype)


def _logits(q: jax.Array, keys: KV, visible: jax.Array) -> jax.Array:
  """q [B, K, N, Q], keys [B, S, K, Q] or shared [P, K, Q], visible [B or 1, 1, N or 1, S] -> [B, K, N, S] float32."""
  keys, scales = units_and_scales(keys, q.dtype)
  if keys.ndim == 3:  # one product of all rows: what they share is read once
    logits = jnp.einsum('bknq,skq->bkns', q, keys, preferred_element_type=jnp.float32)
  else:
    # dot_general, not einsum: it keeps the operands in this order, which spares a transposed copy of the cache on CPU.
    logits = lax.dot_general(
      q,
      jnp.moveaxis(keys, 2, 1),
      (((3,), (3,)), ((0, 1), (0, 1))),
      preferred_element_type=jnp.float32,
    )
  return jnp.where(visible, _scaled(logits, scales), -jnp.inf)


def _scaled(x: jax.Array, scales: jax.Array | None) -> jax.Array:
  """x [B, K, N, S] float32 times scales [B, S, K] or shared [P, K]: they multiply what is small, not keys and values."""
  if scales is None:
    return x
  scales = scales if scales.ndim == 3 else scales[None]
  return x * jnp.moveaxis(scales, 2, 1)[:, :, None]


def _mix(weights: jax.Array, values: KV, dtype: jnp.dtype) -> jax.Array:
  """weights [B, K, N, S] float32, values [B, S, K, Q] or shared [P, K, Q], both as `dtype` -> [B, K, N, Q] float32."""
  values, scales = units_and_scales(values, dtype)
  weights = _scaled(weights, scales).astype(dtype)
  if values.ndim == 3:
    return jnp.einsum('bkns,skq->bknq', weights, values, preferred_element_type=jnp.float32)
  return lax.dot_general(
    weights,
    jnp.moveaxis(values, 2, 1),
    (((3,), (2,)), ((0, 1), (0, 1))),
    preferred_element_type=jnp.float32,
  )
