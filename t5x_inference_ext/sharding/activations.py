"""A layout resolved for one pass: a model, a mesh, so many rows of so many positions."""

from collections.abc import Mapping
import dataclasses
import itertools

from jax.sharding import PartitionSpec as P

from t5x_inference_ext.config import BlockPart, ModelConfig
from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.sharding.heads import AttentionHeads, HeadSplit, stored_heads
from t5x_inference_ext.sharding.layout import Axes, Layout, num_shards, shape_text


@dataclasses.dataclass(frozen=True)
class ActivationSharding:
  """Where the activations of one pass live.

  Inside a layer tokens are [B_rows, T_positions]. In attention queries are
  [B_attention_rows, T_attention_positions, heads, Q], and keys and values have all positions of the rows. What products
  leave summed over some axes is also split over them: the residual stream over the hidden axes, the MLP's columns over
  the embed axes. Of its dimensions that is rows, where they divide: whole rows of features need no all-reduce in the
  norm, and no change of layout around the collectives on a TPU; else positions, else features.

  Attributes:
    layout: what was resolved.
    rows, positions: axes that split tokens, those that weights are gathered over.
    residual_dim: the dimension of the residual stream [B, T, E] that the hidden axes split.
    mlp_dim: the dimension of the MLP's columns [B, T, F] that the embed axes split.
    attention_rows: axes that split attention's and the cache's rows; `rows` lead.
    attention_heads: axes that split its heads.
    attention_positions: axes that split its queries by position; `positions` lead. Hidden axes are among them where the
      columns of their shards hold parts of heads.
    joined: hidden axes over which the queries' columns are gathered for want of positions: all their devices do the same.
    heads: the heads on each device.
  """

  layout: Layout
  rows: Axes
  positions: Axes
  residual_dim: int
  mlp_dim: int
  attention_rows: Axes
  attention_heads: Axes
  attention_positions: Axes
  joined: Axes
  heads: AttentionHeads

  @property
  def residual(self) -> tuple[Axes, Axes, Axes]:
    """The axes that split the dimensions of the residual stream [B, T, E]."""
    return tuple(
      axes + (self.layout.hidden_axes if dim == self.residual_dim else ())
      for dim, axes in enumerate((self.rows, self.positions, self.layout.embed_axes))
    )

  @property
  def cache(self) -> P:
    """[B, S, K, Q]; one key head in all is whole on every device that splits heads."""
    return P(
      self.attention_rows, None, None if self.heads.multiquery else self.attention_heads, None
    )

  def sums_into(self, block_part: BlockPart) -> int | None:
    """The dimension of tokens [B, T] that one collective splits all columns of a sublayer over, the embed axes' part.

    None where MLP and attention go into different dimensions or into none, or no axis is left to sum over.
    """
    embed = set(self.layout.embed_axes)
    dims = [self.mlp_dim] if block_part.mlp else []
    if block_part.attention:
      dims.append(
        0 if embed & set(self.attention_rows) else 1 if embed & set(self.attention_positions) else 2
      )
    return dims[0] if embed and len(set(dims)) == 1 and dims[0] < 2 else None

  @property
  def hidden_rows(self) -> Axes:
    """Working hidden axes that attention splits rows over: an all-to-all takes columns to rows."""
    return tuple(a for a in self.layout.hidden_axes if a in self.attention_rows)

  @property
  def hidden_positions(self) -> Axes:
    """Working hidden axes that attention splits queries' positions over: an all-to-all takes columns to positions."""
    return tuple(a for a in self.layout.hidden_axes if a in self.attention_positions)


