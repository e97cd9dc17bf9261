"""Adapters in the server: a request chooses one as its model."""

import json

import numpy as np
import openai
import pytest

from t5x_inference_ext.commands import infer
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.runs.infer_options import InferOptions
from t5x_inference_ext.server.launch import make_served, make_service
from t5x_inference_ext.server.options import ServerOptions
from t5x_inference_ext.text.settings import unknown_vocabulary
from tests.server.running import client, running

pytestmark = pytest.mark.usefixtures('quick_programs')

IDS = [17, 90, 4, 61, 33]
OPTIONS = ServerOptions(port=0, model_name='base', max_length=64)


@pytest.fixture(scope='module')
def engine(testdata):
  paths = {name: testdata / 'adapters' / f'smollm2-{name}' for name in ('lora-0', 'prompt-1')}
  base = testdata / 'families' / 'smollm2'
  return Engine.load(base, mesh='1x1x1', dtype='float32', scan_layers=True, adapters=paths)


def service_of(engine, options=OPTIONS):
  settings = unknown_vocabulary(source='none', bos_id=None, end_ids=())
  model = InferOptions(checkpoint='base', batch_size=4, dtype='float32', prefill_chunk=32)
  return make_service(make_served(engine, settings, model, options), settings, options)


@pytest.fixture(scope='module')
def url(engine):
  with running(service_of(engine)) as url:
    yield url


@pytest.fixture(scope='module')
def api(url):
  with openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0, timeout=60) as api:
    yield api


def test_models_are_listed(api):
  models = {model.id: model for model in api.models.list().data}
  assert [*models] == ['base', 'lora-0', 'prompt-1']
  assert [getattr(models[name], 'parent', None) for name in models] == [None, 'base', 'base']
  assert api.models.retrieve('lora-0').id == 'lora-0'
  with pytest.raises(openai.NotFoundError, match="this server has 'base', 'lora-0', 'prompt-1'"):
    api.models.retrieve('lora-1')


@pytest.mark.parametrize('name', ['base', 'lora-0', 'prompt-1'])
def test_model_chooses_the_adapter(url, engine, name):
  adapter = None if name == 'base' else name
  (expected,) = engine.generate([IDS], max_new_tokens=12, eos_id=-1, adapter=adapter)
  body = {'model': name, 'prompt': IDS, 'max_tokens': 12, 'temperature': 0, 'ignore_eos': True}
  with client(url) as http:
    answer = http.post('/v1/completions', json={**body, 'return_token_ids': True}).json()
    long = http.post('/v1/completions', json={**body, 'max_tokens': 60})
  (choice,) = answer['choices']
  assert choice['token_ids'] == expected.tokens and choice['prompt_token_ids'] == IDS
  assert answer['model'] == name and answer['usage']['prompt_tokens'] == 5
  room = 49 if name == 'prompt-1' else 60
  assert long.status_code == (200 if room == 60 else 400)
  if room == 49:
    assert 'ask for at most 49' in long.json()['error']['message']


@pytest.mark.parametrize('name', ['base', 'lora-0', 'prompt-1'])
def test_an_echoed_prompt_has_the_adapters_log_probabilities(url, engine, name):
  adapter = None if name == 'base' else name
  body = {'model': name, 'prompt': IDS, 'max_tokens': 0, 'echo': True, 'logprobs': 1}
  with client(url) as http:
    (choice,) = http.post('/v1/completions', json=body).json()['choices']
  first, *found = choice['logprobs']['token_logprobs']
  (wanted,) = engine.score_completions([(IDS[:1], IDS[1:])], adapter=adapter)
  assert first is None  # the model has no BOS
  np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize('name', ['lora-0', 'prompt-1'])
def test_a_receipt_records_the_adapter(url, engine, name, testdata, tmp_path, capsys):
  """Replayed with the adapter under another name, and refused with another adapter."""
  body = {'model': name, 'prompt': IDS, 'max_tokens': 12, 'receipt': True, 'seed': 5}
  with client(url) as http:
    receipt = http.post('/v1/completions', json=body).json()['receipt']
  assert receipt['request']['tokens'] == IDS
  assert receipt['request']['adapter'] == [name, engine.adapters.checksums[name]]
  (tmp_path / 'receipt.json').write_text(json.dumps(receipt))
  base, adapters = testdata / 'families' / 'smollm2', testdata / 'adapters'
  command = ['infer', f'--checkpoint={base}', f'--replay={tmp_path}/receipt.json']
  command += ['--compilation_cache=', '--scan_layers']
  paths = f'other={adapters}/smollm2-lora-1,mine={adapters}/smollm2-{name}'
  assert infer.run([*command, f'--adapters={paths}']) == 0
  out = capsys.readouterr().out
  assert 'adapters: mine' in out and 'sample 0: all 12 tokens are equal' in out
  for flags in [], [f'--adapters=other={adapters}/smollm2-lora-1']:
    assert infer.run([*command, *flags]) == 2
    error = capsys.readouterr().err
    assert f'made with the adapter {name}, of CRC-32' in error and error.count('\n') == 1


def test_an_adapter_can_not_have_the_models_name(engine):
  options = ServerOptions(port=0, model_name='lora-0', max_length=64)
  with pytest.raises(RequestError, match='model_name=lora-0 is also the name of an adapter'):
    service_of(engine, options)
