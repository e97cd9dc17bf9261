"""The server over a real engine: answers are the engine's own, whoever asks beside."""

import asyncio
import contextlib
import dataclasses
import json
import random
import re
import time

import httpx
import jax
import numpy as np
import openai
import pytest

from t5x_inference_ext.commands import infer
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.runs.infer_options import InferOptions
from t5x_inference_ext.server.launch import compile_programs, make_served, make_service
from t5x_inference_ext.server.options import ServerOptions
from t5x_inference_ext.text.grammar import Grammar
from t5x_inference_ext.text.settings import assumed_settings
from tests.server.running import client, events_of, running, until

pytestmark = pytest.mark.usefixtures('quick_programs')

NAME = 'palm_tiny'
MAX_LENGTH = 256
TEMPLATE = (
  '{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}'
  '{% for tool in tools or [] %}# {{ tool.function.name }}\n{% endfor %}def '
)
OPTIONS = ServerOptions(port=0, model_name=NAME, max_length=MAX_LENGTH)
JSON = {'content-type': 'application/json'}


_COMPILED: list[int] = []  # number of programs that the server compiles before it is ready


@pytest.fixture(scope='module')
def engine(palm_tiny, quick_programs):  # `nothing_left` would make it before the mark is seen
  return Engine.load(palm_tiny, mesh='1x1x1', dtype='float32', scan_layers=True)


@pytest.fixture(scope='module')
def service(engine, palm_tiny):
  settings = dataclasses.replace(assumed_settings(384), chat_template=TEMPLATE)
  model = InferOptions(checkpoint=str(palm_tiny), batch_size=8, dtype='float32', prefill_chunk=64)
  served = make_served(engine, settings, model, OPTIONS)
  _COMPILED.append(compile_programs(served))
  return make_service(served, settings, OPTIONS)


@pytest.fixture(scope='module')
def url(service):
  with running(service) as url:
    yield url


@pytest.fixture(scope='module')
def api(url):
  with openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0, timeout=60) as api:
    yield api


@pytest.fixture(scope='module')
def http(url):
  with client(url) as http:
    yield http


@pytest.fixture(autouse=True)
def nothing_left(service):
  """Every test leaves free slots, right books, and bounds of which nothing is taken."""
  yield
  until(lambda: service.scheduler.idle and not service.answers)
  assert service.driver.error is None
  assert service.scheduler.check_books() == []
  assert (service.bounds.waiting, service.bounds.tokens) == (0, 0)
  assert not any(service.scheduler.rows)


def _complete(engine, prompt, **options):
  """The engine's own sample, by a scheduler whose programs are those of the server's."""
  sizes = {'slots': 8, 'max_length': MAX_LENGTH, 'prefill_chunk': 64, 'top_log_probs': 20}
  ((sample,),) = engine.complete([prompt], **sizes, **options)
  return sample


def _near(values):
  return pytest.approx(values, rel=1e-5, abs=1e-5)


def test_a_completion_is_the_engines(api, engine):
  (expected,) = engine.generate(['def main('], max_new_tokens=24)
  answer = api.completions.create(model=NAME, prompt='def main(', max_tokens=24, temperature=0)
  assert answer.choices[0].text == expected.text and len(answer.choices) == 1
  assert answer.choices[0].finish_reason == 'length' and answer.choices[0].logprobs is None
  usage = answer.usage
  assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 24, 34)
  assert answer.model == NAME and answer.id.startswith('cmpl-')


def test_prompts_in_all_forms(api, engine):
  texts = ['def main(', 'import ']
  ids = [[b + 3 for b in text.encode()] for text in texts]
  expected = [c.text for c in engine.generate(texts, max_new_tokens=8)]
  for prompt, count in ((texts, 2), (ids, 2), (texts[0], 1), (ids[0], 1)):
    answer = api.completions.create(model=NAME, prompt=prompt, max_tokens=8, temperature=0)
    assert [c.text for c in answer.choices] == expected[:count]
    assert [c.index for c in answer.choices] == list(range(count))


