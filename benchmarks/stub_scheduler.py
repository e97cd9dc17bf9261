"""A scheduler whose steps compute nothing, to measure the server's own work."""

import time
from types import SimpleNamespace
from typing import Any

from t5x_inference_ext.engine.admission import CheckedRequest
from t5x_inference_ext.engine.request import Event, Request
from t5x_inference_ext.engine.stats import SchedulerStats
from t5x_inference_ext.server.driver import Driver
from t5x_inference_ext.server.lockstep import StepInbox
from t5x_inference_ext.server.options import ServerOptions
from t5x_inference_ext.server.request_log import RequestLog
from t5x_inference_ext.server.service import Service
from t5x_inference_ext.server.translation import Translator
from t5x_inference_ext.text.settings import TextSettings

VOCAB_SIZE = 384
_TOKEN, _TEXT = 100, 'a'  # token and text that each row gets in each step


class StubScheduler:
  """Has the methods of a scheduler that a driver calls. Each row gets a token a step, to its limit.

  Args:
    inbox: Queue of incoming requests.
    slots: Maximum number of rows at a time.
    seconds: Time that each step sleeps, in place of a device's work.
    fails_at: Number of the step that fails; 0: none.
  """

  def __init__(
    self, inbox: StepInbox, slots: int = 32, seconds: float = 0.0, fails_at: int = 0
  ) -> None:
    self._inbox, self._slots, self._seconds, self._fails_at = inbox, slots, seconds, fails_at
    self._waiting: list[tuple[int, int, int]] = []  # request, sample, tokens left
    self._rows: list[tuple[int, int, int]] = []
    self.steps = 0
    self.stats = SchedulerStats()
    self.config = SimpleNamespace(top_log_probs=20, prefill_rows=1)
    self.model = SimpleNamespace(
      mesh=SimpleNamespace(shape={'x': 1, 'y': 1, 'z': 1}),
      prefill_layout='ws_2d/batch',
      decode_layout='ws_2d/batch',
      dtype='float32',
      cache_dtype='float32',
    )

  @property
  def rows(self) -> list[Any]:
    """The rows in slots, and None for each free one."""
    return [*self._rows, *[None] * (self._slots - len(self._rows))]

  @property
  def pages(self) -> tuple[int, int]:
    """Pages in use, and their total: one for each row."""
    return len(self._rows), self._slots

  @property
  def idle(self) -> bool:
    """Whether no request is left."""
    return self._inbox.empty and not self._rows and not self._waiting

  @property
  def wanted(self) -> int:
    """Number of free slots."""
    queued = len(self._waiting) + self._inbox.submissions
    return max(0, self._slots - len(self._rows) - queued)

  def check(self, request: Request) -> CheckedRequest:
    """Accept every request."""
    return CheckedRequest(request, ())

  def cancel(self, handle: Any) -> None:
    """End a request within the next step."""
    self._inbox.cancel(handle.index)

  def step(self) -> list[Event]:
    """Give each row a token."""
    self.steps += 1
    if self.steps == self._fails_at:
      raise RuntimeError('the device is gone')
    events = []
    for command, _ in self._inbox.take():
      if command.request is None:
        kept = [row for row in self._rows if row[0] != command.number]
        events += [
          Event(*row[:2], [], [], [], 'cancelled') for row in self._rows if row not in kept
        ]
        self._rows = kept
        self._waiting = [row for row in self._waiting if row[0] != command.number]
      else:
        samples, limit = len(command.request.seeds), command.request.limit
        self._waiting += [(command.number, sample, limit) for sample in range(samples)]
    while self._waiting and len(self._rows) < self._slots:
      self._rows.append(self._waiting.pop(0))
    if self._seconds:
      time.sleep(self._seconds)
    rows = self._rows
    events += [
      Event(request, sample, [_TOKEN], [-0.5], [[]], 'length' if left == 1 else None, _TEXT)
      for request, sample, left in rows
    ]
    self._rows = [(request, sample, left - 1) for request, sample, left in rows if left > 1]
    return events


def stub_service(
  options: ServerOptions | None = None, log: RequestLog | None = None, **stub: Any
) -> Service:
  """Return a service over a StubScheduler, made with the arguments `stub`."""
  options = options or ServerOptions(port=0)
  inbox = StepInbox()
  scheduler: Any = StubScheduler(inbox, **stub)
  settings = TextSettings(
    'bytes', chat_template='{% for m in messages %}{{ m.content }}{% endfor %}'
  )
  return Service(
    Driver(scheduler, inbox, lambda prompts: []),
    Translator(settings, VOCAB_SIZE, options.max_length),
    'stub',
    'float32',
    options,
    log or RequestLog(),
    lambda request, samples, seconds: {'seconds': seconds},
  )
