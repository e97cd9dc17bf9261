"""Requests that are wrong: each gets the right status, and the name of the field."""

import json
import socket

import pytest

from benchmarks.stub_scheduler import stub_service
from t5x_inference_ext.server.options import ServerOptions
from tests.server.running import client, running

MOST = 20_000  # bytes of a body
JSON = {'content-type': 'application/json'}
PROMPT = {'prompt': 'x'}
MESSAGES = {'messages': [{'role': 'user', 'content': 'x'}]}


@pytest.fixture(scope='module')
def http():
  service = stub_service(ServerOptions(port=0, max_body_bytes=MOST, max_length=64))
  with running(service) as url, client(url) as http:
    yield http
    assert service.driver.error is None and service.bounds.waiting == 0


def _with(body, **fields):
  return json.dumps({**body, **fields})


# Body of /v1/completions, and the field that the error names.
COMPLETIONS = [
  (_with(PROMPT, temprature=1), 'temprature'),
  (_with(PROMPT, **{f'x{i}': 1 for i in range(50)}), 'x0'),
  (_with(PROMPT, temperature=-0.1), 'temperature'),
  (_with(PROMPT, temperature='1'), 'temperature'),
  (_with(PROMPT, temperature=True), 'temperature'),
  (_with(PROMPT, temperature=float('inf')), 'temperature'),
  ('{"prompt": "x", "temperature": 1e999}', 'temperature'),
  (_with(PROMPT, temperature=[1]), 'temperature'),
  (_with(PROMPT, top_p=0), 'top_p'),
  (_with(PROMPT, top_p=1.5), 'top_p'),
  (_with(PROMPT, top_k=-2), 'top_k'),
  (_with(PROMPT, top_k=2.5), 'top_k'),
  (_with(PROMPT, n=0), 'n'),
  (_with(PROMPT, n=10**6), 'n'),
  (_with(PROMPT, n=True), 'n'),
  (_with({'prompt': ['x'] * 9}, n=128), 'n'),
  (_with(PROMPT, best_of=3), 'best_of'),
  (_with(PROMPT, max_tokens=0), 'max_tokens'),
  (_with(PROMPT, max_tokens=-1), 'max_tokens'),
  (_with(PROMPT, max_tokens=64), 'max_tokens'),
  (_with(PROMPT, max_tokens=10**30), 'max_tokens'),
  (_with(PROMPT, max_tokens='5'), 'max_tokens'),
  (_with(PROMPT, max_tokens=5.0), 'max_tokens'),
  (_with(PROMPT, min_tokens=-1), 'min_tokens'),
  (_with(PROMPT, seed=2**70), 'seed'),
  (_with(PROMPT, seed='a'), 'seed'),
  (_with(PROMPT, stop=''), 'stop'),
  (_with(PROMPT, stop=['a', 1]), 'stop'),
  (_with(PROMPT, stop=5), 'stop'),
  (_with(PROMPT, stop=['a'] * 99), 'stop'),
  (_with(PROMPT, stop='\ud800'), 'stop'),
  (_with(PROMPT, logprobs=21), 'logprobs'),
  (_with(PROMPT, logprobs=True), 'logprobs'),
  (_with(PROMPT, logit_bias={'384': 1}), 'logit_bias'),
  (_with(PROMPT, logit_bias={'-1': 1}), 'logit_bias'),
  (_with(PROMPT, logit_bias={'a': 1}), 'logit_bias'),
  (_with(PROMPT, logit_bias={' 5': 1}), 'logit_bias'),
  (_with(PROMPT, logit_bias={'9' * 5000: 1}), 'logit_bias'),
  (_with(PROMPT, logit_bias={'5': None}), 'logit_bias.5'),
  (_with(PROMPT, logit_bias=[5]), 'logit_bias'),
  (_with(PROMPT, repetition_penalty=0), 'repetition_penalty'),
  (_with(PROMPT, frequency_penalty=1e300), 'frequency_penalty'),
  (_with(PROMPT, response_format={'type': 'yaml'}), 'response_format'),
  (_with(PROMPT, response_format={'type': 'json_object', 'schema': {}}), 'response_format'),
  (_with(PROMPT, response_format={'type': 'regex', 'regex': 5}), 'response_format'),
  (_with(PROMPT, response_format={'type': 'lark', 'lark': ''}), 'response_format'),
  (_with(PROMPT, response_format={'type': 'json_schema', 'json_schema': 5}), 'response_format'),
  (
    _with(PROMPT, response_format={'type': 'json_schema', 'json_schema': {'schema': 'x'}}),
    'response_format',
  ),
  (
    _with(PROMPT, response_format={'type': 'json_schema', 'json_schema': {'Schema': {}}}),
    'response_format',
  ),
  (_with(PROMPT, stream='yes'), 'stream'),
  (_with(PROMPT, stream_options={'usage': True}), 'stream_options.usage'),
  (_with(PROMPT, timeout=0), 'timeout'),
  (_with(PROMPT, suffix='x'), 'suffix'),
  ('{}', 'prompt'),
  (_with({}, prompt=None), 'prompt'),
  (_with({}, prompt=[]), 'prompt'),
  (_with({}, prompt=['a', [1]]), 'prompt'),
  (_with({}, prompt=[[1], []]), 'prompt'),
  (_with({}, prompt=[True]), 'prompt'),
  (_with({}, prompt=[1.0]), 'prompt'),
  (_with({}, prompt=[384]), 'prompt'),
  (_with({}, prompt=[[1], [-1]]), 'prompt[1]'),
  (_with({}, prompt=[10**30]), 'prompt'),
  (_with({}, prompt='x' * 64), 'prompt'),
  (_with({}, prompt=['x', 'a\udfff']), 'prompt[1]'),
  (_with(PROMPT, model=5), 'model'),
]


