"""Routes and what stands in front of them, over an engine whose steps compute nothing."""

import io
import json
import socket
import threading
import time

import httpx
import pytest

from benchmarks.stub_scheduler import stub_service
from t5x_inference_ext.server import app
from t5x_inference_ext.server.options import ServerOptions
from t5x_inference_ext.server.request_log import RequestLog
from tests.server.running import client, events_of, running, until

ASKED = {'prompt': 'secret', 'max_tokens': 3}


def test_health_and_version():
  service = stub_service()
  with running(service) as url, client(url) as http:
    assert http.get('/health').json() == {'status': 'ready'}
    assert http.get('/version').json()['version'].count('.') == 2
    assert http.head('/health').status_code == 200


def test_keys_are_asked_for_where_models_answer():
  service = stub_service(ServerOptions(port=0, api_key='one'))
  with running(service) as url, client(url) as http:
    for path in ('/health', '/metrics', '/version', '/status'):
      assert http.get(path).status_code == 200
    for path in ('/v1/models', '/nowhere'):
      assert http.get(path).status_code == 401
    for path in ('/v1/completions', '/v1/chat/completions', '/tokenize', '/detokenize'):
      response = http.post(path, json={})
      assert response.status_code == 401 and response.json()['error']['code'] == 'invalid_api_key'
    answer = http.post('/v1/completions', json=ASKED, headers={'authorization': 'Bearer one'})
    assert answer.json()['choices'][0]['text'] == 'aaa'


def test_the_host_header_is_checked_on_this_machine():
  with running(stub_service()) as url, client(url) as http:
    response = http.get('/health', headers={'host': 'evil.org'})
    assert response.status_code == 403
    assert response.json()['error']['code'] == 'host_not_allowed'
    assert response.headers['x-content-type-options'] == 'nosniff'


def test_the_log_holds_no_prompts_unless_asked_for():
  logs = []
  for log_prompts in (False, True):
    stream = io.StringIO()
    options = ServerOptions(port=0, log_prompts=log_prompts)
    with running(stub_service(options, RequestLog(stream))) as url, client(url) as http:
      http.post('/v1/completions', json=ASKED)
      http.post('/v1/completions', json={**ASKED, 'stream': True, 'n': 2})
      http.post('/v1/chat/completions', json={'messages': [{'role': 'user', 'content': 'secret'}]})
      http.post('/v1/completions', json={'prompt': 'secret', 'colour': 1})
      http.get('/health')
    logs.append([json.loads(line) for line in stream.getvalue().splitlines()])
  quiet, loud = logs
  assert [line['status'] for line in quiet] == [200, 200, 200, 400]
  assert 'secret' not in json.dumps(quiet) and 'aaa' not in json.dumps(quiet)
  first = quiet[0]
  assert first['prompt_tokens'] == 7 and first['completion_tokens'] == 3
  assert first['finish_reasons'] == ['length'] and first['id'].startswith('cmpl-')
  assert first['seconds'] >= first['first_token_seconds'] >= first['queue_seconds'] >= 0
  assert quiet[3]['error'] == 'unknown fields: colour'
  assert loud[0]['prompts'] == ['secret'] and loud[0]['completions'] == ['aaa']
  assert loud[1]['completions'] == ['aaa', 'aaa']
  assert loud[2]['prompts'] == [{'role': 'user', 'content': 'secret'}]


def test_a_fault_of_the_server_is_told_as_one(monkeypatch):
  def fails(self, body):
    raise ZeroDivisionError('inside')

  service = stub_service()
  monkeypatch.setattr(type(service.translator), 'sampling', fails)
  with running(service) as url, client(url) as http:
    response = http.post('/v1/completions', json=ASKED)
    assert response.status_code == 500 and 'inside' not in response.text
    assert response.json()['error']['code'] == 'internal_error'
    assert http.get('/health').status_code == 200


