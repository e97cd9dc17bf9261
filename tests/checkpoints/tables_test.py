"""Embeddings and untied heads in int8: contents, other formats, kills, and what is refused."""

import ml_dtypes
import numpy as np
import pytest

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import convert, open_checkpoint, serving
from t5x_inference_ext.checkpoints.conversion.verify import verify
from t5x_inference_ext.checkpoints.tensor import InMemory
from t5x_inference_ext.checkpoints.views import RoundedTable
from t5x_inference_ext.errors import CheckpointError, UserError
from tests.checkpoints import resume_test, synthetic

VALUES = synthetic.canonical()
VALUES['embedding'][3] = 0  # a row of zeros


@pytest.fixture
def source(tmp_path):
  return synthetic.write_legacy(tmp_path / 'source', synthetic.fused(VALUES), chunks=5)


def read(path):
  return {name: tensor.read() for name, tensor in open_checkpoint(path).tensors.items()}


def dequantized(tensors, table='embedding'):
  return tensors[table].astype(np.float32) * tensors[f'{table}_scale'][:, None]


@pytest.mark.parametrize('side', [5, 8192], ids=['many chunks', 'one chunk'])
@pytest.mark.parametrize('weights', ['int8', 'int4', 'bfloat16'])
def test_contents(source, tmp_path, monkeypatch, weights, side):
  """Each row has its own scale, and all other tensors are as without bits for the table."""
  monkeypatch.setattr(serving, 'MAX_CHUNK_ROWS', side)
  monkeypatch.setattr(serving, 'MAX_CHUNK_COLUMNS', side)
  convert.convert(source, tmp_path / 'plain', weights, scale_search='absmax')
  out = tmp_path / 'out'
  options = dict(bits='embedding:8', scale_search='absmax', hold_bytes=0, slice_bytes=100)
  report = convert.convert(source, out, weights, **options)
  assert open_checkpoint(out).weights == f'{weights},embedding:8'
  found, plain, values = read(out), read(tmp_path / 'plain'), VALUES['embedding']
  largest = np.abs(values).max(1)
  scale = np.where(largest > 0, largest / np.float32(127), np.float32(1))
  np.testing.assert_array_equal(found['embedding_scale'], scale, strict=True)
  units = np.rint(values / scale[:, None]).astype(np.int8)
  np.testing.assert_array_equal(found['embedding'], units, strict=True)
  assert not units[3].any() and np.abs(units.astype(int)).max() == 127
  assert found.keys() - plain.keys() == {'embedding_scale'}
  for name in plain.keys() - {'embedding'}:
    np.testing.assert_array_equal(found[name], plain[name], strict=True, err_msg=name)
  error = np.linalg.norm(dequantized(found) - values) / np.linalg.norm(values)
  assert report.errors['embedding'].relative == pytest.approx(error, rel=1e-5)
  # The size of the layers does not count the table.
  layers = sum((out / name / '0.0.0').exists() for name in found)
  assert layers == 7 and report.layer_bytes < report.output_bytes - values.size
  assert 'are as recorded' in verify(out)[0] and len(verify(out, str(source))) == 2


def test_an_untied_head(testdata, tmp_path):
  """Both tables, or one of them, of a public model."""
  family = testdata / 'families' / 'llama_untied'
  before = read(family)
  for tables in (('head',), ('embedding', 'head')):
    out = tmp_path / '-'.join(tables)
    convert.convert(family, out, 'int8', bits=','.join(f'{name}:8' for name in tables))
    found = read(out)
    assert {n for n in params.TABLES if found[n].dtype == np.int8} == set(tables)
    for name in tables:
      half = found[f'{name}_scale'][:, None] * 0.5001
      assert (np.abs(dequantized(found, name) - before[name]) <= half).all()


