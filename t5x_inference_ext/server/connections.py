"""HTTP connections with limits that uvicorn's lack: on the size of headers, and on idle time."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 2**16  # maximum number of bytes of a request besides its body
HEAD_SECONDS = 30  # a connection without a new request for so long, or twice as long, is closed
# Bytes that a byte of a body may take besides itself, in chunks of one byte each.
_CHUNKED = 8


class Connection(HttpToolsProtocol):
  """An HTTP connection.

  Without a limit, a client could keep the server's memory busy with headers or trailers without
  end, and its connections with requests that never become whole, before it shows a key.
  """

  _heads = _heads_before = 0  # requests whose headers have arrived: now, and at the last look
  # Bytes of the current request so far, without those of the read in which it began, and how many
  # they may be.
  _received, _allowed, _begins = 0, HEAD_BYTES, False

  def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
    """Begin to look at the connection from time to time."""
    super().connection_made(transport)
    self._timer = self.loop.call_later(HEAD_SECONDS, self._look)

  def connection_lost(self, exc: Exception | None) -> None:
    """Look no more."""
    super().connection_lost(exc)
    self._timer.cancel()

  def data_received(self, data: bytes) -> None:
    """Parse what was read, unless it is too much for a request."""
    super().data_received(data)
    self._received = 0 if self._begins else self._received + len(data)
    self._begins = False
    if self._received > self._allowed and not self.transport.is_closing():
      self.send_400_response(f'the headers have more than {HEAD_BYTES} bytes')

  def on_message_begin(self) -> None:
    """Begin to count a request's bytes."""
    super().on_message_begin()
    self._begins, self._allowed = True, HEAD_BYTES

  def on_headers_complete(self) -> None:
    """Count the request."""
    super().on_headers_complete()
    self._heads += 1

  def on_body(self, body: bytes) -> None:
    """Allow a part of a body, whose size the routes limit, and what encodes it."""
    super().on_body(body)
    self._allowed += len(body) * (1 + _CHUNKED)

  def _look(self) -> None:
    """Close the connection if it is neither answered nor has had a request since the last look."""
    answering = self.cycle is not None and not self.cycle.response_complete
    if not answering and self._heads == self._heads_before:
      self.transport.close()
    else:
      self._heads_before = self._heads
      self._timer = self.loop.call_later(HEAD_SECONDS, self._look)
