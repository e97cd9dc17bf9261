"""Serving of a list of requests by a scheduler, as an iterator of events."""

from collections.abc import Iterable, Iterator
import itertools

from t5x_inference_ext.engine.request import Event, Handle, Request, RequestState
from t5x_inference_ext.engine.scheduler import Scheduler


def serve(scheduler: Scheduler, requests: Iterable[Request]) -> Iterator[Event]:
  """Serve requests in order and yield their events, with requests numbered from 0.

  Requests are taken from the iterable shortly before they are needed. If the caller stops
  iterating, or a request does not fit the scheduler, unfinished requests are cancelled.

  Args:
    scheduler: The scheduler. No other caller may step it meanwhile.
    requests: The requests.

  Raises:
    RequestError: A request that does not fit the scheduler.
  """
  waiting, handles = iter(requests), list[Handle]()
  numbers: dict[int, int] = {}  # the scheduler's index of a request -> its number in this run
  exhausted = False
  try:
    while handles or not exhausted:
      wanted = scheduler.wanted
      taken = list(itertools.islice(waiting, wanted))
      exhausted |= len(taken) < wanted
      for request in taken:
        handles.append(scheduler.submit(request))
        numbers[handles[-1].index] = len(numbers)
      for event in scheduler.step():
        if event.request in numbers:
          yield event._replace(request=numbers[event.request])
      handles = [h for h in handles if h.state is not RequestState.FINISHED]
  finally:
    for handle in handles:
      scheduler.cancel(handle)
