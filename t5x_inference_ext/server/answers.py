"""One HTTP request in the engine: its tickets, their events, and their metrics."""

import asyncio
from collections.abc import AsyncIterator, Hashable, Sequence
from typing import Any

from t5x_inference_ext.engine.admission import CheckedRequest
from t5x_inference_ext.engine.request import Event
from t5x_inference_ext.server.admission_queue import WaitingBounds
from t5x_inference_ext.server.api_errors import ApiError
from t5x_inference_ext.server.driver import Driver, Ticket
from t5x_inference_ext.server.forms import FINISHES
from t5x_inference_ext.server.metrics import Metrics
from t5x_inference_ext.server.receipts import ReceiptWriter


class HttpAnswer:
  """The prompts of one HTTP request in the engine, from before tokenization to the last token.

  Args:
    driver: The engine's thread.
    bounds: Limits on waiting prompts.
    metrics: Metrics to update with every event.
    sizes: Size of each prompt in tokens, or bytes of text; see WaitingBounds.
    client: Name of the client that sent the request.
    keep_texts: Whether the request log records the answers' texts.

  Attributes:
    arrived: Time when the request arrived, in seconds; see Driver.now.
    prompt_tokens: Number of tokens of all prompts.
    new_tokens: Number of tokens of all samples so far.
    finishes: Finish reasons of the samples that have ended.
    queue_seconds: Time from arrival until the first prompt was started; None before.
    first_seconds: Time from arrival until the first token; None before.
    receipt: Makes the receipt; None if the request does not want one.
    closed: Whether the answer was closed: no client waits for it.

  Raises:
    ApiError: More prompts wait than the bounds allow.
  """

  def __init__(
    self,
    driver: Driver,
    bounds: WaitingBounds,
    metrics: Metrics,
    sizes: list[int],
    client: Hashable = None,
    keep_texts: bool = False,
  ) -> None:
    bounds.enter(sizes)
    self._driver, self._bounds, self._metrics = driver, bounds, metrics
    self._client = client
    self._waiting = dict(enumerate(sizes))  # sizes of the prompts that still wait
    self._tickets: list[Ticket] = []
    self.arrived = driver.now()
    self._firsts: dict[int, float] = {}  # time of each prompt's first token
    self._lasts: dict[tuple[int, int], float] = {}  # time of each sample's last token
    self._counts: dict[tuple[int, int], int] = {}
    self._texts: dict[tuple[int, int], str] | None = {} if keep_texts else None
    self._left = 0
    self._events: list[tuple[int, Event]] = []
    self._wake = asyncio.Event()
    self._wakes = True
    self._error: ApiError | None = None
    self.receipt: ReceiptWriter | None = None
    self.closed = False
    self.prompt_tokens = self.new_tokens = 0
    self.finishes: list[str] = []
    self.queue_seconds: float | None = None
    self.first_seconds: float | None = None

  def submit(self, requests: Sequence[CheckedRequest], *, at_once: bool) -> None:
    """Queue the prompts' requests.

    Args:
      requests: A request for each prompt.
      at_once: Whether to deliver each event when it occurs (a stream), or all events at the end.

    Raises:
      ApiError: The engine has failed.
    """
    self._wakes = at_once
    self._left = sum(len(each.request.seeds) for each in requests)
    for number, checked in enumerate(requests):
      ticket = Ticket(checked, self, self._client, number)
      self._tickets.append(ticket)
      self._driver.submit(ticket)

  def finish_at_once(self, prompts: int, samples: int) -> None:
    """End every sample without new tokens, for a request with max_tokens 0."""
    self._left = prompts * samples
    for number in range(prompts):
      self._leave(number, served=True)
      for sample in range(samples):
        self._events.append((number, Event(number, sample, [], [], [], 'length')))
        self._finish('length')
    self._wake.set()

  async def events(self) -> AsyncIterator[list[tuple[int, Event]]]:
    """Yield events as pairs (number of the prompt, event) until all samples have ended.

    Raises:
      ApiError: The engine has failed, the server is shutting down, or a row can't go on.
    """
    done = 0
    while done < self._left:
      await self._wake.wait()
      self._wake.clear()
      events, self._events = self._events, []
      for _, event in events:
        if event.finish == 'error':
          raise ApiError(500, f'the answer can not go on: {event.error}', code='row_failed')
        done += event.finish is not None
      if events:
        yield events
      if self._error is not None and done < self._left:
        raise self._error

  def push(self, ticket: Ticket, event: Event) -> None:
    """Process an event of a ticket."""
    self._observe(ticket, event)
    if self._texts is not None:
      key = ticket.number, event.sample
      self._texts[key] = self._texts.get(key, '') + event.text
    self._events.append((ticket.number, event))
    if self._wakes or len(self.finishes) == self._left or event.finish == 'error':
      self._wake.set()

  def fail(self, error: ApiError) -> None:
    """End the answer with an error, which `events` then raises."""
    self._error = error
    self._wake.set()

  def close(self) -> None:
    """Cancel samples that have not ended, and remove their prompts from the waiting count."""
    self.closed = True
    for ticket in self._tickets:
      if ticket.left:
        self._driver.cancel(ticket)
    ended = len(self.finishes)
    for _ in range(self._left - ended):
      self._finish('abort')
    for number in list(self._waiting):
      self._leave(number, served=False)

  def _leave(self, number: int, *, served: bool) -> None:
    size = self._waiting.pop(number, None)
    if size is not None:
      self._bounds.leave(size, served=served)

  def _finish(self, reason: str) -> None:
    self.finishes.append(reason)
    self._metrics.ended(reason)

  def _observe(self, ticket: Ticket, event: Event) -> None:
    """Count an event in the metrics."""
    now, metrics, number = self._driver.now(), self._metrics, ticket.number
    key = number, event.sample
    if event.tokens:
      if number not in self._firsts:
        self._begin(ticket, now)
      elif key in self._lasts:
        # A sample's first token has no time since the previous token.
        metrics.observe('between_tokens', (now - self._lasts[key]) / len(event.tokens))
      self._lasts[key] = now
      self._counts[key] = self._counts.get(key, 0) + len(event.tokens)
      self.new_tokens += len(event.tokens)
      metrics.made(len(event.tokens))
    if event.finish is not None:
      self._leave(number, served=True)
      self._finish(FINISHES.get(event.finish, event.finish))
      metrics.observe('generation', self._counts.get(key, 0))
      metrics.observe('decode', now - self._firsts.get(number, now))
      metrics.observe('latency', now - self.arrived)

  def _begin(self, ticket: Ticket, now: float) -> None:
    self._firsts[ticket.number] = now
    self._leave(ticket.number, served=True)
    started = ticket.started_at or now
    queue = started - self.arrived
    if self.first_seconds is None:
      self.queue_seconds, self.first_seconds = queue, now - self.arrived
    self._metrics.began(len(ticket.request.tokens), queue, now - started)

  def summary(self) -> dict[str, Any]:
    """Return the fields of this request for the request log."""
    return {
      'prompt_tokens': self.prompt_tokens,
      'completion_tokens': self.new_tokens,
      'finish_reasons': self.finishes,
      'queue_seconds': self.queue_seconds,
      'first_token_seconds': self.first_seconds,
      'completions': None if self._texts is None else [self._texts[k] for k in sorted(self._texts)],
    }