def shard_activations(
  layout: Layout,
  config: ModelConfig,
  mesh: Mapping[str, int],
  batch: int,
  length: int,
  cached: bool = False,
) -> ActivationSharding:
  """Resolves a layout.

  Args:
    layout: to resolve.
    config: the model.
    mesh: axis name -> size.
    batch: B.
    length: T; 1 is a decode step. See padded_length for what it must be a multiple of.
    cached: whether these positions follow others in a cache, which then lies as decode steps of the layout have it.

  Raises:
    MeshError: rows that a weight-gathered decode step can't split, naming what it could.
  """
  rows, positions = _token_axes(layout, batch, mesh)
  if length % num_shards(positions, mesh):
    chips = num_shards(layout.gathered_axes, mesh)
    raise MeshError(
      f'{layout} splits tokens over {chips} devices of the mesh {shape_text(mesh)}, and {batch} rows of {length} do '
      f'not divide: use a batch that is a multiple of {chips}'
      + (', or a weight-stationary layout (ws_2d) for decode' if length == 1 else '')
    )
  hidden, embed = layout.hidden_axes, layout.embed_axes
  more: Axes = ()
  if layout.attention == 'batch':
    more = _filled(_row_axes(embed, hidden), batch // num_shards(rows, mesh), mesh)
  stored = stored_heads(config, num_shards(layout.stored_hidden, mesh))
  whole = _whole_heads(stored, hidden, more, mesh)
  heads = tuple(a for a in hidden if a not in more + whole)
  cut = 1
  if embed and embed[0] not in more:
    # Partial sums over x are reduced into positions, as the MLP's are, or into heads if these are asked for, padded where
    # most are real; if neither will do (one token, few heads) not at all.
    divides = (1 if cached else length) % num_shards(embed, mesh) == 0
    enough = heads == hidden and 2 * stored.local_heads > num_shards(embed, mesh)
    if enough and not (divides and layout.attention == 'batch'):
      heads, cut = heads + embed, num_shards(embed, mesh)
    elif divides:
      positions += embed
  joined = whole if length % num_shards(positions + whole, mesh) else ()
  positions += () if joined else whole
  blocks = stored.shards // num_shards(tuple(a for a in heads if a in hidden), mesh)
  gathered = tuple(a for a in positions if a in layout.gathered_axes)
  tokens = batch // num_shards(rows, mesh), length // num_shards(gathered, mesh)
  # Looped collectives cut the dimension that the product sums over: whole rows would be few for each step.
  residual_dim = 2 if layout.ring_directions else _token_dim(tokens, num_shards(hidden, mesh))
  return ActivationSharding(
    layout,
    rows,
    gathered,
    residual_dim,
    _token_dim(tokens, num_shards(embed, mesh)),
    rows + more,
    heads,
    positions,
    joined,
    AttentionHeads(stored, blocks, cut, config.num_kv_heads == 1),
  )


def padded_length(layout: Layout, mesh: Mapping[str, int], batch: int, length: int) -> int:
  """The smallest length of at least `length` that `place` takes; padding goes to the right, where nothing sees it."""
  multiple = num_shards(_token_axes(layout, batch, mesh)[1], mesh)
  return -(-length // multiple) * multiple


def sampling_axes(layout: Layout, batch: int, mesh: Mapping[str, int]) -> Axes:
  """The axes that logits [B, V] are split over by rows, for the choice of tokens: as many as the rows fill."""
  return _filled(_row_axes(layout.stored_embed, layout.stored_hidden), batch, mesh)


def padded_batch(decode: Layout, batch: int, mesh: Mapping[str, int]) -> int:
  """The smallest batch of at least `batch` rows that fills every set of axes that so many rows could fill.

  On 2x2x2 that makes 3 rows 4, 5 rows 8 and 9 rows 16: a few rows more cost less than rows that each device repeats.
  Where decode splits heads alone no number is better than another. A weight-gathered decode needs a multiple of what it
  gathers over.
  """
  gathered = num_shards(decode.gathered_axes, mesh)
  candidates = (
    _row_axes(decode.embed_axes, decode.hidden_axes) if decode.attention == 'batch' else [()]
  )
  sizes = [num_shards(c, mesh) for c in candidates]
  rows = itertools.count(-(-batch // gathered))
  return gathered * next(n for n in rows if n % max(s for s in sizes if s <= n) == 0)


def _whole_heads(stored: HeadSplit, hidden: Axes, rows: Axes, mesh: Mapping[str, int]) -> Axes:
  """The hidden axes, besides those that rows take, whose shards' columns together are whole heads: the fastest."""
  here = stored.shards // num_shards(hidden, mesh)
  left = tuple(a for a in hidden if a not in rows)
  taken = num_shards(tuple(a for a in hidden if a in rows), mesh)
  return next(
    left[i:]
    for i in range(len(left), -1, -1)
    if here * taken * num_shards(left[i:], mesh) % stored.pieces == 0
  )


def _token_axes(layout: Layout, batch: int, mesh: Mapping[str, int]) -> tuple[Axes, Axes]:
  """The axes that weights are gathered over: those that rows fill, and the rest, which split positions."""
  rows = _filled(_subsets(layout.gathered_axes), batch, mesh)
  return rows, tuple(a for a in layout.gathered_axes if a not in rows)


def _token_dim(tokens: tuple[int, int], shards: int) -> int:
  """The dimension of [rows, positions, features] that so many shards split: the first that they divide."""
  return next((dim for dim, n in enumerate(tokens) if n % shards == 0), 2)


def _row_axes(embed: Axes, hidden: Axes) -> list[Axes]:
  """The sets of axes that rows may be split over in attention.

  Hidden axes from the fastest: the heads of those left over are then consecutive.
  """
  return [e + hidden[i:] for i in range(len(hidden) + 1) for e in ((embed, ()) if embed else ((),))]


def _filled(candidates, batch: int, mesh: Mapping[str, int]) -> Axes:
  """The candidate with the most devices that divide the batch.

  Of equals one with x: heads can take the other axes, while x, over which products are partial sums, would be idle.
  """
  return max(
    (c for c in candidates if batch % num_shards(c, mesh) == 0),
    key=lambda c: (num_shards(c, mesh), 'x' in c),
  )


def _subsets(axes: Axes):
  """More axes first."""
  return [s for n in range(len(axes), -1, -1) for s in itertools.combinations(axes, n)]
