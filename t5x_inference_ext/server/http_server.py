"""The HTTP server: its socket, and graceful shutdown on SIGTERM."""

import asyncio
from collections.abc import Callable
import contextlib
import os
import socket
from types import FrameType

import uvicorn

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.server.api_errors import unavailable
from t5x_inference_ext.server.app import make_app
from t5x_inference_ext.server.connections import Connection
from t5x_inference_ext.server.options import ServerOptions
from t5x_inference_ext.server.service import Service

_NOTIFY_SECONDS = 1  # seconds to send clients the error that the server ends
_CLOSE_SECONDS = 1  # seconds for connections to close after that
_POLL_SECONDS = 0.05
_BACKLOG = 1024


def bind(options: ServerOptions) -> socket.socket:
  """Return a socket that is bound to the options' address and does not listen yet.

  Raises:
    RequestError: The address is in use, or does not belong to this machine.
  """
  try:
    found = socket.getaddrinfo(
      options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, kind, protocol, _, address = found[0]
    with contextlib.ExitStack() as stack:
      listener = stack.enter_context(socket.socket(family, kind, protocol))
      listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      listener.bind(address)
      stack.pop_all()
      return listener
  except (OSError, UnicodeError) as error:  # UnicodeError: no host can have this name
    reason = error.strerror if isinstance(error, OSError) else 'not a name of a host'
    raise RequestError(
      f"can't listen at {options.host}:{options.port} ({reason}): choose another --port or --host"
    ) from error


def address_of(listener: socket.socket) -> str:
  """Return the URL of a socket."""
  host, port = listener.getsockname()[:2]
  return f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'


class HttpServer(uvicorn.Server):
  """Runs the service until SIGTERM, SIGINT or `stop`.

  After the first SIGTERM or SIGINT, new requests are refused, and running ones may go on for
  `drain_seconds`; then their clients get an error. A second signal ends the process at once.

  Args:
    service: The server's parts.
    say: Prints a line.
  """

  def __init__(self, service: Service, say: Callable[[str], None]) -> None:
    super().__init__(
      uvicorn.Config(
        make_app(service),
        http=Connection,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan='off',
        backlog=_BACKLOG,
        proxy_headers=False,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
      )
    )
    self._service, self._say = service, say
    self._drain: asyncio.Task | None = None
    self._loop: asyncio.AbstractEventLoop | None = None

  async def serve(self, sockets: list[socket.socket] | None = None) -> None:
    """Serve on bound sockets."""
    self._loop = asyncio.get_running_loop()
    self._service.driver.start(self._loop)
    await super().serve(sockets)

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    """Start listening, and print the address."""
    await super().startup(sockets)
    if self.started and sockets:
      self._say(f'ready on {address_of(sockets[0])}')

  def handle_exit(self, sig: int, frame: FrameType | None) -> None:
    """Begin the shutdown on the first signal; end the process at once on the second."""
    del frame
    if self._service.draining:
      os._exit(128 + sig)
    self.stop()

  def stop(self) -> None:
    """Begin the shutdown. Any thread may call this."""
    self._service.draining = True
    assert self._loop is not None
    self._loop.call_soon_threadsafe(self._begin_drain)

  def _begin_drain(self) -> None:
    if self._drain is None:
      self._drain = asyncio.ensure_future(self._end())

  async def _end(self) -> None:
    """Wait for requests to end, end the remaining ones with an error, then end the server."""
    service = self._service
    seconds = service.options.drain_seconds
    self._say(f'draining: {len(service.answers)} requests may go on for {seconds} s')
    await self._no_answers(seconds)
    if service.answers:
      self._say(f'ending {len(service.answers)} requests')
      for answer in list(service.answers):
        answer.fail(unavailable('the server has ended: try another one', 'server_ended'))
      await self._no_answers(_NOTIFY_SECONDS)
    self.should_exit = True

  async def _no_answers(self, seconds: float) -> None:
    """Wait until no request is being answered, for at most `seconds`."""
    deadline = asyncio.get_running_loop().time() + seconds
    while self._service.answers and asyncio.get_running_loop().time() < deadline:
      await asyncio.sleep(_POLL_SECONDS)
