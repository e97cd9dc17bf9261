"""The end of a server on SIGTERM, as a process of its own; its engine computes nothing."""

import concurrent.futures
import contextlib
import json
import signal
import subprocess
import sys
import time

import pytest

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.server.http_server import bind
from t5x_inference_ext.server.options import ServerOptions
from tests.server.running import TIMEOUT_SECONDS, client, events_of, until

STEP = 0.02
BODY = {'prompt': 'x', 'max_tokens': 50}


class Server:
  """A process that serves."""

  def __init__(self, repository, drain_seconds):
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'tests.server.stub_program', str(drain_seconds), str(STEP)],
      cwd=repository,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
    self.url = self._process.stdout.readline().removeprefix('ready on ').strip()
    assert self.url.startswith('http://127.0.0.1:')

  def signal(self):
    self._process.send_signal(signal.SIGTERM)

  def ended(self):
    """Its exit code, what else it said, and how many seconds it took from now."""
    begin = time.monotonic()
    said, _ = self._process.communicate(timeout=TIMEOUT_SECONDS)
    return self._process.returncode, said.splitlines(), time.monotonic() - begin

  def kill(self):
    self._process.kill()
    self._process.wait()


@contextlib.contextmanager
def _serving(repository, drain_seconds, bodies):
  """A server that answers these requests, and the futures of the answers."""
  server = Server(repository, drain_seconds)
  try:
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool, client(server.url) as http:
      answers = [pool.submit(http.post, '/v1/completions', json=body) for body in bodies]
      until(lambda: http.get('/status').json()['slots']['used'] == len(bodies))
      yield server, http, answers
  finally:
    server.kill()


def test_requests_end_and_new_ones_are_refused(repository):
  bodies = [{**BODY, 'stream': i % 2 == 0} for i in range(20)]
  with _serving(repository, 30, bodies) as (server, http, answers):
    server.signal()
    until(lambda: http.get('/health').status_code == 503)
    refused = http.post('/v1/completions', json=BODY)
    assert refused.status_code == 503 and refused.json()['error']['code'] == 'draining'
    assert int(refused.headers['retry-after']) > 0
    assert http.get('/metrics').status_code == 200
    code, said, seconds = server.ended()
    assert code == 0 and seconds < 10 and said[0].startswith('draining: 20 requests')
    for body, answer in zip(bodies, answers):
      response = answer.result()
      assert response.status_code == 200
      if body['stream']:
        *events, last = events_of(response)
        texts = [json.loads(event)['choices'][0]['text'] for event in events]
        assert last == '[DONE]' and ''.join(texts) == 'a' * 50
      else:
        assert response.json()['choices'][0]['text'] == 'a' * 50


def test_the_rest_is_told_when_the_time_is_up(repository):
  bodies = [{**BODY, 'max_tokens': 2000, 'stream': i % 2 == 0} for i in range(20)]
  with _serving(repository, 0, bodies) as (server, _, answers):
    server.signal()
    code, said, seconds = server.ended()
    assert code == 0 and seconds < 4 and 'ending 20 requests' in said
    for body, answer in zip(bodies, answers):
      response = answer.result()
      told = json.loads(events_of(response)[-1]) if body['stream'] else response.json()
      assert told['error']['code'] == 'server_ended'
      assert response.status_code == (200 if body['stream'] else 503)


def test_a_second_signal_ends_at_once(repository):
  with _serving(repository, 600, [{**BODY, 'max_tokens': 2000}]) as (server, http, answers):
    server.signal()
    until(lambda: http.get('/health').status_code == 503)
    server.signal()
    code, _, seconds = server.ended()
    assert code == 128 + signal.SIGTERM and seconds < 2
    assert answers[0].exception() is not None


def test_an_address_that_is_taken_or_foreign():
  with bind(ServerOptions(port=0)) as listener:
    listener.listen()
    with pytest.raises(RequestError, match='Address already in use.*choose another --port'):
      bind(ServerOptions(port=listener.getsockname()[1]))
  with pytest.raises(RequestError, match=r"can't listen at \.\.:0 \(not a name of a host\)"):
    bind(ServerOptions(port=0, host='..'))
  with pytest.raises(RequestError, match="can't listen at 192.0.2.1:0"):
    bind(ServerOptions(port=0, host='192.0.2.1'))
