"""The serving checkpoint: written, read back in any slices, and never read wrongly."""

import shutil

from hypothesis import given, settings
from hypothesis import strategies as st
import ml_dtypes
import numpy as np
import pytest

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import convert, open_checkpoint, serving
from t5x_inference_ext.config import PRESETS, ModelConfig, preset
from t5x_inference_ext.errors import CheckpointError
from t5x_inference_ext.params import LAYERS_AXIS, parameters
from t5x_inference_ext.quantization.formats import SERVED_WEIGHTS
from tests.checkpoints import synthetic

SCANNED = synthetic.fused(synthetic.canonical())


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """An int8 serving checkpoint, not to be changed."""
  root = tmp_path_factory.mktemp('serving')
  convert.convert(
    synthetic.write_legacy(root / 'source', SCANNED), root / 'finished', norm_scale='one'
  )
  return root / 'finished'


@pytest.fixture
def copy(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / 'copy')


def test_records_all_that_loading_needs(finished):
  checkpoint = open_checkpoint(finished)
  assert (checkpoint.format, checkpoint.weights, checkpoint.step) == ('serving', 'int8', 7)
  assert checkpoint.config == ModelConfig(**{**synthetic.CONFIG.to_dict(), 'norm_scale': 'one'})
  assert 'norm_scale: one (recorded: given)' in checkpoint.notes
  expected = {**params.parameters(checkpoint.config), **params.scales(checkpoint.config)}
  dtypes = {
    'matrix': np.int8,
    'embedding': ml_dtypes.bfloat16,
    'norm': np.float32,
    'scale': np.float32,
  }
  assert {n: (t.shape, t.dtype) for n, t in checkpoint.tensors.items()} == {
    n: (p.shape, dtypes[p.kind]) for n, p in expected.items()
  }


def test_can_be_moved_and_named_anything(finished, tmp_path):
  moved = shutil.copytree(finished, tmp_path / 'checkpoint with space')
  found, expected = open_checkpoint(f'{moved}/').tensors, open_checkpoint(finished).tensors
  assert found and found.keys() == expected.keys()
  for name, tensor in found.items():
    np.testing.assert_array_equal(tensor.read(), expected[name].read())


def test_any_slice_over_many_chunks(tmp_path, monkeypatch):
  """Chunk borders within and between shards: small chunks, and every slice equals numpy's."""
  monkeypatch.setattr(serving, 'MAX_CHUNK_ROWS', 5)
  monkeypatch.setattr(serving, 'MAX_CHUNK_COLUMNS', 5)
  monkeypatch.setattr(serving, 'MAX_CHUNK_BYTES', 12)
  convert.convert(synthetic.write_legacy(tmp_path / 'source', SCANNED), tmp_path / 'many')
  monkeypatch.undo()
  convert.convert(tmp_path / 'source', tmp_path / 'one')
  many, one = open_checkpoint(tmp_path / 'many'), open_checkpoint(tmp_path / 'one')
  assert len(list((tmp_path / 'many' / 'gate').iterdir())) > 20
  wholes = {name: t.read() for name, t in one.tensors.items()}

  @settings(deadline=None, derandomize=True, max_examples=100)
  @given(st.data())
  def check(data):
    name = data.draw(st.sampled_from(sorted(wholes)))
    whole = wholes[name]
    ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in whole.shape]
    index = tuple(slice(*e) for e in ends)
    np.testing.assert_array_equal(many.tensors[name].read(index), whole[index], strict=True)

  check()


@pytest.mark.parametrize('name', sorted(PRESETS))
@pytest.mark.parametrize('weights', SERVED_WEIGHTS)
def test_chunks_are_of_one_layer_and_bounded(name, weights):
  tensors = serving.serving_tensors(preset(name), weights)
  assert len(tensors) > 8
  whole = {n for n, p in parameters(preset(name)).items() if p.axes[0] != LAYERS_AXIS}
  for tensor, (shape, dtype) in tensors.items():
    itemsize = {'int4': 0.5, 'int8': 1, 'bfloat16': 2, 'float32': 4}[dtype]
    chunk = serving.serving_chunk_shape(tensor, shape, dtype)
    assert len(chunk) == len(shape) and int(np.prod(chunk)) * itemsize <= 64 * 2**20
    assert tensor in whole or chunk[0] == 1
    assert all(c <= n for c, n in zip(chunk, shape))


