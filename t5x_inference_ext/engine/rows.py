"""A row: one sample of a request, from its submission to its end, as the host knows it."""

import collections
from collections.abc import Sequence

from t5x_inference_ext.engine.adapters import NO_ADAPTERS, AdapterNames
from t5x_inference_ext.engine.grammars import GrammarMatcher
from t5x_inference_ext.engine.request import (
  NO_TOKEN,
  NOT_FINITE,
  Event,
  FinishReason,
  Handle,
  TopLogProbs,
)
from t5x_inference_ext.text.detokenizer import Detokenizer
from t5x_inference_ext.text.stop_texts import StopTexts
from t5x_inference_ext.text.vocabulary import Vocabulary


class Row:
  """One sample of a request.

  Args:
    handle: The request.
    sample: Index of the sample within the request.
    end_ids: Tokens that end the row.
    vocabulary: Needed if the request asks for text or has stop texts.
    matcher: Matcher of the request's grammar, in its start state; None without a grammar.
    adapters: Names of the adapters.

  Attributes:
    adapter: Number of the row's adapter; 0: none.
    tokens: New tokens that the host has read.
    started: For each started program whose output was not read, the most tokens it gives the row.
    finish: Why the row has ended; None while it has not.
    matcher: State of the grammar after the row's tokens; None without a grammar.
  """

  def __init__(
    self,
    handle: Handle,
    sample: int,
    end_ids: Sequence[int],
    vocabulary: Vocabulary | None,
    matcher: GrammarMatcher | None = None,
    adapters: AdapterNames = NO_ADAPTERS,
  ) -> None:
    self.handle, self.sample, self.end_ids = handle, sample, tuple(end_ids)
    self.matcher = matcher
    self.tokens: list[int] = []
    self.started: collections.deque[int] = collections.deque()
    self.finish: FinishReason | None = None
    request = handle.request
    self.adapter = adapters.number(request.adapter)
    self._text = self._stops = None
    if request.text or request.stop_texts:
      assert vocabulary is not None
      soft = len(adapters.prompt(request.adapter))
      self._text = Detokenizer(vocabulary, request.tokens[soft:])
      self._stops = StopTexts(request.stop_texts)

  @property
  def finished(self) -> bool:
    """Whether the row has ended."""
    return self.finish is not None

  @property
  def limit(self) -> int:
    """Maximum number of new tokens of the row."""
    return self.handle.request.limit

  @property
  def most(self) -> int:
    """Maximum number of new tokens that the row can have once all started programs end."""
    return min(len(self.tokens) + sum(self.started), self.limit)

  @property
  def least(self) -> int:
    """Number of new tokens that the row has once all started programs end, unless it ends early.

    Each program whose output was not read gives at least one token.
    """
    return len(self.tokens) + len(self.started)

  def cached(self, new: int) -> int:
    """Return the number of cache positions that the row fills once it has `new` new tokens.

    The last new token is not in the cache.
    """
    return len(self.handle.request.tokens) + new - 1

  @property
  def cached_tokens(self) -> tuple[int, ...]:
    """The prompt and those new tokens whose keys and values started programs have computed.

    Tokens that the host has not read are left out, as is the last one of a row that has ended.
    """
    known = len(self.tokens) if self.started and not self.finished else len(self.tokens) - 1
    return (*self.handle.request.tokens, *self.tokens[: max(0, known)])

  def add(
    self, tokens: list[int], log_probs: list[float], top: list[TopLogProbs], failed: bool
  ) -> Event:
    """Append new tokens, decide whether the row ends, and return its event.

    Args:
      tokens: New token ids.
      log_probs: Log-probability of each.
      top: For each new token, the most likely tokens at its step, or an empty list.
      failed: Whether the row's logits after these tokens were not finite.
    """
    before = len(self.tokens)
    kept, finish = self._kept(tokens)
    tokens = tokens[:kept]
    self.tokens += tokens
    error: str | None = None
    if self.matcher is not None and finish is None:
      finish, error = self._followed(self.matcher, tokens, failed)
    elif finish is None and failed:
      finish, error = 'error', NOT_FINITE
    if finish is None and len(self.tokens) >= self.limit:
      finish = 'length'
    text = ''
    if self._text is not None and self._stops is not None:
      text, kept, finish = self._told(tokens, finish)
      self.tokens[before + kept :] = []
      tokens = tokens[:kept]
    if finish is not None:
      self.end(finish)
    return Event(
      self.handle.index,
      self.sample,
      tokens,
      log_probs[: len(tokens)],
      top[: len(tokens)],
      finish,
      text,
      error,
    )

  def end(self, reason: FinishReason) -> None:
    """End the row."""
    self.finish = reason
    self.handle.finish_reasons[self.sample] = reason

  def _followed(
    self, matcher: GrammarMatcher, tokens: list[int], failed: bool
  ) -> tuple[FinishReason | None, str | None]:
    """Follow new tokens through the grammar; return why the row ends, if it does, and an error."""
    for token in tokens:
      matcher.push(token)
    if matcher.complete or (failed and matcher.exhausted(self.end_ids)):
      return 'stop', None
    if failed:
      return 'error', matcher.error or NO_TOKEN
    return None, None

  def _told(
    self, tokens: list[int], finish: FinishReason | None
  ) -> tuple[str, int, FinishReason | None]:
    """Return the new text, the number of tokens that it covers, and the finish reason or None."""
    assert self._text is not None and self._stops is not None
    text, before = '', len(self.tokens) - len(tokens)
    least = self.handle.request.sampling.min_new_tokens
    for i, token in enumerate(tokens):
      if finish == 'eos' and i + 1 == len(tokens):
        continue
      more, stop = self._stops.push(self._text.push([token]), may_stop=before + i + 1 > least)
      text += more
      if stop is not None:
        return text, i + 1, 'stop'
    if finish is not None:
      more, stop = self._stops.push(self._text.finish())
      text += more
      if stop is not None:
        return text, len(tokens), 'stop'
      text += self._stops.finish()
    return text, len(tokens), finish

  def _kept(self, new: list[int]) -> tuple[int, FinishReason | None]:
    """Return how many of the new tokens belong to the row, and whether they end it."""
    sampling = self.handle.request.sampling
    tokens = self.tokens + new if sampling.stop else new
    offset = len(tokens) - len(new)
    for i, token in enumerate(new):
      if token in self.end_ids:
        return i + 1, 'eos'
      if offset + i + 1 <= sampling.min_new_tokens:
        continue
      for stop in sampling.stop:
        if tuple(tokens[max(0, offset + i + 1 - len(stop)) : offset + i + 1]) == stop:
          return i + 1, 'stop'
    return len(new), None


def rows_of(
  handle: Handle,
  end_ids: Sequence[int],
  vocabulary: Vocabulary | None,
  adapters: AdapterNames = NO_ADAPTERS,
) -> list[Row]:
  """Return a row for each sample of a request.

  Args:
    handle: The request. If it has a grammar, its handle has a matcher for each sample.
    end_ids: Tokens that end a row if its request gives none.
    vocabulary: See Row.
    adapters: See Row.
  """
  request = handle.request
  ends = end_ids if request.end_ids is None else request.end_ids
  matchers: Sequence[GrammarMatcher | None] = handle.matchers or [None] * len(request.seeds)
  return [Row(handle, i, ends, vocabulary, matcher, adapters) for i, matcher in enumerate(matchers)]
