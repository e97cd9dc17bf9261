"""Conventions: properties of a model that T5X weights do not show, and the sources that state them.

For example, a model with GELU and one with swish have equal kernels. The sources, in order of
precedence: the manifest of a conversion that wrote the tree; T5X's own model, as the user's gin
configures it (inside T5X); the config.gin of the training run; the user's options or MODEL_CONFIG.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError, printable
from t5x_inference_ext.features import MLPS, NORM_SCALES
from t5x_inference_ext.options import check_options, option

_GROUP = 'What the weights of a T5X checkpoint do not show'
# Name of the source: the gin files that are included before configs/t5x/infer.gin.
STOCK = "T5X's own model, in the gin files in front"
ASSUMED = "assumed, PaLM's"
# Defaults of ParallelFusedDecoderLayer, which was made for PaLM. Other layers have no defaults.
PALM: Mapping[str, Any] = {
  'norm_scale': 'zero',
  'norm_epsilon': 1e-6,
  'positions': 'rotary',
  'rope_max_timescale': 1e4,
  'rescale_logits': True,
}


@dataclasses.dataclass(frozen=True)
class Conventions:
  """Properties of a model that its weights do not show, as one source states them.

  A source is a file, or the user's options. None: the source does not state this property. All
  fields except rescale_logits are fields of ModelConfig. The help texts explain them.

  Raises:
    RequestError: A value is of the wrong type, or not one of the choices.
  """

  norm_scale: str | None = option(
    None,
    help='How norm scales are stored. zero: norms apply 1 + scale. one: norms apply the scale '
    'itself. The default is the value recorded in the checkpoint, or in the config.gin beside it.',
    group=_GROUP,
    choices=NORM_SCALES,
  )
  norm_epsilon: float | None = option(
    None, help="Norms add this to the mean square; 1e-6 is flaxformer's default.", group=_GROUP
  )
  mlp: str | None = option(
    None,
    help='Activations of the MLP, as ModelConfig.mlp names them: swiglu for (swish, linear), geglu '
    'for (gelu, linear), and so on.',
    group=_GROUP,
    choices=tuple(MLPS),
  )
  rescale_logits: bool | None = option(
    None,
    help='Whether attention logits were divided by sqrt(d_head) in training. False is the default '
    "of flaxformer, and T5X's decoder_only never divides.",
    group=_GROUP,
  )
  positions: str | None = option(
    None,
    help="Kind of positions, for a tree without T5's relative bias.",
    group=_GROUP,
    choices=('rotary', 'none'),
  )
  rope_max_timescale: float | None = option(
    None, help="The base of rotary positions; 1e4 is flaxformer's default.", group=_GROUP
  )
  relative_max_distance: int | None = option(
    None, help="Distance from which on T5's relative bias is constant.", group=_GROUP, least=1
  )
  num_heads: int | None = option(
    None, help='Number of heads, where kernels [E, H Q] do not show it.', group=_GROUP, least=1
  )

  def __post_init__(self) -> None:
    check_options(self)

  def stated(self) -> dict[str, Any]:
    """Return the conventions that the source states, by name."""
    return {name: value for name, value in vars(self).items() if value is not None}


CONVENTION_NAMES = tuple(field.name for field in dataclasses.fields(Conventions))


@dataclasses.dataclass(frozen=True)
class ResolvedOption:
  """The value of a convention, and its source."""

  value: Any
  source: str

  def __str__(self) -> str:
    return f'{self.value} ({self.source})'


@dataclasses.dataclass(frozen=True)
class ConventionSources:
  """All sources of conventions.

  Attributes:
    recorded: Pairs (name of a source, its conventions), in order of precedence: files beside the
      checkpoint, and T5X's own model.
    given: The user's options.
    config: The model that the user requires, which states all conventions except rescale_logits.
  """

  recorded: Sequence[tuple[str, Conventions]] = ()
  given: Conventions = Conventions()
  config: ModelConfig | None = None

  def find(self, name: str) -> ResolvedOption | None:
    """Return a convention from the first source that states it, or None.

    Raises:
      CheckpointError: The user's value differs from that of a source with precedence.
    """
    for source, conventions in self.recorded:
      if (value := getattr(conventions, name)) is not None:
        found = ResolvedOption(value, source)
        break
    else:
      found = None
    requested = self._requested(name)
    if found is None or requested is None:
      return found or requested
    if requested.value != found.value:
      raise CheckpointError(
        f'{name}={requested.value} was {requested.source}, but it is {found.value} by '
        f'{found.source}: leave {name} out, or change its value there'
      )
    return found

  def _requested(self, name: str) -> ResolvedOption | None:
    value = getattr(self.given, name)
    if value is not None:
      return ResolvedOption(value, 'given')
    if self.config is None or name == 'rescale_logits':
      return None
    value = getattr(self.config, name)
    # A relative bias is visible in the weights, and excludes other positions: so state 'none' here.
    value = 'none' if (name, value) == ('positions', 'relative') else value
    return ResolvedOption(value, 'given with the model')

  def overruled(self, stated: Mapping[str, ResolvedOption]) -> list[str]:
    """Return a note for each recorded value that a source of higher precedence overrides."""
    return [
      f'  {name} is {value} by {source}, which {stated[name].source} overrules'
      for source, conventions in self.recorded
      for name, value in conventions.stated().items()
      if name in stated and stated[name].value != value
    ]


def check_stated(given: Conventions, found: ModelConfig, where: str) -> None:
  """Compare the user's options with the complete model that a checkpoint records.

  Raises:
    CheckpointError: An option differs from the recorded model, or has no effect on one.
  """
  for name, value in given.stated().items():
    if name == 'rescale_logits':
      raise CheckpointError(
        f'rescale_logits is for T5X checkpoints: {where} says how attention logits are scaled'
      )
    if value != getattr(found, name):
      raise CheckpointError(
        f'{name}={value} was asked for, but {where} records {getattr(found, name)!r}: leave it '
        'out, or convert again'
      )


def recorded_in(header: Mapping[str, Any]) -> dict[str, ResolvedOption]:
  """Return the conventions of its source that a serving checkpoint's header records, by name."""
  listed = header['source'].get('conventions')
  if not isinstance(listed, dict):  # header of an earlier version
    return {
      'norm_scale': ResolvedOption(header['model'].get('norm_scale'), 'recorded in the checkpoint')
    }
  found = {}
  for name, stated in listed.items():
    if isinstance(stated, dict):
      value = stated.get('value')
      value = value if isinstance(value, (bool, int, float)) else printable(value)
      found[printable(name)] = ResolvedOption(value, f'recorded: {printable(stated.get("source"))}')
  return found


