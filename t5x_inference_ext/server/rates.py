"""Measure the rate of events over the last seconds."""

import collections
from collections.abc import Callable
import time

WINDOW_SECONDS = 30.0
_GRAIN = 0.25  # seconds; amounts within this interval are summed


class MeasuredRate:
  """The rate per second of an amount over the last WINDOW_SECONDS.

  Args:
    now: Returns the time in seconds.
  """

  def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
    self._now = now
    self._begin = now()
    self._parts: collections.deque[tuple[float, float]] = collections.deque()
    self._sum = 0.0

  def add(self, amount: float) -> None:
    """Count an amount now."""
    now = self._now()
    if self._parts and now - self._parts[-1][0] < _GRAIN:
      self._parts[-1] = self._parts[-1][0], self._parts[-1][1] + amount
    else:
      self._parts.append((now, amount))
    self._sum += amount
    self._forget(now)

  @property
  def per_second(self) -> float:
    """The rate; 0 if nothing was counted lately."""
    now = self._now()
    self._forget(now)
    return self._sum / max(min(now - self._begin, WINDOW_SECONDS), 1.0)

  def _forget(self, now: float) -> None:
    while self._parts and now - self._parts[0][0] >= WINDOW_SECONDS:
      self._sum -= self._parts.popleft()[1]
    if not self._parts:
      self._sum = 0.0  # removes accumulated rounding errors
