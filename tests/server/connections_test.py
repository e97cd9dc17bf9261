"""Connections: what is too large or too slow ends, and nothing else does."""

import json
import socket
import time

import httpx
import pytest

from benchmarks.stub_scheduler import stub_service
from t5x_inference_ext.server import connections
from t5x_inference_ext.server.options import ServerOptions
from tests.server.running import running

POST = (
  b'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n'
  b'transfer-encoding: chunked\r\n'
)
GET = b'GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n'


@pytest.fixture(scope='module')
def url():
  service = stub_service(ServerOptions(port=0, max_length=40_000))
  with running(service) as found:
    yield found


@pytest.fixture
def peer(url):
  with socket.create_connection(('127.0.0.1', httpx.URL(url).port), timeout=20) as found:
    yield found


def chunked(text, size):
  parts = [text[i : i + size] for i in range(0, len(text), size)]
  return b''.join(b'%x\r\n%s\r\n' % (len(part), part) for part in parts)


def sent(peer, data, part=2**14):
  """Sends data in parts until the server ends the connection; whether it did."""
  try:
    for i in range(0, len(data), part):
      peer.sendall(data[i : i + part])
      time.sleep(0.001)
  except (BrokenPipeError, ConnectionResetError):
    return False
  return True


def answer(peer):
  """Return all bytes that the server sent before the connection ended."""
  found = b''
  try:
    while part := peer.recv(2**16):
      found += part
  except ConnectionResetError:
    pass
  return found


@pytest.mark.parametrize(
  'data',
  [
    b'GET /health HTTP/1.1\r\nhost: localhost\r\nx: ' + b'a' * 10**7,
    b'GET /health HTTP/1.1\r\nhost: localhost\r\n' + b'x: a\r\n' * 10**6,
    b'GET /' + b'a' * 10**7,
    POST + b'\r\n' + chunked(b'{"prompt": "x"}', 8) + b'0\r\n' + b'x: a\r\n' * 10**6,
  ],
  ids=['a value', 'many headers', 'a path', 'trailers'],
)
def test_headers_without_end(peer, url, data):
  whole = sent(peer, data)
  said = answer(peer)
  assert not whole or b'400 Bad Request' in said
  assert httpx.get(f'{url}/health').status_code == 200


@pytest.mark.parametrize('size', [1, 1000])
def test_a_long_body_in_chunks_of_any_size(peer, size):
  body = chunked(json.dumps({'prompt': 'x' * 30_000, 'max_tokens': 1}).encode(), size)
  assert sent(peer, POST + b'connection: close\r\n\r\n' + body + b'0\r\n\r\n')
  assert b'"text":"a"' in answer(peer)


def test_many_requests_on_one_connection(peer):
  assert sent(peer, GET * 3000 + GET[:-2] + b'connection: close\r\n\r\n')
  assert answer(peer).count(b'200 OK') == 3001


@pytest.mark.parametrize('begin', [b'', GET[:-9], GET + GET[:-9]], ids=['nothing', 'half', 'later'])
def test_a_request_that_never_becomes_whole(url, begin, monkeypatch):
  monkeypatch.setattr(connections, 'HEAD_SECONDS', 0.3)
  with socket.create_connection(('127.0.0.1', httpx.URL(url).port), timeout=20) as peer:
    peer.sendall(begin)
    began = time.monotonic()
    assert answer(peer).count(b'200 OK') == begin.count(b'\r\n\r\n')
    assert 0.2 < time.monotonic() - began < 5


def test_an_answer_may_take_longer_than_a_request(monkeypatch):
  monkeypatch.setattr(connections, 'HEAD_SECONDS', 0.2)
  body = {'prompt': 'x', 'max_tokens': 15}
  with running(stub_service(seconds=0.1)) as url:
    response = httpx.post(f'{url}/v1/completions', json=body, timeout=20)
  assert response.json()['choices'][0]['text'] == 'a' * 15