def test_answers_in_a_format(api, engine):
  schema = {
    'type': 'object',
    'properties': {'ok': {'type': 'boolean'}, 'n': {'enum': [1, 25]}},
    'required': ['ok', 'n'],
    'additionalProperties': False,
    'x-guidance': {'whitespace_flexible': False},  # palm_tiny would write blanks without end
  }
  formats = [
    {'type': 'json_schema', 'json_schema': {'name': 'answer', 'schema': schema}},
    {'type': 'regex', 'regex': '[0-9]{3}-[a-f]{2}'},
    {'type': 'lark', 'lark': 'start: "yes" | "no"'},
  ]
  answers = [
    api.completions.create(
      model=NAME, prompt='x = ', max_tokens=64, seed=3, extra_body={'response_format': each}
    ).choices[0]
    for each in formats
  ]
  found = json.loads(answers[0].text)
  assert isinstance(found['ok'], bool) and found['n'] in (1, 25) and len(found) == 2
  assert re.fullmatch('[0-9]{3}-[a-f]{2}', answers[1].text)
  assert answers[2].text in ('yes', 'no')
  assert {each.finish_reason for each in answers} == {'stop'}
  grammar = Grammar('regex', formats[1]['regex'])
  alone = _complete(
    engine, 'x = ', max_new_tokens=64, sampling=SamplingParams(1.0), seeds=[3], grammar=grammar
  )
  assert answers[1].text == alone.text
  chat = api.chat.completions.create(
    model=NAME,
    messages=[{'role': 'user', 'content': 'an object'}],
    response_format=formats[0],
    max_tokens=64,
    seed=1,
  )
  assert json.loads(chat.choices[0].message.content).keys() == {'ok', 'n'}


@pytest.mark.parametrize(
  'format_',
  [
    {'type': 'regex', 'regex': '(' * 9},
    {'type': 'json_schema', 'json_schema': {'schema': {'type': 'xyz'}}},
    {'type': 'lark', 'lark': 'start: missing'},
  ],
  ids=lambda format_: format_['type'],
)
def test_grammars_that_the_library_refuses(http, format_):
  response = http.post('/v1/completions', json={'prompt': 'x', 'response_format': format_})
  error = response.json()['error']
  assert (response.status_code, error['param']) == (400, 'response_format')
  assert error['message'].startswith(f'response_format: the {format_["type"]}')


def test_receipts(http, engine):
  body = {'model': NAME, 'prompt': 'def f', 'max_tokens': 6, 'temperature': 0.9, 'seed': 5, 'n': 2}
  expected = engine.generate(
    ['def f'] * 2, max_new_tokens=6, sampling=SamplingParams(0.9), seeds=[5, 6]
  )
  answers = [
    http.post('/v1/completions', json={**body, 'receipt': True}).json(),
    http.post('/v1/completions', json=body, headers={'x-receipt': '1'}).json(),
  ]
  streamed = http.post('/v1/completions', json={**body, 'receipt': True, 'stream': True})
  answers.append(json.loads(events_of(streamed)[-2]))
  assert answers[2]['choices'] == []
  for receipt in (answer['receipt'] for answer in answers):
    assert [sample['tokens'] for sample in receipt['samples']] == [c.tokens for c in expected]
    assert receipt['request']['seeds'] == [5, 6] and receipt['seconds'] > 0
    assert receipt['engine']['mesh'] == '1x1x1'
  assert 'receipt' not in http.post('/v1/completions', json=body).json()
  two = http.post('/v1/completions', json={**body, 'prompt': ['a', 'b'], 'receipt': True})
  assert two.status_code == 400 and two.json()['error']['param'] == 'receipt'


def test_receipt_of_an_answer_in_a_format(http, palm_tiny, tmp_path, capsys):
  schema = {'enum': ['yes', 'no', 12]}
  format_ = {'type': 'json_schema', 'json_schema': {'name': 'answer', 'schema': schema}}
  body = {'prompt': 'x = ', 'max_tokens': 8, 'seed': 2, 'n': 2, 'response_format': format_}
  answer = http.post('/v1/completions', json={**body, 'receipt': True}).json()
  assert {json.loads(choice['text']) for choice in answer['choices']} <= {*schema['enum']}
  grammar = answer['receipt']['request']['grammar']
  assert grammar['kind'] == 'json_schema' and json.loads(grammar['source']) == schema
  (tmp_path / 'receipt.json').write_text(json.dumps(answer['receipt']))
  command = ['infer', f'--checkpoint={palm_tiny}', f'--replay={tmp_path}/receipt.json']
  assert infer.run([*command, '--compilation_cache=']) == 0
  out = capsys.readouterr().out
  assert len(re.findall(r'sample \d: all \d+ tokens are equal, and the end: ', out)) == 2


