"""Kills, full disks, failing reads: what is resumed ends in the same bytes, and no part loads."""

import json
import os
import subprocess
import sys
import tempfile

import pytest

from t5x_inference_ext.config import ModelConfig
from tests.checkpoints import gguf_families, public_files, synthetic

CONFIG = ModelConfig(num_layers=3, d_model=16, d_ff=48, num_heads=4, d_head=8, vocab_size=32)
KILLS = 40


def source_of(kind: str, path, testdata):
  """Return a source of a conversion: 'T5X', 'safetensors' or 'GGUF'."""
  if kind == 'T5X':
    leaves = synthetic.fused(synthetic.canonical(CONFIG), CONFIG)
    return synthetic.write_legacy(path, leaves, chunks=8)
  family = testdata / 'families' / 'falcon_40b'
  if kind == 'safetensors':
    return family
  return public_files.write_gguf(path.with_suffix('.gguf'), *gguf_families.converted(family))


@pytest.fixture
def run(tmp_path, repository, testdata, request):
  source = source_of(getattr(request, 'param', 'T5X'), tmp_path / 'source', testdata)
  # In memory where that is possible: a conversion waits for the disk again and again, which costs a
  # minute here.
  memory = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None
  scratch = tempfile.TemporaryDirectory(dir=memory)
  request.addfinalizer(scratch.cleanup)

  def program(*arguments):
    command = [
      sys.executable,
      str(repository / 'tests' / 'checkpoints' / 'fault_program.py'),
      str(source),
      scratch.name,
      *map(str, arguments),
    ]
    result = subprocess.run(
      command,
      capture_output=True,
      text=True,
      check=False,
      timeout=300,
      env={'PYTHONPATH': str(repository), 'PATH': '/usr/bin:/bin'},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)

  return program


@pytest.mark.parametrize(
  'run, weights',
  [('T5X', 'int8'), ('T5X', 'int4,embedding:8'), ('safetensors', 'int8'), ('GGUF', 'int8')],
  indirect=['run'],
)
def test_kills(run, weights):
  result = run('kills', 0, KILLS, weights)
  assert result['kills'] >= KILLS and result['resumed'] >= KILLS // 4, result
  assert result['finished'] >= 2
  for name in ('different', 'partial_loads', 'lost'):
    assert result[name] == 0, result
  # At most one slice a worker: the one being written, and with a second worker the one being read
  # ahead.
  assert all(0 < redone <= int(workers) for workers, redone in result['redone'].items()), result


def test_kills_of_shards(run):
  result = run('shard_kills', 0, 20)
  assert result['kills'] >= 20 and result['finished'] >= 1, result
  assert not (result['different'] or result['partial_loads'] or result['wrong']), result


def test_full_disks_and_failing_reads(run):
  result = run('errors')
  assert result['hit'] >= 30, result
  assert result['wrong'] == []
  for message in filter(None, result['messages']):
    assert '\n' not in message and ("can't write to" in message or 'damaged data in' in message)
  assert any('to continue' in message for message in result['messages'])
