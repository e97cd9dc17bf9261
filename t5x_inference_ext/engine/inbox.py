"""Requests and cancellations on their way to the scheduler, from any thread.

With several processes, only process 0 accepts requests. In each step the other processes get them
through jax's coordination service, which runs on the hosts, so that no device waits.
"""

from collections.abc import Sequence
import pickle
import threading
from typing import Any, NamedTuple

import jax

from t5x_inference_ext import distributed
from t5x_inference_ext.engine.grammars import GrammarMatcher
from t5x_inference_ext.engine.request import Handle, Request


class Command(NamedTuple):
  """A submission or cancellation for the scheduler.

  Attributes:
    number: Index of the request.
    request: The request to submit, or None: the request with this index is cancelled.
  """

  number: int
  request: Request | None


class Inbox:
  """Collects commands from any thread until the scheduler takes them.

  Attributes:
    submitted: Number of requests submitted so far.
    closed: Whether no more requests will come; processes other than 0 then stop stepping.
  """

  def __init__(self) -> None:
    # Reentrant: while a thread queues a request, garbage collection in it may drop a stream, which
    # then cancels its requests in the same thread.
    self._lock = threading.RLock()
    self._commands: list[Command] = []
    self._handles: dict[int, Handle] = {}  # handles of submissions that were not taken yet
    self.submitted = 0
    self.closed = False

  def submit(self, request: Request, matchers: Sequence[GrammarMatcher] = ()) -> Handle:
    """Queue a request; return its handle, which keeps the grammar matchers `matchers`."""
    with self._lock:
      handle = Handle(self.submitted, request, matchers)
      self.submitted += 1
      self._handles[handle.index] = handle
      self._commands.append(Command(handle.index, request))
    return handle

  def cancel(self, index: int) -> None:
    """Queue the cancellation of a request."""
    with self._lock:
      self._commands.append(Command(index, None))

  def close(self) -> None:
    """Refuse further requests, and tell the other processes that none will come."""
    self.closed = True

  @property
  def submissions(self) -> int:
    """Number of requests that are queued."""
    return len(self._handles)

  @property
  def empty(self) -> bool:
    """Whether nothing is queued."""
    return not self._commands

  def take(self) -> list[tuple[Command, Handle | None]]:
    """Empty the queue; return its commands, each submission with its handle."""
    with self._lock:
      commands, self._commands = self._commands, []
      handles, self._handles = self._handles, {}
    return [(c, handles[c.number] if c.request else None) for c in commands]


class SharedInbox(Inbox):
  """The inbox of a scheduler that runs in several processes: only process 0 accepts requests.

  All processes must call `take` equally often. They then get equal commands, and their schedulers
  take equal steps.

  Args:
    name: Unique name of the scheduler in the run.
  """

  def __init__(self, name: str = 'inbox') -> None:
    super().__init__()
    self._messages = distributed.Messages(name)

  def take(self) -> list[tuple[Command, Handle | None]]:
    """Return the commands that process 0 has queued, with the handles of submissions."""
    commands, _ = self.take_with(None)
    return commands

  def take_with(self, more: Any) -> tuple[list[tuple[Command, Handle | None]], Any]:
    """Take commands like `take`; return them and the value that process 0 passed as `more`."""
    mine: list[tuple[Command, Handle | None]] = []
    if jax.process_count() == 1:
      return super().take(), more

    def make() -> bytes:
      mine.extend(super(SharedInbox, self).take())
      return pickle.dumps((self.closed, more, [command for command, _ in mine]))

    message = self._messages.next(make)
    if distributed.is_main():
      return mine, more
    self.closed, more, commands = pickle.loads(message)  # trusted: from process 0 of this run
    self.submitted += sum(command.request is not None for command in commands)
    return [(c, Handle(c.number, c.request) if c.request else None) for c in commands], more
