"""The precompile command: flags and gin, files, exit codes, no variables to set."""

import json
import os
import subprocess
import sys

import pytest

from t5x_inference_ext.commands import precompile as command
from t5x_inference_ext.engine import saved_program
from t5x_inference_ext.precompile import analysis, fit
from t5x_inference_ext.precompile.fit import Shortage

GIN = [
  '--gin_file=t5x_inference_ext/configs/runs/precompile.gin',
  '--gin_file=t5x_inference_ext/configs/models/palm_tiny.gin',
]
TINY = [
  '--model=palm_tiny',
  '--slice=v4:2x2x1',
  '--batch=8',
  '--context=128',
  '--layout=ws_2d/batch',
]


def run(*argv: str) -> int:
  return command.run(['precompile', *argv])


@pytest.mark.libtpu
def test_a_report_and_its_files(tmp_path, capsys):
  files = {name: tmp_path / name for name in ('json', 'hlo', 'save')}
  assert run(*TINY, *(f'--{name}={path}' for name, path in files.items())) == 0
  out, err = capsys.readouterr()
  assert 'fits: ' in out and 'time: ' in out and 'compiling decode in ws_2d/batch ...' in err
  data = json.loads(files['json'].read_text())
  assert data['fits'] and data['case']['weights'] == 'int8' and data['case']['phase'] == 'decode'
  assert files['hlo'].read_text().startswith('HloModule')
  header = saved_program.read_program_header(files['save'])
  assert header['platform'] == 'tpu' and header['libtpu'] and len(header['devices']) == 4
  assert header['description'] == data['case'] and f'libtpu {header["libtpu"]}' in out


@pytest.mark.libtpu
def test_gin_says_the_same(tmp_path, capsys):
  plain, by_gin = tmp_path / 'plain', tmp_path / 'gin'
  assert run(*TINY, f'--json={plain}') == 0
  assert (
    run(
      *GIN,
      '--gin.SLICE="v4:2x2x1"',
      '--gin.BATCH=8',
      '--gin.CONTEXT=128',
      '--gin.LAYOUT="ws_2d/batch"',
      f'--gin.JSON_FILE="{by_gin}"',
    )
    == 0
  )
  reports = [json.loads(path.read_text()) for path in (plain, by_gin)]
  for report in reports:
    del report['compile_seconds']
  assert reports[0] == reports[1]


def test_one_is_for_what_does_not_fit(monkeypatch, capsys, tmp_path):
  def refuse(case, slice_, mesh=None):
    return Shortage(case, slice_, 2**36, 2**35, 2**34, 0, 'RESOURCE_EXHAUSTED')

  monkeypatch.setattr(fit, 'try_compile', refuse)
  monkeypatch.setattr(analysis.slices, 'slice_mesh', lambda slice_, config, shape: FakeMesh)
  monkeypatch.setattr(analysis.fit, 'alternatives', lambda shortage, say: [])
  path = tmp_path / 'report'
  assert run(*TINY, f'--json={path}', f'--save={tmp_path / "executable"}') == 1
  out = capsys.readouterr().out
  assert 'does not fit: 64.00 GiB are needed' in out and 'nothing to write to' in out
  assert not json.loads(path.read_text())['fits'] and not (tmp_path / 'executable').exists()


class FakeMesh:
  """The part of a mesh that the progress line reads."""

  class devices:
    shape = (2, 2, 1)


@pytest.mark.parametrize(
  'argv,words',
  [
    (['--model=palm_tiny'], '--slice, --batch not given; --help shows examples'),
    (['--model=palm_9b'], 'palm_9b'),
    ([*TINY, '--slice=v4:3x3x3'], 'there is no v4 slice v4:3x3x3; known: v4:1x1x1'),
    ([*TINY, '--layout=ws_9d/batch'], "unknown layout part 'ws_9d'"),
    ([*TINY, '--mesh=2x2'], 'a mesh is written XxYxZ'),
    ([*TINY, '--batch=0'], 'batch must be a whole number, 1 or more, got 0'),
    ([*TINY, '--phase=prefill', '--prompt=200'], 'prompt=200 does not fit into context=128'),
    ([*TINY, '--json=/nowhere/report'], "can't write /nowhere/report: there is no directory"),
    ([*TINY, *GIN], "--model and gin flags can't be mixed"),
    ([*GIN, '--gin.BATCH=8'], 'SLICE has no value'),
    ([*GIN, '--gin.SLIC="v4:2x2x1"'], 'nothing uses SLIC; the gin files define'),
  ],
)
def test_two_is_for_errors_in_one_line(capsys, argv, words):
  assert run(*argv) == 2
  err = capsys.readouterr().err
  assert err.startswith('error: ') and words in err and err.count('\n') == 1


@pytest.mark.libtpu
def test_a_plain_shell_needs_no_variables(repository, tmp_path):
  """With none of libtpu's or jax's variables set, from a process of its own."""
  wanted = ('PATH', 'HOME', 'LANG', 'VIRTUAL_ENV', 'PYTHONPATH')
  environment = {name: os.environ[name] for name in wanted if name in os.environ}
  result = subprocess.run(
    [
      sys.executable,
      '-m',
      't5x_inference_ext.precompile',
      '--model=palm_tiny',
      '--slice=v5e:2x2',
      '--batch=8',
      '--context=128',
      '--layout=ws_2d/batch',
      '--phase=prefill',
      f'--json={tmp_path / "report"}',
    ],
    cwd=repository,
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 0, result.stderr
  assert 'slice:  v5e:2x2, 4 chips' in result.stdout
  assert set(result.stderr.splitlines()) == {
    'v5e:2x2: 4 chips as a mesh of 1x2x2 ...',
    'compiling prefill in ws_2d/batch ...',
  }
