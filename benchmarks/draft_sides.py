"""A side of the benchmark of drafts: a timed scheduler, and what its drafts could save."""

from collections.abc import Sequence
import dataclasses
import statistics
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from t5x_inference_ext.engine import scheduler_config
from t5x_inference_ext.engine.draft_width import verify_widths
from t5x_inference_ext.engine.drafting import DraftInputs, DraftState
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.executor import DeviceExecutor, Executor
from t5x_inference_ext.engine.ngram_drafts import NgramDrafter
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.slots import StepsOutput
from t5x_inference_ext.engine.stats import DraftStats
from t5x_inference_ext.engine.step_prices import StepPrices


def right_tokens(drafter: NgramDrafter, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
  """Return how many tokens of the draft are right after 1, 2, ... tokens of an answer."""
  whole, made = np.asarray([*prompt, *answer], np.int32), np.arange(1, len(answer))
  last = jnp.asarray(len(prompt) - 1 + made, jnp.int32)
  tokens = jnp.asarray(np.tile(whole, (len(made), 1)))
  outlook, none = drafter.outlook(tokens, last), jnp.zeros(0)
  state: Any = None  # n-grams are drafted from tokens alone
  inputs = DraftInputs(None, state, state, DraftState(tokens, none, none), last)
  drafts = np.asarray(drafter.draft(inputs, outlook, drafter.most)[1])
  right = []
  for done, draft, count in zip(made, drafts, np.asarray(outlook.counts)):
    known = np.asarray(answer[done : done + count])
    right.append(int(np.cumprod(draft[: len(known)] == known).sum()))
  return right


def right_shares(right: Sequence[int], most: int) -> list[float]:
  """Return the share of right tokens at each position of drafts, of those after right tokens.

  Args:
    right: Number of right tokens of each draft, before the first wrong one.
    most: Number of tokens of a draft.
  """
  reached = [sum(count >= i for count in right) for i in range(most + 1)]
  return [after / max(1, before) for before, after in zip(reached, reached[1:])]


def least_time(right: Sequence[int], widths: Sequence[int], prices: Sequence[float]) -> float:
  """Return the least time, in plain steps, of a row alone that knows its answer.

  Args:
    right: From `right_tokens`.
    widths: Numbers of draft tokens that a step can check.
    prices: Time of each such step, in plain steps.
  """
  times = [0.0] * (len(right) + 1)  # of the tokens from this one on
  for i in reversed(range(len(right))):
    ends = (min(i + 1 + min(right[i], width), len(right)) for width in widths)
    times[i] = min(price + times[end] for price, end in zip(prices, ends))
  return times[0]


class OneKind(StepPrices):
  """Prices at which all steps are of one kind.

  Args:
    widths: Number of draft tokens that each kind of step checks.
    kind: Index of the kind.
  """

  tries_plain = False

  def __init__(self, widths: Sequence[int], kind: int) -> None:
    super().__init__(widths)
    self._kind = kind

  def next(self) -> np.ndarray:
    """Return a low price of the kind, and a high one of the others."""
    return np.where(np.arange(len(self.prices)) == self._kind, 1.0, 1e6).astype(np.float32)


class TimedExecutor:
  """An executor that adds up the seconds of decode steps.

  Args:
    executor: Runs the programs.

  Attributes:
    seconds: Seconds of the programs that decode, each from the end of the program before it.
  """

  def __init__(self, executor: Executor) -> None:
    self._executor, self.seconds = executor, 0.0
    self._begun: dict[int, float] = {}
    self._read_at = 0.0

  def __getattr__(self, name: str) -> Any:
    return getattr(self._executor, name)

  def decode_steps(self, *inputs: Any) -> StepsOutput:
    """Start decode steps."""
    begun = self._executor.now()
    output = self._executor.decode_steps(*inputs)
    self._begun[id(output)] = begun
    return output

  def fetch(self, output: StepsOutput) -> StepsOutput:
    """Wait for a program's output, and count its seconds."""
    found, begun = self._executor.fetch(output), self._begun.pop(id(output), None)
    now = self._executor.now()
    if begun is not None:
      self.seconds += now - max(begun, self._read_at)
    self._read_at = now
    return found


class Side:
  """One scheduler that serves the requests again and again.

  Attributes:
    seconds: Seconds of decode steps in each run since the reset.
    whole: Seconds of each run.
    processor: Seconds of processor time of each run.
    tokens: The tokens of each request, from the last time that it was served.
  """

  def __init__(
    self,
    engine: Engine,
    requests: list[Request],
    slots: int,
    steps: int,
    speculate: str | None,
    *,
    greedy: bool = False,
  ):
    config = scheduler_config.config_for(
      engine.model, requests, slots=slots, decode_steps=steps, speculate=speculate
    )
    runs = DeviceExecutor(engine.model, engine.weights, config)
    if greedy:  # set this before any program is compiled
      made: Any = runs.drafter
      runs.drafter = dataclasses.replace(made, shared_noise=False)
    self.executor = TimedExecutor(runs)
    self.scheduler = Scheduler(engine.model, None, config, executor=self.executor)
    drafter = runs.drafter
    self.widths = (0,) if drafter is None else (0, *verify_widths(drafter.most))
    self._requests = requests
    self.tokens: list[list[int]] = []
    self.reset()

  def reset(self) -> None:
    """Forget the counts."""
    self.seconds: list[float] = []
    self.whole: list[float] = []
    self.processor: list[float] = []
    self._decoded = self.scheduler.stats.decoded
    self._before = self.scheduler.stats.drafts

  def check_only(self, kind: int) -> None:
    """Let all steps check the number of draft tokens with this index in `widths`."""
    self.scheduler._decoder._prices = OneKind(self.widths, kind)

  def run(self) -> None:
    """Serve all requests once."""
    begin, decoded = self.executor.now(), self.executor.seconds
    processor = time.process_time()
    first = self.scheduler.submit(self._requests[0]).index
    for request in self._requests[1:]:
      self.scheduler.submit(request)
    self.tokens = [[] for _ in self._requests]
    while not self.scheduler.idle:
      for event in self.scheduler.step():
        self.tokens[event.request - first] += event.tokens
    self.whole.append(self.executor.now() - begin)
    self.processor.append(time.process_time() - processor)
    self.seconds.append(self.executor.seconds - decoded)

  @property
  def steps(self) -> float:
    """Steps of a run of all requests."""
    decoded = self.scheduler.stats.decoded - self._decoded
    return decoded / self.scheduler.config.slots / len(self.seconds)

  @property
  def tokens_per_second(self) -> float:
    """Tokens of decode steps, without those of insertions, per second; the median of the runs."""
    return sum(len(each) - 1 for each in self.tokens) / statistics.median(self.seconds)

  def least_steps(self, prices: Sequence[float]) -> float | None:
    """Return a lower bound on the time of a run at these prices; None for a draft model."""
    drafter = self.executor.drafter
    if not isinstance(drafter, NgramDrafter):
      return None
    times = [
      least_time(right_tokens(drafter, request.tokens, answer), self.widths, prices)
      for request, answer in zip(self._requests, self.tokens)
    ]
    return max(*times, sum(times) / self.scheduler.config.slots)

  def right_by_position(self) -> list[float]:
    """Return the share of right tokens at each position of a draft, of those after right ones."""
    drafter = self.executor.drafter
    if not isinstance(drafter, NgramDrafter):
      return []
    right = [
      count
      for request, answer in zip(self._requests, self.tokens)
      for count in right_tokens(drafter, request.tokens, answer)[: -drafter.most]  # whole drafts
    ]
    return right_shares(right, drafter.most)

  @property
  def drafts(self) -> DraftStats:
    """Counters of drafts since the reset."""
    now, was = self.scheduler.stats.drafts, self._before
    return DraftStats(
      now.row_steps - was.row_steps,
      now.generated - was.generated,
      now.drafted - was.drafted,
      now.accepted - was.accepted,
    )