def test_samples_have_the_engines_seeds(api, engine):
  sampling = SamplingParams(0.9, top_k=40, top_p=0.95)
  expected = engine.generate(
    ['if x', 'if x', 'for i', 'for i'], max_new_tokens=12, sampling=sampling, seeds=[7, 8, 7, 8]
  )
  answer = api.completions.create(
    model=NAME,
    prompt=['if x', 'for i'],
    n=2,
    max_tokens=12,
    temperature=0.9,
    top_p=0.95,
    seed=7,
    extra_body={'top_k': 40},
  )
  assert [c.text for c in answer.choices] == [c.text for c in expected]
  assert len({c.text for c in expected}) == 4


def test_without_a_seed_answers_differ(api):
  request = dict(model=NAME, prompt='x', max_tokens=16, temperature=1.5)
  texts = {api.completions.create(**request).choices[0].text for _ in range(3)}
  assert len(texts) == 3


def test_every_option_reaches_the_engine(http, engine):
  sampling = SamplingParams(
    0.7,
    repetition_penalty=1.3,
    frequency_penalty=0.4,
    presence_penalty=0.2,
    logit_bias={35: -2.0, 104: 1.5},
    min_new_tokens=5,
  )
  expected = _complete(
    engine, 'def f(', max_new_tokens=24, sampling=sampling, seeds=[3], stop=['e', 's', 'a', ' ']
  )
  body = {
    'prompt': 'def f(',
    'max_tokens': 24,
    'temperature': 0.7,
    'repetition_penalty': 1.3,
    'frequency_penalty': 0.4,
    'presence_penalty': 0.2,
    'logit_bias': {'35': -2, '104': 1.5},
    'min_tokens': 5,
    'seed': 3,
    'stop': ['e', 's', 'a', ' '],
    'return_token_ids': True,
    'user': 'somebody',
    'metadata': {'a': 'b'},
    'store': True,
  }
  (choice,) = http.post('/v1/completions', json=body).json()['choices']
  assert choice['token_ids'] == expected.tokens and len(expected.tokens) > 5
  assert choice['text'] == expected.text
  assert choice['finish_reason'] == 'stop' == expected.finish_reason
  assert choice['prompt_token_ids'] == [b + 3 for b in b'def f(']


def test_a_stream_is_the_whole_in_pieces(http):
  body = {'prompt': ['def main(', 'import '], 'n': 2, 'max_tokens': 16, 'seed': 1}
  whole = http.post('/v1/completions', json=body).json()
  stream = {**body, 'stream': True, 'stream_options': {'include_usage': True}}
  response = http.post('/v1/completions', json=stream)
  assert response.headers['content-type'].startswith('text/event-stream')
  *events, last = events_of(response)
  assert last == '[DONE]'
  *chunks, counts = map(json.loads, events)
  assert counts['choices'] == [] and counts['usage'] == whole['usage']
  assert all(chunk['usage'] is None for chunk in chunks)
  texts, finishes = [''] * 4, [None] * 4
  for chunk in chunks:
    (choice,) = chunk['choices']
    assert finishes[choice['index']] is None, 'nothing comes after the end'
    texts[choice['index']] += choice['text']
    finishes[choice['index']] = choice['finish_reason']
  assert texts == [choice['text'] for choice in whole['choices']]
  assert finishes == ['length'] * 4
  assert len(chunks) > 16 and len({chunk['id'] for chunk in chunks}) == 1


def test_deltas_never_cut_a_character(http, service):
  bias = {str(0xC3 + 3): 1e9, str(0xA9 + 3): 1e9}  # half of the letter e-acute each
  body = {'prompt': 'x', 'max_tokens': 40, 'seed': 5, 'logit_bias': bias, 'return_token_ids': True}
  events = events_of(http.post('/v1/completions', json={**body, 'stream': True}))
  choices = [json.loads(event)['choices'][0] for event in events[:-1]]
  tokens = [token for choice in choices for token in choice['token_ids']]
  text = ''.join(choice['text'] for choice in choices)
  assert len(tokens) == 40 and text == service.translator.vocabulary.decode(tokens)
  assert '\u00e9' in text and '\ufffd' in text
  assert {character for choice in choices for character in choice['text']} == {'\u00e9', '\ufffd'}


