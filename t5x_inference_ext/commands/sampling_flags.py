"""A SamplingParams as plain flags, for every command that has one. Its gin bindings are configs/sampling.gin's."""

from collections.abc import Callable
import dataclasses
import json
from typing import Any

from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.errors import UserError

# What each does; flags have the names and defaults of a SamplingParams's fields. Stop sequences are ids there, and texts in
# commands, which have a flag of their own for them.
TEXTS = {
  'temperature': '0 takes the most likely token.',
  'top_k': 'Sample among the k most likely tokens; 0: all.',
  'top_p': 'Sample among the most likely tokens that reach this probability.',
  'repetition_penalty': 'Divides positive logits of tokens in prompt or output, and multiplies negative ones.',
  'frequency_penalty': "Is taken off a token's logit for each time it was generated.",
  'presence_penalty': 'Is taken off the logits of all tokens that were generated.',
  'logit_bias': 'What is added to logits, as JSON: {"TOKEN ID": NUMBER, ...}; -Infinity forbids a token.',
  'min_new_tokens': 'EOS is not chosen, and no stop sequence counts, before so many tokens.',
}
FLAG_KINDS = {float: 'float', int: 'integer'}


def define(define_flag: Callable[..., None], whose: str = '') -> None:
  """Defines the flags with define_flag(kind, name, default, text); `whose` begins each text."""
  for field in dataclasses.fields(SamplingParams):
    if field.name in TEXTS:
      kind = FLAG_KINDS.get(field.type)
      default = field.default if kind else None
      define_flag(kind or 'string', field.name, default, whose + TEXTS[field.name])


def sampling(flags: Any) -> SamplingParams:
  """What the flags say. Raises UserError (RequestError) for a value that makes no sense."""
  values = {name: flags[name].value for name in TEXTS}
  return SamplingParams(**{**values, 'logit_bias': _bias(values['logit_bias'])})


def _bias(text: str | None) -> dict[int, float]:
  if text is None:
    return {}
  example = 'write --logit_bias=\'{"13": -5, "1": 2.5}\''
  try:
    found = json.loads(text)
  except json.JSONDecodeError as error:
    raise UserError(
      f'logit_bias is not JSON ({error.msg} at column {error.colno}): {example}'
    ) from None
  number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
  if not isinstance(found, dict) or not all(
    key.isdecimal() and number(value) for key, value in found.items()
  ):
    raise UserError(f'logit_bias must be an object of token ids and numbers, got {text}: {example}')
  return {int(key): float(value) for key, value in found.items()}
