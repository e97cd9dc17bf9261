"""The ModelConfig of a flaxformer tree, derived from its shapes and from conventions."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from t5x_inference_ext.checkpoints.conventions import (
  PALM,
  ConventionSources,
  ResolvedOption,
  resolve,
)
from t5x_inference_ext.checkpoints.readers.flaxformer_names import EMBEDDING, HEAD, RELATIVE_BIAS
from t5x_inference_ext.checkpoints.readers.layer_kinds import (
  LayerKind,
  Shapes,
  UnknownHeads,
  UnknownSizes,
)
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError

# Number of the MLP's input matrices -> PaLM's kind of MLP.
_PALM_MLPS = {1: 'gelu', 2: 'swiglu'}


@dataclasses.dataclass(frozen=True)
class TreeShape:
  """Properties of a model that can be derived from its tree.

  Attributes:
    kind: The kind of the model's layers.
    kernels: Module of a layer -> shape of its kernel, without the layer axis.
    norm: 'rms' or 'layer'.
    num_layers: L.
    leaves: The parameters in scanned form, by name.
  """

  kind: LayerKind
  kernels: Shapes
  norm: str
  num_layers: int
  leaves: Mapping[str, Tensor]

  @property
  def bias_table(self) -> tuple[int, ...] | None:
    """Shape [H, buckets] of T5's relative bias, or None."""
    leaf = self.leaves.get(RELATIVE_BIAS)
    return None if leaf is None else leaf.shape

  def facts(self) -> dict[str, Any]:
    """Return the ModelConfig fields, except sizes, that can be derived from the tree."""
    facts: dict[str, Any] = {'block': self.kind.block, 'norm': self.norm}
    facts['tied_head'] = HEAD not in self.leaves
    if self.bias_table is not None:
      facts |= {'positions': 'relative', 'relative_buckets': self.bias_table[1]}
    return facts


def find_model(
  shape: TreeShape, sources: ConventionSources, where: str
) -> tuple[ModelConfig, dict[str, ResolvedOption]]:
  """Return a tree's model, and the conventions that had to be looked up.

  Args:
    shape: The tree's properties.
    sources: Sources of conventions. If they include a required model, it must equal the tree's.
    where: The checkpoint, for messages.

  Raises:
    ValueError: The shapes fit no model, or not the model that the user requires.
    CheckpointError: A convention is not stated.
  """
  if shape.bias_table is not None and len(shape.bias_table) != 2:
    raise UnknownSizes(
      f'target/{RELATIVE_BIAS} has shape {list(shape.bias_table)}, expected [heads, buckets]'
    )
  inputs = shape.kind.mlp_inputs(shape.kernels)
  facts, config = shape.facts(), sources.config
  if config is not None:
    _check_required(config, facts, inputs)
  needed = _needed(shape, sources, where)
  heads = shape.bias_table[0] if shape.bias_table else None
  stated_heads = sources.find('num_heads')
  known = stated_heads.value if stated_heads else None
  try:
    sizes = {} if config else shape.kind.sizes(shape.kernels, heads or known)
  except UnknownHeads:
    sizes, needed = {}, (*needed, 'num_heads')
  if stated_heads is not None and sizes and sizes['num_heads'] != stated_heads.value:
    raise UnknownSizes(f'num_heads={stated_heads}, but the kernels have {sizes["num_heads"]}')
  defaults = {**PALM, 'mlp': _PALM_MLPS[inputs]} if shape.kind.is_palms else {}
  stated = resolve(sources, needed, inputs, defaults, where)
  if shape.norm == 'layer':  # flax's layer norm always stores scales centred at one
    stated = {
      'norm_scale': sources.find('norm_scale') or ResolvedOption('one', "flax's LayerNorm"),
      **stated,
    }
  values = {name: s.value for name, s in stated.items() if name != 'rescale_logits'}
  if config is not None:
    model = dataclasses.replace(config, **values)
  else:
    vocab_size, d_model = shape.leaves[EMBEDDING].shape
    sizes |= {'num_layers': shape.num_layers, 'vocab_size': vocab_size, 'd_model': d_model}
    model = ModelConfig(**{**sizes, **facts, **values})
  if len(model.mlp_inputs) != inputs:
    raise UnknownSizes(
      f'mlp={stated["mlp"]} has {len(model.mlp_inputs)} input matrices, but the tree has {inputs}'
    )
  return model, stated


def _needed(shape: TreeShape, sources: ConventionSources, where: str) -> tuple[str, ...]:
  """Return the names of the conventions that a tree's model needs, except num_heads."""
  names = ('mlp', *(('norm_scale',) if shape.norm == 'rms' else ()), 'norm_epsilon')
  positions = sources.find('positions')
  if shape.bias_table is None:
    rotary = () if positions and positions.value == 'none' else ('rope_max_timescale',)
    return (*names, 'rescale_logits', 'positions', *rotary)
  if positions and positions.source == 'given':
    raise CheckpointError(f'positions={positions}, but {where} has a relative bias')
  if positions and positions.value == 'rotary':
    raise CheckpointError(
      f'{where} has a relative bias, and by {positions.source} rotary positions too: only one is '
      'supported'
    )
  return (*names, 'rescale_logits', 'relative_max_distance')


def _check_required(config: ModelConfig, facts: Mapping[str, Any], inputs: int) -> None:
  """Raise UnknownSizes if the model that the user requires differs from what the tree shows."""
  shown = {name: (getattr(config, name), value) for name, value in facts.items()}
  if 'positions' not in facts and config.positions == 'relative':
    shown['positions'] = config.positions, 'no relative bias'
  if len(config.mlp_inputs) != inputs:
    shown['mlp'] = config.mlp, f'{inputs} input matrices'
  for name, (required, found) in shown.items():
    if required != found:
      raise UnknownSizes(
        f'the model asked for has {name}={required}, but the tree has {name}={found}'
      )
