"""Requests and when they arrive: read from a log, or drawn at random.

A log has one JSON object a line:

    {"arrival": 0.31, "input_length": 812, "output_length": 64}

`arrival` is in seconds. `timestamp`, in milliseconds as in Mooncake's traces, may take its place. A
prompt given by its length has random tokens, with no prefix common to others. `tokens` gives the
token ids themselves. `hash_ids` names blocks of 512 tokens, as in Mooncake's traces: equal leading
ids mean a common prefix.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.options import has_type
from t5x_inference_ext.text_files import parse_json

HASH_BLOCK = 512  # number of tokens that each of hash_ids stands for
_LONGEST = 8  # random lengths are cut at this many times the mean
_FIRST_TOKEN = 3  # smallest random token: lower ids are padding, BOS and EOS in many models


class Arrival(NamedTuple):
  """A request of a trace.

  Attributes:
    seconds: Time of arrival, in seconds.
    tokens: Token ids of the prompt, BOS included.
    limit: Number of new tokens.
  """

  seconds: float
  tokens: tuple[int, ...]
  limit: int


@dataclasses.dataclass(frozen=True)
class RandomTrace:
  """Parameters of a random trace.

  Attributes:
    requests: Number of requests.
    input_length: Mean tokens of a prompt.
    output_length: Mean new tokens of a request.
    length_spread: Standard deviation of each length divided by its mean. Lengths are log-normal,
      cut at 8 times the mean. 0: all lengths are equal.
    shared_length: Length of the common prefix of all prompts, part of input_length.
  """

  requests: int
  input_length: int
  output_length: int
  length_spread: float = 0.0
  shared_length: int = 0

  def arrivals(self, rate: float, vocab_size: int, seed: int = 0) -> list[Arrival]:
    """Return random requests, whose arrivals are a Poisson process.

    Args:
      rate: Mean number of requests a second.
      vocab_size: V.
      seed: Seed of times, lengths and tokens. With one seed, another rate only stretches the times.
    """
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1.0, self.requests)) / rate
    inputs = self._lengths(rng, self.input_length)
    outputs = self._lengths(rng, self.output_length)
    shared = _tokens(rng, self.shared_length, vocab_size)
    return [
      Arrival(float(time), (shared + _tokens(rng, length, vocab_size))[:length], new)
      for time, length, new in zip(times, inputs, outputs)
    ]

  def _lengths(self, rng: np.random.Generator, mean: int) -> list[int]:
    variance = math.log1p(self.length_spread**2)  # of the logarithm
    logs = rng.normal(math.log(mean) - variance / 2, math.sqrt(variance), self.requests)
    return np.clip(np.rint(np.exp(logs)), 1, _LONGEST * mean).astype(int).tolist()


def _tokens(rng: np.random.Generator, count: int, vocab_size: int) -> tuple[int, ...]:
  return tuple(rng.integers(min(_FIRST_TOKEN, vocab_size - 1), vocab_size, count).tolist())


def read_trace(path: str, vocab_size: int) -> list[Arrival]:
  """Return the requests of a log, sorted by arrival, with the first arrival at 0.

  Args:
    path: File with one JSON object a line.
    vocab_size: V, the upper bound of random tokens.

  Raises:
    RequestError: The file can't be read, has no requests, or has an invalid line, which the message
      names.
  """
  rng, found = np.random.default_rng(0), []
  try:
    with open(path, encoding='utf-8') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          try:
            found.append(_arrival(parse_json(line), rng, vocab_size))
          except (ValueError, KeyError, TypeError) as e:
            what = f'has no {e}' if isinstance(e, KeyError) else f'is {e}'
            raise RequestError(f'{path}, line {number} {what}') from e
  except (OSError, UnicodeDecodeError) as e:
    raise RequestError(f"can't read {path}: {getattr(e, 'strerror', 'it is not UTF-8')}") from e
  if not found:
    raise RequestError(f'{path} has no requests: write one JSON object a line (docs/planner.md)')
  found.sort(key=lambda arrival: arrival.seconds)
  first = found[0].seconds
  return [arrival._replace(seconds=arrival.seconds - first) for arrival in found]


def _arrival(row: Any, rng: np.random.Generator, vocab_size: int) -> Arrival:
  if not isinstance(row, dict):
    raise ValueError('not a JSON object')
  at = row['timestamp'] / 1e3 if 'timestamp' in row else row['arrival']
  if not has_type(at, float) or not 0 <= at < math.inf:
    raise ValueError(f'not a request: its arrival must be 0 or a positive number, got {at!r}')
  if 'tokens' in row:
    tokens = tuple(row['tokens'])
    if not all(type(token) is int and 0 <= token < vocab_size for token in tokens):
      raise ValueError(
        f'not a request: its tokens must be whole numbers from 0 to {vocab_size - 1}'
      )
  else:
    length = _length(row, 'input_length')
    blocks = [np.random.default_rng(block) for block in row.get('hash_ids', ())]
    named = (token for block in blocks for token in _tokens(block, HASH_BLOCK, vocab_size))
    tokens = tuple(named)[:length]
    tokens += _tokens(rng, length - len(tokens), vocab_size)
  if not tokens:
    raise ValueError('not a request: its list of tokens is empty')
  return Arrival(float(at), tokens, _length(row, 'output_length'))


def _length(row: dict[str, Any], name: str) -> int:
  value = row[name]
  if type(value) is not int or not 1 <= value < 2**31:
    raise ValueError(f'not a request: its {name} must be a whole number above 0, got {value!r}')
  return value


def rate_of(arrivals: Sequence[Arrival]) -> float:
  """Return the mean number of requests a second; infinite if all arrive at once."""
  span = arrivals[-1].seconds
  return (len(arrivals) - 1) / span if span else math.inf


def at_rate(arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
  """Return the requests of a trace with arrivals scaled to `rate` requests per second."""
  before = rate_of(arrivals)
  if math.isinf(before):
    raise RequestError('all requests of the trace arrive at once: they have no rate to change')
  return [arrival._replace(seconds=arrival.seconds * before / rate) for arrival in arrivals]
