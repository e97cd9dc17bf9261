"""inspect_checkpoint: what a directory holds, whatever it is."""

import msgpack
import numpy as np
import pytest

from t5x_inference_ext.checkpoints import convert
from t5x_inference_ext.commands import inspect_checkpoint
from t5x_inference_ext.config import ModelConfig, preset
from tests.checkpoints import gguf_families, public_files, synthetic


def inspect(capsys, *argv):
  code = inspect_checkpoint.run(['inspect_checkpoint', *map(str, argv)])
  captured = capsys.readouterr()
  return code, captured.out, captured.err


def test_t5x(palm_tiny, capsys):
  code, out, _ = inspect(capsys, palm_tiny)
  assert code == 0
  for words in (
    'T5X checkpoint at',
    'step 1000',
    'decoder/decoder/q_wi_fused/kernel',
    '[256, 4, 8, 288]',
    '6 tensors, 3,835,136 values, 15.3 MB',
    'it looks like palm_tiny: 3,835,136 parameters',
    'with int8 weights: 4.0 MB of disk',
    'with bfloat16 weights: 7.7 MB of disk',
    'of memory and, with',
  ):
    assert words in out
  assert inspect(capsys, f'--path={palm_tiny}')[1].splitlines()[:5] == out.splitlines()[:5]


def test_orbax_and_serving(palm_tiny, testdata, tmp_path, capsys):
  code, out, _ = inspect(capsys, testdata / 'palm_tiny_orbax' / 'checkpoint_1000')
  assert (
    code == 0 and 'Orbax checkpoint (OCDBT, zarr 2)' in out and 'it looks like palm_tiny' in out
  )
  convert.convert(palm_tiny, tmp_path / 'int8')
  code, out, _ = inspect(capsys, tmp_path / 'int8')
  assert (
    code == 0
    and 'serving checkpoint at' in out
    and 'query_scale' in out
    and 'int8     [4, 256, 256]' in out
  )


def test_a_model_that_can_t_be_served(tmp_path, capsys):
  path = synthetic.write_legacy(
    tmp_path / 'c', {'encoder/layers_0/mlp/wi/kernel': np.ones((4, 4), np.float32)}
  )
  code, out, _ = inspect(capsys, path)
  assert (
    code == 0
    and 'encoder/layers_0/mlp/wi/kernel' in out
    and "can't be served" in out
    and 'a decoder-only model' in out
  )


def test_the_index_file_itself(palm_tiny, capsys):
  code, out, _ = inspect(capsys, palm_tiny / 'checkpoint')
  assert code == 0 and out.splitlines()[:5] == inspect(capsys, palm_tiny)[1].splitlines()[:5]


def test_no_parameters(tmp_path, capsys):
  (tmp_path / 'checkpoint').write_bytes(msgpack.packb({'target': {}}))
  code, out, _ = inspect(capsys, tmp_path)
  assert code == 0 and '0 tensors, 0 values' in out and "can't be served" in out


def test_nan(tmp_path, capsys):
  """Which is for a conversion to find: it is only timed here."""
  leaves = synthetic.fused(synthetic.canonical())
  leaves['decoder/decoder/q_wi_fused/kernel'][0] = np.nan
  code, out, err = inspect(capsys, synthetic.write_legacy(tmp_path / 'c', leaves))
  assert code == 0 and 'with int8 weights' in out and not err


@pytest.mark.parametrize(
  'argv,words', [((), 'no checkpoint given'), (('/no/such',), 'no such directory')]
)
def test_errors(argv, words, capsys):
  code, _, err = inspect(capsys, *argv)
  assert code == 2 and words in err and err.count('\n') == 1


@pytest.mark.parametrize(
  'config,words',
  [
    (preset('palm_540b'), 'it looks like palm_540b: '),
    (
      preset('palm_62b', vocab_size=1000),
      'looks like palm_62b, but with vocab_size 1000 instead of 256128',
    ),
    (preset('palm_8b', num_layers=30), 'looks like palm_8b, but with num_layers 30 instead of 32'),
    (preset('megatron_530b'), 'it looks like megatron_530b: '),
    (
      ModelConfig(
        num_layers=3,
        d_model=16,
        d_ff=24,
        num_heads=2,
        d_head=6,
        vocab_size=12,
        mlp='gelu',
        norm='layer',
        num_kv_heads=2,
      ),
      'not like any of the known models',
    ),
  ],
)
def test_which_model(config, words):
  assert words in inspect_checkpoint.looks_like(config)


def test_public_models(testdata, tmp_path, capsys):
  code, out, _ = inspect(capsys, testdata / 'families' / 'falcon_40b')
  assert code == 0
  for words in (
    'model of the family falcon at',
    'vocabulary: none (no tokenizer.json or tokenizer.model is beside the model), no BOS, rows end',
    'transformer.h.0.self_attention.query_key_value.weight  bfloat16 [80, 48]\n',
    'with int8 weights',
  ):
    assert words in out
  metadata, arrays = gguf_families.converted(testdata / 'families' / 'qwen2')
  path = public_files.write_gguf(tmp_path / 'model.gguf', metadata, arrays)
  code, out, _ = inspect(capsys, path)
  assert code == 0 and 'architecture qwen2' in out and 'blk.2.attn_k.bias' in out
