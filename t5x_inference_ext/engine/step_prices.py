"""Prices of decode steps by the number of draft tokens that they check, measured while running."""

from collections.abc import Sequence
import itertools

import jax
import numpy as np

from t5x_inference_ext import distributed

# Extra time of a step for each draft token that it checks, as a share of a plain step's time. It is
# assumed until times are measured. It is low, so that each kind of step is tried where drafts are
# good.
FIRST_PRICE = 0.02
# KEPT: each measurement multiplies the weight of the earlier ones by this. FIRST_WEIGHT: weight of
# the assumed price of each kind, in measurements. So a kind that seems too slow is tried again
# after some 260 measurements: the cause of its slowness may be over.
KEPT, FIRST_WEIGHT = 0.98, 0.005
# Measured times, but for the first of a kind, are clipped to these multiples of the expected time:
# other work disturbs some.
LEAST, MOST = 0.5, 3.0
# One in so many programs checks no drafts, so that the time of plain steps is known, whatever pays;
# it has at most TRIAL_STEPS steps.
PLAIN_EVERY, TRIAL_STEPS = 64, 2
# Price at which no step checks drafts.
TOO_MUCH = 1e6
# Several processes exchange prices once in this many programs.
AGREE_EVERY = 32
_COUNT = itertools.count()  # numbers the StepPrices in this process, for unique names


class StepPrices:
  """Estimates the time of a step of each kind, from the times of programs that mix kinds.

  Processes that share a mesh must use equal prices, but they measure different times: all use the
  prices of process 0.

  Args:
    widths: Number of draft tokens that each kind of step checks, ascending; the first is 0.
  """

  def __init__(self, widths: Sequence[int]) -> None:
    self._first = 1 + FIRST_PRICE * np.asarray(widths, np.float64)
    self._seconds: np.ndarray | None = None
    # Normal equations of a least-squares fit of relative errors: a row and a column for each kind.
    self._matrix, self._right = np.zeros((len(widths), len(widths))), np.zeros(len(widths))
    self._asked, self._agreed = 0, self.prices
    self._messages: distributed.Messages | None = None
    if jax.process_count() > 1:
      self._messages = distributed.Messages(f'prices-{next(_COUNT)}')

  @property
  def prices(self) -> np.ndarray:
    """The price of each kind of step, [W] float32: its time divided by that of a plain step."""
    found = self._first if self._seconds is None else self._seconds
    return (found / found[0]).astype(np.float32)

  @property
  def tries_plain(self) -> bool:
    """Whether the next program checks no drafts, to measure plain steps. Equal in all processes."""
    unknown = self._messages is None and not self._matrix[0, 0]
    return unknown or self._asked % PLAIN_EVERY == 0

  def next(self) -> np.ndarray:
    """Return the prices for the next program, [W] float32. Processes must call it equally often."""
    found, plain = self.prices, self.tries_plain
    if self._messages is not None:
      if self._asked % AGREE_EVERY == 0:
        message = self._messages.next(self.prices.tobytes)
        self._agreed = np.frombuffer(message, np.float32)
      found = self._agreed
    self._asked += 1
    return np.where(np.arange(len(found)) == 0, found, np.float32(TOO_MUCH)) if plain else found

  def add(self, seconds: float, passes: np.ndarray) -> None:
    """Learn from a program that took `seconds` for `passes` [W] steps of each kind."""
    counts = passes.astype(np.float64)
    if not counts.any() or seconds <= 0:
      return
    if self._seconds is None:
      self._seconds = self._first * (seconds / (counts @ self._first))
    expected = counts @ self._seconds
    if np.diag(self._matrix)[counts > 0].all():  # nothing is known of a kind's first time
      seconds = float(np.clip(seconds, LEAST * expected, MOST * expected))
    self._matrix = KEPT * self._matrix + np.outer(counts, counts) / seconds**2
    self._right = KEPT * self._right + counts / seconds
    first = self._first * self._seconds[0]
    weights = FIRST_WEIGHT / first**2
    found = np.linalg.solve(self._matrix + np.diag(weights), self._right + weights * first)
    # A step that checks more tokens never takes less time.
    self._seconds = np.maximum.accumulate(np.maximum(found, LEAST * first))
