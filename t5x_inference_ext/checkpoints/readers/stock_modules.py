"""Conventions of a model made of flaxformer's or T5X's decoder_only modules, from module options.

The options come from a run's gin file (training_gin.py), or from the modules themselves
(t5x/stock_model.py).
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from t5x_inference_ext.checkpoints.conventions import Conventions
from t5x_inference_ext.errors import CheckpointError, printable

FLAXFORMER, DECODER_ONLY = 'flaxformer.', 't5x.examples.decoder_only.'
_ATTENTION: dict[str, Any] = {
  'rescale_logits': False,
  'use_rotary_embedding': False,
  'rotary_embedding_max_timescale': 1e4,
  'use_extra_logit': False,
  'num_heads': None,
}
_NORM: dict[str, Any] = {'epsilon': 1e-6, 'center_scale_at_zero': False}
_RELATIVE: dict[str, Any] = {'max_distance': None, 'num_heads': None}
# Class -> its options that decide conventions, with flaxformer's defaults. Other classes are
# ignored.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
  'MlpBlock': {'activations': ('relu',)},
  'MultiHeadDotProductAttention': _ATTENTION,
  'MultiQueryDotProductAttention': _ATTENTION,
  'T5LayerNorm': _NORM,
  'LayerNorm': _NORM,
  'RelativePositionBiases': _RELATIVE,
  'FixedEmbed': {'features': 0},
}
_KINDS = {
  'MultiQueryDotProductAttention': 'MultiHeadDotProductAttention',
  'T5LayerNorm': 'LayerNorm',
}
# Activation -> ModelConfig.mlp. _PLAIN: MLPs with one input matrix. _GATED: MLPs with two, whose
# second is linear.
_PLAIN = {'gelu': 'gelu', 'relu': 'relu', 'swish': 'swish', 'silu': 'swish'}
_GATED = {
  'gelu': 'geglu',
  'relu': 'reglu',
  'swish': 'swiglu',
  'silu': 'swiglu',
  'sigmoid': 'glu',
  'linear': 'bilinear',
}


class StockModule(NamedTuple):
  """An option of a module of T5X's own model.

  Attributes:
    name: Name of the module's class, a key of OPTIONS.
    option: Name of the option.
    value: Value of the option; hashable, so that values of several modules can be compared.
  """

  name: str
  option: str
  value: Any


# Conventions of decoder_only's modules that do not depend on options.
DECODER_ONLY_MODULES = (
  StockModule('MultiHeadDotProductAttention', 'rescale_logits', False),
  StockModule('LayerNorm', 'epsilon', 1e-6),
  StockModule('LayerNorm', 'center_scale_at_zero', False),
  StockModule('RelativePositionBiases', 'max_distance', 128),
)


def conventions_of(modules: Iterable[StockModule], where: str, exact: bool = True) -> Conventions:
  """Derive conventions from the options of a model's modules.

  Args:
    modules: The options of all modules of known classes.
    where: Name of the configuration, for messages.
    exact: Whether `modules` are exactly the model's. If they are only candidates, an option with
      several values is ignored.

  Raises:
    CheckpointError: An option is not supported, or modules of one kind have different options.
  """
  values: dict[tuple[str, str], set[Any]] = {}
  for name, option, value in modules:
    values.setdefault((_KINDS.get(name, name), option), set()).add(value)
  if ('FixedEmbed', 'features') in values:
    raise CheckpointError(
      f'{where}: FixedEmbed adds sinusoids to the embedding; positions must be rotary, a relative '
      'bias or none'
    )

  def one(kind: str, option: str) -> Any:
    found = values.get((kind, option), set()) - {None}
    if len(found) > 1 and not exact:
      return None
    if len(found) > 1:
      raise CheckpointError(
        f'{where}: {kind}.{option} has several values, '
        f'{printable(", ".join(sorted(map(repr, found))))}; a model may have only one'
      )
    return next(iter(found), None)

  attention = 'MultiHeadDotProductAttention'
  if one(attention, 'use_extra_logit'):
    raise CheckpointError(f'{where}: use_extra_logit=True of attention is not supported')
  rotary, centered = (
    one(attention, 'use_rotary_embedding'),
    one('LayerNorm', 'center_scale_at_zero'),
  )
  heads = {one(attention, 'num_heads'), one('RelativePositionBiases', 'num_heads')} - {None}
  timescale, epsilon = one(attention, 'rotary_embedding_max_timescale'), one('LayerNorm', 'epsilon')
  return Conventions(
    norm_scale=None if centered is None else 'zero' if centered else 'one',
    norm_epsilon=epsilon,
    mlp=_mlp(one('MlpBlock', 'activations'), where),
    rescale_logits=one(attention, 'rescale_logits'),
    positions=None if rotary is None else 'rotary' if rotary else 'none',
    rope_max_timescale=timescale if rotary else None,
    relative_max_distance=one('RelativePositionBiases', 'max_distance'),
    num_heads=heads.pop() if len(heads) == 1 else None,
  )


def _mlp(activations: Any, where: str) -> str | None:
  """Return ModelConfig.mlp for a module's activations, a tuple of names."""
  if activations is None:
    return None
  known = None
  if isinstance(activations, tuple) and all(isinstance(name, str) for name in activations):
    first, *rest = activations or ('',)
    if not rest:
      known = _PLAIN.get(first)
    elif rest == ['linear']:
      known = _GATED.get(first)
  if known is None:
    raise CheckpointError(
      f'{where}: the activations {printable(repr(activations))} of the MLP are not supported; '
      f'supported are one of {", ".join(_PLAIN)}, or one of {", ".join(_GATED)} and then linear'
    )
  return known
