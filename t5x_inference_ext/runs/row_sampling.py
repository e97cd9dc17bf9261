"""Sampling options of a single row of a prompts file, which replace those of the run."""

from collections.abc import Mapping
import dataclasses
import reprlib
from typing import Any

from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.sampling_arrays import stack_params
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.options import has_type
from t5x_inference_ext.text.grammar import Grammar
from t5x_inference_ext.text.stop_texts import check_stop_texts
from t5x_inference_ext.text.vocabulary import Vocabulary

_FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams))
_KNOWN = (*_FIELDS, 'max_new_tokens', 'seed')


@dataclasses.dataclass(frozen=True)
class RowSampling:
  """The sampling options of one row.

  Attributes:
    sampling: How tokens are chosen, and which ids end the row.
    max_new_tokens: Maximum number of new tokens of the row.
    seed: Seed of the row's first sample; the next samples have seed + 1, seed + 2, ... None:
      derived from the run's seed and the row's index.
    stop: Texts that end the row.
    grammar: The grammar that the row's text must satisfy; None: any text.
    adapter: Name of the row's adapter; None: the model itself.
  """

  sampling: SamplingParams
  max_new_tokens: int
  seed: int | None = None
  stop: tuple[str, ...] = ()
  grammar: Grammar | None = None
  adapter: str | None = None


def row_sampling(
  run: RowSampling, given: Mapping[str, Any], vocabulary: Vocabulary | None, vocab_size: int
) -> RowSampling:
  """Return the sampling options of a row.

  Args:
    run: Options of the run.
    given: The row's `sampling` as read from JSON. Allowed are the fields of SamplingParams (texts
      or ids in `stop`, an object as `logit_bias`), `max_new_tokens`, at most the run's, and `seed`.
    vocabulary: Encodes stop texts; None if it is not known.
    vocab_size: V, rows of the model's embedding.

  Raises:
    RequestError: An option is unknown, or a value is out of its range.
  """
  for name, value in given.items():
    if name not in _KNOWN:
      raise RequestError(
        f'`sampling` has {reprlib.repr(name)}, but can only have {", ".join(_KNOWN)}'
      )
    if name not in _FIELDS and not has_type(value, int):
      raise RequestError(f'`sampling`: {name} must be a whole number, got {reprlib.repr(value)}')
  fields = {name: value for name, value in given.items() if name in _FIELDS}
  texts = run.stop
  if 'stop' in fields:
    texts, fields['stop'] = _stop(fields['stop'], vocabulary)
  if 'logit_bias' in fields:
    fields['logit_bias'] = parse_logit_bias(fields['logit_bias'])
  sampling = dataclasses.replace(run.sampling, **fields)
  stack_params([sampling], vocab_size)
  limit = given.get('max_new_tokens', run.max_new_tokens)
  if not 1 <= limit <= run.max_new_tokens:
    raise RequestError(
      f"`sampling`: max_new_tokens must be 1 to {run.max_new_tokens}, the run's, got "
      f'{reprlib.repr(limit)}'
    )
  seed = given.get('seed', run.seed)
  if seed is not None and not 0 <= seed < 2**32:
    raise RequestError(f'`sampling`: seed must be 0 to 2**32 - 1, got {reprlib.repr(seed)}')
  return RowSampling(sampling, limit, seed, texts)


def _stop(value: Any, vocabulary: Vocabulary | None) -> tuple[tuple[str, ...], list[list[int]]]:
  """Return stop texts and stop ids for a text, or for a list of texts and lists of token ids."""
  texts, found = [], []
  for item in value if isinstance(value, list) else [value]:
    if isinstance(item, str) and item:
      if vocabulary is None:
        raise RequestError(
          '`sampling`: stop has a text, but the vocabulary is unknown: give --vocabulary, or ids'
        )
      check_stop_texts([item])
      texts.append(item)
    elif isinstance(item, list) and item and all(has_type(token, int) for token in item):
      found.append(item)
    else:
      raise RequestError(
        '`sampling`: stop must be a text, or a list of texts and lists of token ids, got '
        f'{reprlib.repr(value)}'
      )
  return tuple(texts), found


def parse_logit_bias(value: Any) -> dict[int, float]:
  """Convert a JSON object {"TOKEN ID": NUMBER or "-Infinity", ...} to a logit bias.

  Raises:
    RequestError: The value is no such object, or a number is too large for a float.
  """
  try:
    found = {int(token): float(bias) for token, bias in value.items()}
    # Check the text first: int() also accepts ' 3' and '+3', and float() any number as text.
    if [*map(str, found)] == [*value] and all(
      has_type(bias, float) or bias == '-Infinity' for bias in value.values()
    ):
      return found
  except (AttributeError, OverflowError, TypeError, ValueError):
    pass
  raise RequestError(
    f'logit_bias must be an object that maps token ids to numbers, got {reprlib.repr(value)}'
  )
