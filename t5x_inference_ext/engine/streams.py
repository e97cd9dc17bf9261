"""Streams of events for any number of threads: one of the waiting threads steps the scheduler."""

import asyncio
import collections
from collections.abc import AsyncIterator, Iterator, Sequence
import threading

from t5x_inference_ext.engine.request import Event, Handle, Request, RequestState
from t5x_inference_ext.engine.scheduler import Scheduler

# How long, in seconds, a waiting thread sleeps before it checks whether it must step the scheduler.
# Every step wakes all threads; the timeout matters if the stepping thread got its last event and
# stopped.
WAIT_SECONDS = 0.05


class Stream:
  """The events of some requests, in order, with the requests numbered from 0.

  Iterate over a stream with `for`, or with `async for`, which does not block the event loop.
  Closing or dropping the stream cancels the requests that have not ended.

  Attributes:
    handles: The requests in their scheduler.
  """

  def __init__(self, streams: 'Streams', requests: Sequence[Request]) -> None:
    self._streams = streams
    self.handles: list[Handle] = []
    self._events: collections.deque[Event] = collections.deque()
    self._samples_left = sum(len(request.seeds) for request in requests)
    try:
      for request in requests:
        self.handles.append(streams.submit(request, self._events, len(self.handles)))
    except BaseException:
      self.close()
      raise

  def __iter__(self) -> Iterator[Event]:
    return self

  def __next__(self) -> Event:
    if not self._samples_left:
      raise StopIteration
    return self._took(self._streams.wait(self._events))

  def __aiter__(self) -> AsyncIterator[Event]:
    return self

  async def __anext__(self) -> Event:
    if not self._samples_left:
      raise StopAsyncIteration
    return self._took(await asyncio.to_thread(self._streams.wait, self._events))

  def _took(self, event: Event) -> Event:
    self._samples_left -= event.finish is not None
    return event

  def close(self) -> None:
    """Cancel the requests that have not ended. No more events come."""
    self._samples_left = 0
    self._streams.forget(self.handles)

  def __enter__(self) -> 'Stream':
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def __del__(self) -> None:
    self.close()


class Streams:
  """The streams of one scheduler; no other caller may step it.

  Args:
    scheduler: The scheduler.
  """

  def __init__(self, scheduler: Scheduler) -> None:
    self.scheduler = scheduler
    self._stepping = threading.Lock()
    self._changed = threading.Condition()
    # Index of each unfinished request -> (queue of its events, its number in the stream, its
    # handle).
    self._listeners: dict[int, tuple[collections.deque[Event], int, Handle]] = {}

  def open(self, requests: Sequence[Request]) -> Stream:
    """Submit requests, and return their events.

    Raises:
      RequestError: A request does not fit the scheduler; then no request is served.
    """
    return Stream(self, requests)

  def submit(self, request: Request, events: collections.deque[Event], number: int) -> Handle:
    """Submit a request whose events, with the request numbered `number`, go to `events`."""
    checked = self.scheduler.check(request)  # may take seconds; other requests are served meanwhile
    with self._changed:  # the request must have a listener before its first event
      handle = self.scheduler.submit(checked)
      self._listeners[handle.index] = events, number, handle
    return handle

  def wait(self, events: collections.deque[Event]) -> Event:
    """Return the next event of a stream. Steps the scheduler unless another thread does."""
    while True:
      if self._stepping.acquire(blocking=False):
        try:
          if not events:
            self._tell(self.scheduler.step())
        finally:
          self._stepping.release()
      with self._changed:
        if events:
          return events.popleft()
        if self._stepping.locked():
          self._changed.wait(WAIT_SECONDS)

  def forget(self, handles: Sequence[Handle]) -> None:
    """Cancel requests that have not ended, and drop their events."""
    with self._changed:
      for handle in handles:
        if self._listeners.pop(handle.index, None) is not None:
          self.scheduler.cancel(handle)

  def _tell(self, events: list[Event]) -> None:
    with self._changed:
      ended = []
      for event in events:
        listener = self._listeners.get(event.request)
        if listener is not None:
          waiting, number, handle = listener
          waiting.append(event._replace(request=number))
          if handle.state is RequestState.FINISHED:
            ended.append(handle.index)
      for index in ended:
        self._listeners.pop(index, None)
      self._changed.notify_all()
