"""--verify: a finished checkpoint against its manifest and its source."""

import json
import shutil

import pytest

from t5x_inference_ext import convert_checkpoint
from t5x_inference_ext.checkpoints import convert
from t5x_inference_ext.checkpoints.verify import verify
from t5x_inference_ext.errors import CheckpointError
from tests.checkpoints import synthetic

VALUES = synthetic.canonical()


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """source, other (one weight differs), and finished checkpoints of each format."""
  root = tmp_path_factory.mktemp('verify')
  synthetic.write_legacy(root / 'source', synthetic.fused(VALUES))
  values = {name: v.copy() for name, v in VALUES.items()}
  values['gate'][1, 2, 3] *= -1
  synthetic.write_legacy(root / 'other', synthetic.fused(values))
  convert.convert(root / 'source', root / 'serving', scale_search='mse')
  convert.convert(root / 'source', root / 'bfloat16', 'bfloat16')
  for form in ('t5x_int8', 't5x_float'):
    convert.convert(root / 'source', root / form, format=form)
  return root


FORMATS = ('serving', 'bfloat16', 't5x_int8', 't5x_float')


@pytest.mark.parametrize('form', FORMATS)
def test_sound(root, form):
  lines = verify(root / form, root / 'source')
  assert len(lines) == 2 and 'are as recorded' in lines[0] and str(root / 'source') in lines[1]


@pytest.mark.parametrize('form', FORMATS)
def test_one_flipped_bit(root, form, tmp_path):
  copy = shutil.copytree(root / form, tmp_path / 'copy')
  chunk = max((p for p in copy.rglob('*') if p.is_file() and p.name[0].isdigit()), key=lambda p: p.stat().st_size)
  data = bytearray(chunk.read_bytes())
  data[len(data) // 2] ^= 1
  chunk.write_bytes(data)
  with pytest.raises(CheckpointError, match=f'damaged data in {chunk}'):
    verify(copy)


@pytest.mark.parametrize('form', FORMATS)
def test_another_source(root, form):
  with pytest.raises(CheckpointError, match='1 values from .* are not what .*other converts to'):
    verify(root / form, root / 'other')


def test_another_step(root, tmp_path):
  synthetic.write_legacy(tmp_path / 'source', synthetic.fused(VALUES), step=8)
  with pytest.raises(CheckpointError, match='made from step 7, but .* is step 8'):
    verify(root / 'serving', tmp_path / 'source')


@pytest.mark.parametrize('change', [
    lambda m: m.pop('tensors'), lambda m: m.update(tensors={'gate': {}}), lambda m: m.update(source=None)])
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
  assert '--output not given' in capsys.readouterr().err
