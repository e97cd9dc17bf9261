"""PaLM models of lucidrains' palm_rlhf_pytorch, such as conceptofmind's, from their state dict.

A state dict has no settings: sizes are derived from shapes, and other properties are those of
palm_rlhf_pytorch's code, which are printed. The form of norm scales can't be derived: until 2024
the code stored them centred at one, since January 2025 centred at zero.
"""

from collections.abc import Mapping

from t5x_inference_ext.checkpoints.families.family import FamilyModel
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError
from t5x_inference_ext.features import NORM_SCALES

_LAYER = 'layers.{}.fn.'
_FUSED, _ATTENTION_OUT, _MLP_OUT = (
  f'{_LAYER}{name}' for name in ('fused_attn_ff_proj', 'attn_out', 'ff_out.2')
)
_MODULES = {
  'embedding': 'token_emb',
  'head': 'to_logits',
  'final_norm': 'norm',
  'layer_norm': f'{_LAYER}norm',
  **dict.fromkeys(('query', 'key', 'value', 'linear', 'gate'), _FUSED),
  'attention_output': _ATTENTION_OUT,
  'mlp_output': _MLP_OUT,
}
LUCIDRAINS_NOTE = (
  'assumed, as in palm_rlhf_pytorch: rotary positions up to 10000 with xPos of base 512, layer '
  'norm with epsilon 1e-05, swish of the second MLP input'
)


def is_lucidrains(stored: Mapping[str, Tensor]) -> bool:
  """Return whether stored tensors have the names of such a model."""
  return f'{_FUSED.replace("{}", "0")}.weight' in stored


def lucidrains_model(
  stored: Mapping[str, Tensor], norm_scale: str | None, where: str
) -> FamilyModel:
  """Derive the model from its stored tensors.

  Args:
    stored: Stored tensors, by name.
    norm_scale: How norm scales are stored, 'zero' or 'one'.
    where: Path of the tensors, for messages.

  Raises:
    CheckpointError: The shapes fit no model, or norm_scale is not given.
  """
  names = [f'{n.replace("{}", "0")}.weight' for n in (_FUSED, _ATTENTION_OUT, _MLP_OUT)]
  shapes = [stored[n].shape if n in stored else () for n in ('token_emb.weight', *names)]
  if any(len(shape) != 2 for shape in shapes):
    raise CheckpointError(
      f'{where} lacks matrices of palm_rlhf_pytorch: it needs token_emb.weight, {", ".join(names)}'
    )
  (vocab_size, d_model), (rows, _), (_, q), (_, d_ff) = shapes
  d_head, odd = divmod(rows - q - 2 * d_ff, 2)
  if odd or d_head < 1 or q % d_head:
    raise CheckpointError(
      f'{names[0]} in {where} has {rows} rows, which do not fit the queries, key, value '
      f'and MLP inputs of a model with {q} rows of queries and d_ff {d_ff}'
    )
  if norm_scale not in NORM_SCALES:
    raise CheckpointError(
      f'{where} does not say how its norm scales are stored: give norm_scale=one for weights of '
      'palm_rlhf_pytorch until 2024, such as conceptofmind/palm-410m, or norm_scale=zero for later '
      'ones'
    )
  num_layers = 0
  while f'{_FUSED.replace("{}", str(num_layers))}.weight' in stored:
    num_layers += 1
  try:
    config = ModelConfig(
      num_layers=num_layers,
      d_model=d_model,
      d_ff=d_ff,
      num_heads=q // d_head,
      d_head=d_head,
      vocab_size=vocab_size,
      norm='layer',
      norm_scale=norm_scale,
      norm_epsilon=1e-5,
      xpos_scale_base=512.0,
    )
  except ValueError as e:
    raise CheckpointError(f'{where}: {e}') from e
  biases = {f'{name}_bias': f'{_MODULES[name]}.beta' for name in ('layer_norm', 'final_norm')}
  absent = {n for n, leaf in biases.items() if leaf.replace('{}', '0') not in stored}
  return FamilyModel(
    config, _MODULES, fused='lucidrains', absent=frozenset(absent), norm_leaves=('gamma', 'beta')
  )
