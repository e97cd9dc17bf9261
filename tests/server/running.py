"""A server in a thread of the test's own process."""

import contextlib
import threading
import time

import httpx

from t5x_inference_ext.server.http_server import HttpServer, address_of, bind

TIMEOUT_SECONDS = 60


@contextlib.contextmanager
def running(service):
  """Yields the URL of a server over a service, and ends the server afterwards."""
  lines = []
  server, listener = HttpServer(service, lines.append), bind(service.options)
  url = address_of(listener)
  thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
  thread.start()
  try:
    until(lambda: f'ready on {url}' in lines)
    yield url
  finally:
    server.stop()
    thread.join(TIMEOUT_SECONDS)
    assert not thread.is_alive()
    assert service.driver.close(TIMEOUT_SECONDS)
    service.log.close()


def until(condition, seconds=TIMEOUT_SECONDS):
  """Waits for a condition, which must come true."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, 'this did not come true in time'
    time.sleep(0.01)


def client(url, **options):
  """An HTTP client of a server."""
  return httpx.Client(base_url=url, timeout=TIMEOUT_SECONDS, **options)


def events_of(response):
  """The data of each server-sent event of a response."""
  lines = [line for line in response.text.split('\n\n') if line]
  assert all(line.startswith('data: ') for line in lines)
  return [line.removeprefix('data: ') for line in lines]