@pytest.mark.parametrize(
  'body, field', COMPLETIONS, ids=[f'{field} {body[:40]}' for body, field in COMPLETIONS]
)
def test_a_completion(http, body, field):
  response = http.post('/v1/completions', content=body, headers=JSON)
  error = response.json()['error']
  assert response.status_code == 400, error
  assert error['param'] == field and error['type'] == 'invalid_request_error'
  assert field.partition('[')[0].split('.')[-1] in error['message']
  assert len(error['message']) < 600 and error['message'].isprintable()


CHATS = [
  ('{}', 'messages'),
  ('{"messages": []}', 'messages'),
  ('{"messages": "x"}', 'messages'),
  ('{"messages": ["x"]}', 'messages[0]'),
  ('{"messages": [{"content": "x"}]}', 'messages[0].role'),
  ('{"messages": [{"role": "user", "content": 5}]}', 'messages[0].content'),
  ('{"messages": [{"role": "user", "content": "x", "colour": 1}]}', 'messages[0].colour'),
  (
    '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    'messages[0].content[0]',
  ),
  (_with(MESSAGES, prompt='x'), 'prompt'),
  (_with(MESSAGES, top_logprobs=3), 'top_logprobs'),
  (_with(MESSAGES, tools={}), 'tools'),
  (_with(MESSAGES, tool_choice='required'), 'tool_choice'),
  (_with(MESSAGES, max_completion_tokens=0), 'max_completion_tokens'),
  (_with(MESSAGES, max_completion_tokens=64), 'max_completion_tokens'),
  (_with(MESSAGES, chat_template_kwargs={'messages': []}), 'chat_template_kwargs'),
  ('{"messages": [{"role": "user", "content": "\\ud800"}]}', 'messages'),
]


@pytest.mark.parametrize('body, field', CHATS, ids=[body[:60] for body, _ in CHATS])
def test_a_chat(http, body, field):
  response = http.post('/v1/chat/completions', content=body, headers=JSON)
  assert response.status_code == 400
  assert response.json()['error']['param'] == field


