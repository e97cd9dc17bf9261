"""The columns of a layer's fused matrices that each shard holds. Only this module defines them.

The input matrix of a block part is [E, columns], its output matrix [rows, E]. A shard's columns are
one block [gate | linear | query | key, value], and its rows one block [mlp | attention]. Weight
packing lays the blocks out, the model cuts products along them, and traffic counts their bytes.
"""

from collections.abc import Callable
import dataclasses
import functools
import itertools

from t5x_inference_ext.config import BlockPart, ModelConfig
from t5x_inference_ext.sharding.heads import (
  HeadSplit,
  kv_columns,
  query_columns,
  stored_heads,
  vocabulary_rows,
)


@dataclasses.dataclass(frozen=True)
class PackedPart:
  """One part of every shard's block: a range of canonical tensors, concatenated.

  Attributes:
    names: Canonical names (params.py) of the tensors, in order.
    sizes: Size of each tensor along the packed dimension.
    width: Columns of each shard, padding included.
    ranges: [start, stop) of each shard in the concatenated tensors. Zeros pad it to `width`.
  """

  names: tuple[str, ...]
  sizes: tuple[int, ...]
  width: int
  ranges: tuple[tuple[int, int], ...]

  @property
  def total(self) -> int:
    """Columns of all shards together, padding and copies included."""
    return self.width * len(self.ranges)

  @property
  def padding(self) -> int:
    """Columns of `total` that are zeros."""
    return self.total - self._filled

  @property
  def copies(self) -> int:
    """Columns of `total` that are repeated, because several shards share a key head."""
    return self._filled - sum(self.sizes)

  @property
  def _filled(self) -> int:
    return sum(stop - start for start, stop in self.ranges)


@functools.lru_cache(maxsize=1024)
def input_parts(config: ModelConfig, block_part: BlockPart, shards: int) -> tuple[PackedPart, ...]:
  """Return the parts of a shard's block of input-matrix columns, in order.

  Args:
    config: The model.
    block_part: The block part that the matrix belongs to.
    shards: Number of devices that split the columns.
  """
  parts = []
  if block_part.mlp:
    parts += [_even((name,), (config.d_ff,), shards) for name in config.mlp_inputs]
  if block_part.attention:
    split, width = stored_heads(config, shards), config.num_kv_heads * config.d_head
    parts.append(_queries('query', config, split))
    if config.num_kv_heads == 1:
      # The single key head's columns are split over all shards, which gather them before use.
      used, padded = kv_columns(config, split)
      parts.append(_even(('key', 'value'), (width, width), shards, used, padded))
    else:
      columns = split.local_groups * config.d_head
      parts += [
        _by_heads(name, width, columns, config.d_head, split.group_range, shards)
        for name in ('key', 'value')
      ]
  return tuple(parts)


@functools.lru_cache(maxsize=1024)
def output_parts(config: ModelConfig, block_part: BlockPart, shards: int) -> tuple[PackedPart, ...]:
  """Return the parts of a shard's block of output-matrix rows, in order.

  The arguments are those of input_parts.
  """
  parts = []
  if block_part.mlp:
    parts.append(_even(('mlp_output',), (config.d_ff,), shards))
  if block_part.attention:
    parts.append(_queries('attention_output', config, stored_heads(config, shards)))
  return tuple(parts)


def vocabulary_part(config: ModelConfig, shards: int, name: str = 'embedding') -> PackedPart:
  """Return the rows of the embedding [V, E], or of the untied 'head', on each shard."""
  return _even((name,), (config.vocab_size,), shards, vocabulary_rows(config, shards))


def positions_part(config: ModelConfig, shards: int) -> PackedPart:
  """Return the rows of the learned table of positions [P, E] on each shard."""
  return _even(('position_embedding',), (config.num_positions or 0,), shards)


def column_widths(config: ModelConfig, block_part: BlockPart, shards: int) -> dict[str, int]:
  """Return consumer -> number of a shard's input-matrix columns, in order.

  The keys are the MLP's inputs ('gate', 'linear') and 'attention': queries, then keys and values.
  The arguments are those of input_parts.
  """
  widths: dict[str, int] = {}
  for part in input_parts(config, block_part, shards):
    name = part.names[0] if part.names[0] in config.mlp_inputs else 'attention'
    widths[name] = widths.get(name, 0) + part.width
  return widths


def row_widths(config: ModelConfig, block_part: BlockPart, shards: int) -> dict[str, int]:
  """Return the number of a shard's output-matrix rows by canonical name ('mlp_output', ...)."""
  return {part.names[0]: part.width for part in output_parts(config, block_part, shards)}


def _even(
  names: tuple[str, ...], sizes: tuple[int, ...], shards: int, share: int = 0, width: int = 0
) -> PackedPart:
  """Cut concatenated tensors into shares of equal width, by default as small as possible.

  If the columns can't be divided evenly, the last shards have fewer, or none.
  """
  total = sum(sizes)
  share = share or -(-total // shards)
  bounds = [min(shard * share, total) for shard in range(shards + 1)]
  return PackedPart(names, sizes, width or share, tuple(itertools.pairwise(bounds)))


def _by_heads(
  name: str,
  size: int,
  width: int,
  d_head: int,
  head_range: Callable[[int], tuple[int, int]],
  shards: int,
) -> PackedPart:
  """Cut a tensor into whole heads; `head_range` gives each shard's heads as (start, stop)."""
  heads = map(head_range, range(shards))
  ranges = tuple((start * d_head, stop * d_head) for start, stop in heads)
  return PackedPart((name,), (size,), width, ranges)


def _queries(name: str, config: ModelConfig, split: HeadSplit) -> PackedPart:
  """Cut all query heads' columns: by whole heads, or evenly if shards hold parts of heads."""
  size = config.num_heads * config.d_head
  if split.pieces > 1:
    return _even((name,), (size,), split.shards)
  width = query_columns(config, split)
  return _by_heads(name, size, width, config.d_head, split.query_range, split.shards)
