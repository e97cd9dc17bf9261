"""T5X's own commands, as processes: stock configurations, and this package's gin files."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from tests.t5x_adapter import inference_tasks

PLUGIN = 't5x_inference_ext/configs/t5x/infer.gin'


def _run(repository, *args, succeeds=True):
  process = subprocess.run(
    [sys.executable, '-m', *args],
    cwd=repository,
    capture_output=True,
    text=True,
    timeout=240,
    check=False,
  )
  assert (process.returncode == 0) == succeeds, process.stderr[-4000:]
  return process.stderr


def _rows(output, mode):
  path = output / f'{inference_tasks.TASK}-{mode}.jsonl-00000-of-00001'
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def test_infer(repository, palm_tiny, stock_rows, tmp_path):
  """The stock command with one more gin file, and one that chooses layouts."""
  output = tmp_path / 'output'
  _run(
    repository,
    't5x.infer',
    '--gin_file=tests/t5x_adapter/stock_infer.gin',
    f'--gin_file={PLUGIN}',
    '--gin_file=t5x_inference_ext/configs/layouts/high_throughput.gin',
    f'--gin.CHECKPOINT_PATH="{palm_tiny}"',
    f'--gin.INFER_OUTPUT_DIR="{output}"',
    '--gin.MESH="2x2x2"',
    '--gin.DTYPE="float32"',
  )
  assert _rows(output, 'predict') == stock_rows('predict')
  info = (output / 'model-info.txt').read_text(encoding='utf-8')
  assert 'Total number of parameters: 3835136' in info
  assert re.search(r"layers_0/parallel/w_in .*\(embed=256, hidden=.*'x', \('z', 'y'\)", info), info


def test_infer_with_slots(repository, palm_tiny, stock_rows, tmp_path):
  """A third file keeps decode slots full, and takes over the options of the stock configuration."""
  output = tmp_path / 'output'
  _run(
    repository,
    't5x.infer',
    '--gin_file=tests/t5x_adapter/stock_infer.gin',
    f'--gin_file={PLUGIN}',
    '--gin_file=t5x_inference_ext/configs/t5x/continuous.gin',
    f'--gin.CHECKPOINT_PATH="{palm_tiny}"',
    f'--gin.INFER_OUTPUT_DIR="{output}"',
    '--gin.MESH="1x1x1"',
    '--gin.DTYPE="float32"',
    '--gin.SLOTS=2',
    '--gin.decoding.temperature_sample.max_decode_steps=8',
  )
  expected = [{**row, 'prediction': row['prediction'][:8]} for row in stock_rows('predict')]
  assert expected and _rows(output, 'predict') == expected


def test_infer_from_tfexample_file(repository, palm_tiny, stock_rows, tmp_path):
  """The recipe of docs/t5x.md: T5X makes a task of a file, with the model's vocabulary."""
  with tf.io.TFRecordWriter(str(tmp_path / 'prompts')) as writer:
    for row in inference_tasks.rows():
      text = tf.train.Feature(bytes_list=tf.train.BytesList(value=[row['prompt'].encode()]))
      example = tf.train.Example(features=tf.train.Features(feature={'inputs': text}))
      writer.write(example.SerializeToString())
  vocabulary, output = tmp_path / 'vocabulary.gin', tmp_path / 'output'
  vocabulary.write_text(
    'from __gin__ import dynamic_registration\nimport seqio\n'
    'VOCABULARY = @seqio.ByteVocabulary()\n',
    encoding='utf-8',
  )
  _run(
    repository,
    't5x.infer',
    f'--gin_file={vocabulary}',
    '--gin_file=t5x/configs/runs/infer_from_tfexample_file.gin',
    f'--gin_file={PLUGIN}',
    '--gin_file=t5x_inference_ext/configs/t5x/tfexample.gin',
    f'--gin.TF_EXAMPLE_FILE_PATHS=["{tmp_path / "prompts"}"]',
    '--gin.TF_EXAMPLE_FILE_TYPE="tfrecord"',
    f'--gin.FEATURE_LENGTHS={inference_tasks.LENGTHS}',
    '--gin.inputs/seqio.Feature.add_eos=False',
    f'--gin.CHECKPOINT_PATH="{palm_tiny}"',
    f'--gin.INFER_OUTPUT_DIR="{output}"',
    '--gin.MESH="1x1x1"',
    '--gin.DTYPE="float32"',
  )
  (written,) = output.glob('infer_*-predict.jsonl-00000-of-00001')
  rows = [json.loads(line) for line in written.read_text(encoding='utf-8').splitlines()]
  stock = stock_rows('predict')
  assert [row['prediction'] for row in rows] == [row['prediction'] for row in stock]


@pytest.mark.parametrize(
  'line, new',
  [
    ('from t5x_inference_ext.decoding import sampling', 'engine.sampling'),
    (
      'from t5x_inference_ext.engine import sampling\nsampling.Sampler.temperature = 0.5',
      'engine.sampling.SamplingParams',
    ),
  ],
)
def test_gin_files_of_earlier_versions(line, new, repository, tmp_path):
  """T5X ends with the new name of what the file names."""
  old = tmp_path / 'old.gin'
  old.write_text(f'from __gin__ import dynamic_registration\n{line}\n', encoding='utf-8')
  stderr = _run(
    repository, 't5x.infer', f'--gin_file={PLUGIN}', f'--gin_file={old}', succeeds=False
  )
  assert f'is now t5x_inference_ext.{new} (CHANGELOG.md' in stderr


def test_main_with_int8(repository, int8_checkpoint, stock_rows, tmp_path):
  """t5x.main, scoring, on the package's own run file: no stock model, and so no flaxformer."""
  output = tmp_path / 'output'
  _run(
    repository,
    't5x.main',
    '--run_mode=infer',
    '--gin_file=t5x_inference_ext/configs/runs/t5x_infer.gin',
    '--gin_bindings=from tests.t5x_adapter import inference_tasks',
    f'--gin.MIXTURE_OR_TASK_NAME="{inference_tasks.TASK}"',
    f'--gin.TASK_FEATURE_LENGTHS={inference_tasks.LENGTHS}',
    f'--gin.CHECKPOINT_PATH="{int8_checkpoint}"',
    f'--gin.INFER_OUTPUT_DIR="{output}"',
    '--gin.infer.mode="score"',
    '--gin.MESH="1x1x1"',
  )
  scores, stock = (
    [row['score'] for row in rows] for rows in (_rows(output, 'score'), stock_rows('score'))
  )
  # bfloat16 and int8 against float32.
  np.testing.assert_allclose(scores, stock, rtol=0.05)


def test_unknown_binding(repository, palm_tiny, tmp_path):
  stderr = _run(
    repository,
    't5x.infer',
    '--gin_file=tests/t5x_adapter/stock_infer.gin',
    f'--gin_file={PLUGIN}',
    f'--gin.CHECKPOINT_PATH="{palm_tiny}"',
    f'--gin.INFER_OUTPUT_DIR="{tmp_path}"',
    '--gin.InferenceModel.dtypes="float32"',
    succeeds=False,
  )
  assert 'InferenceModel' in stderr and "doesn't have a parameter named 'dtypes'" in stderr
