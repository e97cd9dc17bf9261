"""What a row of a prompts file says of how it is continued, in the place of what the run says."""

from collections.abc import Mapping
import dataclasses
import reprlib
from typing import Any

from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.sampling_arrays import stack_params
from t5x_inference_ext.engine.vocabularies import Vocabulary, stop_sequences
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.options import has_type

FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams))
KNOWN = (*FIELDS, 'max_new_tokens', 'seed')


@dataclasses.dataclass(frozen=True)
class Asked:
  """How one row is continued.

  Attributes:
    sampler: how its tokens are chosen, and what ends it.
    max_new_tokens: its limit.
    seed: of its first sample, others follow; None: one from the run's seed and the row's place.
  """

  sampling: SamplingParams
  max_new_tokens: int
  seed: int | None = None


def asked(
  run: Asked, said: Mapping[str, Any], vocabulary: Vocabulary | None, vocab_size: int
) -> Asked:
  """What a row asks for.

  Args:
    run: what all rows do that say nothing.
    said: the row's `sampling`, as read from JSON: a SamplingParams's fields, with texts or ids in `stop` and an object as
      `logit_bias`; `max_new_tokens`, the run's at most; `seed`.
    vocabulary: for texts.
    vocab_size: V, rows of the model's embedding.

  Raises:
    RequestError: an option that is not known, or a value that makes no sense.
  """
  for name, value in said.items():
    if name not in KNOWN:
      raise RequestError(f'`sampling` has {name!r}, and can have {", ".join(KNOWN)}')
    if name in ('max_new_tokens', 'seed') and not has_type(value, int):
      raise RequestError(f'`sampling`: {name} must be a whole number, got {reprlib.repr(value)}')
  fields = {name: value for name, value in said.items() if name in FIELDS}
  if 'stop' in fields:
    fields['stop'] = _stop(fields['stop'], vocabulary)
  if 'logit_bias' in fields:
    fields['logit_bias'] = parse_logit_bias(fields['logit_bias'])
  sampling = dataclasses.replace(run.sampling, **fields)
  stack_params([sampling], vocab_size)
  limit, seed = said.get('max_new_tokens', run.max_new_tokens), said.get('seed', run.seed)
  if not 1 <= limit <= run.max_new_tokens:
    raise RequestError(
      f"`sampling`: max_new_tokens must be 1 to {run.max_new_tokens}, the run's, got {limit}"
    )
  if seed is not None and not 0 <= seed < 2**32:
    raise RequestError(f'`sampling`: seed must be 0 to 2**32 - 1, got {seed}')
  return Asked(sampling, limit, seed)


def _stop(value: Any, vocabulary: Vocabulary | None) -> list[list[int]]:
  found = []
  for item in value if isinstance(value, list) else [value]:
    if isinstance(item, str) and item:
      if vocabulary is None:
        raise RequestError(
          '`sampling`: stop has a text, and the vocabulary is not known: give --vocabulary, or ids'
        )
      found += stop_sequences(vocabulary, item)
    elif (
      isinstance(item, list)
      and item
      and all(isinstance(i, int) and not isinstance(i, bool) for i in item)
    ):
      found.append(item)
    else:
      raise RequestError(
        f'`sampling`: stop must be a text, or a list of texts and lists of token ids, got {value!r}'
      )
  return found


def parse_logit_bias(value: Any) -> dict[int, float]:
  """Return a logit bias from what JSON holds of it, {"TOKEN ID": NUMBER, ...}.

  Raises:
    RequestError: the value is no such object, or a number is no float.
  """
  try:
    if all(
      isinstance(bias, (int, float)) and not isinstance(bias, bool) for bias in value.values()
    ):
      return {int(token): float(bias) for token, bias in value.items()}
  except (AttributeError, OverflowError, ValueError):
    pass
  raise RequestError(
    f'logit_bias must be an object of token ids and numbers, got {reprlib.repr(value)}'
  )