def resolve(
  sources: ConventionSources,
  needed: Sequence[str],
  inputs: int,
  defaults: Mapping[str, Any],
  where: str,
) -> dict[str, ResolvedOption]:
  """Return the value and source of each needed convention.

  Args:
    sources: All sources of conventions.
    needed: Names of the conventions that the model has and its weights do not show.
    inputs: Matrices that feed the MLP, 1 or 2.
    defaults: Values to assume if no source states one.
    where: The checkpoint, for messages.

  Raises:
    CheckpointError: Conventions are not stated. The message lists them, with their choices.
  """
  stated = {name: found for name in needed if (found := sources.find(name)) is not None}
  stated |= {
    n: ResolvedOption(defaults[n], ASSUMED) for n in needed if n not in stated and n in defaults
  }
  missing = [name for name in needed if name not in stated]
  if missing:
    others = ', '.join(source for source, _ in sources.recorded)
    raise CheckpointError(
      f'{where} does not say all that its model computes: weights do not show '
      f'{"; ".join(_question(name, inputs) for name in missing)}. '
      + (f'{others} does not say it either. ' if others else '')
      + 'Give each as an option of this name, or MODEL_CONFIG, or put the config.gin of the '
      'training run beside the checkpoint (docs/serving_checkpoint.md#conventions)'
    )
  return stated


def _question(name: str, inputs: int) -> str:
  """Return a convention with its choices, for a message."""
  mlps = ', '.join(mlp for mlp, matrices in MLPS.items() if len(matrices) == inputs)
  return {
    'mlp': f'mlp, the activations ({mlps})',
    'norm_scale': 'norm_scale, whether scales are stored around (zero, one)',
    'norm_epsilon': 'norm_epsilon (a number, usually 1e-6)',
    'rescale_logits': 'rescale_logits, whether attention divides by sqrt(d_head) (True, False)',
    'positions': 'positions (rotary, none)',
    'rope_max_timescale': 'rope_max_timescale of rotary positions (a number, usually 1e4)',
    'relative_max_distance': 'relative_max_distance (a whole number, usually 128)',
    'num_heads': 'num_heads of merged kernels (a whole number)',
  }[name]
