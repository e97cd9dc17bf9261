"""SamplingParams as flags, for every command that generates (for gin: configs/sampling.gin)."""

from absl import flags as absl_flags

from t5x_inference_ext.commands import option_flags
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.runs.row_sampling import parse_logit_bias
from t5x_inference_ext.text_files import parse_json

_GROUP = 'Choosing tokens'
# logit_bias is a mapping, which the command line takes as JSON.
_SKIP = ('logit_bias',)
NAMES = option_flags.option_names(SamplingParams)


def define_sampling(flags: absl_flags.FlagValues, prefix: str = '') -> None:
  """Define a flag for each option of SamplingParams. Each help text begins with `prefix`."""
  option_flags.define_options(flags, SamplingParams, skip=_SKIP, group=_GROUP, prefix=prefix)
  (bias,) = option_flags.option_fields(SamplingParams, named=_SKIP)
  text = f'{prefix}{bias.metadata["help"]}'
  option_flags.define_flag(flags, bias.name, str | None, None, text, group=_GROUP)


def read_sampling(flags: absl_flags.FlagValues) -> SamplingParams:
  """Return the SamplingParams of the flags; raise UserError for a value out of its range."""
  if flags.logit_bias is None:
    return option_flags.read_options(flags, SamplingParams, skip=_SKIP)
  example = 'write --logit_bias=\'{"13": -5, "1": 2.5}\''
  try:
    found = parse_json(flags.logit_bias)
  except ValueError as error:
    raise UserError(f'logit_bias is {error}: {example}') from None
  try:
    bias = parse_logit_bias(found)
  except UserError as error:
    raise UserError(f'{error}: {example}') from None
  return option_flags.read_options(flags, SamplingParams, skip=_SKIP, logit_bias=bias)
