"""The thread that runs the engine, and the interface between it and the event loop.

The event loop never waits for a device: it queues tickets, and receives their events in one call
per step. Only the event loop calls the methods, except those below the comment "The thread".
"""

import asyncio
from collections.abc import Callable, Hashable, Sequence
import concurrent.futures
import dataclasses
import threading
import time
from typing import Any, Protocol

from t5x_inference_ext.engine.admission import CheckedRequest
from t5x_inference_ext.engine.request import Event, Handle, Request
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.server.admission_queue import FairQueue
from t5x_inference_ext.server.api_errors import ApiError, unavailable
from t5x_inference_ext.server.lockstep import PromptToScore, StepInbox


class Listener(Protocol):
  """Receiver of a ticket's events. The event loop calls both methods."""

  def push(self, ticket: 'Ticket', event: Event) -> None:
    """Receive an event of a ticket."""

  def fail(self, error: ApiError) -> None:
    """Receive the error after which no events come."""


@dataclasses.dataclass(eq=False)
class Ticket:
  """A request in the driver, from the queue to the request's last event.

  Attributes:
    checked: The request, and the matchers of its grammar.
    listener: Receives the events.
    client: Name of the client; clients take turns.
    number: Index of the prompt within its HTTP request.
    handle: The request's handle in the scheduler; None before it is submitted there.
    left: Number of samples that have not ended.
    started_at: Time of submission to the scheduler (see Driver.now); None before.
  """

  checked: CheckedRequest
  listener: Listener
  client: Hashable = None
  number: int = 0
  handle: Handle | None = None
  left: int = dataclasses.field(init=False)
  started_at: float | None = None

  def __post_init__(self) -> None:
    self.left = len(self.request.seeds)

  @property
  def request(self) -> Request:
    """The request."""
    return self.checked.request


# A prompt that waits to be scored, and the future of its result.
_Score = tuple[PromptToScore, concurrent.futures.Future[Any]]


