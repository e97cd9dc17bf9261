"""Receipts of HTTP requests, for requests that want one."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from t5x_inference_ext.engine.request import Request, Sample
from t5x_inference_ext.server.api_errors import invalid

# Function that makes a receipt from a request, its samples, and the seconds from arrival to end.
MakeReceipt = Callable[[Request, Sequence[Sample], float], dict[str, Any]]


class ReceiptWriter:
  """Makes the receipt of a request with one prompt.

  Args:
    make: Makes the receipt.
    requests: The requests of all prompts.
    now: Returns the time, in seconds.
    arrived: Time when the request arrived.

  Raises:
    ApiError: There are several prompts.
  """

  def __init__(
    self, make: MakeReceipt, requests: Sequence[Request], now: Callable[[], float], arrived: float
  ) -> None:
    if len(requests) > 1:
      raise invalid('a receipt is for one prompt: send each prompt in its own request', 'receipt')
    (self._request,) = requests
    self._make, self._now, self._arrived = make, now, arrived

  async def receipt(self, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the receipt, given the prompt's samples, which have ended."""
    seconds = self._now() - self._arrived
    # The first receipt reads files to get the weights' identity, so use another thread.
    return await asyncio.to_thread(self._make, self._request, samples, seconds)
