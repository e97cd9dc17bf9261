"""Traffic: the collectives of a pass and their bytes, predicted from the layout alone.

The layouts are those of the paper's sections 3.2 and 3.3; the formulas are from its appendix A. All
numbers are per device. Letters are those of the paper's section 3.1 and of config.py. N is the
number of devices that weights are gathered over: each of them has B T / N tokens of activations [B,
T, ..].
"""

from collections.abc import Mapping

from t5x_inference_ext.config import BlockPart, ModelConfig
from t5x_inference_ext.params import norm_names, post_norm_names
from t5x_inference_ext.sharding.activations import ActivationSharding, sampling_axes
from t5x_inference_ext.sharding.attention_traffic import from_attention, head_norms, to_attention
from t5x_inference_ext.sharding.collective import FLOAT32, INT32, Collective, Pass, WeightBytes
from t5x_inference_ext.sharding.heads import vocabulary_rows
from t5x_inference_ext.sharding.layout import Axes, Layout


def layer_collectives(
  config: ModelConfig,
  sharding: ActivationSharding,
  mesh: Mapping[str, int],
  batch: int,
  length: int,
  activation_bytes: int = 2,
  weight_bytes: WeightBytes = 2,
) -> list[Collective]:
  """Return the collectives of one layer, block part by block part.

  A serial block has the collectives 'norm', 'input' and 'output' twice. Padding of heads and
  columns is counted, because it is sent too.

  Args:
    config: The model.
    sharding: The sharding of a pass over `batch` rows of `length` positions (shard_activations).
    mesh: Axis name -> size.
    batch: B.
    length: T; 1 for a decode step.
    activation_bytes: Bytes of an activation element: 4 or 2.
    weight_bytes: Bytes of a weight element (WeightBytes): 4, 2, or with float32 scales 1 for int8
      and 0.5 for int4.
  """
  p = Pass(config, sharding.layout, mesh, batch * length, activation_bytes, weight_bytes)
  embed = p.layout.embed_axes
  collectives: list[Collective] = []
  for part in config.block_parts:
    rows, positions, features = sharding.residual
    moments = _moments(p, features, batch * length // p.size(rows + positions))
    collectives += (
      moments if norm_names(config, part) else []
    )  # two norms of one input share the moments
    collectives += _into_columns(p, part, sharding.residual_dim is None)
    summed = sharding.reduce_scatter_dim(part) is not None
    if summed:
      collectives += _sums_of_columns(p, part)
    if part.attention:
      collectives += to_attention(p, sharding, summed)
      collectives += head_norms(p, sharding, batch, length)
    if part.mlp and not summed:
      collectives += _mlp(p, part)
    if part.attention:
      collectives += from_attention(p, sharding, summed)
    if summed:
      count = p.tokens * sum(p.rows(part).values())
      collectives += p.activations('mlp and attention', 'all_gather', embed, count)
    collectives += _out_of_columns(p, part, sharding.residual_dim is None)
    collectives += moments if post_norm_names(config, part) else []
  return collectives


def feedforward_collectives(
  config: ModelConfig,
  layout: Layout,
  mesh: Mapping[str, int],
  tokens: int,
  activation_bytes: int = 2,
  weight_bytes: WeightBytes = 2,
) -> list[Collective]:
  """Return the collectives of an MLP alone, without its norm: the paper's appendix A.2.

  The paper's formulas have no gate. In elements, the sum of `bytes` is 2 B L E for ws_1d,
  2 B L (E/X + F/YZ) for ws_2d, and 2 E F N/n + 2 B L E/N for weight-gathered layouts on n devices.

  Args:
    config: The model.
    layout: The layout. Only its feedforward part is used.
    mesh: Axis name -> size.
    tokens: B L.
    activation_bytes: Bytes of an activation element: 4 or 2.
    weight_bytes: Bytes of a weight element (WeightBytes): 4, 2, or with float32 scales 1 for int8
      and 0.5 for int4.

  Raises:
    ValueError: The tokens do not divide over the devices that split them.
  """
  p = Pass(config, layout, mesh, tokens, activation_bytes, weight_bytes)
  mlp = BlockPart('mlp', False, True)
  return _into_columns(p, mlp) + _mlp(p, mlp) + _out_of_columns(p, mlp)


def embedding_collectives(
  config: ModelConfig,
  sharding: ActivationSharding,
  mesh: Mapping[str, int],
  batch: int,
  length: int,
  activation_bytes: int = 2,
) -> list[Collective]:
  """Return the collectives of the embedding lookup, which runs once per pass.

  The lookup gives [B, T, E/stored embed], partial sums over the vocabulary; the collectives reshard
  them to the residual stream. If rows are split, the lookup runs on a few positions at a time, and
  `bytes` is the sum over all runs. The arguments are those of layer_collectives.
  """
  layout = sharding.layout
  p = Pass(config, layout, mesh, batch * length, activation_bytes, activation_bytes)
  collectives: list[Collective] = []
  if config.positions == 'learned' and length == 1:  # every device looks up all positions
    collectives += p.collective('positions', 'all_gather', sharding.attention_rows, batch, INT32)
  local = batch * length * config.d_model // p.size(layout.stored_embed)
  for dim, axes in enumerate(sharding.residual):
    if dim < 2:  # gathering d_model while splitting tokens keeps the element count
      embed = tuple(a for a in axes if a in layout.stored_embed)
      collectives += p.activations('embedding', 'all_to_all', embed, local)
    hidden = tuple(a for a in axes if a in layout.stored_hidden)
    collectives += p.activations('embedding', 'reduce_scatter', hidden, local)
    local //= p.size(hidden)
  if sharding.residual_dim is None:
    collectives += p.activations('embedding', 'all_reduce', layout.stored_hidden, local)
  if config.embedding_norm:
    rows, positions, features = sharding.residual
    collectives += _moments(p, features, batch * length // p.size(rows + positions))
  return collectives


def logits_collectives(
  config: ModelConfig,
  sharding: ActivationSharding,
  mesh: Mapping[str, int],
  batch: int,
  length: int,
  sampling: Layout,
  activation_bytes: int = 2,
  last: bool = True,
  greedy: bool = False,
) -> list[Collective]:
  """Return the collectives of the final norm and the logits, which run once per pass.

  Args:
    config: The model.
    sharding: The sharding of the pass.
    mesh: Axis name -> size.
    batch: B.
    length: T.
    sampling: The prefill layout, which decides how rows are split while tokens are chosen
      (activations.sampling_axes).
    activation_bytes: Bytes of an activation element: 4 or 2.
    last: True for logits of each row's last position only, as in prefill and decode; False for
      logits of all positions.
    greedy: Whether only the most likely tokens move, as in Model.decode_greedily.
  """
  layout, e = sharding.layout, config.d_model
  p = Pass(config, layout, mesh, batch * length, activation_bytes, activation_bytes)
  rows, positions, features = sharding.residual
  width = e // p.size(features)
  collectives: list[Collective] = []
  if last:
    collectives += p.activations(
      'last positions', 'all_reduce', positions, batch // p.size(rows) * width
    )
    length, positions = 1, ()
  collectives += _moments(p, features, batch // p.size(rows) * length // p.size(positions))
  # Gather all tokens, then split d_model as in the embedding.
  collectives += p.activations(
    'logits input', 'all_gather', rows, batch * length // p.size(positions) * width
  )
  tokens = batch * length
  collectives += p.activations('logits input', 'all_gather', positions, tokens * width)
  hidden = tuple(a for a in features if a in layout.stored_hidden)
  collectives += p.activations(
    'logits input', 'all_gather', hidden, tokens * width * p.size(hidden)
  )
  # Reshard [B, T, V/hidden], partial sums over d_model, to [B/sampling, T, V].
  split = sampling_axes(sampling, batch, mesh)
  vocabulary = vocabulary_rows(config, p.size(layout.stored_hidden))
  scattered = tuple(a for a in layout.stored_embed if a in split)
  collectives += p.collective('logits', 'reduce_scatter', scattered, tokens * vocabulary, FLOAT32)
  tokens //= p.size(scattered)
  reduced = tuple(a for a in layout.stored_embed if a not in split)
  collectives += p.collective('logits', 'all_reduce', reduced, tokens * vocabulary, FLOAT32)
  if greedy:  # three numbers of each row from each shard (model/best_tokens.py)
    best = 3 * p.size(layout.stored_hidden) * tokens
    collectives += p.collective('best', 'all_gather', layout.stored_hidden, best, FLOAT32)
    return collectives + p.collective(
      'best', 'all_gather', scattered, best * p.size(scattered), FLOAT32
    )
  rows = tuple(a for a in layout.stored_hidden if a in split)
  collectives += p.collective('logits', 'all_to_all', rows, tokens * vocabulary, FLOAT32)
  rest = tuple(a for a in layout.stored_hidden if a not in split)
  return collectives + p.collective(
    'logits', 'all_gather', rest, tokens * vocabulary * p.size(rest), FLOAT32
  )


def _moments(p: Pass, features: Axes, tokens: int) -> list[Collective]:
  """Return the all-reduces of each token's moments: two for layer norm, one for RMS norm."""
  moments = 2 if p.config.norm == 'layer' else 1
  return moments * p.collective('norm', 'all_reduce', features, tokens, FLOAT32)


def _sums_of_columns(p: Pass, part: BlockPart) -> list[Collective]:
  """Return the reduce-scatters of a block part's columns: one, or with two norms one for each."""
  columns = p.columns(part)
  groups = {'all columns': sum(columns.values())}
  if p.config.has_two_norms(part):
    groups = {
      'mlp columns': groups['all columns'] - columns['attention'],
      'attention columns': columns['attention'],
    }
  collectives: list[Collective] = []
  for name, width in groups.items():
    collectives += p.activations(name, 'reduce_scatter', p.layout.embed_axes, p.tokens * width)
  return collectives


def _into_columns(p: Pass, part: BlockPart, whole: bool = False) -> list[Collective]:
  """Return the collectives of the input product: B T E/embed activations, or gathered weights.

  Gathered weights go `E_xF_zy` -AG-> `E_(embed)F_(hidden)`, with the scales of their columns.

  Args:
    p: The pass.
    part: The block part.
    whole: Whether each device along the hidden axes has the activations already.
  """
  layout, features = p.layout, _features(p)
  gathered = layout.gathered_axes
  axes = () if whole else layout.hidden_axes
  collectives = p.activations('input', 'all_gather', axes, p.tokens * features)
  weight = p.weight_width(part, 'w_in')
  for name, width in p.columns(part).items():
    collectives += p.collective(
      f'weights: {name}', 'all_gather', gathered, features * width, weight
    )
    if weight <= 1:
      scales = tuple(a for a in layout.stored_hidden if a in gathered)
      collectives += p.collective(f'scales: {name}', 'all_gather', scales, width, FLOAT32)
  return collectives


def _out_of_columns(p: Pass, part: BlockPart, whole: bool = False) -> list[Collective]:
  """Return the collectives of the output product: gathered weights, and B T E/embed sums.

  Args:
    p: The pass.
    part: The block part.
    whole: Whether each device along the hidden axes gets all sums.
  """
  layout, features = p.layout, _features(p)
  gathered = layout.gathered_axes
  collectives: list[Collective] = []
  for name, width in p.rows(part).items():
    what = f'weights: {name.replace("_", " ")}'
    weight = p.weight_width(part, 'w_out')
    collectives += p.collective(what, 'all_gather', gathered, width * features, weight)
  kind = 'all_reduce' if whole else 'reduce_scatter'
  return collectives + p.activations('output', kind, layout.hidden_axes, p.tokens * features)


def _features(p: Pass) -> int:
  """Return E/embed, the number of features in a device's products."""
  return p.config.d_model // p.size(p.layout.embed_axes)


def _mlp(p: Pass, part: BlockPart) -> list[Collective]:
  """Return the collectives that sum an MLP's inputs and gather their product.

  `BLF_yz(partialsum-x)` -RS(x)-> `BLF_xyz` for each input, -AG(x)-> `BLF_yz` of the product.
  """
  columns, embed = p.columns(part), p.layout.embed_axes
  collectives: list[Collective] = []
  for name in p.config.mlp_inputs:
    collectives += p.activations(name, 'reduce_scatter', embed, p.tokens * columns[name])
  return collectives + p.activations(
    'mlp', 'all_gather', embed, p.tokens * p.rows(part)['mlp_output']
  )