def test_log_probabilities_are_the_engines(api, engine):
  expected = _complete(engine, 'def main(', max_new_tokens=8)
  answer = api.completions.create(
    model=NAME, prompt='def main(', max_tokens=8, temperature=0, logprobs=3
  )
  told = answer.choices[0].logprobs
  assert told.token_logprobs == _near(expected.log_probs)
  assert ''.join(told.tokens) == answer.choices[0].text
  assert told.text_offset == list(range(8))
  best = [max(top, key=top.get) for top in told.top_logprobs]
  assert best == told.tokens and all(len(top) == 3 for top in told.top_logprobs)
  for top, pairs in zip(told.top_logprobs, expected.top):
    assert sorted(top.values(), reverse=True) == _near([value for _, value in pairs[:3]])


def test_a_server_that_is_ready_compiles_nothing(url):
  """Whatever lengths and options requests have: completions, streams, grammars and scores."""
  assert 0 < _COMPILED[-1] <= 24
  rng = random.Random(1)
  bodies = []
  for i in range(60):
    length = rng.randrange(1, MAX_LENGTH - 8)
    body = {
      'prompt': [[rng.randrange(3, 384) for _ in range(length)] for _ in range(rng.choice((1, 3)))],
      'max_tokens': rng.randrange(1, 8),
      'temperature': rng.choice((0, 0.7)),
      'top_p': rng.choice((0.5, 1)),
      'logprobs': rng.choice((None, 0, 1, 5, 20)),
      'n': rng.choice((1, 2)),
      'frequency_penalty': rng.choice((0, 0.5)),
      'stream': rng.random() < 0.3,
    }
    if i % 2:
      body.update(echo=True, max_tokens=rng.choice((0, 1)))
    elif i % 3 == 0:
      body.update(response_format={'type': 'regex', 'regex': f'[a-{rng.choice("xyz")}]+'})
    bodies.append(body)

  async def ask_all():
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
      return await asyncio.gather(*(http.post('/v1/completions', json=body) for body in bodies))

  with compilations() as compiled:
    answers = asyncio.run(ask_all())
  assert [answer.status_code for answer in answers] == [200] * len(bodies)
  assert compiled == []


