"""Activation sharding: a layout resolved for one pass of a model over some rows and positions.

The model, its predicted traffic (traffic.py) and the planner all read the result.
"""

from collections.abc import Mapping
import dataclasses
import functools
import itertools

from jax.sharding import PartitionSpec as P

from t5x_inference_ext.config import BlockPart, ModelConfig
from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.sharding.heads import AttentionHeads, HeadSplit, stored_heads
from t5x_inference_ext.sharding.layout import Axes, Layout, num_shards, shape_text
from t5x_inference_ext.sharding.mesh import AXES
from t5x_inference_ext.sharding.token_axes import (
  most_devices,
  residual_dim,
  row_axes,
  token_axes,
  token_dim,
)

# Logical axes of the activations and the KV cache. params.py has the weights' logical axes.
ACTIVATION_AXES = {
  'residual': ('residual_rows', 'residual_positions', 'residual'),  # [B, T, E]
  'mlp': ('rows', 'positions', 'mlp'),  # [B, T, F]
  'queries': ('attention_rows', 'attention_positions', 'attention_heads', 'd_head'),  # [B, T, H, Q]
  'cache': ('attention_rows', 'kv_heads', 'cache_positions', 'd_head'),  # [B, K, S, Q]
}


@dataclasses.dataclass(frozen=True)
class ActivationSharding:
  """The mesh axes that split each activation of one pass.

  Inside a layer, `rows` and `positions` split tokens [B, T]. In attention, the three `attention_`
  fields split queries [B, T, H, Q]; keys and values have the same rows, but all positions.

  Products are summed by reduce-scatter, which splits the sum over the same axes: the residual
  stream over the layout's hidden axes, the MLP's columns over its embed axes. These axes split rows
  if they divide them, else positions, else features. With split rows, the norm needs no all-reduce,
  since a device has all features of a row, and a TPU need not change memory layouts around
  collectives. Few tokens that do not divide over the hidden axes are not split over them: there the
  residual stream is summed by all-reduce.

  Attributes:
    layout: The layout that was resolved.
    rows, positions: Axes that split tokens; together, the axes that weights are gathered over.
    residual_dim: The dimension of the residual stream [B, T, E] that the hidden axes split. None:
      they split none, so that every device along them has the same part of the stream.
    mlp_dim: The dimension of the MLP's columns [B, T, F] that the embed axes split.
    attention_rows: Axes that split rows in attention and the KV cache: `rows`, then others.
    attention_heads: Axes that split the heads of attention.
    attention_positions: Axes that split the positions of queries: those of `positions`, then
      others. Hidden axes are among the others if a shard's columns hold parts of heads.
    joined: Hidden axes along which query columns are gathered instead, because there are too few
      positions to split. All devices along these axes compute equal attention.
    heads: The heads on each device.
  """

  layout: Layout
  rows: Axes
  positions: Axes
  residual_dim: int | None
  mlp_dim: int
  attention_rows: Axes
  attention_heads: Axes
  attention_positions: Axes
  joined: Axes
  heads: AttentionHeads

  @property
  def residual(self) -> tuple[Axes, Axes, Axes]:
    """The axes that split each dimension of the residual stream [B, T, E]."""
    split = [self.rows, self.positions, self.layout.embed_axes]
    if self.residual_dim is not None:
      split[self.residual_dim] += self.layout.hidden_axes
    return split[0], split[1], split[2]

  @property
  def axes(self) -> dict[str, Axes]:
    """The mesh axes that split each logical axis of ACTIVATION_AXES."""
    residual_rows, residual_positions, residual = self.residual
    return {
      'residual_rows': residual_rows,
      'residual_positions': residual_positions,
      'residual': residual,
      'rows': self.rows,
      'positions': self.positions,
      'mlp': self.layout.hidden_axes,
      'attention_rows': self.attention_rows,
      'attention_positions': self.attention_positions,
      'attention_heads': self.attention_heads,
      'd_head': (),
      'cache_positions': (),
      # With a single key head, every device that splits query heads has the whole key head.
      'kv_heads': () if self.heads.multiquery else self.attention_heads,
    }

  @property
  def cache(self) -> P:
    """The sharding of one layer's keys or values [B, K, S, Q]."""
    return P(*(self.axes[axis] or None for axis in ACTIVATION_AXES['cache']))

  def reduce_scatter_dim(self, block_part: BlockPart) -> int | None:
    """Return the dimension of tokens [B, T] into which all columns of a part are reduce-scattered.

    One collective then sums all columns of the block part over the embed axes. Return None if there
    are no such axes, or if MLP and attention split different dimensions or split features.
    """
    embed = set(self.layout.embed_axes)
    dims = [self.mlp_dim] if block_part.mlp else []
    if block_part.attention:
      if embed & set(self.attention_rows):
        dims.append(0)
      elif embed & set(self.attention_positions):
        dims.append(1)
      else:
        dims.append(2)
    return dims[0] if embed and len(set(dims)) == 1 and dims[0] < 2 else None

  @property
  def hidden_rows(self) -> Axes:
    """The mesh's hidden axes that an all-to-all moves from the columns to attention's rows."""
    return tuple(a for a in self.layout.hidden_axes if a in self.attention_rows)

  @property
  def hidden_positions(self) -> Axes:
    """The mesh's hidden axes that an all-to-all moves from the columns to queries' positions."""
    return tuple(a for a in self.layout.hidden_axes if a in self.attention_positions)


