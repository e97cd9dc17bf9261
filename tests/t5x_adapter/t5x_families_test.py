"""Decoders that T5X users train, in t5x.infer: the user's own gin says what they compute."""

import json
import subprocess
import sys

import numpy as np
import pytest
from t5x import models, partitioning, utils
from t5x.examples.decoder_only import network

from tests.t5x_adapter import inference_tasks, running, separate_flaxformer
from tests.t5x_adapter.t5x_layer_kinds_test import saved

SIZES = dict(vocab=384, layers=2, embed=32, ff=80, heads=4, head_dim=8)
# T5X's example: gin's names of the sizes.
_DECODER_ONLY = dict(
  vocab_size=384,
  num_layers=2,
  emb_dim=32,
  mlp_dim=80,
  num_heads=4,
  head_dim=8,
  mlp_activations=('gelu', 'linear'),
  dropout_rate=0.0,
)
# What gin binds, by the module that it makes.
FAMILIES = {
  'decoder_only, tied': dict(_DECODER_ONLY, logits_via_embedding=True),
  'decoder_only, untied': dict(_DECODER_ONLY, logits_via_embedding=False),
  'flaxformer, merged heads, not rescaled, relative bias': dict(
    SIZES,
    activations=('gelu', 'linear'),
    norm='rms',
    relative=True,
    rescale_logits=False,
    scan_axis=None,
  ),
  'flaxformer, split heads, rotary, untied': dict(
    SIZES, activations=('relu', 'linear'), norm='rms', split=True, tied=False, scan_axis=None
  ),
}


def _module(options):
  if 'vocab' in options:
    return separate_flaxformer.make_module(**options)
  return network.DecoderWrapper(network.TransformerConfig(**options))


def _model_gin(options) -> str:
  """The gin file that a user of stock T5X has for the module."""
  name = 'network.TransformerConfig'
  lines = ['from t5x.examples.decoder_only import network']
  lines += ['models.DecoderOnlyModel.module = @network.DecoderWrapper()']
  lines += [f'network.DecoderWrapper.config = @{name}()']
  if 'vocab' in options:
    name = 'separate_flaxformer.make_module'
    lines = ['from tests.t5x_adapter import separate_flaxformer']
    lines += [f'models.DecoderOnlyModel.module = @{name}()']
  lines += [f'{name}.{option} = {value!r}' for option, value in options.items()]
  return '\n'.join(['from __gin__ import dynamic_registration', 'from t5x import models', *lines])


@pytest.fixture(scope='module', params=FAMILIES)
def family(request, tmp_path_factory):
  """(the user's gin file, checkpoint, a function of a mode: the rows that stock T5X writes)."""
  root, options = tmp_path_factory.mktemp('family'), FAMILIES[request.param]
  gin = root / 'model.gin'
  gin.write_text(_model_gin(options) + '\n', encoding='utf-8')
  path, _, _ = saved(_module(options), root / 'checkpoints')
  model = models.DecoderOnlyModel(
    _module(options), running.VOCABULARY, optimizer_def=None, decode_fn=running.GREEDY
  )

  def rows(mode):
    with running.closed_event_loops():
      return running.infer_rows(
        model,
        # Whole on each of the devices: eight of them don't divide four heads.
        partitioning.PjitPartitioner(
          num_partitions=1,
          logical_axis_rules=[
            (axis, None) for axis, _ in partitioning.standard_logical_axis_rules()
          ],
        ),
        utils.RestoreCheckpointConfig(str(path), 'specific', dtype='float32'),
        root / f'stock_{mode}',
        mode,
      )

  return gin, path, rows


def _rows(repository, gin, path, output, mode, *flags, succeeds=True):
  """The rows of the stock command with this package's gin file behind it; else what it says."""
  command = [
    *(sys.executable, '-m', 't5x.infer', '--gin_file=tests/t5x_adapter/families_infer.gin'),
    *([f'--gin_file={gin}'] if gin else []),
    '--gin_file=t5x_inference_ext/configs/t5x/infer.gin',
    *flags,
    f'--gin.CHECKPOINT_PATH="{path}"',
    f'--gin.INFER_OUTPUT_DIR="{output}"',
    f'--gin.infer.mode="{mode}"',
    '--gin.DTYPE="float32"',
  ]
  process = subprocess.run(
    command, cwd=repository, capture_output=True, text=True, timeout=300, check=False
  )
  assert (process.returncode == 0) == succeeds, process.stderr[-4000:]
  if not succeeds:
    return process.stderr
  written = output / f'{inference_tasks.TASK}-{mode}.jsonl-00000-of-00001'
  return [json.loads(line) for line in written.read_text(encoding='utf-8').splitlines()]


def test_predictions_equal_stock_t5xs(family, repository, tmp_path):
  gin, path, stock = family
  rows = _rows(repository, gin, path, tmp_path, 'predict', '--gin.MESH="2x2x2"')
  expected = stock('predict')
  assert rows == expected
  assert len({row['prediction'] for row in rows}) > 1  # so that equal rows mean something


def test_scores_equal_stock_t5xs(family, repository, tmp_path):
  gin, path, stock = family
  rows = _rows(repository, gin, path, tmp_path, 'score', '--gin.MESH="1x1x1"')
  expected = stock('score')
  assert [row['inputs'] for row in rows] == [row['inputs'] for row in expected]
  np.testing.assert_allclose(
    [row['score'] for row in rows], [row['score'] for row in expected], rtol=1e-4
  )


def test_slot_refill_and_a_refusal(repository, tmp_path):
  """Without the user's model in front the run ends with the choices; with it slots serve it."""
  options = FAMILIES['flaxformer, merged heads, not rescaled, relative bias']
  gin = tmp_path / 'model.gin'
  gin.write_text(_model_gin(options) + '\n', encoding='utf-8')
  path, _, _ = saved(_module(options), tmp_path / 'checkpoints')
  stderr = _rows(repository, None, path, tmp_path / 'out', 'predict', succeeds=False)
  assert 'weights do not show mlp, the activations (swiglu, geglu' in stderr
  assert 'rescale_logits, whether' in stderr and 'num_heads of merged' not in stderr
  slots = ('--gin_file=t5x_inference_ext/configs/t5x/continuous.gin', '--gin.SLOTS=2')
  rows = _rows(repository, gin, path, tmp_path / 'out', 'predict', *slots, '--gin.MESH="1x2x2"')
  plain = _rows(repository, gin, path, tmp_path / 'plain', 'predict', '--gin.MESH="1x1x1"')
  assert rows == plain
