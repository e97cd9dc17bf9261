"""The sampling parameters of many rows as arrays.

Two kinds of programs take them. A static batch is compiled for the features that its rows use.
Slots hold the rows of any requests: their arrays have fixed widths (`slot_params`), and features
that no row uses are skipped at run time.
"""

from collections.abc import Iterable, Sequence
import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from t5x_inference_ext.engine.sampling import LARGEST, SamplingParams
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.options import short_repr

# Rows that keep at most this many tokens draw from candidates, found without sorting the
# vocabulary.
MAX_CANDIDATES = 256
LARGEST_INT32 = 2**31 - 1
BIAS_WIDTH = 256  # maximum number of biased tokens of a row in slots
END_IDS = 4  # maximum number of ids that end a row
# Fillers for stop sequences, and for the recent tokens compared with them. No token has these ids.
ANY, NEVER, NOTHING = -1, -2, -3

# Whether some row uses a feature: a Python bool known at compile time, or a traced scalar.
Flag = bool | jax.Array


class SamplingFeatures(NamedTuple):
  """The features that a choice of tokens must support, because some row uses them.

  Attributes:
    sampled: Whether a row has a temperature above 0.
    few: Pairs (n, flag), in ascending order of n. The flag tells whether every row with a
      temperature above 0 keeps at most n tokens. Tokens are drawn from n candidates, for the first
      n whose flag is true; if no flag is true, from the whole vocabulary.
    limited: Whether top_k or top_p drops tokens of a row.
    both: Whether a row has both top_k and top_p.
    bias: Whether a row has a logit_bias.
    penalties: Whether a row has a penalty.
    min_new_tokens: Whether a row has min_new_tokens.
    masked: Whether a row has a grammar, and so a mask in `token_choice.TokenMasks`.
  """

  sampled: Flag = False
  few: tuple[tuple[int, Flag], ...] = ()
  limited: Flag = False
  both: Flag = False
  bias: Flag = False
  penalties: Flag = False
  min_new_tokens: Flag = False
  masked: Flag = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
  """The sampling parameters of B rows, as arrays.

  Attributes:
    temperature: [B] float32.
    top_k: [B] int32; V where all tokens are kept.
    top_p: [B] float32.
    repetition_penalty: [B] float32.
    frequency_penalty: [B] float32.
    presence_penalty: [B] float32.
    min_new_tokens: [B] int32.
    bias_ids: [B, N] int32. Ids within a row are distinct; unused entries are V.
    bias: [B, N] float32.
    stop: [B, N, M] int32. Stop sequences, aligned at their ends. Positions before a sequence hold
      ANY; unused sequences hold NEVER.
    features: SamplingFeatures of these rows, fixed at compile time; None: found at run time.
      Static.
  """

  temperature: jax.Array | np.ndarray
  top_k: jax.Array | np.ndarray
  top_p: jax.Array | np.ndarray
  repetition_penalty: jax.Array | np.ndarray
  frequency_penalty: jax.Array | np.ndarray
  presence_penalty: jax.Array | np.ndarray
  min_new_tokens: jax.Array | np.ndarray
  bias_ids: jax.Array | np.ndarray
  bias: jax.Array | np.ndarray
  stop: jax.Array | np.ndarray
  features: SamplingFeatures | None = dataclasses.field(metadata=dict(static=True))


def stack_params(rows: Sequence[SamplingParams], vocab_size: int) -> SamplingArrays:
  """Return the sampling parameters of a static batch's rows, as numpy arrays.

  Widths are powers of two, and features are those of these rows: batches of similar parameters
  share a compilation.

  Args:
    rows: Parameters of each row.
    vocab_size: V.

  Raises:
    RequestError: A logit_bias or stop sequence with ids outside the vocabulary, or a logit_bias
      that forbids every token.
  """
  every = {*rows}
  for params in every:
    _check(params, vocab_size)
  longest = max((len(sequence) for p in every for sequence in p.stop), default=0)
  return _arrays(
    rows,
    vocab_size,
    biases=_power_of_two(max(len(p.logit_bias) for p in every)),
    stops=_power_of_two(max(len(p.stop) for p in every)),
    longest=_power_of_two(longest),
    features=_features(every, vocab_size),
  )


def slot_params(params: SamplingParams, vocab_size: int) -> SamplingArrays:
  """Return one row's sampling parameters, [1, ...], in the widths that all slots use.

  Stop sequences are left out: for slots, the host looks for them in the generated tokens.

  Raises:
    RequestError: Parameters that `stack_params` refuses, or more than BIAS_WIDTH biased tokens.
  """
  _check(params, vocab_size)
  if len(params.logit_bias) > BIAS_WIDTH:
    raise RequestError(
      f'logit_bias holds {len(params.logit_bias)} tokens: at most {BIAS_WIDTH} of a row can be '
      'biased in continuous batching'
    )
  return _arrays([params], vocab_size, BIAS_WIDTH, stops=0, longest=0, features=None)


