"""zarr arrays: their values, and an error wherever a gzip chunk is not what was written."""

import gzip
import itertools
import json
import zlib

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from t5x_inference_ext.checkpoints.readers import zarr_arrays
from t5x_inference_ext.checkpoints.readers.zarr_arrays import open_array
from t5x_inference_ext.errors import CheckpointError

SHAPE, CHUNKS = (7, 5, 6), (3, 5, 4)
SIZE = 3 * 5 * 4 * 4


def write(path, dtype='<f4', compressor='gzip', shape=SHAPE, chunks=CHUNKS, **metadata):
  """An array and its values."""
  values = (
    np.random.default_rng(0)
    .integers(-100, 100, shape)
    .astype(ml_dtypes.bfloat16 if dtype == 'bfloat16' else np.dtype(dtype).newbyteorder('='))
  )
  compressor = compressor and {
    'id': compressor,
    **({'level': 1} if compressor in ('gzip', 'zlib', 'zstd') else {}),
  }
  ts.open(
    {
      'driver': 'zarr',
      'kvstore': {'driver': 'file', 'path': f'{path}/'},
      'metadata': {
        'shape': shape,
        'chunks': chunks,
        'dtype': dtype,
        'compressor': compressor,
        **metadata,
      },
    },
    create=True,
  ).result().write(values).result()
  return values


def read(path, cached=True):
  return open_array('gate', str(path), cached=cached).tensor()


@pytest.mark.parametrize('cached', [True, False])
@pytest.mark.parametrize(
  'options',
  [
    dict(),
    dict(order='F'),
    dict(dtype='>f4'),
    dict(dtype='>f4', order='F'),
    dict(dtype='bfloat16'),
    dict(dtype='|i1'),
    dict(dtype='<f2', compressor='zlib'),
    dict(dimension_separator='/'),
    dict(fill_value=3.0),
    dict(chunks=SHAPE),
    dict(chunks=(8, 5, 6)),
    dict(compressor=None),
    dict(compressor='zstd'),
    dict(compressor='blosc'),
    dict(shape=(), chunks=()),
  ],
  ids=str,
)
def test_values(tmp_path, options, cached):
  values = write(tmp_path, **options)
  tensor = read(tmp_path, cached)
  assert (tensor.shape, tensor.dtype) == (values.shape, values.dtype)
  np.testing.assert_array_equal(tensor.read(), values, strict=True)
  spans = [[(0, n), (1, n), (0, 1), (n // 2, n // 2 + 2)] for n in values.shape]
  for bounds in itertools.product(*spans):
    index = tuple(slice(*b) for b in bounds)
    found = tensor.read(index)
    np.testing.assert_array_equal(found, values[index], strict=True)
    found[...] = 0  # is the reader's own
  np.testing.assert_array_equal(tensor.read(), values, strict=True)


def fails(path, *words):
  """Reading the chunk 0.0.0, and only that."""
  for cached in (True, False):
    tensor = read(path, cached)
    assert tensor.read((slice(3, 7),)).shape == (4, 5, 6)
    with pytest.raises(CheckpointError) as caught:
      tensor.read((slice(2, 4),))
    message = str(caught.value)
    assert '\n' not in message and message.startswith(f'gate: damaged data in {path}')
    assert f'{path}/0.0.0' in message
    for word in words:
      assert word in message


@pytest.mark.parametrize('compressor,end', [('gzip', 9), ('zlib', 0)])
def test_cut_anywhere(tmp_path, compressor, end):
  """A zlib stream, which T5X does not write, may lose its checksum: all of its values are there."""
  write(tmp_path, compressor=compressor)
  chunk = tmp_path / '0.0.0'
  data = chunk.read_bytes()
  for length in (0, 1, 5, 10, len(data) // 2, *range(len(data) - end, len(data))):
    chunk.write_bytes(data[:length])
    fails(tmp_path)


@pytest.mark.parametrize('compressor,end', [('gzip', 8), ('zlib', 4)])
def test_a_flipped_bit_in_the_checksum_or_before(tmp_path, compressor, end):
  write(tmp_path, compressor=compressor)
  chunk = tmp_path / '0.0.0'
  data = chunk.read_bytes()
  for place in (*range(len(data) - end, len(data)), len(data) // 2):
    chunk.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    fails(tmp_path)


@pytest.mark.parametrize(
  'data',
  [
    gzip.compress(bytes(SIZE)) + b'x',
    gzip.compress(bytes(SIZE)) * 2,
    gzip.compress(bytes(SIZE - 4)),
    gzip.compress(bytes(SIZE + 4)),
    gzip.compress(bytes(10**7)),
    zlib.compress(bytes(SIZE)),
    b'something else, which is no stream at all',
  ],
  ids=['more', 'twice', 'short', 'long', 'far too long', 'zlib', 'no stream'],
)
def test_another_stream(tmp_path, data):
  write(tmp_path)
  (tmp_path / '0.0.0').write_bytes(data)
  fails(tmp_path)


def test_a_missing_chunk(tmp_path):
  write(tmp_path, fill_value=0.0)
  (tmp_path / '0.0.0').unlink()
  fails(tmp_path, 'missing')


def test_chunks_larger_than_memory_are_refused_before_they_are_allocated(tmp_path):
  write(tmp_path)
  file = tmp_path / '.zarray'
  file.write_text(json.dumps({**json.loads(file.read_text()), 'chunks': [2**40, 5, 4]}))
  with pytest.raises(
    CheckpointError, match=r'gate: .*chunks of \[1099511627776, 5, 4\] are .* GB each'
  ):
    read(tmp_path)


def test_each_trailer_is_read_once(tmp_path, monkeypatch):
  write(tmp_path)
  tensor = read(tmp_path)
  asked, original = [], zarr_arrays._GzipTrailers.damage
  monkeypatch.setattr(
    zarr_arrays._GzipTrailers,
    'damage',
    lambda self, ends: asked.extend(ends) or original(self, ends),
  )
  for layer in range(SHAPE[1]):
    tensor.read((slice(None), slice(layer, layer + 1)))
  assert sorted(asked) == sorted(f'{i}.0.{j}' for i in range(3) for j in range(2))
