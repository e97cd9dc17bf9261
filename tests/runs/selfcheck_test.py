"""The selfcheck: right on simulated devices, and told by it when something is wrong."""

import dataclasses
import itertools
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.checkpoints.convert import convert
from t5x_inference_ext.commands import selfcheck as command
from t5x_inference_ext.runs.selfcheck import golden, selfcheck, serving, timing
from t5x_inference_ext.sharding import torus
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import make_mesh
from tests import reference

# A few pairs: tests/engine/golden_test.py has them all.
FEW = [('ws_1d/batch', 'ws_1d/batch'), ('wg_xyz/batch', 'ws_2d/heads')]
PAIRS = [tuple(map(Layout.parse, pair)) for pair in FEW]


@pytest.fixture(scope='module')
def goldens():
  return golden.read_goldens()


@pytest.fixture(scope='module')
def checkpoint(palm_tiny):
  return open_checkpoint(palm_tiny)


@pytest.fixture
def quick(monkeypatch):
  """Leaves one part of each kind."""
  monkeypatch.setattr(golden, 'layout_pairs', lambda: PAIRS[:1])
  monkeypatch.setattr(selfcheck, '_SERVED', selfcheck._SERVED[:1])
  cases = timing.timed_cases
  monkeypatch.setattr(timing, 'timed_cases', lambda mesh: cases(mesh)[:1])


def test_golden_tokens_are_t5xs_own(goldens, golden_rows):
  assert goldens.prompts == [row['prompt_tokens'] for row in golden_rows]
  assert goldens.tokens['float32'] == [row['greedy_tokens'] for row in golden_rows]


@pytest.fixture(scope='module')
def golden_rows(golden):  # the fixture of tests/conftest.py: a directory
  return json.loads((golden / 'greedy.json').read_text())


@pytest.mark.parametrize(('weights', 'count'), [('int8', 48), ('int4', golden.ROUNDED_STEPS)])
def test_golden_tokens_of_rounded_weights_are_the_references(
  goldens, checkpoint, weights, count, palm_tiny, tmp_path
):
  """Every golden token is the most likely one after those before it, and by a margin."""
  config = checkpoint.config
  if weights == 'int8':
    tensors = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    rounded = reference.quantized(config, tensors)
  else:  # whose scales are searched, so the conversion's own are taken
    convert(str(palm_tiny), str(tmp_path / 'int4'), 'int4')
    stored = open_checkpoint(tmp_path / 'int4').tensors
    rounded = {name: np.asarray(tensor.read()) for name, tensor in stored.items()}
    assert rounded['query'].dtype == ml_dtypes.int4
  rounded = reference.dequantized(config, rounded)
  for prompt, tokens in zip(goldens.prompts, goldens.tokens[weights], strict=True):
    inputs = np.asarray([[0, *prompt, *tokens[:-1]]])
    logits = reference.logits(config, rounded, inputs)[0, len(prompt) :]
    assert np.argmax(logits, axis=-1).tolist() == tokens and len(tokens) == count
    best, second = np.sort(logits, axis=-1)[:, -1], np.sort(logits, axis=-1)[:, -2]
    assert (best - second).min() > 0.005  # rounding of float32 decides nothing
  assert goldens.tokens[weights] != [row[:count] for row in goldens.tokens['float32']]


def test_pairs_are_all_that_can_share_weights():
  pairs = [tuple(map(str, pair)) for pair in golden.layout_pairs()]
  one, two = ['ws_1d/batch', 'ws_1d/heads'], ['ws_2d', 'wg_x', 'wg_xy']
  others = [f'{f}/{a}' for f in two for a in ('batch', 'heads')] + ['wg_xyz/batch']
  wanted = {*itertools.product(one, repeat=2), *itertools.product(others, repeat=2)}
  assert len(pairs) == 53 and set(pairs) == wanted


def test_pairs_on_a_mesh(checkpoint, goldens):
  results = list(golden.check_goldens(checkpoint, make_mesh((2, 2, 2)), goldens, PAIRS))
  assert [(each.prefill, each.decode) for each in results] == FEW
  assert [each.different + each.impossible for each in results] == ['', '']
  assert [each.steps for each in results] == [48, 8]


def test_a_wrong_token_is_found_and_told(checkpoint, goldens):
  tokens = [[*row] for row in goldens.tokens['float32']]
  right = tokens[6][5]
  tokens[6][5] = right + 1
  wrong = goldens._replace(tokens={'float32': tokens})
  (result,) = golden.check_goldens(checkpoint, make_mesh((1, 1, 1)), wrong, PAIRS[:1])
  assert result.different == f'token 5 of row 6 is {right}, and should be {right + 1}'


