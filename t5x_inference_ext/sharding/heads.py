"""Attention heads laid over equal shards, padded where they do not divide (the paper pads 48 heads to 64, section 4).

A key head and the query heads that it serves are a *group*. Shards take whole groups where there are enough; otherwise
several shards share a group, each with a part of its queries and a copy of its key head. One key head in all lies over
all shards: then consecutive shards may also share the columns of their queries, with parts of heads on each.
"""

import dataclasses
import math

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.hardware import LANES


@dataclasses.dataclass(frozen=True)
class HeadSplit:
  """What each of some equal shards holds of `groups` groups of `queries` query heads.

  Attributes:
    groups, queries, shards: as asked.
    local_groups: groups (or parts of one) that a shard has.
    local_queries: query heads that it has for each, padding included.
    copies: shards that share one group.
    pieces: consecutive shards over which the columns of `local_heads` are cut evenly; 1: each has so many heads.
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
    if groups >= shards:
      return cls(groups, queries, shards, -(-groups // shards), queries, 1)
    padded = next(g for g in range(groups, shards + 1) if shards % g == 0)
    copies = shards // padded
    return cls(groups, queries, shards, 1, -(-queries // copies), copies)

  @property
  def local_heads(self) -> int:
    """Query heads of a shard, or of `pieces` shards together, padding included."""
    return self.local_groups * self.local_queries

  @property
  def padded_groups(self) -> int:
    return self.shards * self.local_groups // self.copies

  @property
  def padded_queries(self) -> int:
    """Query heads of a group, padding included."""
    return self.local_queries * self.copies

  def query_range(self, shard: int) -> tuple[int, int]:
    """The query heads [start, stop) of a shard; fewer than local_heads where padding follows."""
    first, part = shard // self.copies * self.local_groups, shard % self.copies
    start = min(first * self.queries + part * self.local_queries, self.groups * self.queries)
    if self.copies > 1:
      stop = min(start + self.local_queries, (first + 1) * self.queries, self.groups * self.queries)
    else:
      stop = min(start + self.local_heads, self.groups * self.queries)
    return start, max(start, stop)

  def group_range(self, shard: int) -> tuple[int, int]:
    """The groups, that is key heads, [start, stop) of a shard."""
    start = min(shard // self.copies * self.local_groups, self.groups)
    return start, min(start + self.local_groups, self.groups)


def stored_heads(config: ModelConfig, shards: int) -> HeadSplit:
  """How the weights of a model hold its heads, on this many shards of the hidden axes.

  With one key head in all, heads that would have to be padded are cut evenly over a few shards, if that gives whole tiles:
  48 heads of 256 over 32 shards are 3 heads over each 2, with 384 columns on each shard.
  """
  split = HeadSplit.of(config.num_kv_heads, config.num_heads // config.num_kv_heads, shards)
  columns = config.num_heads * config.d_head
  if (
    config.num_kv_heads > 1
    or split.local_heads * shards == config.num_heads
    or columns % (shards * LANES)
  ):
    return split
  pieces = next(
    n for n in range(2, shards + 1) if shards % n == 0 and config.num_heads % (shards // n) == 0
  )
  whole = HeadSplit.of(1, config.num_heads, shards // pieces)
  return dataclasses.replace(whole, shards=shards, copies=shards, pieces=pieces)


def query_columns(config: ModelConfig, stored: HeadSplit) -> int:
  """A stored shard's columns of queries, and rows of attention's output matrix, padding included."""
  return stored.local_heads * config.d_head // stored.pieces


def vocabulary_rows(config: ModelConfig, shards: int) -> int:
  """A shard's rows of the embedding: whole tiles of logits, where there are so many that the last shards can spare some."""
  unit = LANES if config.vocab_size >= 8 * LANES * shards else 1
  return -(-config.vocab_size // (shards * unit)) * unit


def kv_columns(config: ModelConfig, stored: HeadSplit) -> tuple[int, int]:
  """A stored shard's columns of keys and values: those that count, and those that there are, padded.

  One key head in all is less than a shard: all share its columns evenly, padded to whole tiles where a shard's queries
  are so many that this is little.
  """
  if config.num_kv_heads > 1:
    return (2 * stored.local_groups * config.d_head,) * 2
  count = -(-2 * config.d_head // stored.shards)
  return count, -(-count // LANES) * LANES if query_columns(config, stored) >= 3 * LANES else count


@dataclasses.dataclass(frozen=True)
class AttentionHeads:
  """The heads that one device attends with, in one phase.

  Attributes:
    stored: how the weights hold the heads.
    blocks: consecutive shards of `stored` whose heads are here: 1, or more where weights or rows were gathered.
    shards: into how many parts each such block is cut again, by heads, when partial sums are reduced; 1: not.
    multiquery: whether there is one key head in all, whose columns are then spread over all shards and gathered.
  """

  stored: HeadSplit
  blocks: int
  shards: int
  multiquery: bool

  @property
  def cut(self) -> HeadSplit:
    """A block's heads over the `shards` that cut it again."""
    return HeadSplit.of(self.stored.local_groups, self.stored.local_queries, self.shards)

  @property
  def stride(self) -> int:
    """Every stride-th block brings a new key head."""
    return self.blocks if self.multiquery else math.gcd(self.stored.copies, self.blocks)

  @property
  def kv_heads(self) -> int:
    """Key heads here."""
    if self.shards > 1:
      return 1 if self.multiquery else self.cut.local_groups
    return self.blocks * self.stored.local_groups // self.stride

  @property
  def heads(self) -> int:
    """Query heads here, padding included; consecutive ones share a key head."""
    return (
      self.cut.local_heads
      if self.shards > 1
      else self.blocks * self.stored.local_heads // self.stored.pieces
    )

  def cached(self) -> tuple[int | None, ...]:
    """The key head behind each head of the cache, over all devices that split heads; None is padding."""
    if self.multiquery:
      return (0,)
    heads = []
    for block in range(0, self.stored.shards, self.stride):
      start, stop = self.stored.group_range(block)
      local = [start + i if start + i < stop else None for i in range(self.stored.local_groups)]
      if self.shards == 1:
        heads += local
        continue
      for shard in range(self.shards):
        first = shard // self.cut.copies * self.cut.local_groups
        heads += [
          local[i] if i < len(local) else None for i in range(first, first + self.cut.local_groups)
        ]
    return tuple(heads)
