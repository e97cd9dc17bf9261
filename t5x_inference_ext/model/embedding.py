"""The tied embedding, split V_hidden E_embed as it is stored: lookup and logits, per shard. No weights move."""

import math

import jax
from jax import lax
import jax.numpy as jnp

from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.quantization import int8
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.layout import Axes


def embed(table: jax.Array, tokens: jax.Array, sharding: ActivationSharding) -> jax.Array:
  """table [V/hidden, E/embed], all tokens [B, T] -> [B, T, E], the shard's part of the residual stream.

  An id outside the vocabulary gives zeros, as a one-hot would.
  """
  # Every device looks up all tokens, also those that others keep. Where only rows are split, that is done for a part of
  # the positions at a time: never more than the residual stream itself is held.
  rows, positions, _ = map(ops.axis_size, sharding.residual)
  parts = (
    1 if positions > 1 else math.gcd(tokens.shape[1], rows if sharding.layout.gathered_axes else 1)
  )
  if parts == 1:
    return _embed(table, tokens, sharding)
  x = lax.map(
    lambda part: _embed(table, part, sharding),
    jnp.moveaxis(tokens.reshape(tokens.shape[0], parts, -1), 1, 0),
  )  # [parts, B, T/parts, E]
  return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], tokens.shape[1], x.shape[-1])


def _embed(table, tokens, sharding):
  layout, rows = sharding.layout, table.shape[0]
  local = tokens - ops.shard_index(layout.stored_hidden) * rows
  here = (local >= 0) & (local < rows)
  x = jnp.take(table, jnp.clip(local, 0, rows - 1), axis=0)
  x = jnp.where(
    here[..., None], x, jnp.zeros((), x.dtype)
  )  # [B, T, E/embed], partial sums over hidden
  for dim, axes in enumerate(sharding.residual):
    if dim < 2:
      x = ops.all_to_all(x, tuple(a for a in axes if a in layout.stored_embed), dim, 2)
    x = ops.reduce_scatter(x, tuple(a for a in axes if a in layout.stored_hidden), dim)
  return x


def last_positions(x: jax.Array, lengths: jax.Array, sharding: ActivationSharding) -> jax.Array:
  """x [B, T, E] of the residual stream and lengths [B] of its rows -> [B, 1, E]: each row's last token."""
  positions = sharding.residual[1]
  last = lengths - 1 - ops.shard_index(positions) * x.shape[1]
  y = jnp.take_along_axis(x, jnp.clip(last, 0, x.shape[1] - 1)[:, None, None], axis=1)
  here = (last >= 0) & (last < x.shape[1])
  return ops.all_reduce(jnp.where(here[:, None, None], y, jnp.zeros((), y.dtype)), positions)


def unembed(
  table: jax.Array,
  x: jax.Array,
  vocab_size: int,
  d_model: int,
  sharding: ActivationSharding,
  positions: Axes,
  sampling: Axes,
) -> jax.Array:
  """The logits of x, normed.

  Args:
    table: [V/hidden, E/embed].
    x: [B, T, E], split as the residual stream but for its positions.
    vocab_size: V.
    d_model: E.
    placement: of x.
    positions: the axes that x is split over by position.
    sampling: the axes that the logits are to be split over by rows.

  Returns:
    [B_sampling, T, V] float32, scaled by 1/sqrt(E).
  """
  layout = sharding.layout
  rows, _, features = sharding.residual
  x = ops.all_gather(ops.all_gather(x, rows, 0), positions, 1)
  # All tokens, and the axes of the table: [B, T, E/embed].
  x = ops.all_gather(x, tuple(a for a in features if a in layout.stored_hidden), 2)
  gathered = tuple(a for a in layout.stored_embed if a in layout.gathered_axes)
  x = ops.local_slice(x, gathered, 2)
  logits = int8.matmul(
    x, table, dtype=jnp.float32, transposed=True
  )  # [B, T, V/hidden], partial sums
  embed_rows = tuple(a for a in layout.stored_embed if a in sampling)
  logits = ops.reduce_scatter(logits, embed_rows, 0)
  logits = ops.all_reduce(logits, tuple(a for a in layout.stored_embed if a not in sampling))
  hidden_rows = tuple(a for a in layout.stored_hidden if a in sampling)
  logits = ops.all_to_all(
    logits[:, :, None], hidden_rows, 0, 2
  )  # [B_sampling, T, blocks, V/hidden]
  logits = ops.all_gather(logits, tuple(a for a in layout.stored_hidden if a not in sampling), 2)
  return logits.reshape(*logits.shape[:2], -1)[..., :vocab_size] * d_model**-0.5
