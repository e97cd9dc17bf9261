"""Sampling parameters: how a row chooses its tokens, and what ends it."""

from collections.abc import Mapping, Sequence
import dataclasses
import numbers
from typing import Any

import numpy as np

from t5x_inference_ext._moved import renamed
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.options import check_options, is_whole, option, short_repr

SMALLEST = float(np.finfo(np.float32).tiny)  # the smallest normal float32
LARGEST = float(np.finfo(np.float32).max)  # the largest finite float32


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How a row chooses its tokens, and what ends it besides EOS and its limit.

  Penalties and bias are applied before the temperature, so they affect greedy choices too.

  Attributes:
    temperature: 0 takes the most likely token; otherwise the logits are divided by it.
    top_k: Keep the k most likely tokens; 0 keeps all.
    top_p: Among the tokens that top_k keeps, keep the fewest most likely ones whose renormalized
      probabilities sum to at least top_p; 1 keeps all.
    repetition_penalty: Positive logits of tokens in the prompt or the output are divided by it, and
      negative ones multiplied; 1 has no effect.
    frequency_penalty: Subtracted from a token's logit once for each time it was generated.
    presence_penalty: Subtracted from the logit of every token that was generated.
    logit_bias: Pairs of a token id and the number added to its logit, or a mapping of ids to
      numbers. -inf forbids a token. Biased logits are ordered by their exact sums.
    min_new_tokens: Number of first tokens that can't end the row: EOS is forbidden among them, and
      stop sequences that end among them are ignored.
    stop: Sequences of token ids. A row ends when its generated tokens end in one of them. The row's
      tokens include the sequence, as they include EOS.

  Raises:
    RequestError: A value outside its range.
  """

  temperature: float = option(
    0.0, help='0 takes the most likely token; logits are divided by others.'
  )
  top_k: int = option(0, help='Sample among the k most likely tokens; 0: all.')
  top_p: float = option(
    1.0, help='Sample among the fewest most likely tokens whose probabilities reach this; 1: all.'
  )
  repetition_penalty: float = option(
    1.0,
    help='Divide positive logits of tokens in the prompt or the output by this, and multiply '
    'negative ones.',
  )
  frequency_penalty: float = option(
    0.0, help="Subtract this from a token's logit once for each time it was generated."
  )
  presence_penalty: float = option(
    0.0, help='Subtract this from the logit of every token that was generated.'
  )
  logit_bias: tuple[tuple[int, float], ...] = option(
    (), help='Numbers added to logits: {"TOKEN ID": NUMBER, ...}; -Infinity forbids a token.'
  )
  min_new_tokens: int = option(
    0, help='The first this many tokens can not end the row, by EOS or a stop sequence.'
  )
  stop: tuple[tuple[int, ...], ...] = ()

  def __post_init__(self) -> None:
    check_options(self)
    if isinstance(self.logit_bias, Mapping):
      object.__setattr__(self, 'logit_bias', tuple(self.logit_bias.items()))
    for name in ('logit_bias', 'stop'):  # lists, as read from JSON, become hashable tuples
      object.__setattr__(self, name, _tuples(name, getattr(self, name)))
    if not 0 <= self.temperature <= LARGEST:
      most = f' and at most {LARGEST:.1e}' if self.temperature > LARGEST else ''
      raise _refused('temperature', f'0 or more{most}', self.temperature)
    for name, least in (('top_k', '0 (keep all)'), ('min_new_tokens', '0')):
      if getattr(self, name) < 0:
        raise _refused(name, f'a whole number, {least} or more', getattr(self, name))
    if not 0 < self.top_p <= 1:
      raise _refused('top_p', 'above 0 and at most 1', self.top_p)
    if not SMALLEST <= self.repetition_penalty <= LARGEST:
      raise _refused(
        'repetition_penalty', 'above 0 and in the range of float32', self.repetition_penalty
      )
    for name in ('frequency_penalty', 'presence_penalty'):
      if not -LARGEST <= getattr(self, name) <= LARGEST:
        raise _refused(name, 'a number in the range of float32', getattr(self, name))
    pair = next(
      (p for p in self.logit_bias if len(p) != 2 or not _is_id(p[0]) or not _is_bias(p[1])), None
    )
    if pair is not None:
      raise _refused(
        'logit_bias',
        'pairs of a token id and a number (-Infinity forbids a token, and 1e9 makes it the choice)',
        pair,
      )
    if not all(_is_id(token) for sequence in self.stop for token in sequence):
      raise _refused('stop', 'sequences of token ids', self.stop)
    if not all(self.stop):
      raise RequestError('stop holds an empty sequence: it would end every row at once')

  @property
  def penalizes(self) -> bool:
    """Whether a penalty changes any logit."""
    return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)

  def before_stop(self, tokens: list[int]) -> list[int]:
    """Return a row's tokens without the longest stop sequence that they end in.

    A sequence that ends among the first `min_new_tokens` tokens does not count.
    """
    if len(tokens) <= self.min_new_tokens:
      return tokens
    ends = [len(s) for s in self.stop if tuple(tokens[-len(s) :]) == s]
    return tokens[: len(tokens) - max(ends, default=0)]


def _tuples(name: str, value: Any) -> tuple[tuple[Any, ...], ...]:
  """Return a sequence of sequences as tuples; raise RequestError for anything else."""
  if not _is_list(value) or not all(map(_is_list, value)):
    raise _refused(name, 'a sequence of sequences, such as [[5, 6]]', value)
  return tuple(map(tuple, value))


def _is_list(value: Any) -> bool:
  if isinstance(value, np.ndarray):
    return value.ndim > 0
  return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def _is_id(value: Any) -> bool:
  return is_whole(value) and value >= 0


def _is_bias(value: Any) -> bool:
  number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  return number and (-LARGEST <= value <= LARGEST or value == -float('inf'))


def _refused(name: str, wanted: str, value: Any) -> RequestError:
  return RequestError(f'{name} must be {wanted}, got {short_repr(value)}')


__getattr__ = renamed(__name__, {'Sampler': 'SamplingParams'})
