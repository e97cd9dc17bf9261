"""The loop of a service: requests arrive, wait, enter the scheduler and get their tokens."""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import statistics
from typing import NamedTuple

from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.stats import DraftStats
from t5x_inference_ext.simulator.clock import ServiceClock
from t5x_inference_ext.simulator.trace import Arrival


class WaitingLimits(NamedTuple):
  """Limits on the requests that wait. More are refused, as by the server.

  Attributes:
    requests: Maximum number of requests that wait for their first token.
    tokens: Maximum number of tokens of the waiting prompts. A single prompt may always wait.
  """

  requests: int = 256
  tokens: int = 1_000_000


DEFAULT_LIMITS = WaitingLimits()


class Quantiles(NamedTuple):
  """Quantiles of a latency, in seconds."""

  p50: float
  p95: float
  p99: float

  @classmethod
  def of(cls, values: Sequence[float]) -> 'Quantiles':
    """Return the quantiles of some values; NaN if there are none."""
    if not values:
      return cls(*[float('nan')] * 3)
    if len(values) == 1:
      return cls(*[values[0]] * 3)
    cuts = statistics.quantiles(values, n=100, method='inclusive')
    return cls(cuts[49], cuts[94], cuts[98])


@dataclasses.dataclass(frozen=True)
class ServedTrace:
  """The results of serving a trace, as its clients see them.

  Attributes:
    first: Time to first token of each request, from its arrival.
    between: Mean time between tokens, of each request with two or more tokens.
    gaps: Every single time between two consecutive tokens of a request.
    tokens: Number of new tokens of all requests.
    seconds: Time from the first arrival to the last token.
    refused: Number of requests that were refused because too many waited.
    preempted: Number of rows that were preempted: they left their slot, and were computed again.
    hit_share: Share of the prompts' tokens that were found in the prefix cache.
    drafts: Counters of drafts.
  """

  first: Quantiles
  between: Quantiles
  gaps: Quantiles
  tokens: int
  seconds: float
  refused: int
  preempted: int
  hit_share: float
  drafts: DraftStats = DraftStats()

  @property
  def tokens_per_second(self) -> float:
    """New tokens per second, of all requests together."""
    return self.tokens / self.seconds if self.seconds else 0.0


@dataclasses.dataclass
class _Served:
  arrived: float
  size: int
  times: list[float] = dataclasses.field(default_factory=list)


def serve_arrivals(
  scheduler: Scheduler,
  arrivals: Sequence[Arrival],
  clock: ServiceClock,
  bounds: WaitingLimits = DEFAULT_LIMITS,
  begin_step: Callable[[], object] = lambda: None,
) -> ServedTrace:
  """Serve requests as they arrive, and return their latencies and tokens.

  A request waits until the scheduler can start it, as in server/driver.py.

  Args:
    scheduler: An idle scheduler.
    arrivals: The requests, by arrival.
    clock: The clock; its time begins at 0.
    bounds: Limits on waiting requests.
    begin_step: Called before each step of the scheduler.

  Raises:
    RequestError: A request does not fit the scheduler.
  """
  left = collections.deque(arrivals)
  queue: collections.deque[Arrival] = collections.deque()
  served: dict[int, _Served] = {}
  done: list[_Served] = []
  waiting = waiting_tokens = refused = 0
  last = 0.0
  while left or queue or not scheduler.idle:
    if left and not queue and scheduler.idle:
      clock.sleep_until(left[0].seconds)
    while left and left[0].seconds <= clock.now():
      arrival = left.popleft()
      size = len(arrival.tokens)
      too_long = waiting > 0 and waiting_tokens + size > bounds.tokens
      if waiting >= bounds.requests or too_long:
        refused += 1
        continue
      waiting, waiting_tokens = waiting + 1, waiting_tokens + size
      queue.append(arrival)
    for _ in range(min(scheduler.wanted, len(queue))):
      arrival = queue.popleft()
      handle = scheduler.submit(Request(arrival.tokens, limit=arrival.limit))
      served[handle.index] = _Served(arrival.seconds, len(arrival.tokens))
    begin_step()
    events = scheduler.step()
    now = clock.now()
    for event in events:
      each = served[event.request]
      if not each.times:
        waiting, waiting_tokens = waiting - 1, waiting_tokens - each.size
      each.times += [now] * len(event.tokens)
      if event.finish is not None:
        done.append(served.pop(event.request))
        last = now
  return _service(scheduler, done, last, refused)


def _service(
  scheduler: Scheduler, done: Sequence[_Served], last: float, refused: int
) -> ServedTrace:
  """Return the results of a trace, from the times of its tokens."""
  several = [each.times for each in done if len(each.times) > 1]
  stats = scheduler.stats
  return ServedTrace(
    Quantiles.of([each.times[0] - each.arrived for each in done if each.times]),
    Quantiles.of([(times[-1] - times[0]) / (len(times) - 1) for times in several]),
    Quantiles.of([after - before for times in several for before, after in zip(times, times[1:])]),
    sum(len(each.times) for each in done),
    last,
    refused,
    stats.preempted,
    stats.prefixes.hit_tokens / max(1, stats.prefixes.query_tokens),
    stats.drafts,
  )