def test_other_formats_of_a_quantized_table_are_its_values(source, tmp_path):
  quantized = tmp_path / 'quantized'
  convert.convert(source, quantized, 'int8', bits='embedding:8')
  tensors = read(quantized)
  values = dequantized(tensors)
  for number, (options, dtype) in enumerate(
    [
      (dict(weights='bfloat16'), ml_dtypes.bfloat16),
      (dict(weights='int8'), ml_dtypes.bfloat16),
      (dict(format='t5x_int8'), np.float32),
      (dict(format='t5x_float'), np.float32),
    ]
  ):
    out = tmp_path / str(number)
    convert.convert(quantized, out, **options)
    assert 'embedding_scale' not in read(out)
    np.testing.assert_array_equal(read(out)['embedding'], values.astype(dtype), strict=True)
  convert.convert(quantized, tmp_path / 'again', 'int8', bits='embedding:8')
  for name, found in read(tmp_path / 'again').items():
    np.testing.assert_array_equal(found, tensors[name], strict=True, err_msg=name)
  # A checkpoint of int8 matrices, whose float table is rounded later.
  convert.convert(source, tmp_path / 'int8')
  convert.convert(tmp_path / 'int8', tmp_path / 'later', 'int8', bits='embedding:8')
  later = read(tmp_path / 'later')
  np.testing.assert_array_equal(later['query'], tensors['query'], strict=True)
  bfloat16 = VALUES['embedding'].astype(ml_dtypes.bfloat16).astype(np.float32)
  assert (np.abs(dequantized(later) - bfloat16) <= later['embedding_scale'][:, None] / 1.99).all()


@pytest.mark.parametrize('search', ['absmax', 'mse'])
def test_a_view_of_the_table_has_the_values_that_are_served(source, tmp_path, search):
  """A calibration reads the embedding through this view."""
  convert.convert(source, tmp_path / 'out', bits='embedding:8', scale_search=search)
  view = RoundedTable(InMemory(VALUES['embedding'], ''), np.dtype(np.int8), search == 'mse')
  served = dequantized(read(tmp_path / 'out'))
  np.testing.assert_array_equal(view.read(), served, strict=True)
  where = slice(2, 9), slice(1, 4)
  np.testing.assert_array_equal(view.read(where), served[where], strict=True)


def test_killed_between_slices_of_a_table(source, tmp_path, monkeypatch):
  options = dict(bits='embedding:8', slice_bytes=100)
  convert.convert(source, tmp_path / 'expected', **options)
  kills = 0
  for calls in (1, 4, 16):
    kills += resume_test.killed(
      monkeypatch, 'append_line', calls, source, tmp_path / 'out', **options
    )
  convert.convert(source, tmp_path / 'out', **options)
  assert kills == 3
  assert synthetic.contents(tmp_path / 'out') == synthetic.contents(tmp_path / 'expected')


def test_a_row_that_is_not_finite(tmp_path):
  values = {**VALUES, 'embedding': VALUES['embedding'].copy()}
  values['embedding'][7, 2:4] = np.nan
  source = synthetic.write_legacy(tmp_path / 'nan', synthetic.fused(values))
  with pytest.raises(CheckpointError, match='embedding: 2 NaN or infinite values, read from'):
    convert.convert(source, tmp_path / 'out', bits='embedding:8')


def test_refusals(source, tmp_path, palm_tiny):
  out = tmp_path / 'out'
  with pytest.raises(UserError, match='bits=embedding:8 is for serving checkpoints'):
    convert.convert(source, out, format='t5x_int8', bits='embedding:8')
  with pytest.raises(UserError, match='head is no matrix of this model, and no table'):
    convert.convert(source, out, bits='head:8')
  convert.convert(palm_tiny, out, 'bfloat16', bits='embedding:8')
  np.save(tmp_path / 'tokens.npy', np.ones((2, 8), np.int32))
  with pytest.raises(UserError, match='holds bfloat16,embedding:8 weights, which are rounded'):
    convert.convert(out, tmp_path / 'int8', calibration=str(tmp_path / 'tokens.npy'))
