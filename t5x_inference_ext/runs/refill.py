"""Requests through decode slots that are kept full (engine.scheduler), and the clock on them."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.scheduler import Request, Scheduler, SchedulerConfig
from t5x_inference_ext.runs.batches import Clock


class Sample(NamedTuple):
  """One sample of a request, whole.

  Attributes:
    tokens: generated ids, EOS included where it came.
    log_probs: of each of them.
    top: at each the most likely, as pairs (id, log-probability), as many as the plan says.
  """

  tokens: list[int]
  log_probs: list[float]
  top: list[list[tuple[int, float]]]

  @property
  def score(self) -> float:
    return sum(self.log_probs)


def completions(
  engine: Engine,
  requests: Iterable[tuple[int, Request]],
  plan: SchedulerConfig,
  shared: tuple[int, ...] = (),
  clock: Clock | None = None,
) -> Iterator[tuple[int, list[Sample]]]:
  """Each request's samples in the order of its seeds, as soon as all of them have ended: requests not in order.

  Args:
    engine: to run on.
    requests: with what their results are to be called by. Taken as slots become free.
    plan, shared: for all of them (engine.scheduler_config).
    clock: is advanced.
  """
  scheduler = Scheduler(engine.model, engine.weights, plan, shared)
  names, under_way, left = [], {}, {}

  def taken():
    for name, request in requests:
      under_way[len(names)] = [Sample([], [], []) for _ in request.seeds]
      left[len(names)] = len(request.seeds)
      names.append(name)
      yield request

  clock = clock or Clock()
  for event in clock.over(scheduler.run(taken())):
    sample = under_way[event.request][event.sample]
    for whole, new in zip(sample, (event.tokens, event.log_probs, event.top)):
      whole += new
    clock.add(0, len(event.tokens))
    left[event.request] -= event.ended
    if not left[event.request]:
      clock.add(1, 0)
      del left[event.request]
      yield names[event.request], under_way.pop(event.request)