class TestLoad:
  def test_more_than_the_bounds_is_refused(self):
    options = ServerOptions(port=0, max_waiting_requests=3)
    service = stub_service(options, slots=1, seconds=0.01)
    with running(service) as url, client(url) as http:
      with http.stream(
        'POST', '/v1/completions', json={**ASKED, 'max_tokens': 1000, 'stream': True}
      ) as one:
        lines = one.iter_lines()  # dropping it would close the connection
        next(lines)
        until(lambda: service.bounds.waiting == 0)
        body = {**ASKED, 'max_tokens': 1000, 'n': 1, 'prompt': ['a', 'b', 'c'], 'stream': True}
        with http.stream('POST', '/v1/completions', json=body):
          until(lambda: service.bounds.waiting == 3)
          response = http.post('/v1/completions', json=ASKED)
          assert response.status_code == 429 and int(response.headers['retry-after']) >= 1
          assert response.json()['error']['type'] == 'rate_limit_error'
        until(lambda: service.bounds.waiting == 0)
      begin = time.monotonic()
      assert http.post('/v1/completions', json=ASKED).status_code == 200
      assert time.monotonic() - begin < 5
    assert not service.scheduler.rows[0]

  def test_a_long_text_counts_its_bytes_before_it_is_tokenized(self, monkeypatch):
    options = ServerOptions(port=0, max_waiting_tokens=1000, max_length=10**6)
    service = stub_service(options, slots=1, seconds=0.01)
    with running(service) as url, client(url) as http:
      body = {**ASKED, 'max_tokens': 1000, 'stream': True}
      with http.stream('POST', '/v1/completions', json=body) as one:
        lines = one.iter_lines()  # dropping it would close the connection
        next(lines)
        with http.stream('POST', '/v1/completions', json={**body, 'prompt': '\u00e9' * 400}):
          until(lambda: service.bounds.tokens == 800)

          def fails(text):
            raise AssertionError('tokenized')

          monkeypatch.setattr(service.translator.vocabulary, 'encode', fails)
          assert (
            http.post('/v1/completions', json={**ASKED, 'prompt': 'x' * 201}).status_code == 429
          )

  def test_a_client_that_leaves_frees_its_slot_within_a_step(self):
    service = stub_service(slots=2, seconds=0.05)
    with running(service) as url, client(url) as http:
      body = {**ASKED, 'max_tokens': 1000}
      with http.stream('POST', '/v1/completions', json={**body, 'stream': True}) as one:
        lines = one.iter_lines()
        next(lines)
      self._wait_for_free_slots(service)
      with pytest.raises(httpx.TimeoutException):
        http.post('/v1/completions', json=body, timeout=0.3)
      self._wait_for_free_slots(service)
      assert 'vllm:request_success_total{finished_reason="abort",model_name="stub"} 2' in (
        http.get('/metrics').text
      )

  def _wait_for_free_slots(self, service):
    steps = service.scheduler.steps
    until(lambda: not any(service.scheduler.rows))
    assert service.scheduler.steps - steps <= 3

  @pytest.mark.parametrize(
    'path, body',
    [
      ('/v1/completions', {'prompt': 'x', 'stop': [1] * 10**6}),
      ('/v1/completions', dict.fromkeys(map(str, range(3 * 10**5)), 1)),
      ('/v1/chat/completions', {'messages': [{'a': 1}] * (3 * 10**5)}),
      ('/v1/completions', {'logit_bias': dict.fromkeys(map(str, range(3 * 10**5)), 'a')}),
      ('/detokenize', {'tokens': [5.5] * (9 * 10**5)}),
      ('/detokenize', {'tokens': [5] * 10**6}),
    ],
    ids=['stops', 'unknown fields', 'messages', 'biases', 'fractions', 'ids'],
  )
  def test_a_large_body_keeps_no_client_waiting(self, path, body):
    """The second client's request begins while the first one's is checked."""
    service, waits = stub_service(), []
    content = json.dumps(body, separators=(',', ':'))
    headers = {'content-type': 'application/json'}
    with running(service) as url, client(url) as http, client(url) as other:
      assert other.get('/health').status_code == 200
      sender = threading.Thread(target=lambda: http.post(path, content=content, headers=headers))
      sender.start()
      while sender.is_alive():
        begin = time.monotonic()
        other.get('/health')
        waits.append(time.monotonic() - begin)
      sender.join()
    assert len(waits) > 2 and max(waits) < 2

  def test_a_client_that_reads_nothing_loses_its_slots_when_its_time_is_up(self):
    options = ServerOptions(port=0, max_length=10**5, request_timeout=1)
    service = stub_service(options, seconds=0.001)
    body = {'prompt': 'x', 'max_tokens': 90_000, 'n': 16, 'stream': True, 'logprobs': 5}
    content = json.dumps(body).encode()
    head = (
      'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n'
      f'content-length: {len(content)}\r\n\r\n'
    )
    with running(service) as url, socket.socket() as reader:
      reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
      reader.connect(('127.0.0.1', httpx.URL(url).port))
      reader.sendall(head.encode() + content)
      until(lambda: service.load().slots_used == 16)
      until(lambda: service.load().slots_used == 0 and not service.answers, seconds=20)
      assert b'finished_reason="abort",model_name="stub"} 16.0' in service.metrics.text()

  def test_clients_take_turns(self, tmp_path):
    (tmp_path / 'keys').write_text('a\nb\n')
    options = ServerOptions(port=0, api_key_file=str(tmp_path / 'keys'))
    service = stub_service(options, slots=1, seconds=0.005)
    with running(service) as url, client(url) as http:
      many = {'prompt': ['x'] * 40, 'max_tokens': 10, 'stream': True}
      with http.stream(
        'POST', '/v1/completions', json=many, headers={'authorization': 'Bearer a'}
      ) as one:
        lines = one.iter_lines()  # dropping it would close the connection
        next(lines)
        begin = time.monotonic()
        http.post('/v1/completions', json=ASKED, headers={'authorization': 'Bearer b'})
        assert time.monotonic() - begin < 1  # of two turns, not of forty
        assert service.bounds.waiting > 20


