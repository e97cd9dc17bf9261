"""Run work that is cancelled when its client disconnects or its time limit passes."""

import asyncio
from collections.abc import Coroutine
from typing import Any, NamedTuple, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from t5x_inference_ext.server.api_errors import too_late

_T = TypeVar('_T')


class Deadline(NamedTuple):
  """The time limit of a request.

  Attributes:
    at: Time of the event loop's clock, in seconds.
    seconds: The limit in seconds from the start of the request, for messages.
  """

  at: float
  seconds: float

  @classmethod
  def after(cls, seconds: float) -> 'Deadline':
    """Return a deadline `seconds` from now."""
    return cls(asyncio.get_running_loop().time() + seconds, seconds)


async def in_time(receive: Receive, work: Coroutine[Any, Any, _T], deadline: Deadline) -> _T:
  """Return the result of `work`, unless its client disconnects or its deadline passes.

  Args:
    receive: ASGI function that returns the client's messages; the body was already read.
    work: The work.
    deadline: Time limit of the work.

  Raises:
    ClientDisconnect: The client has left. The work is cancelled.
    ApiError: The time is up. The work is cancelled.
  """

  async def left() -> None:
    while (await receive())['type'] != 'http.disconnect':
      pass

  task, gone = asyncio.ensure_future(work), asyncio.ensure_future(left())
  try:
    timeout = max(0.0, deadline.at - asyncio.get_running_loop().time())
    await asyncio.wait({task, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
      return task.result()
    if gone.done():
      raise ClientDisconnect
    raise too_late(deadline.seconds)
  finally:
    for each in (task, gone):
      if not each.done():
        each.cancel()
    await asyncio.gather(task, gone, return_exceptions=True)