@contextlib.contextmanager
def compilations():
  """Yields a list that gets the duration of every compilation by XLA."""
  found = []

  def listen(event, duration, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      found.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    jax.block_until_ready(jax.jit(lambda x: x * 2)(np.arange(3)))
    assert len(found) == 1, 'jax tells of compilations'
    found.clear()
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


class TestScores:
  """Requests as lm-evaluation-harness's local-completions sends them, read as it reads answers."""

  PAIRS = [('def main(', 'self):'), ('import ', 'os\n'), ('x = [1, 2', ', 3]'), ('a', 'b')]

  def _ids(self, text):
    return [b + 3 for b in text.encode()]

  def _parsed(self, answer, lengths):
    """Return what parse_logprobs of lm-evaluation-harness reads from an answer."""
    found = []
    for choice, length in zip(sorted(answer['choices'], key=lambda c: c['index']), lengths):
      logprobs = choice['logprobs']['token_logprobs'][length:-1]
      tops = choice['logprobs']['top_logprobs'][length:-1]
      greedy = all(value == max(top.values()) for value, top in zip(logprobs, tops))
      found.append((sum(logprobs), greedy, len(logprobs)))
    return found

  def test_are_the_engines_own(self, http, engine):
    pairs = [(self._ids(a), self._ids(b)) for a, b in self.PAIRS]
    (best,) = engine.generate([pairs[0][0]], max_new_tokens=4)
    pairs.append((pairs[0][0], best.tokens))
    body = {
      'model': NAME,
      'prompt': [[*prompt, *completion] for prompt, completion in pairs],
      'temperature': 0,
      'max_tokens': 1,
      'logprobs': 1,
      'seed': 1234,
      'echo': True,
    }
    found = self._parsed(http.post('/v1/completions', json=body).json(), [len(a) for a, _ in pairs])
    expected = engine.score_completions(pairs)
    assert [score for score, _, _ in found] == _near([sum(e) for e in expected])
    assert [count for _, _, count in found] == [len(e) for e in expected]
    greedy = []
    for prompt, completion in pairs:
      (own,) = engine.generate([prompt], max_new_tokens=len(completion))
      greedy.append(own.tokens == completion)
    assert [is_greedy for _, is_greedy, _ in found] == greedy
    assert greedy[-1] and not all(greedy)

  @pytest.mark.parametrize('stream', [False, True])
  def test_of_a_prompt_alone(self, http, engine, stream):
    ids = self._ids('import os')
    body = {'prompt': 'import os', 'max_tokens': 0, 'logprobs': 0, 'echo': True, 'stream': stream}
    response = http.post('/v1/completions', json=body)
    chunks = [json.loads(e) for e in events_of(response)[:-1]] if stream else [response.json()]
    choices = [chunk['choices'][0] for chunk in chunks]
    (expected,) = engine.score_completions([((), ids)])
    told = [value for c in choices for value in c['logprobs']['token_logprobs']]
    assert told == _near(expected)
    assert ''.join(c['text'] for c in choices) == 'import os'
    assert [c['finish_reason'] for c in choices][-1] == 'length'
    assert all(c['logprobs']['top_logprobs'] is None for c in choices)

  def test_of_a_long_prompt_are_the_engines(self, http, engine, palm_tiny):
    ids = self._ids((palm_tiny.parent.parent / 'prompts.jsonl').read_text()[:200])
    body = {'prompt': ids, 'max_tokens': 1, 'logprobs': 5, 'echo': True}
    told = http.post('/v1/completions', json=body).json()['choices'][0]['logprobs']
    inputs = np.asarray([[0, *ids[:-1]]])
    logits = engine.logits(inputs)[0]
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    expected = log_probs[np.arange(len(ids)), ids]
    assert told['token_logprobs'][:-1] == pytest.approx(expected.tolist(), abs=1e-4)
    for top, row in zip(told['top_logprobs'][:-1], log_probs):
      likely = sorted(top.values(), reverse=True)[:5]
      assert likely == pytest.approx(sorted(row.tolist())[:-6:-1], abs=1e-4)


class TestChat:
  MESSAGES = [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'Hello'}]
  TEXT = '# system: Be kind.\n# user: Hello\ndef '

  def test_the_template_is_rendered(self, api, engine):
    (expected,) = engine.generate([self.TEXT], max_new_tokens=12)
    answer = api.chat.completions.create(
      model=NAME, messages=self.MESSAGES, max_completion_tokens=12, temperature=0
    )
    (choice,) = answer.choices
    assert choice.message.content == expected.text and choice.message.role == 'assistant'
    assert choice.finish_reason == 'length' and answer.object == 'chat.completion'
    assert answer.usage.prompt_tokens == len(self.TEXT) + 1

  def test_parts_and_tools_reach_the_template(self, http):
    tools = [{'type': 'function', 'function': {'name': 'weather', 'parameters': {}}}]
    parts = [{'type': 'text', 'text': 'Hel'}, {'type': 'text', 'text': 'lo'}]
    messages = [{'role': 'user', 'content': parts}]
    expected = [0, *(b + 3 for b in b'# user: Hel\nlo\n# weather\ndef ')]
    body = {'messages': messages, 'tools': tools}
    assert http.post('/tokenize', json=body).json()['tokens'] == expected
    found = http.post('/v1/chat/completions', json={**body, 'max_tokens': 1}).json()
    assert found['usage']['prompt_tokens'] == len(expected)
    body['tool_choice'] = 'none'
    found = http.post('/v1/chat/completions', json={**body, 'max_tokens': 1}).json()
    assert found['usage']['prompt_tokens'] == len(expected) - len('# weather\n')

  def test_a_stream(self, api):
    request = dict(model=NAME, messages=self.MESSAGES, max_tokens=10, n=2, seed=4, temperature=0.9)
    whole = api.chat.completions.create(**request)
    texts, roles, finishes = ['', ''], [], {}
    for chunk in api.chat.completions.create(**request, stream=True):
      (choice,) = chunk.choices
      texts[choice.index] += choice.delta.content or ''
      roles += [choice.delta.role] if choice.delta.role else []
      if choice.finish_reason:
        finishes[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == ['assistant'] * 2 and finishes == {0: 'length', 1: 'length'}

  @pytest.mark.parametrize('stream', [False, True])
  def test_log_probabilities(self, api, engine, stream):
    expected = _complete(engine, self.TEXT, max_new_tokens=5)
    answer = api.chat.completions.create(
      model=NAME,
      messages=self.MESSAGES,
      max_tokens=5,
      temperature=0,
      logprobs=True,
      top_logprobs=2,
      stream=stream,
    )
    chunks = list(answer) if stream else [answer]
    told = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.logprob for e in told] == _near(expected.log_probs)
    assert bytes(b for e in told for b in e.bytes).decode() == expected.text
    tops = [[t.logprob for t in e.top_logprobs] for e in told]
    assert tops == [_near([v for _, v in top[:2]]) for top in expected.top]

  def test_without_a_limit_the_answer_fills_the_room(self, http):
    text = 'x' * (MAX_LENGTH - 40)
    body = {'messages': [{'role': 'user', 'content': text}], 'temperature': 0, 'ignore_eos': True}
    usage = http.post('/v1/chat/completions', json=body).json()['usage']
    assert usage['total_tokens'] == MAX_LENGTH + 1  # the last token is in no cache


