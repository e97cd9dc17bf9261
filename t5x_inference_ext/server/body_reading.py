"""Read request bodies: JSON of limited size."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request

from t5x_inference_ext.server.api_errors import ApiError, invalid
from t5x_inference_ext.text_files import parse_json

BODY_SECONDS = 30  # time limit for receiving a body
_SHORT = 2**16  # bytes; longer bodies are parsed in another thread, so that all clients go on

_T = TypeVar('_T')


async def read_body(request: Request, most: int, convert: Callable[[Any], _T]) -> _T:
  """Return what `convert` makes of the value of a JSON body.

  Args:
    request: The request.
    most: Maximum number of bytes; further bytes are not read.
    convert: Checks and converts the value. Called in another thread for a long body.

  Raises:
    ApiError: The body is not JSON in UTF-8, is too large, or does not arrive in time.
    ClientDisconnect: The client disconnected before the body had arrived.
  """
  kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
  if kind != 'application/json':
    raise ApiError(415, 'the body must be JSON: send content-type: application/json')
  if request.headers.get('content-encoding', 'identity').lower() != 'identity':
    raise ApiError(415, 'the body must not be compressed')
  stated = request.headers.get('content-length', '')
  if stated.isdecimal() and (len(stated) > 18 or int(stated) > most):
    raise _too_large(most)
  data = bytearray()
  try:
    async with asyncio.timeout(BODY_SECONDS):
      async for part in request.stream():
        data += part
        if len(data) > most:
          raise _too_large(most)
  except TimeoutError:
    raise ApiError(408, f'the body did not arrive within {BODY_SECONDS} s') from None
  if not data:
    raise invalid('the body is empty: send a JSON object')
  if len(data) <= _SHORT:
    return convert(_json(data))
  return await asyncio.to_thread(lambda: convert(_json(data)))


def _json(data: bytearray) -> Any:
  try:
    return parse_json(data.decode())
  except UnicodeDecodeError as error:
    raise invalid(f'the body is not UTF-8: byte {error.start} is not part of a character') from None
  except ValueError as error:
    raise invalid(f'the body is {error}') from None


def _too_large(most: int) -> ApiError:
  # The rest of the body is not read, so the connection can't be used again.
  return ApiError(
    413,
    f'the body has more than {most} bytes: send less, or raise --max_body_bytes',
    headers={'connection': 'close'},
  )