def end_id_array(ids: int | Sequence[int], rows: int) -> np.ndarray:
  """Return the ids that end rows in the form of RowParams.end_ids: [rows, END_IDS] int32.

  Args:
    ids: One id, or several. Negative ids are ignored.
    rows: Number of rows, which all get these ids.

  Raises:
    RequestError: More than END_IDS ids.
  """
  wanted = {ids} if isinstance(ids, int) else set(ids)
  found = sorted(int(i) for i in wanted if 0 <= i <= LARGEST_INT32)
  if len(found) > END_IDS:
    raise RequestError(f'at most {END_IDS} token ids can end a row, got {len(found)}: {found}')
  return np.tile(np.asarray(found + [-1] * (END_IDS - len(found)), np.int32), (rows, 1))


def _arrays(
  rows: Sequence[SamplingParams],
  vocab_size: int,
  biases: int,
  stops: int,
  longest: int,
  features: SamplingFeatures | None,
) -> SamplingArrays:
  bias_ids = np.full((len(rows), biases), vocab_size, np.int32)
  bias = np.zeros((len(rows), biases), np.float32)
  stop = np.full((len(rows), stops, longest), NEVER, np.int32)
  for i, params in enumerate(rows):
    if params.logit_bias:
      summed = _bias(params)
      bias_ids[i, : len(summed)], bias[i, : len(summed)] = [*summed], [*summed.values()]
    if stops:
      for j, sequence in enumerate(params.stop):
        stop[i, j] = [ANY] * (longest - len(sequence)) + list(sequence)

  def floats(name: str) -> np.ndarray:
    return np.asarray([getattr(p, name) for p in rows], np.float32)

  return SamplingArrays(
    temperature=floats('temperature'),
    top_k=np.asarray([_kept(p, vocab_size) for p in rows], np.int32),
    top_p=floats('top_p'),
    repetition_penalty=floats('repetition_penalty'),
    frequency_penalty=floats('frequency_penalty'),
    presence_penalty=floats('presence_penalty'),
    min_new_tokens=np.asarray([min(p.min_new_tokens, LARGEST_INT32) for p in rows], np.int32),
    bias_ids=bias_ids,
    bias=bias,
    stop=stop,
    features=features,
  )


def _bias(params: SamplingParams) -> dict[int, float]:
  """Return token id -> bias. An id that is given twice gets the sum."""
  summed = dict(params.logit_bias)
  if len(summed) == len(params.logit_bias):
    return summed
  summed = {}
  for token, value in params.logit_bias:
    summed[token] = summed.get(token, 0.0) + value
  return {
    token: value if value < -LARGEST else max(-LARGEST, min(value, LARGEST))
    for token, value in summed.items()
  }


def _check(params: SamplingParams, vocab_size: int) -> None:
  biased = dict(params.logit_bias)
  largest = max(*biased, *(token for sequence in params.stop for token in sequence), 0, 0)
  if largest >= vocab_size:  # SamplingParams refuses negative ids
    raise RequestError(
      f'logit_bias or stop holds token {short_repr(largest)}, outside the vocabulary of '
      f'{vocab_size}'
    )
  forbidden = (token for token, value in params.logit_bias if value == -np.inf)
  if len(biased) == vocab_size == len(set(forbidden)):
    raise RequestError(f'logit_bias forbids all {vocab_size} tokens: leave at least one allowed')


def _kept(params: SamplingParams, vocab_size: int) -> int:
  """Return how many tokens top_k keeps."""
  return min(params.top_k or vocab_size, vocab_size)


def _power_of_two(least: int) -> int:
  return 1 << (least - 1).bit_length() if least else 0


def _features(every: Iterable[SamplingParams], vocab_size: int) -> SamplingFeatures:
  sampled = [p for p in every if p.temperature > 0]
  most = max((_kept(p, vocab_size) for p in sampled), default=1)
  candidates = min(vocab_size, _power_of_two(most))
  return SamplingFeatures(
    sampled=bool(sampled),
    few=((candidates, True),) if sampled and most <= MAX_CANDIDATES else (),
    limited=any(_kept(p, vocab_size) < vocab_size or p.top_p < 1 for p in sampled),
    both=any(_kept(p, vocab_size) < vocab_size and p.top_p < 1 for p in sampled),
    bias=any(p.logit_bias for p in every),
    penalties=any(p.penalizes for p in every),
    min_new_tokens=any(p.min_new_tokens for p in every),
  )