class TestErrors:
  def test_are_those_that_clients_know(self, api):
    with pytest.raises(openai.BadRequestError) as bad:
      api.completions.create(model=NAME, prompt='x', temperature=-1)
    assert bad.value.param == 'temperature' and bad.value.type == 'invalid_request_error'
    with pytest.raises(openai.NotFoundError) as missing:
      api.completions.create(model='other', prompt='x')
    assert missing.value.code == 'model_not_found'
    with pytest.raises(openai.BadRequestError) as long:
      api.completions.create(model=NAME, prompt='x' * 300)
    assert long.value.code == 'context_length_exceeded' and long.value.param == 'prompt'

  def test_too_many_tokens_say_how_many_fit(self, http):
    body = {'prompt': 'x' * 55, 'max_tokens': 202}
    error = http.post('/v1/completions', json=body).json()['error']
    assert error['param'] == 'max_tokens' and error['message'].endswith('ask for at most 201')
    body['max_tokens'] = 201
    assert http.post('/v1/completions', json=body).json()['usage']['completion_tokens'] <= 201

  @pytest.mark.parametrize('stream', [False, True])
  def test_a_request_ends_when_its_time_is_up(self, http, service, stream):
    body = {'prompt': 'x', 'max_tokens': 200, 'timeout': 0.02, 'ignore_eos': True, 'n': 8}
    begin = time.monotonic()
    response = http.post('/v1/completions', json={**body, 'stream': stream})
    assert time.monotonic() - begin < 5
    error = json.loads(events_of(response)[-1]) if stream else response.json()
    assert response.status_code == (200 if stream else 408)
    assert error['error']['code'] == 'timeout' and 'within 0.02 s' in error['error']['message']


def test_metrics_count_what_was_served(http):
  def values():
    found = {}
    for line in http.get('/metrics').text.splitlines():
      if not line.startswith('#'):
        name, _, value = line.rpartition(' ')
        found[name.replace(f'model_name="{NAME}"', '')] = float(value)
    return found

  before = values()
  body = {'prompt': 'def main(', 'max_tokens': 6, 'n': 2, 'ignore_eos': True}
  http.post('/v1/completions', json=body)
  after = values()
  grown = {name: value - before[name] for name, value in after.items() if value != before[name]}
  assert grown['vllm:generation_tokens_total{}'] == 12
  assert grown['vllm:prompt_tokens_total{}'] == 10
  assert grown['vllm:request_success_total{finished_reason="length",}'] == 2
  assert grown['vllm:inter_token_latency_seconds_count{}'] == 10
  for name in ('time_to_first_token', 'request_queue_time', 'request_prefill_time'):
    assert grown[f'vllm:{name}_seconds_count{{}}'] == 1
  for name in ('e2e_request_latency', 'request_decode_time'):
    assert grown[f'vllm:{name}_seconds_count{{}}'] == 2
  assert grown['vllm:request_generation_tokens_sum{}'] == 12
  for name in ('num_requests_running', 'num_requests_waiting', 'kv_cache_usage_perc'):
    assert after[f'vllm:{name}{{}}'] == 0
  assert grown['vllm:prefix_cache_queries_total{}'] == 10
  assert 'vllm:prefix_cache_hits_total{}' in after