class TestDeath:
  def test_all_clients_are_told(self):
    service = stub_service(slots=2, seconds=0.02, fails_at=8)
    with running(service) as url, client(url) as http:
      body = {**ASKED, 'max_tokens': 1000}
      with http.stream('POST', '/v1/completions', json={**body, 'stream': True}) as one:
        with client(url) as other:
          response = other.post('/v1/completions', json={**body, 'n': 4})
        one.read()
        last = json.loads(events_of(one)[-1])
      assert response.status_code == 503 and response.json()['error']['code'] == 'engine_dead'
      assert last['error']['code'] == 'engine_dead'
      health = http.get('/health')
      assert health.status_code == 503 and 'the device is gone' in health.json()['error']['message']
      assert http.post('/v1/completions', json=ASKED).status_code == 503
      assert http.get('/status').json()['state'] == 'dead'
      assert http.get('/metrics').status_code == 200

  def test_also_if_the_thread_hangs(self):
    service = stub_service(slots=2, seconds=0.3)
    with running(service) as url, client(url) as http:
      with http.stream('POST', '/v1/completions', json={**ASKED, 'stream': True}) as one:
        service.driver.fail_soon('process 1 has ended')
        one.read()
        assert 'process 1 has ended' in json.loads(events_of(one)[-1])['error']['message']
      assert 'process 1 has ended' in http.get('/health').json()['error']['message']


def test_the_page_and_nothing_else_of_its_folder(monkeypatch):
  files = {'/': (b'<p>', 'text/html; charset=utf-8'), '/page.js': (b'1', 'text/javascript')}
  monkeypatch.setattr(app, '_page_files', lambda: files)
  service = stub_service(ServerOptions(port=0, api_key='one'))
  with running(service) as url, client(url) as http:
    for path, (data, kind) in files.items():
      response = http.get(path)
      assert response.content == data and response.headers['content-type'].startswith(kind)
      policy = response.headers['content-security-policy']
      assert "default-src 'self'" in policy and "script-src 'self'" in policy
      assert 'unsafe' not in policy
    assert http.get('/page.css').status_code == 401


def test_files_of_the_page_are_of_known_kinds():
  for path, (data, kind) in app._page_files().items():
    assert path == '/' or path.count('/') == 1
    assert data and kind in app._PAGE_TYPES.values() and not path.endswith('.py')
