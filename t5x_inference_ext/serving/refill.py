"""Requests through decode slots that are kept full (decoding.scheduler), and the clock on them."""

from typing import Iterable, Iterator

from t5x_inference_ext.decoding.scheduler import Plan, Request, Scheduler
from t5x_inference_ext.engine import Completion, Engine
from t5x_inference_ext.serving.batches import Clock


def completions(
    engine: Engine, requests: Iterable[tuple[int, Request]], plan: Plan, shared: tuple[int, ...] = (),
    clock: Clock | None = None) -> Iterator[tuple[int, list[Completion]]]:
  """Each request's samples, as soon as all of them have ended: not in order.

  Args:
    engine: to run on.
    requests: with what their results are to be called by. Taken as slots become free.
    plan, shared: for all of them (decoding.plans).
    clock: is advanced.
  """
  scheduler = Scheduler(engine.model, engine.weights, plan, shared)
  names, asked, parts = [], [], {}

  def taken():
    for name, request in requests:
      names.append(name)
      asked.append(request)
      yield request

  clock = clock or Clock()
  for event in clock.over(scheduler.run(taken())):
    tokens, log_probs = parts.setdefault(event.request, {}).setdefault(event.sample, ([], []))
    tokens += event.tokens
    log_probs += event.log_probs
    clock.add(0, len(event.tokens))
    if event.ended:
      parts[event.request][event.sample] = Completion(tokens, sum(log_probs))
      done = parts[event.request]
      if len(done) == len(asked[event.request].seeds) and all(isinstance(c, Completion) for c in done.values()):
        clock.add(1, 0)
        del parts[event.request]
        yield names[event.request], [done[i] for i in range(len(done))]
