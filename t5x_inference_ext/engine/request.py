"""The engine's inputs and outputs: requests, events, completions."""

from collections.abc import Collection
import dataclasses
from typing import NamedTuple

import numpy as np

from t5x_inference_ext.engine.sampling import SamplingParams

TopLogProbs = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt to continue.

  Attributes:
    tokens: Model inputs: BOS, then the prompt.
    seeds: One seed for each sample; the samples share the prompt's prefill.
    limit: Most new tokens of each sample.
    sampling: How tokens are chosen, and what ends a sample.
  """

  tokens: tuple[int, ...]
  seeds: tuple[int, ...] = (0,)
  limit: int = 64
  sampling: SamplingParams = SamplingParams()


class Event(NamedTuple):
  """New tokens of one sample.

  Attributes:
    request: Index of the request, in the order of submission.
    sample: Index of the sample within its request.
    tokens: New token ids.
    log_probs: Log-probability of each new token.
    top: For each new token the most likely tokens at its step, as pairs (id, log-probability);
      empty if SchedulerConfig.top_log_probs is 0.
    ended: Whether these are the sample's last tokens.
  """

  request: int
  sample: int
  tokens: list[int]
  log_probs: list[float]
  top: list[TopLogProbs]
  ended: bool


class Completion(NamedTuple):
  """A finished row.

  Attributes:
    tokens: Generated ids. If the row ended with EOS, that is the last id.
    score: Sum of the tokens' log-probabilities.
    finish_reason: Why the row ended: see `finish_reason`.
  """

  tokens: list[int]
  score: float
  finish_reason: str = 'length'


def finish_reason(
  tokens: list[int], sampling: SamplingParams, end_ids: Collection[int], failed: bool
) -> str:
  """Return why a row ended.

  Args:
    tokens: All tokens that the row generated.
    sampling: The row's sampling parameters.
    end_ids: Ids that end the row.
    failed: Whether no token could be chosen.

  Returns:
    'eos', 'stop' (a stop sequence), 'length' (the row's limit), or 'error': no token could be
    chosen, because the logits were not finite or every token was forbidden.
  """
  if failed:
    return 'error'
  if tokens and tokens[-1] in end_ids and len(tokens) > sampling.min_new_tokens:
    return 'eos'
  return 'length' if sampling.before_stop(tokens) == tokens else 'stop'


def completion(
  tokens: np.ndarray, score: float, sampling: SamplingParams, end_ids: Collection[int], failed: bool
) -> Completion:
  """Return a row of a static batch as a Completion; see `finish_reason`."""
  found = tokens.tolist()
  return Completion(found, float(score), finish_reason(found, sampling, end_ids, bool(failed)))


class Sample(NamedTuple):
  """A finished sample of a request, with the log-probabilities of its tokens.

  Attributes:
    tokens: Generated ids, including EOS if the sample ended with it.
    log_probs: Log-probability of each token.
    top: For each token the most likely tokens at its step, as pairs (id, log-probability); empty if
      SchedulerConfig.top_log_probs is 0.
  """

  tokens: list[int]
  log_probs: list[float]
  top: list[TopLogProbs]

  @property
  def score(self) -> float:
    """Sum of the tokens' log-probabilities."""
    return sum(self.log_probs)


class SampleCollector:
  """Joins events into whole samples."""

  def __init__(self) -> None:
    self._samples: dict[int, list[Sample]] = {}
    self._unfinished: dict[int, int] = {}

  def expect(self, request: int, samples: int) -> None:
    """Begin to collect the samples of a request."""
    self._samples[request] = [Sample([], [], []) for _ in range(samples)]
    self._unfinished[request] = samples

  def add(self, event: Event) -> list[Sample] | None:
    """Add an event; return the request's samples once all of them have ended, else None."""
    sample = self._samples[event.request][event.sample]
    sample.tokens.extend(event.tokens)
    sample.log_probs.extend(event.log_probs)
    sample.top.extend(event.top)
    self._unfinished[event.request] -= event.ended
    if self._unfinished[event.request]:
      return None
    del self._unfinished[event.request]
    return self._samples.pop(event.request)
