"""Moving queries, keys and values from 'split by hidden columns' to how attention splits them, and back (section 3.3)."""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.heads import kv_columns, query_columns


@dataclasses.dataclass(frozen=True)
class AttentionColumns:
  """The moves of one placement, on one shard.

  The projections' columns come as [B_rows, T_positions, columns/hidden], a block of columns for each stored shard that is
  here; partial sums over the embed axes, unless summed already. By axis:

    embed axis (x)    partial sums are reduced into heads or positions, whichever attention splits over x.
    hidden axes       an all-to-all takes columns to rows where attention splits rows; where it splits heads the columns
                      stay, and with one key head in all its columns are gathered. Where columns are parts of heads,
                      an all-to-all takes them to positions, or, of a single token, they are gathered.
    positions' axes   queries stay split, keys and values are gathered: each device attends from its positions.

  Attributes:
    placement: says which axis does what.
    config: the model.
    summed: whether columns come summed, and with rows or positions split, over the embed axes (ActivationSharding.sums_into). Then
      what goes back is split so too.
  """

  sharding: ActivationSharding
  config: ModelConfig
  summed: bool

  @property
  def d_head(self) -> int:
    return self.config.d_head

  @property
  def _embed(self):
    return self.sharding.layout.embed_axes

  def _embed_splits(self, axes) -> bool:
    return bool(self._embed) and self._embed[0] in axes

  def to_attention(self, columns: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Blocks of queries' columns, then keys' and values' -> q [B', T', H', Q], k and v [B', T, K', Q], as placed."""
    p, heads = self.sharding, self.sharding.heads
    here = heads.stored.shards // ops.axis_size(p.layout.hidden_axes)  # blocks before the move
    y = columns.reshape(*columns.shape[:2], here, -1)  # [B, T, blocks, columns of a block]
    width = query_columns(self.config, heads.stored)
    by_heads = self._embed_splits(p.attention_heads)
    # Queries, keys and values in one collective, wherever they go the same way.
    if not by_heads and not self.summed:
      y = (
        ops.reduce_scatter(y, self._embed, 1)
        if self._embed_splits(p.attention_positions)
        else ops.all_reduce(y, self._embed)
      )
    if not by_heads and p.hidden_rows == p.layout.hidden_axes:
      y = ops.all_to_all(y, p.hidden_rows, 0, 2)
    query, kv = y[..., :width], y[..., width : width + kv_columns(self.config, heads.stored)[0]]
    if by_heads:
      query, kv = self._cut_queries(query), self._cut_keys(kv)
    if by_heads or p.hidden_rows != p.layout.hidden_axes:
      query, kv = (ops.all_to_all(y, p.hidden_rows, 0, 2) for y in (query, kv))
      if heads.multiquery:
        kv = ops.all_gather(kv, tuple(a for a in p.layout.hidden_axes if a not in p.hidden_rows), 2)
    if not by_heads and not heads.multiquery:
      kv = kv[:, :, :: heads.stride]  # before the gather: copies need not move
    query = ops.all_gather(ops.all_to_all(query, p.hidden_positions, 1, 2), p.joined, 2)
    kv = ops.all_gather(
      kv, tuple(a for a in p.attention_positions if a not in p.hidden_positions), 1
    )
    q = query.reshape(*query.shape[:2], heads.heads, self.d_head)
    return q, *self._keys_values(kv, by_heads)

  def from_attention(self, out: jax.Array) -> jax.Array:
    """[B', T', H', Q] -> columns [B_rows, T_positions, columns/hidden], split over the embed axes as they came."""
    p, heads = self.sharding, self.sharding.heads
    y = out.reshape(*out.shape[:2], heads.blocks if heads.shards == 1 else 1, -1)
    y = ops.all_to_all(ops.local_slice(y, p.joined, 2), p.hidden_positions, 2, 1)
    y = ops.all_to_all(y, p.hidden_rows, 2, 0)
    if self._embed_splits(p.attention_positions) and not self.summed:
      y = ops.all_gather(y, self._embed, 1)
    elif self._embed_splits(p.attention_heads):
      y = ops.all_gather(y, self._embed, 2)
      stored, cut = heads.stored, heads.cut
      y = y.reshape(*y.shape[:2], cut.padded_groups, cut.padded_queries, self.d_head)
      y = y[:, :, : stored.local_groups, : stored.local_queries]
    return y.reshape(*y.shape[:2], -1)

  def query_positions(self, positions: int) -> jax.Array | int:
    """The first of this shard's queries among `positions` positions."""
    axes = self.sharding.attention_positions
    return ops.shard_index(axes) * (positions // ops.axis_size(axes))

  def _cut_queries(self, query):
    """One block's [B, T, 1, heads * Q], partial sums -> [B, T, heads of this embed shard, Q], summed."""
    stored, cut = self.sharding.heads.stored, self.sharding.heads.cut
    y = query.reshape(*query.shape[:2], stored.local_groups, stored.local_queries, self.d_head)
    y = jnp.pad(
      y,
      (
        (0, 0),
        (0, 0),
        (0, cut.padded_groups - stored.local_groups),
        (0, cut.padded_queries - stored.local_queries),
        (0, 0),
      ),
    )
    return ops.reduce_scatter(y.reshape(*y.shape[:2], -1, self.d_head), self._embed, 2)

  def _cut_keys(self, kv):
    """One block's [B, T, 1, columns], partial sums -> the same of this embed shard's key heads, summed."""
    heads = self.sharding.heads
    if heads.multiquery:
      return ops.all_reduce(kv, self._embed)
    y = kv.reshape(*kv.shape[:2], 2, heads.stored.local_groups, self.d_head)
    cut = heads.cut
    if cut.copies == 1:
      y = ops.reduce_scatter(_pad(y, 3, cut.padded_groups), self._embed, 3)
    else:
      y = _pad(ops.all_reduce(y, self._embed), 3, cut.padded_groups)
      y = lax.dynamic_slice_in_dim(y, ops.shard_index(self._embed) // cut.copies, 1, 3)
    return y.reshape(*y.shape[:2], 1, -1)

  def _keys_values(self, kv, cut):
    """[B, T, blocks, columns of a block] -> keys, values [B, T, K', Q]."""
    heads = self.sharding.heads
    lead = kv.shape[:2]
    if heads.multiquery:
      y = kv.reshape(*lead, -1)[..., : 2 * self.d_head].reshape(*lead, 2, 1, self.d_head)
    elif cut:
      y = kv.reshape(*lead, 2, heads.kv_heads, self.d_head)
    else:
      y = kv.reshape(*lead, kv.shape[2], 2, heads.stored.local_groups, self.d_head)
      y = jnp.moveaxis(y, 3, 2).reshape(*lead, 2, heads.kv_heads, self.d_head)
    return y[:, :, 0], y[:, :, 1]


def _pad(x, axis, to):
  return jnp.pad(x, [(0, to - n if i == axis else 0) for i, n in enumerate(x.shape)])
