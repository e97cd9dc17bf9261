"""The embedding and the head on one shard: lookup and logits.

Both tables keep the split of the stored weights: rows over the hidden axes, columns over the embed
axis. So no weights move.
"""

import functools
import math
import operator
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.finite import broken_rows, mark_rows
from t5x_inference_ext.model.norm import norm
from t5x_inference_ext.model.shardings import ShardedModel
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.quantization import int8
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.layout import Axes, Layout


def embed(
  weights: Weights,
  tokens: Int[Array, 'B T'],
  start: Int[Array, ' rows'] | None,
  model: ShardedModel,
  sharding: ActivationSharding,
) -> Float[Array, 'b t e']:
  """Look up tokens, and return this shard's part of the residual stream.

  An id outside the vocabulary embeds as zeros, as a product with its one-hot vector would; but ids
  from V on are those of soft prompts, if there are any. Learned positions are added, and a norm is
  applied, if the model has them. A token beyond the last learned position becomes NaN, so that its
  row fails and is not continued wrongly.

  Args:
    weights: This shard's part of the weights.
    tokens: [B, T] int32. All tokens of the pass, on every shard.
    start: [rows] int32. Position of each row's first token, for the rows that this shard's
      attention processes. None: 0 for all rows.
    model: Gives the config and the dtype.
    sharding: Sharding of the pass's activations.
  """
  lookups = [_Lookup(weights.embedding, tokens, weights.embedding_scale)]
  if weights.position_embedding is not None:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if start is not None:
      positions += ops.all_gather(start, sharding.attention_rows, 0)[:, None]
    lookups.append(_Lookup(weights.position_embedding, positions))
  if weights.soft_prompts is not None:
    lookups.append(_Lookup(weights.soft_prompts, tokens - model.config.vocab_size))
  x = _lookups(lookups, model, sharding)
  if weights.embedding_norm is None:
    return x
  features = sharding.residual[2]
  scale, bias = local_norm(weights.embedding_norm, weights.embedding_norm_bias, features)
  return norm(x, scale, bias, model.config, features)


def local_norm(
  scale: Float[Array, ' E'], bias: Float[Array, ' E'] | None, axes: Axes
) -> tuple[Float[Array, ' e'], Float[Array, ' e'] | None]:
  """Cut a norm's scale and bias to this shard's features."""
  return ops.local_slice(scale, axes, 0), None if bias is None else ops.local_slice(bias, axes, 0)


class _Lookup(NamedTuple):
  """Ids [B, T] to look up in this shard's table [v, e_stored], which may have scales [v]."""

  table: jax.Array
  ids: jax.Array
  scale: jax.Array | None = None

  def rows(self, layout: Layout, dtype: str) -> jax.Array:
    """Return [B, T, e_stored], in which ids of other shards, or of none, are zeros."""
    count = self.table.shape[0]
    local = self.ids - ops.shard_index(layout.stored_hidden) * count
    here, local = (local >= 0) & (local < count), jnp.clip(local, 0, count - 1)
    found = jnp.take(self.table, local, axis=0)
    if self.scale is not None:
      found = found.astype(jnp.float32) * jnp.take(self.scale, local)[..., None]
    return jnp.where(here[..., None], found.astype(dtype), jnp.zeros((), dtype))


def _lookups(
  lookups: list[_Lookup], model: ShardedModel, sharding: ActivationSharding
) -> Float[Array, 'b t e']:
  """Return the sum of lookups. The second, if any, is that of learned positions."""
  # Every device looks up all tokens, also those that only other devices keep. If only rows are
  # split, the lookup processes a part of the positions at a time, so that it never needs more
  # memory than the residual stream.
  batch, length = lookups[0].ids.shape
  rows, positions, _ = map(ops.axis_size, sharding.residual)
  split_rows = rows if sharding.layout.gathered_axes else 1
  parts = 1 if positions > 1 else math.gcd(length, split_rows)
  if parts == 1:
    return _look_up(lookups, model, sharding)
  x = lax.map(
    lambda ids: _look_up([w._replace(ids=i) for w, i in zip(lookups, ids)], model, sharding),
    tuple(jnp.moveaxis(w.ids.reshape(batch, parts, -1), 1, 0) for w in lookups),
  )  # [parts, b, T/parts, e]
  return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], length, x.shape[-1])


def _look_up(
  lookups: list[_Lookup], model: ShardedModel, sharding: ActivationSharding
) -> jax.Array:
  layout = sharding.layout
  # [B, T, e_stored], partial sums over the hidden axes.
  x = functools.reduce(operator.add, (w.rows(layout, model.dtype) for w in lookups))
  if model.config.num_positions is not None:
    x = jnp.where((lookups[1].ids < model.config.num_positions)[..., None], x, jnp.nan)
  for dim, axes in enumerate(sharding.residual):
    if dim < 2:
      x = ops.all_to_all(x, tuple(a for a in axes if a in layout.stored_embed), dim, 2)
    x = ops.reduce_scatter(x, tuple(a for a in axes if a in layout.stored_hidden), dim)
  return x if sharding.residual_dim is not None else ops.all_reduce(x, layout.stored_hidden)