def test_command_writes_a_report(quick, tmp_path, capsys):
  path = tmp_path / 'report.json'
  assert command.run(['selfcheck', '--mesh=1x2x1', f'--output={path}']) == 0
  out = capsys.readouterr().out
  for words in (
    '8 cpu devices in 1 processes, mesh 1x2x1; t5x_inference_ext ',
    'float32 weights: golden tokens in 1 of 1 pairs of layouts\n',
    'int8 weights: golden tokens in 1 of 1 pairs of layouts\n',
    'int4 weights: golden tokens in 1 of 1 pairs of layouts\n',
    'served with int8 weights, float32 activations, float32 cache: 100.0% of tokens as golden,',
    'decode of a model of 2 layers, int8, batch 2: measured ',
    'nothing is wrong\n',
  ):
    assert words in out
  assert jax.config.read('jax_disable_most_optimizations') is False  # for what comes after
  report = json.loads(path.read_text())
  assert report['right'] is True and report['problems'] == []
  assert report['machine']['mesh'] == '1x2x1' and len(report['machine']['mesh_devices']) == 2
  assert report['golden tokens, int8 weights'][0]['different'] == ''
  timed = report['time of decode, int8, batch 2']
  assert 0 < timed['seconds'] < 10 and len(timed['all_seconds']) == timing.REPEATS
  assert timed['estimated_seconds'] is None  # a CPU has none
  assert report['seconds'].keys() == report.keys() - {
    *('format', 'version', 'right', 'problems', 'seconds')
  }


def test_a_part_that_fails_is_told_and_the_rest_goes_on(quick, monkeypatch, tmp_path, capsys):
  def fail(*_, **__):
    raise RuntimeError('the\x1b[31m chip is on fire')

  monkeypatch.setattr(serving, '_serve', fail)
  monkeypatch.setattr(timing, 'compile_case', fail)
  path = tmp_path / 'report.json'
  assert command.run(['selfcheck', '--mesh=1x1x1', f'--output={path}']) == 1
  out = capsys.readouterr().out
  assert out.count('WRONG: ') == 2 and '2 problems were found' in out and '\x1b' not in out
  report = json.loads(path.read_text())
  assert report['right'] is False and len(report['problems']) == 2
  assert 'RuntimeError: the\\x1b[31m chip is on fire' in report['problems'][0]
  assert (
    'in _serve' not in report['memory']
    and 'Traceback' in (report['time of decode, int8, batch 1']['error'])
  )
  assert report['golden tokens, int8 weights'][0]['different'] == ''


@pytest.mark.parametrize(
  ('flag', 'words'),
  [
    ('--mesh=64x1x1', 'needs 64 devices'),
    ('--output=/nowhere/report.json', 'there is no directory /nowhere'),
    ('--gin.MESH="1x1x1"', 'takes no gin flags'),
    ('--checkpoint=/nowhere', 'no checkpoint'),
  ],
)
def test_wrong_flags_are_one_sentence(flag, words, capsys):
  assert command.run(['selfcheck', flag]) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1 and words in error


def test_another_checkpoint_has_no_golden_tokens(testdata, capsys):
  checkpoint = testdata / 'palm_unscanned' / 'checkpoint_0'
  assert command.run(['selfcheck', f'--checkpoint={checkpoint}']) == 2
  assert 'is not the bundled checkpoint examples/palm_tiny' in capsys.readouterr().err


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device as jax describes a TPU's."""

  id: int
  coords: tuple[int, int, int]
  device_kind: str = 'TPU v4'
  process_index: int = 0


def test_slice_of_a_mesh_is_that_of_its_chips(monkeypatch):
  from t5x_inference_ext.runs.selfcheck import machine

  chips = [Chip(2 * x + y, (x, y, 0)) for x in range(2) for y in range(2)]
  mesh = make_mesh((2, 2, 1), chips)
  monkeypatch.setattr(machine.jax, 'devices', lambda: chips)
  assert machine.slice_of(mesh) == torus.TpuSlice('v4', (2, 2, 1))
  monkeypatch.setattr(machine.jax, 'devices', lambda: [*chips, Chip(4, (0, 0, 1))])
  assert machine.slice_of(mesh) is None  # a part of a slice
