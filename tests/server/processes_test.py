"""Two processes of one server: the answers of one, and the end of one is told by the other."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from t5x_inference_ext.engine.engine import Engine
from tests import memory, processes
from tests.server.running import client, until

pytestmark = pytest.mark.usefixtures('quick_programs')
START_SECONDS = 200


@contextlib.contextmanager
def _two(palm_tiny, repository, tmp_path):
  """Two processes that serve, the URL, and the file with what the first one says."""
  port = processes.free_port()
  env = {
    **os.environ,
    'XLA_FLAGS': f'--xla_force_host_platform_device_count=1 {memory.QUICK_FLAGS}',
    'JAX_DEFAULT_MATMUL_PRECISION': 'highest',
  }
  running, said = [], tmp_path / 'said0'
  try:
    for process in range(processes.COUNT):
      with open(tmp_path / f'said{process}', 'w', encoding='utf-8') as output:
        running.append(
          subprocess.Popen(
            [
              sys.executable,
              '-m',
              't5x_inference_ext.serve',
              f'--checkpoint={palm_tiny}',
              '--port=0',
              '--dtype=float32',
              '--scan_layers',
              '--batch_size=4',
              '--max_length=64',
              '--prefill_chunk=16',
              '--drain_seconds=1',
              f'--coordinator_address=localhost:{port}',
              f'--num_processes={processes.COUNT}',
              f'--process_id={process}',
            ],
            cwd=repository,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
          )
        )

    def ready():
      assert all(each.poll() is None for each in running), said.read_text()
      return 'ready on ' in said.read_text()

    until(ready, START_SECONDS)
    url = said.read_text().partition('ready on ')[2].split()[0]
    yield running, url, said
  finally:
    for each in running:
      each.kill()
      each.wait()


def test_answers_are_those_of_one_process_and_a_lost_one_is_told(palm_tiny, repository, tmp_path):
  engine = Engine.load(palm_tiny, mesh='1x1x1', dtype='float32')
  prompts = ['def main(', 'import ']
  expected = [c.text for c in engine.generate(prompts, max_new_tokens=12)]
  scores = engine.score_completions([((), [b + 3 for b in b'import '])])[0]
  with _two(palm_tiny, repository, tmp_path) as (running, url, _), client(url) as http:
    body = {'prompt': prompts, 'max_tokens': 12, 'temperature': 0}
    found = http.post('/v1/completions', json=body).json()
    assert [choice['text'] for choice in found['choices']] == expected
    body = {'prompt': 'import ', 'max_tokens': 0, 'echo': True, 'logprobs': 1}
    (choice,) = http.post('/v1/completions', json=body).json()['choices']
    assert choice['logprobs']['token_logprobs'] == pytest.approx(scores, abs=1e-4)
    assert http.get('/status').json()['mesh'] != '1x1x1'
    assert http.get('/health').status_code == 200
    running[1].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    until(lambda: http.get('/health').status_code == 503, 20)
    assert time.monotonic() - begin < 10
    assert 'process 1' in http.get('/health').json()['error']['message']
    assert http.post('/v1/completions', json=body).status_code == 503


def test_all_end_together(palm_tiny, repository, tmp_path):
  with _two(palm_tiny, repository, tmp_path) as (running, url, said), client(url) as http:
    body = {'prompt': 'x', 'max_tokens': 4, 'temperature': 0}
    assert http.post('/v1/completions', json=body).status_code == 200
    running[1].send_signal(signal.SIGTERM)  # has no effect: process 0 decides
    assert http.post('/v1/completions', json=body).status_code == 200
    running[0].send_signal(signal.SIGTERM)
    assert [each.wait(60) for each in running] == [0, 0]
    assert 'ended' in said.read_text()