def last_positions(
  x: Float[Array, 'b t e'], lengths: Int[Array, ' b'], sharding: ActivationSharding
) -> Float[Array, 'b 1 e']:
  """Return the residual stream at the last token of each row, given the rows' lengths, at least 1.

  The result is NaN in rows that are broken at any of their valid positions (see model.finite).
  """
  positions = sharding.residual[1]
  first = ops.shard_index(positions) * x.shape[1]
  last = lengths - 1 - first
  y = jnp.take_along_axis(x, jnp.clip(last, 0, x.shape[1] - 1)[:, None, None], axis=1)
  here = (last >= 0) & (last < x.shape[1])
  y = jnp.where(here[:, None, None], y, jnp.zeros((), y.dtype))
  # If any shard has NaN, so does the sum over shards: no further collective is needed.
  return ops.all_reduce(mark_rows(y, broken_rows(x, lengths, first)), positions)


def unembed(
  model: ShardedModel,
  sharding: ActivationSharding,
  weights: Weights,
  x: Float[Array, 'b t e'],
  position_axes: Axes,
  rows: int,
) -> Float[Array, 'r T V']:
  """Compute float32 logits: the final norm, then the head, which may be the embedding.

  Products are scaled by 1/sqrt(d_model); then the head's bias is added, and the soft cap applied.

  Args:
    model: Gives the config, the dtypes and the axes that split the rows of logits.
    sharding: Sharding of x.
    weights: This shard's part of the weights.
    x: [b, t, e]. The residual stream after the last layer, at some or all of its positions.
    position_axes: Mesh axes that split the positions of x.
    rows: B of the pass.

  Returns:
    [r, T, V] float32: logits at all positions of x, of this shard's r rows of B.
  """
  return whole_rows(model, local_logits(model, sharding, weights, x, position_axes, rows), rows)


def local_logits(
  model: ShardedModel,
  sharding: ActivationSharding,
  weights: Weights,
  x: Float[Array, 'b t e'],
  position_axes: Axes,
  rows: int,
) -> Float[Array, 'r T v']:
  """Compute float32 logits where the head's products lie: each shard's part of the vocabulary.

  The stored hidden axes split the vocabulary, padded with -inf. See unembed for the arguments.

  Returns:
    [r, T, v] float32: of all rows, or of this embed shard's rows (model.local_logits_axes).
  """
  (_, stored), size = model.local_logits_axes(rows), model.config.vocab_size
  products = _head_products(model, sharding, weights, x, position_axes, rows)
  width, bias, cap = products.shape[2], weights.head_bias, model.config.logit_soft_cap
  logits = products * model.config.d_model**-0.5
  if bias is not None:
    padded = jnp.pad(bias, (0, width * ops.axis_size(stored) - size))
    logits = logits + ops.local_slice(padded, stored, 0)[None, None]
  logits = logits if cap is None else cap * jnp.tanh(logits / cap)
  ids = ops.shard_index(stored) * width + jnp.arange(width)[None, None]
  return jnp.where(ids < size, logits, -jnp.inf)


def whole_rows(
  model: ShardedModel, logits: Float[Array, 'r T v'], rows: int
) -> Float[Array, 'own T V']:
  """Move the logits of `local_logits`, so that each shard has whole rows of the vocabulary.

  Args:
    model: Gives the axes that split logits.
    logits: [r, T, v]. Logits of a part of the vocabulary.
    rows: B of the pass.

  Returns:
    [own, T, V] float32: logits of this shard's rows, which model.sampling_axes split.
  """
  axes, (_, vocabulary) = model.sampling_axes(rows), model.local_logits_axes(rows)
  moved = ops.all_to_all(logits[:, :, None], tuple(a for a in vocabulary if a in axes), 0, 2)
  blocks = ops.all_gather(moved, tuple(a for a in vocabulary if a not in axes), 2)
  return blocks.reshape(*blocks.shape[:2], -1)[..., : model.config.vocab_size]


def _head_products(
  model: ShardedModel,
  sharding: ActivationSharding,
  weights: Weights,
  x: Float[Array, 'b t e'],
  position_axes: Axes,
  rows: int,
) -> Float[Array, 'r T v']:
  """Return the products of normed x and the head, of all rows or of this embed shard's rows.

  Each shard has its part of the padded vocabulary, split over the stored hidden axes.
  """
  config, layout = model.config, sharding.layout
  row_axes, _, features = sharding.residual
  scale, bias = local_norm(weights.final_norm, weights.final_norm_bias, features)
  x = norm(x, scale, bias, config, features)
  table, scales = weights.embedding, weights.embedding_scale  # [v, e_stored], [v]
  if weights.head is not None:
    table, scales = weights.head, weights.head_scale
  x = ops.all_gather(ops.all_gather(x, row_axes, 0), position_axes, 1)
  # Gather all tokens, with features split as in the table: [B, T, e_stored].
  x = ops.all_gather(x, tuple(a for a in features if a in layout.stored_hidden), 2)
  gathered = tuple(a for a in layout.stored_embed if a in layout.gathered_axes)
  x = ops.local_slice(x, gathered, 2)
  # [B, T, v], partial sums over the embed axis.
  products = int8.matmul(x, table, scales, dtype=jnp.float32, transposed=True)
  split_rows, _ = model.local_logits_axes(rows)
  products = ops.reduce_scatter(products, split_rows, 0)
  return ops.all_reduce(products, tuple(a for a in layout.stored_embed if a not in split_rows))
