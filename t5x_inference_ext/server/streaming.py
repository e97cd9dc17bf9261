"""Answers as server-sent events."""

import asyncio
from collections.abc import AsyncIterator
import contextlib
import json
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from t5x_inference_ext.engine.request import Sample, SampleCollector
from t5x_inference_ext.server.answers import HttpAnswer
from t5x_inference_ext.server.api_errors import ApiError
from t5x_inference_ext.server.bodies import GenerationBody
from t5x_inference_ext.server.forms import ChatForm, CompletionForm, usage
from t5x_inference_ext.server.waiting import Deadline, in_time

_HEADERS = [
  (b'content-type', b'text/event-stream; charset=utf-8'),
  (b'cache-control', b'no-store'),
  (b'x-accel-buffering', b'no'),  # tells proxies not to buffer the events
]
_END_SECONDS = 5  # seconds for a client to take the last event; then its connection is closed


class EventStream:
  """The response of a streamed answer.

  Args:
    body: The body of the request.
    answer: The request in the engine.
    form: The form of the answer.
    prompts: Number of prompts.
    deadline: Time limit of the request.
    stack: Contexts to close when the stream ends.
  """

  def __init__(
    self,
    body: GenerationBody,
    answer: HttpAnswer,
    form: CompletionForm | ChatForm,
    prompts: int,
    deadline: Deadline,
    stack: contextlib.ExitStack,
  ) -> None:
    self._body, self._answer, self._form = body, answer, form
    self._prompts, self._deadline, self._stack = prompts, deadline, stack
    self._samples: list[Sample] = []  # the prompt's samples, for its receipt

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Send the events. Errors after the first event are events too: the status was already sent."""
    with self._stack:
      record = scope['state']['record']
      last = b'data: [DONE]\n\n'
      try:
        await send({'type': 'http.response.start', 'status': 200, 'headers': _HEADERS})
        await in_time(receive, self._send_all(send), self._deadline)
      except (ClientDisconnect, OSError):
        record.update(left=True)
        return
      except ApiError as error:
        record.update(error=error.message)
        last = event_line(error.body)
      # End the rows and the answer now: a client that reads nothing may never take the last event.
      self._stack.close()
      with contextlib.suppress(TimeoutError, asyncio.CancelledError):  # a shutdown cancels
        async with asyncio.timeout(_END_SECONDS):
          await _send(send, last, more=False)

  async def _send_all(self, send: Send) -> None:
    usage_field = {'usage': None} if self._body.includes_usage else {}
    async for chunks in self._chunks():
      if chunks:
        await _send(send, b''.join(event_line({**chunk, **usage_field}) for chunk in chunks))
    if self._body.includes_usage:
      counts = usage(self._answer.prompt_tokens, self._answer.new_tokens)
      await _send(send, event_line(self._form.chunk(usage=counts)))
    if self._answer.receipt is not None:
      receipt = await self._answer.receipt.receipt(self._samples)
      await _send(send, event_line(self._form.chunk(receipt=receipt, **usage_field)))

  async def _chunks(self) -> AsyncIterator[list[dict[str, Any]]]:
    """Yield chunks: the first chunk of every sample, then a chunk for each event."""
    form, collector = self._form, SampleCollector()
    collector.expect(0, self._body.choices)
    firsts = [form.first(p, i) for p in range(self._prompts) for i in range(self._body.choices)]
    yield [chunk for chunk in firsts if chunk is not None]
    async for events in self._answer.events():
      if self._answer.receipt is not None:
        for _, event in events:
          self._samples = collector.add(event._replace(request=0)) or self._samples
      found = [form.next(number, event) for number, event in events]
      yield [chunk for chunk in found if chunk is not None]


def event_line(value: Any) -> bytes:
  """Encode a JSON-ready value as a server-sent event."""
  return b'data: ' + json.dumps(value, separators=(',', ':')).encode() + b'\n\n'


async def _send(send: Send, data: bytes, more: bool = True) -> None:
  await send({'type': 'http.response.body', 'body': data, 'more_body': more})
