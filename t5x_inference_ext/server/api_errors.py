"""Errors in the API's form: an HTTP status and a JSON object."""

from collections.abc import Mapping
from typing import Any

INVALID, OVERLOADED, UNAVAILABLE, FAILED = (
  'invalid_request_error',
  'rate_limit_error',
  'service_unavailable_error',
  'server_error',
)


class ApiError(Exception):
  """An error answer.

  Args:
    status: HTTP status.
    message: One sentence: the problem, its place and the fix.
    param: Field of the request that is wrong.
    code: Short error code for programs.
    headers: Further headers of the answer.
  """

  def __init__(
    self,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
  ) -> None:
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code
    self.headers = dict(headers or {})

  @property
  def body(self) -> dict[str, Any]:
    """The JSON-ready body of the answer."""
    kinds = {429: OVERLOADED, 503: UNAVAILABLE}
    kind = INVALID if self.status < 500 else FAILED
    return {
      'error': {
        'message': self.message,
        'type': kinds.get(self.status, kind),
        'param': self.param,
        'code': self.code,
      }
    }


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
  """Return the error (status 400) for a request that the client can correct."""
  return ApiError(400, message, param=param, code=code)


def unavailable(reason: str, code: str, retry_after: int | None = None) -> ApiError:
  """Return the error (status 503) for a server that accepts no work."""
  headers = {} if retry_after is None else {'retry-after': str(retry_after)}
  return ApiError(503, reason, code=code, headers=headers)


def too_late(seconds: float) -> ApiError:
  """Return the error (status 408) for a request that exceeded its time limit."""
  return ApiError(
    408,
    f'the request did not end within {seconds:g} s: ask for fewer tokens, or raise `timeout` or '
    "the server's --request_timeout",
    param='timeout',
    code='timeout',
    headers={'x-should-retry': 'false'},  # otherwise OpenAI's clients send the request again
  )
