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
# after REMEMBERED measurements: the cause of its slowness may be over.
KEPT, FIRST_WEIGHT, REMEMBERED = 0.98, 0.03, 256
# A measurement pulls the prices no more than if it differed by this factor from the expected time:
# other work disturbs some. FITS: steps of a fit, so that one measurement suffices for a new kind;
# a fit ends once no price changes by more than CLOSE.
MOST_PULL, FITS, CLOSE = 1.25, 8, 0.03
# Least price, as a multiple of the assumed one.
LEAST = 0.5
# A program's own time, beside its steps: the assumed one, the least and the greatest, in plain
# steps. Without it, the few steps of a trial would seem to take longer than other plain steps.
START, LEAST_START, MOST_START = 0.05, 0.01, 2.0
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

  A machine's speed drifts, where other programs run by tens of percent within seconds. So each
  program's time is compared only with those of the two programs before it: if the kinds of steps
  have other shares in it, the ratio of the times tells the ratio of the kinds' prices.

  Processes that share a mesh must use equal prices, but they measure different times: all use the
  prices of process 0.

  Args:
    widths: Number of draft tokens that each kind of step checks, ascending; the first is 0.
  """

  def __init__(self, widths: Sequence[int]) -> None:
    # Logs of the assumed and the present prices, then of a program's own time.
    self._first = np.log([*(1 + FIRST_PRICE * np.asarray(widths)), START])
    self._logs = self._first
    # Instead of a step that checks N tokens, one can run N + 1 plain steps.
    self._most = np.log1p(np.asarray(widths, np.float64))
    # Of recent programs: log of the seconds, the number of steps of each kind, and 1.
    self._measured = np.zeros((0, 2 + len(widths)))
    self._asked, self._agreed = 0, self.prices
    self._messages: distributed.Messages | None = None
    if jax.process_count() > 1:
      self._messages = distributed.Messages(f'prices-{next(_COUNT)}')

  @property
  def prices(self) -> np.ndarray:
    """The price of each kind of step, [W] float32: its time divided by that of a plain step."""
    return np.exp(self._logs[:-1]).astype(np.float32)

  @property
  def tries_plain(self) -> bool:
    """Whether the next program checks no drafts, to measure plain steps. Equal in all processes."""
    unknown = self._messages is None and not self._measured[:, 1].any()
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
    if not passes.any() or seconds <= 0:
      return
    row = [[np.log(seconds), *passes, 1]]
    self._measured = np.concatenate([self._measured, row])[-REMEMBERED:]
    if not self._measured[:, 2:-1].any():  # plain steps alone say nothing about the others
      self._logs = self._first
    elif len(self._measured) > 1:
      for _ in range(FITS):
        before = self._logs
        self._fit()
        if np.abs(self._logs - before).max() < CLOSE:
          break

  def _fit(self) -> None:
    """Take a Gauss-Newton step towards the prices with the least errors (Huber's) of the ratios."""
    times = self._measured[:, 1:] * np.exp(self._logs)  # [N, W + 1], in plain steps
    whole = times.sum(axis=1, keepdims=True)
    change = _from_before(times / whole)
    slower = _from_before(self._measured[:, :1] - np.log(whole))
    slower = np.clip(slower, -np.log(MOST_PULL), np.log(MOST_PULL))
    weighted = change.T * KEPT ** np.arange(len(change))[::-1]
    move = np.linalg.solve(
      weighted @ change + FIRST_WEIGHT * np.eye(len(self._first)),
      (weighted @ slower)[:, 0] + FIRST_WEIGHT * (self._first - self._logs),
    )
    *found, start = self._logs + move - move[0]
    # A step that checks more tokens never takes less time.
    found = np.maximum.accumulate(np.maximum(found, self._first[:-1] + np.log(LEAST)))
    found = np.minimum(found, self._most)
    self._logs = np.asarray([*found, np.clip(start, np.log(LEAST_START), np.log(MOST_START))])


def _from_before(rows: np.ndarray) -> np.ndarray:
  """Return each row but the first, minus the mean of the one or two rows before it."""
  return rows[1:] - (rows[:-1] + np.concatenate([rows[:1], rows[:-2]])) / 2
