"""The tied embedding, split V_yzE_x: lookup and logits, per shard. No weights move."""

import jax
import jax.numpy as jnp

from t5x_inference_ext.collectives import plain
from t5x_inference_ext.layers.sharding import BatchSharding
from t5x_inference_ext.layouts.layout import Layout


def embed(table: jax.Array, tokens: jax.Array, layout: Layout) -> jax.Array:
  """table [V_yz, E_x], tokens [B, T] -> [B, T, E_xyz]. An id outside the vocabulary gives zeros, as a one-hot would."""
  rows = table.shape[0]
  local = tokens - plain.shard_index(layout.hidden_axes) * rows
  here = (local >= 0) & (local < rows)
  x = jnp.take(table, jnp.clip(local, 0, rows - 1), axis=0)
  x = jnp.where(here[..., None], x, jnp.zeros((), x.dtype))  # [B, T, E_x], partial sums over yz
  return plain.reduce_scatter(x, layout.hidden_axes, 2)


def unembed(table: jax.Array, x: jax.Array, vocab_size: int, d_model: int, batch: BatchSharding) -> jax.Array:
  """x [B, T, E_xyz], normed -> logits [B/axes, T, V] float32, scaled by 1/sqrt(E)."""
  x = plain.all_gather(x, batch.layout.hidden_axes, 2)  # [B, T, E_x]
  logits = jnp.einsum('bte,ve->btv', x, table, preferred_element_type=jnp.float32)  # V_yz, partial sums over x
  logits = batch.to_batch(logits)  # [B/axes, T, yz, V/yz]
  return logits.reshape(*logits.shape[:2], -1)[..., :vocab_size] * d_model ** -0.5
