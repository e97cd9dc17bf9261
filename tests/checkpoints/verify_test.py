"""--verify: a finished checkpoint against its manifest and its source."""

import json
import shutil

import numpy as np
import pytest

from t5x_inference_ext.checkpoints import convert, serving
from t5x_inference_ext.checkpoints.conversion.verify import verify
from t5x_inference_ext.commands import convert_checkpoint
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError, UserError
from tests.checkpoints import synthetic

VALUES = synthetic.canonical()


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """source, other (one weight differs), and finished checkpoints of each format."""
  root = tmp_path_factory.mktemp('verify')
  synthetic.write_legacy(root / 'source', synthetic.fused(VALUES))
  values = {name: v.copy() for name, v in VALUES.items()}
  largest = np.argmax(np.abs(values['gate'][1, :, 3]))  # not rounded to 0
  values['gate'][1, largest, 3] *= -1
  synthetic.write_legacy(root / 'other', synthetic.fused(values))
  convert.convert(root / 'source', root / 'serving', scale_search='mse')
  convert.convert(root / 'source', root / 'bfloat16', 'bfloat16')
  convert.convert(root / 'source', root / 'int4', 'int4', bits='query:8')
  for form in ('t5x_int8', 't5x_float'):
    convert.convert(root / 'source', root / form, format=form)
  return root


FORMATS = ('serving', 'bfloat16', 'int4', 't5x_int8', 't5x_float')


@pytest.mark.parametrize('form', FORMATS)
def test_sound(root, form):
  lines = verify(root / form, root / 'source')
  assert len(lines) == 2 and 'are as recorded' in lines[0] and str(root / 'source') in lines[1]


@pytest.mark.parametrize('form', FORMATS)
def test_one_flipped_bit(root, form, tmp_path):
  copy = shutil.copytree(root / form, tmp_path / 'copy')
  chunk = max(
    (p for p in copy.rglob('*') if p.is_file() and p.name[0].isdigit()),
    key=lambda p: p.stat().st_size,
  )
  data = bytearray(chunk.read_bytes())
  data[len(data) // 2] ^= 1
  chunk.write_bytes(data)
  with pytest.raises(CheckpointError, match=f'damaged data in {chunk}'):
    verify(copy)


@pytest.mark.parametrize('form', FORMATS)
def test_a_flipped_bit_in_any_file(root, form, tmp_path):
  """Also where JSON does not care: in spaces, in text for people, in the case of digits."""
  copy, rng = shutil.copytree(root / form, tmp_path / 'copy'), np.random.default_rng(0)
  files = sorted(p for p in copy.rglob('*') if p.is_file())
  assert {'.zarray', 'checksums.json'} < {file.name for file in files}
  for file in files:
    data = file.read_bytes()
    for place in rng.integers(0, len(data), 8):
      damaged = bytearray(data)
      damaged[place] ^= 1 << rng.integers(8)
      file.write_bytes(damaged)
      with pytest.raises(CheckpointError):
        verify(copy)
    file.unlink()
    with pytest.raises(CheckpointError):
      verify(copy)
    file.write_bytes(data)
  verify(copy)


def test_a_flipped_bit_behind_the_end_of_an_array(tmp_path, monkeypatch):
  monkeypatch.setattr(serving, 'MAX_CHUNK_COLUMNS', 5)
  config = ModelConfig(num_layers=2, d_model=8, d_ff=27, num_heads=3, d_head=4, vocab_size=12)
  source = synthetic.write_legacy(
    tmp_path / 'source', synthetic.fused(synthetic.canonical(config), config)
  )
  convert.convert(source, tmp_path / 'out')
  chunk = tmp_path / 'out' / 'gate' / '0.0.6'  # columns 24 to 28
  data = bytearray(chunk.read_bytes())
  data[-1] = 4
  verify(tmp_path / 'out')
  chunk.write_bytes(data)
  with pytest.raises(CheckpointError, match=f'{chunk}: the padding beyond the array'):
    verify(tmp_path / 'out')


@pytest.mark.parametrize('form', FORMATS)
@pytest.mark.parametrize('name', ['notes.txt', 'query/9.9.9'])
def test_a_file_too_many(root, form, tmp_path, name):
  copy = shutil.copytree(root / form, tmp_path / 'copy')
  (copy / name).parent.mkdir(exist_ok=True)
  (copy / name).write_text('')
  with pytest.raises(CheckpointError, match=f'holds {name}, which'):
    verify(copy)


def test_checkpoint_of_before_small_files_had_checksums(root, tmp_path):
  copy = shutil.copytree(root / 'serving', tmp_path / 'copy')
  header = json.loads((copy / 'serving_config.json').read_text())
  del header['files'], header['crc32'], header['text']
  header['version'] = 1
  (copy / 'serving_config.json').write_text(json.dumps(header))
  verify(copy, root / 'source')


def test_queries_multiplied_as_the_conversion_was_told(tmp_path):
  """rescale_logits=False is recorded: the source converts to the same without saying it again."""
  config = ModelConfig(
    num_layers=2, d_model=8, d_ff=24, num_heads=3, d_head=6, vocab_size=12, block='serial'
  )
  leaves = synthetic.separate(synthetic.canonical(config), config)
  source = synthetic.write_legacy(tmp_path / 'source', leaves)
  told = synthetic.told(config, rescale_logits=False)
  convert.convert(source, tmp_path / 'out', **told)
  verify(tmp_path / 'out', tmp_path / 'source')
  with pytest.raises(CheckpointError, match='query_scale: .* differ from'):
    verify(tmp_path / 'out', tmp_path / 'source', rescale_logits=True)


@pytest.mark.parametrize('form', FORMATS)
def test_another_source(root, form):
  with pytest.raises(CheckpointError, match='values from .* differ from a conversion of .*other'):
    verify(root / form, root / 'other')


def test_workers_are_bounded(root):
  with pytest.raises(UserError, match='workers must be at least 1 and at most 1024, got 100000'):
    verify(root / 'serving', workers=100_000)


def test_another_step(root, tmp_path):
  synthetic.write_legacy(tmp_path / 'source', synthetic.fused(VALUES), step=8)
  with pytest.raises(CheckpointError, match='made from step 7, but .* is step 8'):
    verify(root / 'serving', tmp_path / 'source')


@pytest.mark.parametrize(
  'change',
  [
    lambda m: m.pop('tensors'),
    lambda m: m.update(tensors={'gate': {}}),
    lambda m: m.update(source=None),
  ],
)
def test_damaged_manifest(root, tmp_path, change):
  copy = shutil.copytree(root / 't5x_int8', tmp_path / 'copy')
  manifest = json.loads((copy / 't5x_inference_ext.json').read_text())
  change(manifest)
  (copy / 't5x_inference_ext.json').write_text(json.dumps(manifest))
  with pytest.raises(CheckpointError, match='t5x_inference_ext.json is damaged'):
    verify(copy)


def test_not_made_by_a_conversion(root, tmp_path):
  with pytest.raises(CheckpointError, match='was not written by a conversion'):
    verify(root / 'source')
  with pytest.raises(CheckpointError, match='no such directory'):
    verify(tmp_path / 'nowhere')


def test_command(root, capsys):
  run = lambda *argv: convert_checkpoint.run(['convert_checkpoint', '--verify', *argv])
  assert run(f'--output={root}/serving', f'--input={root}/source') == 0
  assert 'are as recorded in serving_config.json' in capsys.readouterr().out
  assert run(f'--output={root}/serving', f'--input={root}/other') == 2
  assert run() == 2
  assert '--verify needs --output' in capsys.readouterr().err
