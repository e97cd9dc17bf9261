"""What each collective of a pass moves, predicted from the layout alone: the paper's sections 3.2, 3.3 and appendix A.

Everything is per device. The letters are those of the paper's section 3.1 and of config.py; N is the number of devices
that weights are gathered over, and an activation [B, T, ..] has B T / N tokens on each.
"""

from collections.abc import Mapping

from t5x_inference_ext.config import BlockPart, ModelConfig
from t5x_inference_ext.sharding.activations import ActivationSharding, sampling_axes
from t5x_inference_ext.sharding.collective import FLOAT32, Collective, Pass
from t5x_inference_ext.sharding.heads import kv_columns, query_columns, vocabulary_rows
from t5x_inference_ext.sharding.layout import Axes, Layout


def layer_moves(
  config: ModelConfig,
  sharding: ActivationSharding,
  mesh: Mapping[str, int],
  batch: int,
  length: int,
  activation_bytes: int = 2,
  weight_bytes: int = 2,
) -> list[Collective]:
  """The moves of one layer, sublayer by sublayer: a serial block has two 'norm', two 'input' and two 'output'.

  Padded heads and columns count: they move.

  Args:
    config: the model.
    placement: of a pass over `batch` rows of `length` positions (placement.place).
    mesh: axis name -> size.
    batch: B.
    length: T; 1 is a decode step.
    activation_bytes: of one element: 4 or 2.
    weight_bytes: of one element: 4, 2, or 1: int8, with float32 scales.
  """
  p = Pass.of(config, sharding.layout, mesh, batch * length, activation_bytes, weight_bytes)
  moves = []
  for block_part in config.block_parts:
    moves += _norm(p, sharding, batch * length)
    moves += _projections(p, block_part, before=True)
    together = sharding.sums_into(block_part) is not None
    if together:
      moves += p.activations(
        'all columns',
        'reduce_scatter',
        p.layout.embed_axes,
        p.tokens * sum(_columns(p, block_part).values()),
      )
    if block_part.attention:
      moves += _to_attention(p, sharding, together)
    if block_part.mlp and not together:
      moves += _mlp(p)
    if block_part.attention:
      moves += _from_attention(p, sharding, together)
    if together:
      rows = p.config.d_ff // p.size(p.layout.hidden_axes) * block_part.mlp
      rows += query_columns(p.config, p.stored_heads) * block_part.attention
      moves += p.activations(
        'mlp and attention', 'all_gather', p.layout.embed_axes, p.tokens * rows
      )
    moves += _projections(p, block_part, before=False)
  return moves


def feedforward_moves(
  config: ModelConfig,
  layout: Layout,
  mesh: Mapping[str, int],
  tokens: int,
  activation_bytes: int = 2,
  weight_bytes: int = 2,
) -> list[Collective]:
  """The moves of an MLP alone, without its norm: the paper's appendix A.2 formulas, which have no gate.

  The sum of `bytes` is 2 B L E for ws_1d, 2 B L (E/X + F/YZ) for ws_2d, 2 E F N/n + 2 B L E/N for the weight-gathered
  layouts, in elements.

  Args:
    config, layout, mesh, activation_bytes, weight_bytes: as in layer_moves.
    tokens: B L.

  Raises:
    ValueError: tokens that do not divide over the devices that split them.
  """
  p = Pass.of(config, layout, mesh, tokens, activation_bytes, weight_bytes)
  mlp = BlockPart('mlp', False, True)
  return _projections(p, mlp, before=True) + _mlp(p) + _projections(p, mlp, before=False)


def embedding_moves(
  config: ModelConfig,
  sharding: ActivationSharding,
  mesh: Mapping[str, int],
  batch: int,
  length: int,
  activation_bytes: int = 2,
) -> list[Collective]:
  """The moves of the lookup, once a pass: [B, T, E/stored embed], partial sums over the vocabulary, to the residual.

  Where rows are split this is done in parts, a few positions at a time; the moves are then the sums of the parts'.
  """
  layout = sharding.layout
  p = Pass.of(config, layout, mesh, batch * length, activation_bytes, activation_bytes)
  moves, here = [], batch * length * config.d_model // p.size(layout.stored_embed)
  for dim, axes in enumerate(sharding.residual):
    if dim < 2:  # d_model comes together as tokens are split: as much as before
      moves += p.activations(
        'embedding', 'all_to_all', tuple(a for a in axes if a in layout.stored_embed), here
      )
    hidden = tuple(a for a in axes if a in layout.stored_hidden)
    moves += p.activations('embedding', 'reduce_scatter', hidden, here)
    here //= p.size(hidden)
  return moves


