"""The quality report: errors and losses, against what T5X itself computed."""

import importlib.util
import json

import numpy as np
import pytest

from t5x_inference_ext.checkpoints import convert, open_checkpoint
from t5x_inference_ext.commands import convert_checkpoint
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.runs import quality

MODULE = """
import seqio
import tensorflow as tf

def rows(split, shuffle_files, seed=None):
  targets = ['def main():\\n  return 0\\n', 'import os\\n']
  return tf.data.Dataset.from_tensor_slices({'targets': targets})

seqio.TaskRegistry.add(
    'quality_of_conversions', source=seqio.FunctionDataSource(rows, splits=['validation']),
    preprocessors=[seqio.preprocessors.tokenize],
    output_features={'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=False)})
"""


def run(*argv):
  return convert_checkpoint.run(['convert_checkpoint', *map(str, argv)])


@pytest.fixture(scope='module')
def int8(palm_tiny, tmp_path_factory):
  path = tmp_path_factory.mktemp('quality') / 'int8'
  convert.convert(palm_tiny, path, bits='embedding:8')
  return path


def test_the_loss_of_a_model_without_bos(testdata):
  """Each row's first token is predicted from nothing, and counts for nothing."""
  checkpoint = open_checkpoint(testdata / 'families' / 'smollm2')
  rows = np.array([[7, 8, 9, 10], [50, 51, 0, 0]])
  engine = Engine.load(checkpoint, mesh='1x1x1', dtype='float32')
  scored = engine.score_completions([([7], [8, 9, 10]), ([50], [51])])
  assert quality.loss(checkpoint, rows) == pytest.approx(-sum(map(sum, scored)) / 4, rel=1e-5)


def test_report_with_tokens(palm_tiny, golden, int8, tmp_path, capsys):
  """The source's loss is T5X's own figure, and int8 is within 0.3% of it."""
  pytest.importorskip('matplotlib')
  assert (
    run(
      f'--input={palm_tiny}',
      f'--output={int8}',
      '--weights=int8',
      '--bits=embedding:8',
      f'--report={tmp_path}/report',
      f'--report_tokens={golden}/heldout_tokens.npy',
    )
    == 0
  )
  assert 'making only the report' in capsys.readouterr().out
  report = json.loads((tmp_path / 'report' / 'report.json').read_text())
  bits = [value / np.log(2) for value in report['losses'].values()]
  expected = json.loads((golden / 'scores.json').read_text())['bits_per_byte_heldout']
  np.testing.assert_allclose(bits[0], expected, rtol=1e-4)
  # As bfloat16, int8 weights, with an int8 cache besides, and all of that computed in bfloat16.
  assert len(set(bits)) == 5 and all(abs(b / bits[0] - 1) < 0.003 for b in bits)
  assert set(report['errors']) == set(open_checkpoint(palm_tiny).tensors)
  assert (
    report['errors']['layer_norm']['relative'] == 0 < report['errors']['query']['relative'] < 0.01
  )
  alone = report['losses_of_tensors']
  matrices = 'query', 'key', 'value', 'gate', 'linear', 'attention_output', 'mlp_output'
  assert set(alone) == {'embedding', *matrices}
  rounded = 'output, int8,embedding:8'
  source_loss, int8_loss = (report['losses'][name] for name in ('source, float32', rounded))
  together = sum(each - source_loss for each in alone.values())
  assert all(each != source_loss for each in alone.values())
  # The losses of small independent changes add up.
  assert abs(together - (int8_loss - source_loss)) < 2e-4
  table = (tmp_path / 'report' / 'report.txt').read_text()
  assert 'rounded alone' in table and 'mlp_output, int8' in table
  assert 'embedding, int8 ' in table and f'{rounded}, int8 cache' in table and 'Frobenius' in table
  assert (tmp_path / 'report' / 'report.png').read_bytes().startswith(b'\x89PNG')


def test_labels_of_the_plot_can_be_read(tmp_path, monkeypatch):
  """None lies over another."""
  pytest.importorskip('matplotlib')
  pyplot = quality._pyplot()
  monkeypatch.setattr(pyplot, 'close', lambda figure: None)
  names = (
    'source, float32',
    'source in bfloat16',
    'output, int8',
    'output, int8, int8 cache',
    'the same in bfloat16',
  )
  quality._plot(
    pyplot,
    {'query': {'relative': 0.01, 'largest': 0.02}},
    {n: 1.0 + i / 1000 for i, n in enumerate(names)},
    tmp_path / 'report.png',
  )
  boxes = [
    label.get_window_extent()
    for axes in pyplot.gcf().axes
    for axis in (axes.xaxis, axes.yaxis)
    for label in axis.get_ticklabels()
    if label.get_text()
  ]
  monkeypatch.undo()
  pyplot.close('all')
  assert len(boxes) > len(names)
  assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_report_of_a_conversion_with_a_task(palm_tiny, tmp_path, capsys, monkeypatch):
  pytest.importorskip('matplotlib')
  (tmp_path / 'conversion_tasks.py').write_text(MODULE)
  monkeypatch.syspath_prepend(tmp_path)
  assert (
    run(
      f'--input={palm_tiny}',
      f'--output={tmp_path}/bf16',
      '--weights=bfloat16',
      f'--report={tmp_path}/report',
      '--report_task=quality_of_conversions',
      '--report_task_module=conversion_tasks',
    )
    == 0
  )
  assert 'a token, of 33' in capsys.readouterr().out
  assert (
    run(
      f'--input={palm_tiny}',
      f'--output={tmp_path}/bf16',
      '--weights=bfloat16',
      f'--report={tmp_path}/report',
      '--report_task=quality_of_conversion',
      '--report_task_module=conversion_tasks',
    )
    == 2
  )
  assert 'did you mean quality_of_conversions?' in capsys.readouterr().err


@pytest.mark.parametrize(
  'tokens,words',
  [
    (np.zeros((2, 3), np.int32), 'not all 0'),
    (np.ones(3, np.int32), r'rows, length'),
    (np.ones((2, 2)), 'whole numbers'),
    (np.full((2, 2), 384), 'token 384, outside the vocabulary of 384'),
    (np.full((2, 2), -1), 'token -1'),
    (None, 'not a .npy file'),
  ],
)
def test_tokens_that_are_not(tmp_path, tokens, words):
  path = tmp_path / 'tokens.npy'
  if tokens is not None:
    np.save(path, tokens)
  with pytest.raises(UserError, match=words):
    quality.read_tokens(str(path), 384)


def test_padding_is_not_counted(int8):
  checkpoint = open_checkpoint(int8)
  rows = np.random.default_rng(0).integers(3, 258, (3, 20))
  padded = np.pad(rows, ((0, 0), (0, 4)))
  np.testing.assert_allclose(
    quality.loss(checkpoint, padded), quality.loss(checkpoint, rows), rtol=1e-5
  )


def test_a_report_that_can_not_be_made_is_refused_before_the_conversion(
  palm_tiny, tmp_path, capsys, monkeypatch
):
  arguments = [f'--input={palm_tiny}', f'--output={tmp_path}/int8', '--weights=int8']
  (tmp_path / 'file').write_text('')

  def refused(*argv):
    assert run(*arguments, *argv) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file']
    return capsys.readouterr().err

  assert f'no file at --report_tokens={tmp_path}/none.npy' in refused(
    f'--report={tmp_path}/report', f'--report_tokens={tmp_path}/none.npy'
  )
  assert 'is a file: name a directory' in refused(f'--report={tmp_path}/file')
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert "pip install 't5x_inference_ext[plots]'" in refused(f'--report={tmp_path}/report')