def test_the_status_says_what_the_engine_does(http):
  status = http.get('/status').json()
  assert status['state'] == 'ready' and status['model'] == NAME
  assert status['slots'] == {'used': 0, 'total': 8} and status['waiting'] == 0
  assert status['pages']['used'] == 0 and status['pages']['total'] == 16
  assert status['mesh'] == '1x1x1' and status['layouts']['decode'] == 'ws_2d/batch'
  assert status['max_length'] == MAX_LENGTH and status['chat'] is True
  assert status['tokens_per_second'] > 0 and status['time_to_first_token_seconds'] > 0


def test_tokens_of_texts_and_back(http):
  tokens = http.post('/tokenize', json={'prompt': 'h\u00e9'}).json()
  assert tokens == {'tokens': [0, 107, 198, 172], 'count': 4, 'max_model_len': MAX_LENGTH}
  bare = http.post('/tokenize', json={'prompt': 'h', 'add_special_tokens': False}).json()
  assert bare['tokens'] == [107]
  assert http.post('/detokenize', json={'tokens': [107, 198, 172]}).json() == {'prompt': 'h\u00e9'}


def test_models(http):
  (model,) = http.get('/v1/models').json()['data']
  assert model['id'] == NAME and model['max_model_len'] == MAX_LENGTH
  assert http.get(f'/v1/models/{NAME}').json() == model
  assert http.get('/v1/models/other').status_code == 404


def test_many_clients_of_whom_some_leave(url, engine, service):
  """Every answer is the engine's own, whoever shares the batch, comes late or leaves."""
  rng = random.Random(0)
  asked = [
    {
      'prompt': [rng.randrange(35, 126) for _ in range(rng.choice((1, 5, 20, 60)))],
      'max_tokens': rng.choice((1, 4, 12, 30)),
      'temperature': rng.choice((0, 0.8)),
      'seed': i,
      'return_token_ids': True,
      'stream': rng.random() < 0.5,
    }
    for i in range(64)
  ]

  async def leave(http, body):
    if body['stream']:
      async with http.stream('POST', '/v1/completions', json=body) as response:
        assert (await anext(response.aiter_lines())).startswith('data: ')
    else:
      with pytest.raises(TimeoutError):  # far less than 150 steps take
        await asyncio.wait_for(http.post('/v1/completions', json=body), 0.05)

  async def ask(http, body):
    await asyncio.sleep(rng.random())
    if body['seed'] % 10 == 3:  # leaves while its tokens are computed
      await leave(http, {**body, 'max_tokens': 150, 'ignore_eos': True})
      return None
    response = await http.post('/v1/completions', json=body)
    if not body['stream']:
      return response.json()['choices'][0]['token_ids']
    chunks = [json.loads(event)['choices'][0] for event in events_of(response)[:-1]]
    return [token for chunk in chunks for token in chunk['token_ids']]

  async def ask_all():
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
      return await asyncio.gather(*(ask(http, body) for body in asked))

  answers = asyncio.run(ask_all())
  assert answers.count(None) == 7
  kept = [(body, answer) for body, answer in zip(asked, answers) if answer is not None]
  expected = engine.generate(
    [body['prompt'] for body, _ in kept],
    max_new_tokens=[body['max_tokens'] for body, _ in kept],
    sampling=[SamplingParams(body['temperature']) for body, _ in kept],
    seeds=[body['seed'] for body, _ in kept],
  )
  assert [answer for _, answer in kept] == [completion.tokens for completion in expected]


def test_a_burst_whose_clients_leave_delays_nobody(url, http):
  """Whatever waits for a client that has left is not computed."""
  body = {'prompt': 'x' * 200, 'max_tokens': 50, 'ignore_eos': True}
  another = {'prompt': 'y', 'max_tokens': 4}

  async def burst(count, timeout):
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits) as http:
      tasks = (http.post('/v1/completions', json=body) for _ in range(count))
      return await asyncio.gather(*tasks, return_exceptions=True)

  results = asyncio.run(burst(200, 0.5))
  assert sum(isinstance(result, httpx.TimeoutException) for result in results) > 100
  begin = time.monotonic()
  fresh = http.post('/v1/completions', json=another)
  assert fresh.status_code == 200 and time.monotonic() - begin < 5