def logits_moves(
  config: ModelConfig,
  sharding: ActivationSharding,
  mesh: Mapping[str, int],
  batch: int,
  length: int,
  sampling: Layout,
  activation_bytes: int = 2,
  last: bool = True,
) -> list[Collective]:
  """The moves of the final norm and the logits, once a pass.

  Args:
    config, placement, mesh, batch, length, activation_bytes: as in layer_moves.
    sampling: the prefill's layout, which says how rows are split for the choice of tokens (placement.sampling_axes).
    last: logits of each row's last position alone, as prefill and decode take, or of all.
  """
  layout, e = sharding.layout, config.d_model
  p = Pass.of(config, layout, mesh, batch * length, activation_bytes, activation_bytes)
  rows, positions, features = sharding.residual
  moves, width = [], e // p.size(features)
  if last:
    moves += p.activations('last positions', 'all_reduce', positions, batch // p.size(rows) * width)
    length, positions = 1, ()
  moves += _moments(p, features, batch // p.size(rows) * length // p.size(positions))
  # All tokens come together, then d_model as the table has it.
  moves += p.activations(
    'logits input', 'all_gather', rows, batch * length // p.size(positions) * width
  )
  tokens = batch * length
  moves += p.activations('logits input', 'all_gather', positions, tokens * width)
  hidden = tuple(a for a in features if a in layout.stored_hidden)
  moves += p.activations('logits input', 'all_gather', hidden, tokens * width * p.size(hidden))
  # [B, T, V/hidden], partial sums over d_model, to [B/sampling, T, V].
  split = sampling_axes(sampling, batch, mesh)
  vocabulary = vocabulary_rows(config, p.size(layout.stored_hidden))
  scattered = tuple(a for a in layout.stored_embed if a in split)
  moves += p.move('logits', 'reduce_scatter', scattered, tokens * vocabulary, FLOAT32)
  tokens //= p.size(scattered)
  reduced = tuple(a for a in layout.stored_embed if a not in split)
  moves += p.move('logits', 'all_reduce', reduced, tokens * vocabulary, FLOAT32)
  rows = tuple(a for a in layout.stored_hidden if a in split)
  moves += p.move('logits', 'all_to_all', rows, tokens * vocabulary, FLOAT32)
  rest = tuple(a for a in layout.stored_hidden if a not in split)
  return moves + p.move('logits', 'all_gather', rest, tokens * vocabulary * p.size(rest), FLOAT32)


def _norm(p: Pass, sharding: ActivationSharding, tokens: int) -> list[Collective]:
  rows, positions, features = sharding.residual
  return _moments(p, features, tokens // p.size(rows + positions))


def _moments(p: Pass, features: Axes, tokens: int) -> list[Collective]:
  """A moment of each token is summed over all of d_model; layer norm has two, one after the other."""
  return (2 if p.config.norm == 'layer' else 1) * p.move(
    'norm', 'all_reduce', features, tokens, FLOAT32
  )


def _projections(p: Pass, block_part: BlockPart, before: bool) -> list[Collective]:
  """Around the input product (before) or the output product.

  Activations: B T E/embed gathered, or summed, over the hidden axes. Weights, where they are gathered:
  `E_xF_zy` -AG-> `E_(embed)F_(hidden)`, of the axes that are left, and the scales of the input's columns.
  """
  layout, c = p.layout, p.config
  x, gathered = p.size(layout.embed_axes), layout.gathered_axes
  columns, weights = _columns(p, block_part), []
  if before:
    for name, width in columns.items():
      weights += p.move(
        f'weights: {name}', 'all_gather', gathered, c.d_model // x * width, p.weight, looped=True
      )
      if p.weight == 1:
        scales = tuple(a for a in layout.stored_hidden if a in gathered)
        weights += p.move(f'scales: {name}', 'all_gather', scales, width, FLOAT32)
  else:
    rows = {
      'mlp output': columns.get('linear', 0),
      'attention output': block_part.attention * p.blocks * query_columns(c, p.stored_heads),
    }
    for name, width in rows.items():
      if width:
        weights += p.move(
          f'weights: {name}', 'all_gather', gathered, width * c.d_model // x, p.weight, looped=True
        )
  # Where weights are gathered, theirs are the matmuls that loop.
  name, kind = ('input', 'all_gather') if before else ('output', 'reduce_scatter')
  stream = p.activations(
    name, kind, layout.hidden_axes, p.tokens * c.d_model // x, looped=not gathered
  )
  return stream + weights if before else weights + stream


def _columns(p: Pass, block_part: BlockPart) -> dict[str, int]:
  """The columns of the input product on one device."""
  c, stored = p.config, p.stored_heads
  columns = (
    {name: c.d_ff // p.size(p.layout.hidden_axes) for name in c.mlp_inputs}
    if block_part.mlp
    else {}
  )
  if block_part.attention:
    columns['attention'] = p.blocks * (query_columns(c, stored) + kv_columns(c, stored)[1])
  return columns


def _mlp(p: Pass) -> list[Collective]:
  """`BLF_yz(partialsum-x)` -RS(x)-> `BLF_xyz` for each input, -AG(x)-> `BLF_yz` of their product."""
  count = p.tokens * p.config.d_ff // p.size(p.layout.hidden_axes)
  moves = []
  for name in p.config.mlp_inputs:
    moves += p.activations(name, 'reduce_scatter', p.layout.embed_axes, count)
  return moves + p.activations('mlp', 'all_gather', p.layout.embed_axes, count)


def _to_attention(p: Pass, sharding: ActivationSharding, summed: bool) -> list[Collective]:
  """Section 3.3: `BLH_yzQ(partialsum-x)`, unless summed already, to queries, keys and values as attention splits them."""
  layout, heads, d = p.layout, sharding.heads, p.config.d_head
  embed, rows = layout.embed_axes, sharding.hidden_rows
  x = p.size(embed)
  query = p.tokens * p.blocks * query_columns(p.config, heads.stored)
  kv, padded = (p.tokens * p.blocks * n for n in kv_columns(p.config, heads.stored))
  together, by = 'query, keys and values', _split_by(sharding)
  if (
    by == 'heads'
  ):  # each part's heads are padded to divide; so are its key heads, unless devices share them
    cut = heads.cut
    query = p.tokens * cut.padded_groups * cut.padded_queries * d
    moves = p.activations('query', 'reduce_scatter', embed, query)
    if not heads.multiquery and cut.copies == 1:
      moves += p.activations(
        'keys and values', 'reduce_scatter', embed, 2 * p.tokens * cut.padded_groups * d
      )
    else:
      moves += p.activations('keys and values', 'all_reduce', embed, kv)
    query //= x
    kv = kv if heads.multiquery else 2 * p.tokens * cut.local_groups * d
  elif by is None:
    moves = p.activations(together, 'all_reduce', embed, query + padded)
  else:
    moves = [] if summed else p.activations(together, 'reduce_scatter', embed, query + padded)
    query, kv, padded = query // x, kv // x, padded // x
  if by != 'heads' and rows == layout.hidden_axes:
    moves += p.activations(together, 'all_to_all', rows, query + padded)
  else:
    moves += p.activations('query', 'all_to_all', rows, query)
    moves += p.activations('keys and values', 'all_to_all', rows, kv)
  moves += p.activations('query', 'all_to_all', sharding.hidden_positions, query)
  moves += p.activations('query', 'all_gather', sharding.joined, query * p.size(sharding.joined))
  if heads.multiquery:
    rest = tuple(a for a in layout.hidden_axes if a not in rows)
    kv *= p.size(rest)
    moves += p.activations('keys and values', 'all_gather', rest, kv)
  elif by != 'heads':
    kv //= heads.stride  # of key heads that devices share, one copy is kept
  # Every device's queries see all keys; which were gathered over hidden axes already.
  positions = tuple(a for a in sharding.attention_positions if a not in sharding.hidden_positions)
  return moves + p.activations('keys and values', 'all_gather', positions, kv * p.size(positions))


def _from_attention(p: Pass, sharding: ActivationSharding, summed: bool) -> list[Collective]:
  """Section 3.3: what attention gives, back to `BLH_yzQ`."""
  layout, heads = p.layout, sharding.heads
  columns = p.tokens * p.blocks * query_columns(p.config, heads.stored)
  by = _split_by(sharding)
  if by == 'heads':
    columns = p.tokens * heads.cut.padded_groups * heads.cut.padded_queries * p.config.d_head
  here = columns // p.size(layout.embed_axes) if by else columns
  moves = p.activations('attention', 'all_to_all', sharding.hidden_positions, here)
  moves += p.activations('attention', 'all_to_all', sharding.hidden_rows, here)
  return moves + (
    p.activations('attention', 'all_gather', layout.embed_axes, columns)
    if by and not summed
    else []
  )


def _split_by(sharding: ActivationSharding) -> str | None:
  """What attention splits over the embed axis: 'heads', 'positions' or 'rows'; None where nothing, or there is none."""
  split = {
    'heads': sharding.attention_heads,
    'positions': sharding.attention_positions,
    'rows': sharding.attention_rows,
  }
  return next(
    (by for by, axes in split.items() if set(sharding.layout.embed_axes) & set(axes)), None
  )
