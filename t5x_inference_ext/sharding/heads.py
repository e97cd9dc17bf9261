"""Division of attention heads over equal shards, with padding if necessary.

The paper pads 48 heads to 64 (section 4). A key head with the query heads that it serves is a
*group*. Shards take whole groups if there are enough. Otherwise several shards share a group, and
each has some of its query heads and a copy of its key head.

A single key head (multiquery attention) is instead spread over all shards. Consecutive shards may
then also share the columns of query heads, so that each holds parts of heads.
"""

import dataclasses
import math

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.hardware import LANES


@dataclasses.dataclass(frozen=True)
class HeadSplit:
  """The division of heads over `shards` equal shards.

  Attributes:
    groups: Number of groups, which is the number of key heads.
    queries: Query heads in each group.
    shards: Number of shards.
    local_groups: Groups on a shard; 1 if a shard has only a part of a group.
    local_queries: A shard's query heads in each of its groups, padding included.
    copies: Number of shards that share one group.
    pieces: Number of consecutive shards that share the columns of `local_heads` heads, in equal
      shares; 1 if each shard has whole heads.
  """

  groups: int
  queries: int
  shards: int
  local_groups: int
  local_queries: int
  copies: int
  pieces: int = 1

  @classmethod
  def of(cls, groups: int, queries: int, shards: int) -> 'HeadSplit':
    """Split `groups` groups, each of `queries` query heads, over shards by whole heads."""
    if groups >= shards:
      return cls(groups, queries, shards, -(-groups // shards), queries, 1)
    padded = next(g for g in range(groups, shards + 1) if shards % g == 0)
    copies = shards // padded
    return cls(groups, queries, shards, 1, -(-queries // copies), copies)

  @property
  def local_heads(self) -> int:
    """Number of query heads of a shard, or of `pieces` shards together, padding included."""
    return self.local_groups * self.local_queries

  @property
  def padded_groups(self) -> int:
    """Groups on all shards, including padding but not copies."""
    return self.shards * self.local_groups // self.copies

  @property
  def padded_queries(self) -> int:
    """Query heads of a group, padding included."""
    return self.local_queries * self.copies

  def query_range(self, shard: int) -> tuple[int, int]:
    """Return the range [start, stop) of a shard's query heads, which padding follows."""
    first_group, part = shard // self.copies * self.local_groups, shard % self.copies
    start = first_group * self.queries + part * self.local_queries
    stop = start + self.local_heads
    if self.copies > 1:
      stop = min(stop, (first_group + 1) * self.queries)
    heads = self.groups * self.queries
    start = min(start, heads)
    return start, max(start, min(stop, heads))

  def group_range(self, shard: int) -> tuple[int, int]:
    """Return the range [start, stop) of a shard's groups, which are its key heads."""
    start = min(shard // self.copies * self.local_groups, self.groups)
    return start, min(start + self.local_groups, self.groups)


def stored_heads(config: ModelConfig, shards: int) -> HeadSplit:
  """Return the division of heads over the shards of the hidden axes, as weights are stored.

  With a single key head, query heads are cut to avoid padding: a few shards share the columns of a
  few heads, if each shard then has whole tiles of LANES columns. For example, 48 heads of 256 over
  32 shards: every 2 shards share 3 heads, 384 columns on each.
  """
  split = HeadSplit.of(config.num_kv_heads, config.num_heads // config.num_kv_heads, shards)
  padded = split.local_heads * shards > config.num_heads
  whole_tiles = config.num_heads * config.d_head % (shards * LANES) == 0
  if config.num_kv_heads > 1 or not padded or not whole_tiles:
    return split
  pieces = next(
    n for n in range(2, shards + 1) if shards % n == 0 and config.num_heads % (shards // n) == 0
  )
  joined = HeadSplit.of(1, config.num_heads, shards // pieces)
  return dataclasses.replace(joined, shards=shards, copies=shards, pieces=pieces)


def query_columns(config: ModelConfig, stored: HeadSplit) -> int:
  """Return the number of query columns of a shard of the weights, padding included.

  Attention's output matrix has as many rows.
  """
  return stored.local_heads * config.d_head // stored.pieces


def kv_columns(config: ModelConfig, stored: HeadSplit) -> tuple[int, int]:
  """Return a shard's number of key and value columns together: (without padding, with padding).

  A single key head is split evenly over all shards. Its columns are padded to whole tiles of LANES
  if the padding is small compared with a shard's query columns.
  """
  if config.num_kv_heads > 1:
    columns = 2 * stored.local_groups * config.d_head
    return columns, columns
  columns = -(-2 * config.d_head // stored.shards)
  if query_columns(config, stored) < 3 * LANES:
    return columns, columns
  return columns, -(-columns // LANES) * LANES


def vocabulary_rows(config: ModelConfig, shards: int) -> int:
  """Return the number of a shard's rows of the embedding [V, E], padding included.

  The rows are whole tiles of LANES if the vocabulary has at least 8 tiles for each shard, so that
  rounding up costs at most an eighth.
  """
  unit = LANES if config.vocab_size >= 8 * LANES * shards else 1
  return -(-config.vocab_size // (shards * unit)) * unit


@dataclasses.dataclass(frozen=True)
class AttentionHeads:
  """The heads that one device has in attention, in one pass.

  Attributes:
    stored: The heads on each shard of the weights.
    blocks: Number of consecutive shards of `stored` whose heads are on the device; above 1 after a
      gather of weights or rows.
    shards: Number of parts, by heads, into which the reduce-scatter of partial sums cuts each
      block; 1 if it does not cut.
    multiquery: Whether there is a single key head, whose columns all shards share and gather.
  """

  stored: HeadSplit
  blocks: int
  shards: int
  multiquery: bool

  @property
  def cut(self) -> HeadSplit:
    """The split of one block's heads over the `shards` parts that it is cut into."""
    return HeadSplit.of(self.stored.local_groups, self.stored.local_queries, self.shards)

  @property
  def stride(self) -> int:
    """Number of consecutive blocks that hold the same key heads."""
    return self.blocks if self.multiquery else math.gcd(self.stored.copies, self.blocks)

  @property
  def kv_heads(self) -> int:
    """Number of key heads on the device."""
    if self.shards > 1:
      return 1 if self.multiquery else self.cut.local_groups
    return self.blocks * self.stored.local_groups // self.stride

  @property
  def heads(self) -> int:
    """Number of query heads on the device, padding included. Consecutive heads share a key head."""
    if self.shards > 1:
      return self.cut.local_heads
    return self.blocks * self.stored.local_heads // self.stored.pieces

  def cached(self) -> tuple[int | None, ...]:
    """Return, for each head of the KV cache over all devices, its key head, or None for padding."""
    if self.multiquery:
      return (0,)
    heads: list[int | None] = []
    for block in range(0, self.stored.shards, self.stride):
      start, stop = self.stored.group_range(block)
      local = [start + i if start + i < stop else None for i in range(self.stored.local_groups)]
      if self.shards == 1:
        heads += local
        continue
      local += [None] * (self.cut.padded_groups - len(local))
      for shard in range(self.shards):
        first = shard // self.cut.copies * self.cut.local_groups
        heads += local[first : first + self.cut.local_groups]
    return tuple(heads)

  def queries(self) -> tuple[int | None, ...]:
    """Return, for each query head on all devices, its index in the model; None for padding.

    "All devices" are those along the axes that split attention's heads.
    """
    stored, cut = self.stored, self.cut
    if stored.pieces > 1:  # after joining their columns, shards have whole heads, without padding
      return tuple(range(stored.groups * stored.queries))
    heads: list[int | None] = []
    for block in range(stored.shards):
      start, stop = stored.query_range(block)
      local = [start + i if start + i < stop else None for i in range(stored.local_heads)]
      if self.shards > 1:  # pad the queries of each group, and the groups, to divide over shards
        per_group, padding = stored.local_queries, cut.padded_queries - stored.local_queries
        groups = [local[i : i + per_group] for i in range(0, len(local), per_group)]
        groups += [[None] * per_group] * (cut.padded_groups - len(groups))
        local = [head for group in groups for head in group + [None] * padding]
      heads += local
    return tuple(heads)
