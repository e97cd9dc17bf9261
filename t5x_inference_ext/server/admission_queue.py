"""Limits on waiting prompts, and the order in which they enter the engine."""

import collections
from collections.abc import Callable, Hashable
import math
import time
from typing import Generic, TypeVar

from t5x_inference_ext.server.api_errors import ApiError, invalid
from t5x_inference_ext.server.rates import MeasuredRate

_LONGEST = 600  # maximum value of Retry-After, in seconds

_T = TypeVar('_T')


class WaitingBounds:
  """Counts waiting prompts, and refuses prompts beyond the bounds.

  A prompt waits from the moment its body is read, before it is rendered and tokenized, until its
  first token. A text counts as many tokens as it has bytes; it can't have more.

  Args:
    requests: Maximum number of waiting prompts.
    tokens: Maximum number of tokens of all waiting prompts. A single prompt may always wait,
      however long it is.
    now: Returns the time in seconds.

  Attributes:
    waiting: Number of prompts that wait.
    tokens: Number of tokens of the waiting prompts.
  """

  def __init__(self, requests: int, tokens: int, now: Callable[[], float] = time.monotonic) -> None:
    self._most_requests, self._most_tokens = requests, tokens
    self.waiting = self.tokens = 0
    self._request_rate, self._token_rate = MeasuredRate(now), MeasuredRate(now)

  def enter(self, sizes: list[int]) -> None:
    """Count prompts of these sizes as waiting; if one is refused, count none.

    Raises:
      ApiError: Too many prompts would wait. Status 429 has a Retry-After, estimated from the recent
        rate; status 400 if there can never be room.
    """
    if len(sizes) > self._most_requests:
      raise invalid(
        f'prompt holds {len(sizes)} prompts, and at most {self._most_requests} may wait '
        '(--max_waiting_requests): send fewer at once',
        'prompt',
      )
    requests, tokens = self.waiting + len(sizes), self.tokens + sum(sizes)
    too_long = self.waiting > 0 and tokens > self._most_tokens
    if requests > self._most_requests or too_long:
      seconds = max(
        _seconds(requests - self._most_requests, self._request_rate),
        _seconds(min(tokens - self._most_tokens, self.tokens), self._token_rate),
      )
      raise ApiError(
        429,
        f'{self.waiting} prompts of {self.tokens} tokens (bytes of text) wait already: try again '
        f'in {seconds} s',
        code='queue_full',
        headers={'retry-after': str(seconds)},
      )
    self.waiting, self.tokens = requests, tokens

  def leave(self, size: int, *, served: bool) -> None:
    """Stop counting a prompt. `served`: whether it was started; False if it was dropped."""
    self.waiting -= 1
    self.tokens -= size
    if served:
      self._request_rate.add(1)
      self._token_rate.add(size)


def _seconds(excess: int, rate: MeasuredRate) -> int:
  """Return excess / rate in whole seconds, rounded up; 1 if the rate is unknown."""
  if excess <= 0 or not rate.per_second:
    return 1
  return min(max(1, math.ceil(excess / rate.per_second)), _LONGEST)


class FairQueue(Generic[_T]):
  """A queue in which clients take turns; each client's own items stay in order.

  A client with hundreds of items thus delays another client's first item by one item. Not
  thread-safe.
  """

  def __init__(self) -> None:
    # The clients that have items, in the order of their turns.
    self._clients: collections.OrderedDict[Hashable, dict[_T, None]] = collections.OrderedDict()

  def __bool__(self) -> bool:
    return bool(self._clients)

  def add(self, client: Hashable, item: _T) -> None:
    """Add an item after the client's other items."""
    self._clients.setdefault(client, {})[item] = None

  def take(self) -> _T:
    """Remove and return the next item. The queue must have one."""
    client, items = next(iter(self._clients.items()))
    item = next(iter(items))
    del items[item]
    del self._clients[client]
    if items:
      self._clients[client] = items  # this client's next turn comes last
    return item

  def remove(self, client: Hashable, item: _T) -> bool:
    """Remove an item; return whether it was there."""
    items = self._clients.get(client, {})
    if item not in items:
      return False
    del items[item]
    if not items:
      del self._clients[client]
    return True
