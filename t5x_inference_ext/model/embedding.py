"""The tied embedding on one shard: lookup and logits.

The table stays split as it is stored, rows over the hidden axes and columns over the embed axis: no
weights move.
"""

import math

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.quantization import int8
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.layout import Axes


def embed(
  table: Float[Array, 'v e_stored'], tokens: Int[Array, 'B T'], sharding: ActivationSharding
) -> Float[Array, 'b t e']:
  """Look up tokens and return this shard's part of the residual stream.

  An id outside the vocabulary embeds as zeros, as in a product with its one-hot vector.

  Args:
    table: [v, e_stored]. This shard's part of the embedding.
    tokens: [B, T] int32. All tokens of the pass: every shard has them.
    sharding: Where the pass keeps its activations.
  """
  # Every device looks up all tokens, also those that other devices keep. Where only rows are split,
  # the lookup runs over a part of the positions at a time, so that it never takes more memory than
  # the residual stream itself.
  rows, positions, _ = map(ops.axis_size, sharding.residual)
  split_rows = rows if sharding.layout.gathered_axes else 1
  parts = 1 if positions > 1 else math.gcd(tokens.shape[1], split_rows)
  if parts == 1:
    return _embed(table, tokens, sharding)
  x = lax.map(
    lambda part: _embed(table, part, sharding),
    jnp.moveaxis(tokens.reshape(tokens.shape[0], parts, -1), 1, 0),
  )  # [parts, b, T/parts, e]
  return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], tokens.shape[1], x.shape[-1])


def _embed(table: jax.Array, tokens: jax.Array, sharding: ActivationSharding) -> jax.Array:
  layout, rows = sharding.layout, table.shape[0]
  local = tokens - ops.shard_index(layout.stored_hidden) * rows
  here = (local >= 0) & (local < rows)
  x = jnp.take(table, jnp.clip(local, 0, rows - 1), axis=0)
  # [B, T, e_stored], partial sums over the hidden axes.
  x = jnp.where(here[..., None], x, jnp.zeros((), x.dtype))
  for dim, axes in enumerate(sharding.residual):
    if dim < 2:
      x = ops.all_to_all(x, tuple(a for a in axes if a in layout.stored_embed), dim, 2)
    x = ops.reduce_scatter(x, tuple(a for a in axes if a in layout.stored_hidden), dim)
  return x


def last_positions(
  x: Float[Array, 'b t e'], lengths: Int[Array, ' b'], sharding: ActivationSharding
) -> Float[Array, 'b 1 e']:
  """Return the residual stream at each row's last token, for rows of these lengths (at least 1)."""
  positions = sharding.residual[1]
  last = lengths - 1 - ops.shard_index(positions) * x.shape[1]
  y = jnp.take_along_axis(x, jnp.clip(last, 0, x.shape[1] - 1)[:, None, None], axis=1)
  here = (last >= 0) & (last < x.shape[1])
  return ops.all_reduce(jnp.where(here[:, None, None], y, jnp.zeros((), y.dtype)), positions)


def unembed(
  table: Float[Array, 'v e_stored'],
  x: Float[Array, 'b t e'],
  vocab_size: int,
  d_model: int,
  sharding: ActivationSharding,
  position_axes: Axes,
  sampling_axes: Axes,
) -> Float[Array, 'rows T V']:
  """Compute float32 logits, scaled by 1/sqrt(d_model).

  Args:
    table: [v, e_stored]. This shard's part of the embedding.
    x: [b, t, e]. Output of the final norm, split as the residual stream except for its positions.
    vocab_size: V.
    d_model: E.
    sharding: Where x lives.
    position_axes: Mesh axes that split the positions of x.
    sampling_axes: Mesh axes that are to split the rows of the logits.

  Returns:
    [rows, T, V] float32: this shard's rows, at all positions.
  """
  layout = sharding.layout
  rows, _, features = sharding.residual
  x = ops.all_gather(ops.all_gather(x, rows, 0), position_axes, 1)
  # All tokens, with features split as the table's: [B, T, e_stored].
  x = ops.all_gather(x, tuple(a for a in features if a in layout.stored_hidden), 2)
  gathered = tuple(a for a in layout.stored_embed if a in layout.gathered_axes)
  x = ops.local_slice(x, gathered, 2)
  # [B, T, v], partial sums over the embed axis.
  logits = int8.matmul(x, table, dtype=jnp.float32, transposed=True)
  embed_rows = tuple(a for a in layout.stored_embed if a in sampling_axes)
  logits = ops.reduce_scatter(logits, embed_rows, 0)
  logits = ops.all_reduce(logits, tuple(a for a in layout.stored_embed if a not in sampling_axes))
  hidden_rows = tuple(a for a in layout.stored_hidden if a in sampling_axes)
  logits = ops.all_to_all(logits[:, :, None], hidden_rows, 0, 2)  # [rows, T, blocks, v]
  unsplit = tuple(a for a in layout.stored_hidden if a not in sampling_axes)
  logits = ops.all_gather(logits, unsplit, 2)
  return logits.reshape(*logits.shape[:2], -1)[..., :vocab_size] * d_model**-0.5
