"""Resharding of projection columns to attention's split, and back (section 3.3)."""

from collections.abc import Iterable, Mapping
import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.heads import kv_columns, query_columns
from t5x_inference_ext.sharding.layout import Axes


@dataclasses.dataclass(frozen=True)
class AttentionColumns:
  """The resharding around attention, on one shard.

  The projections' columns arrive as [b_rows, t_positions, columns/hidden]: one block of columns for
  each shard of the stored weights that this device holds. They are partial sums over the embed
  axes, unless `summed`. Each kind of mesh axis has its own collectives:

    embed axis (x)    Partial sums are reduced into heads or positions, whichever attention splits
                      over x.
    hidden axes       If attention splits rows, an all-to-all moves columns to rows. If attention
                      splits heads, the columns stay; a single key head's columns are gathered. If a
                      device's columns are parts of heads, an all-to-all moves columns to
                      positions; for a single token, columns are gathered.
    positions' axes   Queries stay split, and keys and values are gathered: each device attends from
                      its own positions.

  Attributes:
    sharding: Decides what each axis does.
    config: Shape of the model.
    summed: Whether columns arrive summed over the embed axes, with rows or positions split over
      them (ActivationSharding.reduce_scatter_dim). Attention's output then returns split in the
      same way.
  """

  sharding: ActivationSharding
  config: ModelConfig
  summed: bool

  @property
  def _embed(self) -> Axes:
    return self.sharding.layout.embed_axes

  def _embed_splits(self, axes: Axes) -> bool:
    return bool(self._embed) and self._embed[0] in axes

  def to_attention(
    self, columns: Float[Array, 'b_rows t_positions columns']
  ) -> tuple[Float[Array, 'b m h q'], Float[Array, 'b t k q'], Float[Array, 'b t k q']]:
    """Turn blocks of columns [query | key, value] into q [b, m, h, q], k and v [b, t, k, q]."""
    sharding, heads = self.sharding, self.sharding.heads
    hidden = sharding.layout.hidden_axes
    blocks = heads.stored.shards // ops.axis_size(hidden)  # number of stored shards on this device
    y = columns.reshape(*columns.shape[:2], blocks, -1)  # [b, t, blocks, columns of a block]
    by_heads = self._embed_splits(sharding.attention_heads)
    # One collective moves queries, keys and values, with their padding: few large collectives take
    # less time than many small ones.
    if not by_heads and not self.summed:
      if self._embed_splits(sharding.attention_positions):
        y = ops.reduce_scatter(y, self._embed, 1)
      else:
        y = ops.all_reduce(y, self._embed)
    if not by_heads:
      y = ops.all_to_all(y, sharding.hidden_rows, 0, 2)
    width = query_columns(self.config, heads.stored)
    query, kv = y[..., :width], y[..., width : width + kv_columns(self.config, heads.stored)[0]]
    if by_heads:
      query, kv = self._cut_queries(query), self._cut_keys(kv)
      query, kv = (ops.all_to_all(y, sharding.hidden_rows, 0, 2) for y in (query, kv))
    if heads.multiquery:
      kv = ops.all_gather(kv, _without(hidden, sharding.hidden_rows), 2)
    if not by_heads and not heads.multiquery:
      kv = kv[:, :, :: heads.stride]  # drop repeated heads before the gather
    query = ops.all_to_all(query, sharding.hidden_positions, 1, 2)
    query = ops.all_gather(query, sharding.joined, 2)
    kv = ops.all_gather(kv, _without(sharding.attention_positions, sharding.hidden_positions), 1)
    q = query.reshape(*query.shape[:2], heads.heads, self.config.d_head)
    return q, *self._keys_values(kv, by_heads)

  def from_attention(
    self, out: Float[Array, 'b m h q']
  ) -> Float[Array, 'b_rows t_positions columns']:
    """Turn attention's output into columns, with the split that to_attention's argument had."""
    sharding, heads = self.sharding, self.sharding.heads
    y = out.reshape(*out.shape[:2], heads.blocks if heads.shards == 1 else 1, -1)
    y = ops.local_slice(y, sharding.joined, 2)
    y = ops.all_to_all(y, sharding.hidden_positions, 2, 1)
    y = ops.all_to_all(y, sharding.hidden_rows, 2, 0)
    if self._embed_splits(sharding.attention_positions) and not self.summed:
      y = ops.all_gather(y, self._embed, 1)
    elif self._embed_splits(sharding.attention_heads):
      y = ops.all_gather(y, self._embed, 2)
      stored, cut = heads.stored, heads.cut
      y = y.reshape(*y.shape[:2], cut.padded_groups, cut.padded_queries, self.config.d_head)
      y = y[:, :, : stored.local_groups, : stored.local_queries]
    return y.reshape(*y.shape[:2], -1)

  def first_query(self, positions: int) -> Int[Array, ''] | int:
    """Return the index of this shard's first query among `positions` new positions."""
    axes = self.sharding.attention_positions
    return ops.shard_index(axes) * (positions // ops.axis_size(axes))

  def _cut_queries(self, query: jax.Array) -> jax.Array:
    """Reduce one block's partial sums [b, t, 1, heads * q] to this embed shard's heads."""
    stored, cut, d_head = self.sharding.heads.stored, self.sharding.heads.cut, self.config.d_head
    y = query.reshape(*query.shape[:2], stored.local_groups, stored.local_queries, d_head)
    y = _pad(y, {2: cut.padded_groups, 3: cut.padded_queries})
    return ops.reduce_scatter(y.reshape(*y.shape[:2], -1, d_head), self._embed, 2)

  def _cut_keys(self, kv: jax.Array) -> jax.Array:
    """Reduce one block's partial sums [b, t, 1, columns] to this embed shard's key heads."""
    heads = self.sharding.heads
    if heads.multiquery:
      return ops.all_reduce(kv, self._embed)
    y = kv.reshape(*kv.shape[:2], 2, heads.stored.local_groups, self.config.d_head)
    cut = heads.cut
    if cut.copies == 1:
      y = ops.reduce_scatter(_pad(y, {3: cut.padded_groups}), self._embed, 3)
    else:
      y = _pad(ops.all_reduce(y, self._embed), {3: cut.padded_groups})
      y = lax.dynamic_slice_in_dim(y, ops.shard_index(self._embed) // cut.copies, 1, 3)
    return y.reshape(*y.shape[:2], 1, -1)

  def _keys_values(self, kv: jax.Array, by_heads: bool) -> tuple[jax.Array, jax.Array]:
    """Turn [b, t, blocks, columns of a block] into keys and values [b, t, k, q]."""
    heads, d_head, lead = self.sharding.heads, self.config.d_head, kv.shape[:2]
    if heads.multiquery:
      y = kv.reshape(*lead, -1)[..., : 2 * d_head].reshape(*lead, 2, 1, d_head)
    elif by_heads:
      y = kv.reshape(*lead, 2, heads.kv_heads, d_head)
    else:
      y = kv.reshape(*lead, kv.shape[2], 2, heads.stored.local_groups, d_head)
      y = jnp.moveaxis(y, 3, 2).reshape(*lead, 2, heads.kv_heads, d_head)
    return y[:, :, 0], y[:, :, 1]


def _without(axes: Axes, others: Iterable[str]) -> Axes:
  return tuple(a for a in axes if a not in others)


def _pad(x: jax.Array, sizes: Mapping[int, int]) -> jax.Array:
  """Pad x with zeros so that dimension d has size sizes[d]."""
  return jnp.pad(x, [(0, sizes.get(i, n) - n) for i, n in enumerate(x.shape)])
