"""Requests that are followed from any number of threads; whichever thread waits runs the scheduler."""

import collections
from collections.abc import AsyncIterator, Iterator
import asyncio
import threading

from t5x_inference_ext.engine.request import Event, Handle, Request
from t5x_inference_ext.engine.scheduler import Scheduler

# How long a thread waits for the one that steps before it looks again, in seconds: a step takes
# less, but its thread may have been stopped in between.
WAIT_SECONDS = 0.05


class Stream:
  """The events of one request, in order. Closing the stream cancels the request.

  Iterating blocks; `async for` does not block the event loop.

  Attributes:
    handle: The request in its scheduler.
  """

  def __init__(self, streams: 'Streams', handle: Handle) -> None:
    self._streams, self.handle = streams, handle
    self._left = len(handle.request.seeds)  # samples that have not ended
    self._closed = False

  def __iter__(self) -> Iterator[Event]:
    return self

  def __next__(self) -> Event:
    if not self._left or self._closed:
      raise StopIteration
    event = self._streams.wait(self.handle)
    self._left -= event.finish is not None
    return event

  def __aiter__(self) -> AsyncIterator[Event]:
    return self

  async def __anext__(self) -> Event:
    if not self._left or self._closed:
      raise StopAsyncIteration
    event = await asyncio.to_thread(self._streams.wait, self.handle)
    self._left -= event.finish is not None
    return event

  def close(self) -> None:
    """Cancel the request, unless it has ended."""
    if not self._closed:
      self._closed = True
      self._streams.close(self.handle, cancel=self._left > 0)

  def __enter__(self) -> 'Stream':
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def __del__(self) -> None:
    self.close()


class Streams:
  """The streams of one scheduler.

  Args:
    scheduler: The scheduler, which nothing else steps.
  """

  def __init__(self, scheduler: Scheduler) -> None:
    self.scheduler = scheduler
    self._stepping = threading.Lock()
    self._changed = threading.Condition()
    self._events: dict[int, collections.deque[Event]] = {}

  def open(self, request: Request) -> Stream:
    """Submit a request, and return its events.

    Raises:
      RequestError: The request does not fit the scheduler.
    """
    with self._changed:  # no event may come before there is a place for it
      handle = self.scheduler.submit(request)
      self._events[handle.index] = collections.deque()
    return Stream(self, handle)

  def wait(self, handle: Handle) -> Event:
    """Return the next event of a request. Steps the scheduler unless another thread does."""
    while True:
      with self._changed:
        events = self._events.get(handle.index)
        if events:
          return events.popleft()
      if self._stepping.acquire(blocking=False):
        try:
          events_ready = bool(self._events.get(handle.index))
          new = [] if events_ready else self.scheduler.step()
        finally:
          self._stepping.release()
        self._put(new)
      else:
        with self._changed:
          if not self._events.get(handle.index):
            self._changed.wait(WAIT_SECONDS)

  def close(self, handle: Handle, cancel: bool) -> None:
    """Forget a request; cancel it first if it has not ended."""
    if cancel:
      self.scheduler.cancel(handle)
    with self._changed:
      self._events.pop(handle.index, None)

  def _put(self, events: list[Event]) -> None:
    with self._changed:
      for event in events:
        waiting = self._events.get(event.request)
        if waiting is not None:
          waiting.append(event)
      self._changed.notify_all()
