"""Requests and cancellations on their way to the scheduler, from any thread.

With several processes, process 0 alone takes requests. The others get them, step by step, through
jax's coordination service: on the host, so that no device waits for it.
"""

from collections.abc import Callable
import pickle
import threading
from typing import NamedTuple

import jax
from jax._src import distributed as jax_distributed

from t5x_inference_ext.engine.request import Handle, Request


class Command(NamedTuple):
  """What was asked of the scheduler.

  Attributes:
    index: Index of the request.
    request: The request to submit; None to cancel the one with this index, or with index -1 to end.
  """

  index: int
  request: Request | None


class Inbox:
  """Collects commands from any thread until the scheduler takes them.

  Attributes:
    submitted: Number of requests so far.
  """

  def __init__(self) -> None:
    # Reentrant: a stream that is dropped while a request is queued cancels in the same thread.
    self._lock = threading.RLock()
    self._commands: list[tuple[Command, Handle | None]] = []
    self.submitted = 0

  def submit(self, request: Request) -> Handle:
    """Queue a request."""
    with self._lock:
      handle = Handle(self.submitted, request)
      self.submitted += 1
      self._commands.append((Command(handle.index, request), handle))
    return handle

  def cancel(self, index: int) -> None:
    """Queue the cancellation of a request."""
    with self._lock:
      self._commands.append((Command(index, None), None))

  @property
  def submissions(self) -> int:
    """Number of requests that are queued."""
    return sum(handle is not None for _, handle in self._commands)

  @property
  def empty(self) -> bool:
    """Whether nothing is queued."""
    return not self._commands

  def take(self) -> list[tuple[Command, Handle | None]]:
    """Return the queued commands, and queue nothing any more."""
    with self._lock:
      taken, self._commands = self._commands, []
    return taken