def shard_activations(
  layout: Layout,
  config: ModelConfig,
  mesh: Mapping[str, int],
  batch: int,
  length: int,
  cached: bool = False,
) -> ActivationSharding:
  """Resolve a layout for one pass.

  Args:
    layout: The layout of the pass.
    config: The model.
    mesh: Axis name -> size.
    batch: B, rows.
    length: T, positions of each row, as rounded up by padded_length; 1 for a decode step.
    cached: Whether the KV cache already holds earlier positions. It is then split as for decode
      steps of this layout.

  Raises:
    MeshError: The tokens do not divide over the axes that weights are gathered over.
  """
  sizes = tuple(mesh[a] for a in AXES)
  return _shard_activations(layout, config, sizes, batch, length, cached)


@functools.lru_cache(maxsize=4096)
def _shard_activations(
  layout: Layout, config: ModelConfig, sizes: tuple[int, ...], batch: int, length: int, cached: bool
) -> ActivationSharding:
  mesh = dict(zip(AXES, sizes, strict=True))
  rows, positions = token_axes(layout, batch, mesh)
  if length % num_shards(positions, mesh):
    devices = num_shards(layout.gathered_axes, mesh)
    raise MeshError(
      f'{layout} splits tokens over {devices} devices of the mesh {shape_text(mesh)}, and {batch} '
      f'rows of {length} do not divide: use a batch that is a multiple of {devices}'
      + (', or a weight-stationary layout (ws_2d) for decode' if length == 1 else '')
    )
  hidden, embed = layout.hidden_axes, layout.embed_axes
  local_tokens = batch // num_shards(rows, mesh), length // num_shards(positions, mesh)
  more_rows: Axes = ()
  if layout.attention == 'batch':
    more_rows = most_devices(row_axes(embed, hidden), local_tokens[0], mesh)
  stored = stored_heads(config, num_shards(layout.stored_hidden, mesh))
  whole = _whole_head_axes(stored, hidden, more_rows, mesh)
  head_axes = tuple(a for a in hidden if a not in more_rows + whole)
  attention_positions, cut = positions, 1
  if embed and embed[0] not in more_rows:
    # Partial sums over x are reduce-scattered to positions, as for the MLP. If the layout splits
    # attention by heads, or x does not divide the positions, they are reduce-scattered to padded
    # heads, if less than half is padding. Otherwise (one token, few heads) they are all-reduced.
    parts = num_shards(embed, mesh)
    positions_divide = (1 if cached else length) % parts == 0
    enough_heads = head_axes == hidden and 2 * stored.local_heads > parts
    if enough_heads and not (positions_divide and layout.attention == 'batch'):
      head_axes, cut = head_axes + embed, parts
    elif positions_divide:
      attention_positions += embed
  joined = whole if length % num_shards(attention_positions + whole, mesh) else ()
  if not joined:
    attention_positions += whole
  blocks = stored.shards // num_shards(tuple(a for a in head_axes if a in hidden), mesh)
  return ActivationSharding(
    layout=layout,
    rows=rows,
    positions=positions,
    residual_dim=residual_dim(layout, local_tokens, mesh),
    mlp_dim=token_dim(local_tokens, embed, mesh),
    attention_rows=rows + more_rows,
    attention_heads=head_axes,
    attention_positions=attention_positions,
    joined=joined,
    heads=AttentionHeads(stored, blocks, cut, config.num_kv_heads == 1),
  )


def padded_length(layout: Layout, mesh: Mapping[str, int], batch: int, length: int) -> int:
  """Return the smallest length, at least `length`, that shard_activations accepts.

  Padding is added on the right of each row, where no token attends to it.
  """
  multiple = num_shards(token_axes(layout, batch, mesh)[1], mesh)
  return -(-length // multiple) * multiple


def sampling_axes(layout: Layout, batch: int, mesh: Mapping[str, int]) -> Axes:
  """Return the axes that split the rows of logits [B, V] for sampling: as many as rows allow."""
  return most_devices(row_axes(layout.stored_embed, layout.stored_hidden), batch, mesh)


def padded_batch(decode: Layout, batch: int, mesh: Mapping[str, int]) -> int:
  """Round a batch size up, so that decode splits rows over all axes that the layout allows.

  On 2x2x2, 3 rows become 4, 5 become 8 and 9 become 16: a few padding rows cost less than rows that
  several devices compute redundantly. If decode splits only heads, the batch size is not changed.
  With gathered weights, the batch is a multiple of the devices that weights are gathered over.
  """
  gathered = num_shards(decode.gathered_axes, mesh)
  candidates: list[Axes] = [()]
  if decode.attention == 'batch':
    candidates = row_axes(decode.embed_axes, decode.hidden_axes)
  sizes = [num_shards(axes, mesh) for axes in candidates]

  def fills(rows: int) -> bool:
    return rows % max(size for size in sizes if size <= rows) == 0

  return gathered * next(filter(fills, itertools.count(-(-batch // gathered))))


def _whole_head_axes(stored: HeadSplit, hidden: Axes, taken: Axes, mesh: Mapping[str, int]) -> Axes:
  """Return the hidden axes to gather along, so that each group of devices holds whole heads.

  Args:
    stored: Heads that each shard of the weights holds.
    hidden: The layout's hidden axes.
    taken: The axes that attention splits rows over.
    mesh: Axis name -> size.

  Returns:
    The smallest sufficient set of axes not in `taken`, chosen from the fastest axis on.
  """
  local = stored.shards // num_shards(hidden, mesh)
  local *= num_shards(tuple(a for a in hidden if a in taken), mesh)
  left = tuple(a for a in hidden if a not in taken)
  first = len(left)
  while local * num_shards(left[first:], mesh) % stored.pieces:
    first -= 1
  return left[first:]