@pytest.mark.parametrize(
  'damage',
  [
    lambda f: f.write_bytes(f.read_bytes()[:-1]),
    lambda f: f.write_bytes(b''),
    lambda f: f.unlink(),
    lambda f: f.write_bytes(
      f.read_bytes()[:30] + bytes([f.read_bytes()[30] ^ 1]) + f.read_bytes()[31:]
    ),  # one bit
  ],
  ids=['truncated', 'empty', 'missing', 'one bit'],
)
def test_damaged_chunk(copy, damage):
  """Also a bit that zstd would decode without noticing."""
  damage(copy / 'gate' / '1.0.0')
  tensor = open_checkpoint(copy).tensors['gate']
  tensor.read((slice(0, 1),))
  for _ in range(2):
    with pytest.raises(CheckpointError, match=f'gate.*{copy}/gate/1.0.0'):
      tensor.read((slice(1, 2), slice(0, 1)))


@pytest.mark.parametrize(
  'change,words',
  [
    (lambda h: h.update(format='other'), ['format', 'other']),
    (lambda h: h.update(version=3), ['version 3', 'reads only versions 1 and 2']),
    (lambda h: h.update(weights='int4'), ['int4']),
    (lambda h: h['model'].update(new_field=1), ['new_field', 'newer']),
    (lambda h: h['model'].pop('d_ff'), ['d_ff']),
    (lambda h: h.update(model=[]), ['a model config is an object']),
    (lambda h: h['model'].update(norm_epsilon=float('nan')), ['it holds NaN']),
    (lambda h: h['model'].update(rope_max_timescale=-5), ['rope_max_timescale', 'got -5']),
    (lambda h: h['model'].update(rope_max_timescale='x'), ['rope_max_timescale', "got 'x'"]),
    (lambda h: h['model'].update(rope_max_timescale=[1]), ['rope_max_timescale', 'got [1]']),
    (lambda h: h['model'].update(norm_epsilon=None), ['norm_epsilon', 'got None']),
    (lambda h: h['model'].update(num_layers=True), ['num_layers', 'got True']),
    (lambda h: h['model'].update(d_model=2**31), ['d_model', 'below 2**31']),
    (lambda h: h['model'].update(block=['serial']), ['block', "got ['serial']"]),
    (lambda h: h.update(text=5), ['form of the text settings']),
    (lambda h: h.pop('model'), ['model']),
    (lambda h: h['model'].update(d_ff=48), ['gate', '[2, 8, 24]', '[2, 8, 48]']),
    (lambda h: h.update(weights='bfloat16'), ['query', 'int8', 'bfloat16']),
  ],
)
def test_header_that_does_not_fit(copy, change, words):
  synthetic.rewrite_header(copy, change)
  with pytest.raises(CheckpointError) as caught:
    open_checkpoint(copy)
  for word in [str(copy), *words]:
    assert word in str(caught.value)


def test_damaged_header(copy):
  (copy / 'serving_config.json').write_text('{"format"')
  with pytest.raises(CheckpointError, match='serving_config.json is damaged'):
    open_checkpoint(copy)


@pytest.mark.parametrize(
  'text,word',
  [('', 'damaged'), ('{}', 'lacks'), ('[]', 'damaged'), ('{"embedding": []}', 'lists 0')],
)
def test_damaged_checksums(copy, text, word):
  (copy / 'checksums.json').write_text(text)
  with pytest.raises(CheckpointError, match='checksums.json') as caught:
    open_checkpoint(copy)
  assert word in str(caught.value)


def test_missing_tensor(copy):
  shutil.rmtree(copy / 'key_scale')
  with pytest.raises(CheckpointError, match=f'key_scale.*{copy}/key_scale'):
    open_checkpoint(copy)


def test_a_norm_scale_that_contradicts_the_recorded_one(finished):
  assert open_checkpoint(finished, norm_scale='one').config.norm_scale == 'one'
  with pytest.raises(CheckpointError, match="norm_scale=zero.*records 'one'"):
    open_checkpoint(finished, norm_scale='zero')


def test_another_model_than_recorded(finished):
  config = open_checkpoint(finished).config.to_dict()
  with pytest.raises(CheckpointError, match=r'gate: shape \[2, 8, 24\] in .*/gate.*\[2, 8, 48\]'):
    open_checkpoint(finished, config=ModelConfig(**{**config, 'd_ff': 48}))
  with pytest.raises(CheckpointError, match='rope_max_timescale=500.*records 10000'):
    open_checkpoint(finished, config=ModelConfig(**{**config, 'rope_max_timescale': 500.0}))