BODIES = [
  (b'', 'the body is empty'),
  (b'x', 'the body is not JSON'),
  (b'{"prompt": "x"', 'the body is not JSON'),
  (b'[1, 2]', 'the body should be a JSON object'),
  (b'"prompt"', 'the body should be a JSON object'),
  (b'null', 'the body should be a JSON object'),
  (b'{"prompt": "\xff"}', 'the body is not UTF-8'),
  (b'{"prompt": "x", "prompt": "y"}', 'is given twice'),
  (b'{"prompt": "x", "temperature": NaN}', 'it holds NaN'),
  (b'{"prompt": ' + b'[' * 9000 + b']' * 9000 + b'}', 'nested too deeply'),
  (b'{"prompt": "x", "seed": ' + b'9' * 9000 + b'}', 'too many digits'),
]


@pytest.mark.parametrize('body, says', BODIES, ids=[says for _, says in BODIES])
@pytest.mark.parametrize(
  'path', ['/v1/completions', '/v1/chat/completions', '/tokenize', '/detokenize']
)
def test_a_body(http, path, body, says):
  response = http.post(path, content=body, headers=JSON)
  assert response.status_code == 400 and says in response.json()['error']['message']


@pytest.mark.parametrize('kind', [None, 'text/plain', 'application/x-www-form-urlencoded', 'json'])
def test_a_wrong_content_type(http, kind):
  headers = {} if kind is None else {'content-type': kind}
  response = http.post('/v1/completions', content=b'{"prompt": "x"}', headers=headers)
  assert response.status_code == 415
  assert 'application/json' in response.json()['error']['message']


def test_a_compressed_body(http):
  headers = {**JSON, 'content-encoding': 'gzip'}
  assert http.post('/v1/completions', content=b'x', headers=headers).status_code == 415


def test_a_content_type_may_have_parameters(http):
  kind = {'content-type': 'Application/JSON; charset=utf-8'}
  body = '{"prompt": "x", "max_tokens": 2}'
  assert http.post('/v1/completions', content=body, headers=kind).status_code == 200


def test_a_huge_body_is_refused_before_it_is_read(http):
  """The client states its size, and sends none of it."""
  url = http.base_url
  with socket.create_connection((url.host, url.port), timeout=10) as connection:
    connection.sendall(
      b'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n'
      b'content-length: 100000000000\r\n\r\n'
    )
    assert connection.recv(1000).startswith(b'HTTP/1.1 413 ')


def test_a_huge_body_is_refused_while_it_is_read(http):
  parts = (b'x' * 10_000 for _ in range(1000))
  response = http.post('/v1/completions', content=parts, headers=JSON)
  assert response.status_code == 413 and str(MOST) in response.json()['error']['message']


def test_other_paths_and_methods(http):
  for path in ('/v1/nope', '/../etc/passwd', '/page/../app.py', '/%2e%2e/app.py', '/v1'):
    response = http.get(path)
    assert response.status_code == 404 and response.json()['error']['param'] is None
  for method, path in (('GET', '/v1/completions'), ('PUT', '/tokenize'), ('POST', '/health')):
    response = http.request(method, path)
    assert response.status_code == 405 and response.json()['error']['message'].startswith(method)


@pytest.mark.parametrize(
  'path, body, field',
  [
    ('/tokenize', {}, 'prompt'),
    ('/tokenize', {'prompt': 'x', 'messages': MESSAGES['messages']}, 'prompt'),
    ('/tokenize', {'prompt': 'x', 'more': 1}, 'more'),
    ('/tokenize', {'prompt': 'a\ud800'}, 'prompt'),
    ('/detokenize', {}, 'tokens'),
    ('/detokenize', {'tokens': ['a']}, 'tokens[0]'),
    ('/detokenize', {'tokens': [400]}, 'tokens'),
  ],
)
def test_the_other_routes(http, path, body, field):
  response = http.post(path, content=json.dumps(body), headers=JSON)
  assert response.status_code == 400 and response.json()['error']['param'] == field