class Driver:
  """Runs a scheduler in a thread of its own.

  Args:
    scheduler: The scheduler, which only the driver steps, and whose inbox is `inbox`.
    inbox: The scheduler's inbox, whose steps other processes follow.
    score: Scores prompts; see engine.ranking.PromptRanker. Called in the thread.

  Attributes:
    error: Why the engine failed; None if it works.
    steps: Number of steps so far.
  """

  now = staticmethod(time.monotonic)

  def __init__(
    self,
    scheduler: Scheduler,
    inbox: StepInbox,
    score: Callable[[Sequence[PromptToScore]], list[Any]],
  ) -> None:
    self.scheduler, self._inbox, self._score = scheduler, inbox, score
    self._wake = threading.Condition()
    # State shared by the event loop and the thread, under the lock _wake.
    self._queue = FairQueue[Ticket]()
    self._scores: list[_Score] = []
    self._closing = False
    # Index of a request in the scheduler -> its ticket.
    self._tickets: dict[int, Ticket] = {}
    self.error: str | None = None
    self.steps = 0
    self._loop: asyncio.AbstractEventLoop | None = None
    self._thread = threading.Thread(target=self._run, name='engine', daemon=True)

  def start(self, loop: asyncio.AbstractEventLoop) -> None:
    """Start the thread; it delivers events to the event loop `loop`."""
    self._loop = loop
    self._thread.start()

  def close(self, timeout: float | None = None) -> bool:
    """End the thread when the scheduler is idle; return whether it ended in `timeout` seconds."""
    with self._wake:
      self._closing = True
      self._wake.notify()
    if self._thread.is_alive():
      self._thread.join(timeout)
    return not self._thread.is_alive()

  def submit(self, ticket: Ticket) -> None:
    """Queue a ticket whose request was checked.

    Raises:
      ApiError: The engine has failed.
    """
    with self._wake:
      self._check_alive()
      self._queue.add(ticket.client, ticket)
      self._wake.notify()

  def cancel(self, ticket: Ticket) -> None:
    """End a ticket within the next step. Its listener gets no more events."""
    with self._wake:
      if self._queue.remove(ticket.client, ticket) or ticket.handle is None:
        return
      if self._tickets.pop(ticket.handle.index, None) is not None:
        self.scheduler.cancel(ticket.handle)
        self._wake.notify()

  async def score(self, prompt: PromptToScore) -> Any:
    """Score a prompt in the thread; see the argument `score` of the class.

    Raises:
      ApiError: The engine has failed.
    """
    future = concurrent.futures.Future[Any]()
    with self._wake:
      self._check_alive()
      self._scores.append((prompt, future))
      self._wake.notify()
    return await asyncio.wrap_future(future)

  def fail(self, reason: str) -> None:
    """Mark the engine as failed, and report it to all listeners. Works even if the thread hangs."""
    with self._wake:
      if self.error is not None:
        return
      self.error = reason
      tickets = list(self._tickets.values())
      while self._queue:
        tickets.append(self._queue.take())
      self._tickets.clear()
      scores, self._scores = self._scores, []
    error = unavailable(f'the engine has stopped: {reason}', 'engine_dead')
    for ticket in tickets:
      ticket.listener.fail(error)
    for _, future in scores:
      if future.set_running_or_notify_cancel():
        future.set_exception(error)

  def fail_soon(self, reason: str) -> None:
    """Call `fail` in the event loop. Any thread may call this."""
    self._call(self.fail, reason)

  def _check_alive(self) -> None:
    if self.error is not None:
      raise unavailable(f'the engine has stopped: {self.error}', 'engine_dead')

  # The thread.

  def _run(self) -> None:
    assert self._loop is not None
    try:
      while self._step():
        pass
    except BaseException as error:  # any error: clients must not wait for the thread
      reason = str(error) if isinstance(error, UserError) else f'{type(error).__name__}: {error}'
      self.fail_soon(reason)

  def _step(self) -> bool:
    """Wait for work and run a step; return False if the driver is closed and has no work left."""
    with self._wake:
      while not (self._scores or self._queue or not self.scheduler.idle):
        if self._closing or self.error is not None:
          self._inbox.close()
          break
        self._wake.wait()
      scores = self._take_scores()
      self._feed()
    self._inbox.begin_step([prompt for prompt, _ in scores])
    if self._inbox.closed:
      return False
    if scores:
      self._score_all(scores)
    events = self.scheduler.step()
    self.steps += 1
    if events:
      self._call(self._deliver, events)
    return True

  def _call(self, function: Callable, *arguments: Any) -> None:
    """Schedule a call of a function in the event loop."""
    assert self._loop is not None
    try:
      self._loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:  # the event loop is closed, so there are no listeners
      self._closing = True

  def _take_scores(self) -> list[_Score]:
    """Take only as many prompts to score as fit into one batch, since decoding rows wait for it."""
    count = self.scheduler.config.prefill_rows
    waiting = [(prompt, future) for prompt, future in self._scores if not future.cancelled()]
    self._scores = waiting[count:]
    return [each for each in waiting[:count] if each[1].set_running_or_notify_cancel()]

  def _score_all(self, scores: list[_Score]) -> None:
    """Score prompts and deliver the results. An error ends only these prompts, not other rows."""
    try:
      results = self._score([prompt for prompt, _ in scores])
    except Exception as error:  # such as too little memory for a long prompt
      why = f'the prompt could not be scored ({type(error).__name__}): try a shorter one'
      for _, future in scores:
        future.set_exception(ApiError(500, why, code='scoring_failed'))
    else:
      for (_, future), result in zip(scores, results):
        future.set_result(result)

  def _feed(self) -> None:
    """Submit as many tickets to the scheduler as it can start."""
    for _ in range(self.scheduler.wanted):
      if not self._queue:
        return
      ticket = self._queue.take()
      ticket.started_at = self.now()
      ticket.handle = self._inbox.submit(*ticket.checked)
      self._tickets[ticket.handle.index] = ticket

  def _deliver(self, events: list[Event]) -> None:
    """Hand events to their listeners; called in the event loop."""
    for event in events:
      ticket = self._tickets.get(event.request)
      if ticket is not None:
        if event.finish is not None:
          ticket.left -= 1
          if not ticket.left:
            del self._tickets[event.request]
        ticket.listener.push(ticket, event)
