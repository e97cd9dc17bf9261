"""Attention of new tokens over a cached context and over themselves, with one softmax (the paper's section 3.3).

Shapes are those of one shard: B is the shard's part of the batch; all heads are here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Context(NamedTuple):
  """One layer's cached keys and values [B, S, K, Q]; the first lengths [B] positions of each row count."""

  keys: jax.Array
  values: jax.Array
  lengths: jax.Array


def attend(q: jax.Array, k: jax.Array, v: jax.Array, context: Context | None) -> jax.Array:
  """Each new token sees its row's context and the new tokens up to itself.

  Args:
    q: [B, T, H, Q], rotated, not yet scaled.
    k, v: [B, T, K, Q], keys rotated.
    context: what was cached before these tokens, or None.

  Returns:
    [B, T, H, Q] in q's dtype. The softmax is float32.
  """
  b, t, h, d = q.shape
  kv = k.shape[2]
  q = (q * jnp.asarray(d ** -0.5, q.dtype)).reshape(b, t, kv, h // kv, d)
  logits = [_logits(q, k, jnp.tril(jnp.ones((1, t, t), bool)))]
  values = [v]
  if context is not None:
    valid = jnp.arange(context.keys.shape[1])[None, :] < context.lengths[:, None]  # [B, S]
    logits.insert(0, _logits(q, context.keys, valid[:, None, :]))
    values.insert(0, context.values)
  top = jnp.max(jnp.stack([jnp.max(x, axis=-1) for x in logits]), axis=0)[..., None]  # [B, K, H/K, T, 1]
  weights = [jnp.exp(x - top) for x in logits]
  total = sum(jnp.sum(w, axis=-1) for w in weights)  # [B, K, H/K, T]
  out = sum(
      jnp.einsum('bkgts,bskd->btkgd', w.astype(x.dtype), x, preferred_element_type=jnp.float32)
      for w, x in zip(weights, values))
  out = out / jnp.moveaxis(total, 3, 1)[..., None]
  return out.reshape(b, t, h, d).astype(q.dtype)


def _logits(q: jax.Array, k: jax.Array, visible: jax.Array) -> jax.Array:
  """q [B, T, K, H/K, Q], k [B, S, K, Q], visible [B or 1, T or 1, S] -> [B, K, H/K, T, S] float32."""
  logits = jnp.einsum('btkgd,bskd->bkgts', q, k, preferred_element_type=jnp.float32)
  return jnp.where(visible[:, None, None, :, :], logits, -jnp.inf)
