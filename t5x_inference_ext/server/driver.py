"""The thread that runs the engine, and its door for the event loop.

The event loop never waits for a device: it queues tickets, and gets their events back in one call a
step. All methods but those of the thread itself are for the event loop alone.
"""

import asyncio
from collections.abc import Callable, Hashable, Sequence
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
from t5x_inference_ext.server.turns import PromptToScore, TurnInbox


class Listener(Protocol):
  """A follower of a ticket. Both methods are called in the event loop."""

  def push(self, ticket: 'Ticket', event: Event) -> None:
    """Take an event of a ticket."""

  def fail(self, error: ApiError) -> None:
    """Learn that no more events come, and why."""


@dataclasses.dataclass(eq=False)
class Ticket:
  """A request on its way through the engine.

  Attributes:
    checked: The request, and the matchers of its grammar.
    listener: Gets the events.
    client: Whose request it is: clients take turns.
    number: The ticket's place among those of one HTTP request.
    handle: The request in the scheduler; None before it is there.
    left: Samples that have not ended.
    started_at: Time when the scheduler took it, see Driver.now; None before.
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


class _Score:
  """A prompt that waits to be scored, and the future of its result."""

  def __init__(self, prompt: PromptToScore, future: asyncio.Future) -> None:
    self.prompt, self.future = prompt, future


class Driver:
  """Runs a scheduler in a thread of its own.

  Args:
    scheduler: The scheduler, which nothing else steps. Its inbox is `inbox`.
    inbox: The inbox, for turns that other processes follow.
    score: Scores prompts; see engine.ranking.PromptRanker. Called in the thread.

  Attributes:
    error: Why the engine is dead; None while it lives.
    steps: Steps so far.
  """

  now = staticmethod(time.monotonic)

  def __init__(
    self,
    scheduler: Scheduler,
    inbox: TurnInbox,
    score: Callable[[Sequence[PromptToScore]], list[Any]],
  ) -> None:
    self.scheduler, self._inbox, self._score = scheduler, inbox, score
    self._wake = threading.Condition()
    # Shared with the thread, under _wake.
    self._queue = FairQueue[Ticket]()
    self._scores: list[_Score] = []
    self._closing = False
    # The tickets in the scheduler, by their index there.
    self._tickets: dict[int, Ticket] = {}
    self.error: str | None = None
    self.steps = 0
    self._loop: asyncio.AbstractEventLoop | None = None
    self._thread = threading.Thread(target=self._run, name='engine', daemon=True)

  def start(self, loop: asyncio.AbstractEventLoop) -> None:
    """Begin to serve; events go to this event loop."""
    self._loop = loop
    self._thread.start()

  def close(self, timeout: float | None = None) -> bool:
    """End the thread, once the scheduler is idle; return whether it has ended within `timeout`."""
    with self._wake:
      self._closing = True
      self._wake.notify()
    if self._thread.is_alive():
      self._thread.join(timeout)
    return not self._thread.is_alive()

  def submit(self, ticket: Ticket) -> None:
    """Queue a ticket whose request was checked.

    Raises:
      ApiError: The engine is dead.
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
    """Return the scores of a prompt; see `score` of the class.

    Raises:
      ApiError: The engine is dead.
    """
    assert self._loop is not None
    future = self._loop.create_future()
    with self._wake:
      self._check_alive()
      self._scores.append(_Score(prompt, future))
      self._wake.notify()
    return await future

  def fail(self, reason: str) -> None:
    """Say that the engine is dead, to all that follow tickets. The thread may hang."""
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
    for each in scores:
      if not each.future.done():
        each.future.set_exception(error)

  def fail_soon(self, reason: str) -> None:
    """Say that the engine is dead, from any thread."""
    self._call(self.fail, reason)

  def _check_alive(self) -> None:
    if self.error is not None:
      raise unavailable(f'the engine has stopped: {self.error}', 'engine_dead')

  # The thread.

  def _run(self) -> None:
    assert self._loop is not None
    try:
      while self._turn():
        pass
    except BaseException as error:  # whatever it is, clients must not wait for it
      reason = str(error) if isinstance(error, UserError) else f'{type(error).__name__}: {error}'
      self._call(self.fail, reason)

  def _turn(self) -> bool:
    """Wait for work and do some; return False once the driver is closed and nothing is left."""
    with self._wake:
      while not (self._scores or self._queue or not self.scheduler.idle):
        if self._closing or self.error is not None:
          self._inbox.close()
          break
        self._wake.wait()
      scores = self._take_scores()
      self._feed()
    self._inbox.begin_turn([each.prompt for each in scores])
    if self._inbox.closed:
      return False
    if scores:
      self._score_all(scores)
    events = self.scheduler.step()
    self.steps += 1
    if events:
      self._call(self._tell, events)
    return True

  def _call(self, function: Callable, *arguments: Any) -> None:
    """Call a function in the event loop, soon."""
    assert self._loop is not None
    try:
      self._loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:  # the loop is closed: nobody listens any more
      self._closing = True

  def _take_scores(self) -> list[_Score]:
    """Take as many prompts to score as are scored together: rows that decode wait for them."""
    self._scores = [each for each in self._scores if not each.future.cancelled()]
    count = self.scheduler.config.prefill_rows
    taken, self._scores = self._scores[:count], self._scores[count:]
    return taken

  def _score_all(self, scores: list[_Score]) -> None:
    """Score prompts, and hand out the results. An error is theirs alone: rows go on."""
    try:
      results = self._score([each.prompt for each in scores])
    except Exception as error:  # such as too little memory for a long prompt
      why = f'the prompt could not be scored ({type(error).__name__}): try a shorter one'
      results = [ApiError(500, why, code='scoring_failed')] * len(scores)
    self._call(_resolve, scores, results)

  def _feed(self) -> None:
    """Give the scheduler as many tickets as it can begin."""
    for _ in range(self.scheduler.wanted):
      if not self._queue:
        return
      ticket = self._queue.take()
      ticket.started_at = self.now()
      ticket.handle = self._inbox.submit(*ticket.checked)
      self._tickets[ticket.handle.index] = ticket

  def _tell(self, events: list[Event]) -> None:
    """Hand events to their listeners; called in the event loop."""
    for event in events:
      ticket = self._tickets.get(event.request)
      if ticket is not None:
        if event.finish is not None:
          ticket.left -= 1
          if not ticket.left:
            del self._tickets[event.request]
        ticket.listener.push(ticket, event)


def _resolve(scores: list[_Score], results: list[Any]) -> None:
  for each, result in zip(scores, results):
    if each.future.done():
      continue
    if isinstance(result, ApiError):
      each.future.set_exception(result)
    else:
      each.future.set_result(result)
