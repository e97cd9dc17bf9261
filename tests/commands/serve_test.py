"""The command: flags and gin, errors in one line before anything loads, and a whole life."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import gin
import pytest

from t5x_inference_ext.checkpoints.conventions import CONVENTION_NAMES
from t5x_inference_ext.commands import cli, serve
from t5x_inference_ext.server import launch
from tests import memory

GIN = '--gin_file=t5x_inference_ext/configs/runs/serve.gin'


def _error(capsys, *argv):
  assert serve.run(['serve', *argv]) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  return error


@pytest.mark.parametrize(
  'flags, says',
  [
    ([], '--checkpoint not given'),
    (['--checkpoint=none'], 'none'),
    (['--checkpoint=x', '--port=70000'], 'port must be 0 to 65535, got 70000'),
    (['--checkpoint=x', '--port=-1'], 'port must be a whole number, 0 or more'),
    (['--checkpoint=x', '--max_length=1'], 'max_length must be a whole number, 2'),
    (['--checkpoint=x', '--api_key='], 'api_key is empty'),
    (['--checkpoint=x', '--api_key_file=/nowhere'], "can't read api_key_file /nowhere"),
    (['--checkpoint=x', '--host=192.0.2.1'], "can't listen at 192.0.2.1:8000"),
    (['--checkpoint=x', '--temperature=1'], "Unknown command line flag 'temperature'"),
    ([GIN], 'CHECKPOINT_PATH has no value'),
    ([GIN, '--port=1'], "--port and gin flags can't be mixed"),
    ([GIN, '--gin.CHECKPOINT_PATH="x"', '--gin.PORT="a"'], 'PORT must be a whole number'),
    ([GIN, '--gin.CHECKPOINT_PATH="x"', '--gin.PROT=1'], 'nothing uses PROT'),
    (['--checkpoint=x', '--process_id=0'], 'go together'),
  ],
)
def test_errors_are_one_line(flags, says, capsys):
  assert says in _error(capsys, *flags)


def test_a_missing_extra_is_named(monkeypatch, capsys):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda name: None if name == 'uvicorn' else find(name)
  )
  assert "pip install 't5x_inference_ext[server]'" in _error(capsys, '--checkpoint=x')


def test_a_cache_that_no_memory_has_is_refused_before_weights_load(palm_tiny, capsys):
  flags = ['--port=0', '--mesh=1x1x1', '--batch_size=1000000', '--max_length=1000000']
  assert 'too little memory' in _error(capsys, f'--checkpoint={palm_tiny}', *flags)


def test_every_option_is_a_macro_of_the_gin_file():
  """Gin binds every option once, with the flag's own default."""
  gin.clear_config()
  gin.add_config_file_search_path(cli._PACKAGE_PARENT)
  gin.parse_config_file('t5x_inference_ext/configs/runs/serve.gin')
  gin.parse_config('CHECKPOINT_PATH = "x"')
  bound = gin.get_bindings(launch.run_server)
  signature = launch.run_server.__signature__.parameters
  options = {name: p for name, p in signature.items() if name != 'options_of_cache'}
  # A gin file is no place for keys; what weights do not show is bound by its own name.
  unbound = {'api_key', *CONVENTION_NAMES} - {'norm_scale'}
  assert options.keys() - bound.keys() == unbound
  for name, value in bound.items():
    if name != 'checkpoint':
      assert value == options[name].default, name
  gin.clear_config()


def test_from_start_to_end(palm_tiny, repository, tmp_path):
  """Requests that are under way when SIGTERM comes are answered whole."""
  log = tmp_path / 'log'
  with open(log, 'w', encoding='utf-8') as stderr:
    process = subprocess.Popen(
      [
        sys.executable,
        '-m',
        't5x_inference_ext.serve',
        f'--checkpoint={palm_tiny}',
        '--port=0',
        '--dtype=float32',
        '--mesh=1x1x1',
        '--scan_layers',
        '--batch_size=4',
        '--max_length=64',
        '--prefill_chunk=16',
      ],
      cwd=repository,
      stdout=subprocess.PIPE,
      stderr=stderr,
      text=True,
      env={**os.environ, 'XLA_FLAGS': memory.QUICK_FLAGS},
    )
  try:
    said = [process.stdout.readline()]
    while said[-1] and not said[-1].startswith('ready on'):
      said.append(process.stdout.readline())
    text = ''.join(said)
    assert re.search(r'^compiling: the port opens after this$', text, re.MULTILINE), log.read_text()
    assert re.search(r'^compiled: \d+ programs in [\d.]+ s$', text, re.MULTILINE)
    url = said[-1].removeprefix('ready on ').strip()
    body = {'prompt': ['x'] * 20, 'max_tokens': 40, 'ignore_eos': True, 'stream': True}
    request = urllib.request.Request(
      f'{url}/v1/completions', json.dumps(body).encode(), {'content-type': 'application/json'}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
      first = answer.readline()
      process.send_signal(signal.SIGTERM)
      begin = time.monotonic()
      rest = answer.read()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and time.monotonic() - begin < 30
    chunks = [line[6:] for line in (first + rest).decode().split('\n') if line]
    assert chunks[-1] == '[DONE]'
    choices = [json.loads(chunk)['choices'][0] for chunk in chunks[:-1]]
    assert sum(choice['finish_reason'] == 'length' for choice in choices) == 20
    assert out.splitlines()[-1] == 'ended'
    (line,) = log.read_text().splitlines()
    assert json.loads(line)['completion_tokens'] == 800
  finally:
    process.kill()
    process.wait()
