"""zarr chunks decompressed without tensorstore: its values, and an error wherever a chunk is not what was written."""

import gzip
import itertools
import zlib

from isal import isal_zlib
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from t5x_inference_ext.checkpoints.readers import gzip_array
from t5x_inference_ext.checkpoints.readers.gzip_array import ChunkCache, GzipArray
from t5x_inference_ext.checkpoints.readers.zarr_arrays import Stored, open_array
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
    dict(shape=(), chunks=()),
  ],
  ids=str,
)
def test_values(tmp_path, options, cached):
  values = write(tmp_path, **options)
  tensor = read(tmp_path, cached)
  assert isinstance(tensor, GzipArray) and (tensor.shape, tensor.dtype) == (
    values.shape,
    values.dtype,
  )
  np.testing.assert_array_equal(tensor.read(), values, strict=True)
  spans = [[(0, n), (1, n), (0, 1), (n // 2, n // 2 + 2)] for n in values.shape]
  for bounds in itertools.product(*spans):
    index = tuple(slice(*b) for b in bounds)
    found = tensor.read(index)
    np.testing.assert_array_equal(found, values[index], strict=True)
    found[...] = 0  # is the reader's own
  np.testing.assert_array_equal(tensor.read(), values, strict=True)


@pytest.mark.parametrize('compressor', [None, 'zstd', 'blosc'])
def test_others_are_tensorstore_s(tmp_path, compressor):
  values = write(tmp_path, compressor=compressor)
  assert isinstance(read(tmp_path), Stored)
  np.testing.assert_array_equal(read(tmp_path).read(), values)


def fails(path, *words):
  """Reading the chunk 0.0.0, and only that."""
  for cached in (True, False):
    tensor = read(path, cached)
    assert tensor.read((slice(3, 7),)).shape == (4, 5, 6)
    with pytest.raises(CheckpointError) as caught:
      tensor.read((slice(2, 4),))
    message = str(caught.value)
    assert '\n' not in message and message.startswith(f'gate: damaged data in {path}/0.0.0: ')
    for word in words:
      assert word in message


@pytest.mark.parametrize('compressor', ['gzip', 'zlib'])
def test_cut_anywhere(tmp_path, compressor):
  write(tmp_path, compressor=compressor)
  chunk = tmp_path / '0.0.0'
  data = chunk.read_bytes()
  for length in (0, 1, 5, 10, len(data) // 2, *range(len(data) - 9, len(data))):
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
  'data,words',
  [
    (gzip.compress(bytes(SIZE)) + b'x', 'behind its end'),
    (gzip.compress(bytes(SIZE)) * 2, 'behind its end'),
    (gzip.compress(bytes(SIZE - 4)), f'it holds {SIZE - 4} bytes, expected {SIZE}'),
    (gzip.compress(bytes(SIZE + 4)), f'more than {SIZE} bytes'),
    (gzip.compress(bytes(10**7)), f'more than {SIZE} bytes'),
    (zlib.compress(bytes(SIZE)), ''),
    (b'something else, which is no stream at all', ''),
  ],
)
def test_another_stream(tmp_path, data, words):
  write(tmp_path)
  (tmp_path / '0.0.0').write_bytes(data)
  fails(tmp_path, words)


def test_a_missing_chunk(tmp_path):
  write(tmp_path, fill_value=0.0)
  (tmp_path / '0.0.0').unlink()
  fails(tmp_path, 'missing')


def test_streams_longer_than_what_is_decompressed_at_a_time(monkeypatch):
  data = np.random.default_rng(0).bytes(1000)
  stream = gzip.compress(data)
  for piece in (1, 7, len(stream) - 1, len(stream)):
    monkeypatch.setattr(gzip_array, '_PIECE_BYTES', piece)
    decompress = lambda stream: gzip_array.decompress(gzip_array._pieces(stream), 31, 1000)
    assert decompress(stream).tobytes() == data
    for wrong in (stream[:-1], stream + b'x'):
      with pytest.raises(isal_zlib.error):
        decompress(wrong)


def test_a_cache_keeps_what_was_used_last():
  cache = ChunkCache(100)
  chunks = {key: np.zeros(40, np.uint8) for key in 'abc'}
  cache.put('a', chunks['a'])
  cache.put('b', chunks['b'])
  assert cache.get('a') is chunks['a']
  cache.put('c', chunks['c'])
  assert cache.get('b') is None and cache.get('a') is chunks['a'] and cache.get('c') is chunks['c']
  cache.put('d', np.zeros(200, np.uint8))  # more than it holds
  assert all(cache.get(key) is None for key in 'abcd')


def test_a_chunk_of_several_layers_is_decoded_once(tmp_path, monkeypatch):
  write(tmp_path)
  decoded, original = [], gzip_array.decompress
  monkeypatch.setattr(gzip_array, 'decompress', lambda *args: decoded.append(1) or original(*args))
  tensor = read(tmp_path)
  for layer in range(SHAPE[1]):
    tensor.read((slice(None), slice(layer, layer + 1)))
  assert len(decoded) == 6
  uncached = tensor.uncached()
  uncached.read()
  uncached.read()
  assert len(decoded) == 18
