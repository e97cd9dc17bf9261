"""The serving checkpoint: canonical tensors as zarr arrays, with the model's config (docs/serving_checkpoint.md).

It is independent of any mesh, and unpadded. Every chunk belongs to one layer and has a checksum, verified when the
chunk is first read.
"""

import itertools
import json
import os
from typing import Any, Iterator
import zlib

import ml_dtypes
import numpy as np
import tensorstore as ts

from t5x_inference_ext import parameters
from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.tensor import Bounds, Tensor
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError

CONFIG = 'serving_config.json'
CHECKSUMS = 'checksums.json'
FORMAT = 't5x_inference_ext serving checkpoint'
VERSION = 1
WEIGHTS = ('int8', 'bfloat16')

# A chunk's sides are halved until they are at most these, so that any shard of a matrix covers few chunks more than its
# share, and a conversion can hold all rows of one column of chunks; then its rows until it has at most MAX_CHUNK_BYTES.
MAX_CHUNK_ROWS = 8192
MAX_CHUNK_COLUMNS = 4096
MAX_CHUNK_BYTES = 64 * 2**20
# Of trained weights, zstd at level 1 leaves 88% (int8) or 78% (bfloat16) at disk speed; higher levels leave the same.
COMPRESSOR = {'id': 'zstd', 'level': 1}

_DTYPES = {'int8': np.dtype(np.int8), 'bfloat16': np.dtype(ml_dtypes.bfloat16), 'float32': np.dtype(np.float32)}
_ZARR_DTYPES = {'int8': '|i1', 'bfloat16': 'bfloat16', 'float32': '<f4'}
# What is written is read back from the disk: no cache.
_no_cache = ts.Context({'cache_pool': {'total_bytes_limit': 0}})


def contents(config: ModelConfig, weights: str) -> dict[str, tuple[tuple[int, ...], str]]:
  """(shape, dtype name) of every tensor in a serving checkpoint of a model, by name."""
  dtypes = {'matrix': weights, 'embedding': 'bfloat16', 'norm': 'float32', 'bias': 'float32', 'scale': 'float32'}
  tensors = parameters.parameters(config)
  if weights == 'int8':
    tensors = {**tensors, **parameters.scales(config)}
  return {name: (p.shape, dtypes[p.kind]) for name, p in tensors.items()}


def is_layered(name: str) -> bool:
  """Whether a tensor's first axis is the layers."""
  return name not in ('embedding', 'final_norm', parameters.bias_name('final_norm'))


def chunk_shape(name: str, shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
  """The chunks of a tensor: one layer of it, or a tile of one layer."""
  halve = lambda n: -(-n // 2)
  sides = list(shape[1:] if is_layered(name) else shape)
  if len(sides) == 2:
    for axis, limit in enumerate((MAX_CHUNK_ROWS, MAX_CHUNK_COLUMNS)):
      while sides[axis] > limit:
        sides[axis] = halve(sides[axis])
  while sides[0] > 1 and int(np.prod(sides)) * itemsize > MAX_CHUNK_BYTES:
    sides[0] = halve(sides[0])
  return (1, *sides) if is_layered(name) else tuple(sides)


class ServingTensor(Tensor):
  """A tensor of a serving checkpoint."""

  def __init__(self, name: str, path: str, store: ts.TensorStore, checksums: list[int]):
    super().__init__(store.shape, store.dtype.numpy_dtype, path)
    self.name = name
    self._store = store
    self._chunk = store.chunk_layout.read_chunk.shape
    self._grid = tuple(-(-n // c) for n, c in zip(self.shape, self._chunk))
    self._checksums = checksums
    self._verified = set()
    if len(checksums) != int(np.prod(self._grid)):
      raise CheckpointError(f'{name}: {path} has {int(np.prod(self._grid))} chunks, but {CHECKSUMS} lists '
                            f'{len(checksums)}')

  def chunks(self, bounds: Bounds | None = None) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """(number, index) of the chunks that cover `bounds`, in C order of the chunk grid."""
    bounds = bounds or tuple((0, n) for n in self.shape)
    ranges = (range(begin // c, -(-end // c)) for (begin, end), c in zip(bounds, self._chunk))
    for place in itertools.product(*ranges):
      index = tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(place, self._chunk, self.shape))
      yield int(np.ravel_multi_index(place, self._grid)), index

  def verify(self, bounds: Bounds | None = None) -> None:
    """Compares the checksums of chunks not read before. Raises CheckpointError."""
    for number, index in self.chunks(bounds):
      if number not in self._verified:
        if checksum(self._load(index)) != self._checksums[number]:
          place = '.'.join(str(s.start // c) for s, c in zip(index, self._chunk))
          raise CheckpointError(f'{self.name}: damaged data in {self.path}/{place}: its checksum is not the one '
                                f'recorded in {CHECKSUMS}; convert again')
        self._verified.add(number)

  def _load(self, index):
    try:
      return np.asarray(self._store[index].read().result())
    except ValueError as e:
      raise CheckpointError(f'{self.name}: damaged data in {self.path}: {storage.reason(e)}') from e

  def _read(self, bounds):
    self.verify(bounds)
    return self._load(tuple(slice(*b) for b in bounds))


def checksum(values: np.ndarray) -> int:
  """CRC-32 of the raw little-endian bytes in C order."""
  return zlib.crc32(np.ascontiguousarray(values).view(np.uint8).data)


class TensorWriter:
  """Writes one tensor, in whole chunks, of any order."""

  def __init__(self, directory: str, name: str, shape: tuple[int, ...], dtype: str):
    self.name, self.shape, self.dtype = name, shape, _DTYPES[dtype]
    self.chunk = chunk_shape(name, shape, self.dtype.itemsize)
    self._grid = tuple(-(-n // c) for n, c in zip(shape, self.chunk))
    self._checksums = {}
    self._store = ts.open({
        'driver': 'zarr',
        'kvstore': storage.kvstore(os.path.join(directory, name)),
        'metadata': {
            'shape': list(shape), 'chunks': list(self.chunk), 'dtype': _ZARR_DTYPES[dtype], 'compressor': COMPRESSOR,
            'fill_value': None,  # chunks of zeros are stored too: one that is not there has been lost
        },
    }, create=True, context=_no_cache).result()

  def write(self, begin: tuple[int, ...], values: np.ndarray) -> None:
    """Writes a block whose first element is at `begin`; the block starts and ends on chunk borders."""
    values = np.ascontiguousarray(values, self.dtype)
    for offset in itertools.product(*(range(0, n, c) for n, c in zip(values.shape, self.chunk))):
      place = tuple((b + o) // c for b, o, c in zip(begin, offset, self.chunk))
      piece = values[tuple(slice(o, o + c) for o, c in zip(offset, self.chunk))]
      index = tuple(slice(p * c, min((p + 1) * c, n)) for p, c, n in zip(place, self.chunk, self.shape))
      assert piece.shape == tuple(s.stop - s.start for s in index), (self.name, begin, values.shape)
      self._store[index].write(piece).result()
      self._checksums[place] = checksum(piece)

  def checksums(self) -> list[int]:
    """In C order of the chunk grid. Every chunk must have been written."""
    return [self._checksums[place] for place in itertools.product(*(range(n) for n in self._grid))]


def write_header(directory: str, config: ModelConfig, weights: str, source: dict[str, Any], tool_version: str,
                 checksums: dict[str, list[int]]) -> None:
  """Writes the two JSON files, the last thing that makes a directory a serving checkpoint.

  Args:
    directory: holds the arrays.
    config: the model, with the norm_scale of the stored norms.
    weights: 'int8' or 'bfloat16'.
    source: where it came from, for people: path, format, step, norm_scale_source.
    tool_version: of this package.
    checksums: of each tensor's chunks.
  """
  tensors = {name: {'shape': shape, 'dtype': dtype, 'chunks': chunk_shape(name, shape, _DTYPES[dtype].itemsize)}
             for name, (shape, dtype) in contents(config, weights).items()}
  header = {'format': FORMAT, 'version': VERSION, 'written_by': f't5x_inference_ext {tool_version}',
            'weights': weights, 'model': config.to_dict(), 'source': source, 'tensors': tensors}
  with open(os.path.join(directory, CHECKSUMS), 'w', encoding='utf-8') as f:
    json.dump({name: [f'{c:08x}' for c in values] for name, values in checksums.items()}, f)
  with open(os.path.join(directory, CONFIG), 'w', encoding='utf-8') as f:
    json.dump(header, f, indent=2)
    f.write('\n')
    f.flush()
    os.fsync(f.fileno())


def read_header(path: str, data: bytes) -> tuple[dict[str, Any], ModelConfig]:
  """The header of the serving checkpoint `path`, whose serving_config.json is `data`. Raises CheckpointError."""
  where = f'{path}/{CONFIG}'
  try:
    header = json.loads(data)
    if header['format'] != FORMAT:
      raise CheckpointError(f'{where}: format {header["format"]!r} is not {FORMAT!r}')
    if header['version'] != VERSION:
      raise CheckpointError(f'{where}: format version {header["version"]}, but this package reads version {VERSION}: '
                            f'written by {header.get("written_by")}')
    config = ModelConfig.from_dict(header['model'])
    if header['weights'] not in WEIGHTS:
      raise CheckpointError(f'{where}: weights {header["weights"]!r} are none of {", ".join(WEIGHTS)}')
    source = header.get('source')
    return {**header, 'source': source if isinstance(source, dict) else {}}, config
  except CheckpointError:
    raise
  except (ValueError, TypeError, KeyError) as e:
    raise CheckpointError(f'{where} is damaged: {type(e).__name__} {e}') from e


def read_tensors(path: str, config: ModelConfig, weights: str, cached: bool = True) -> dict[str, ServingTensor]:
  """The tensors of a serving checkpoint.

  Args:
    path: its directory.
    config: its model.
    weights: its weights.
    cached: False reads from the disk each time.

  Raises:
    CheckpointError: an array that is missing, or not of the model's shape and dtype.
  """
  data = storage.read_file(path, CHECKSUMS)
  try:
    checksums = {name: [int(c, 16) for c in values] for name, values in json.loads(data or b'').items()}
  except (ValueError, TypeError, AttributeError) as e:
    raise CheckpointError(f'{path}/{CHECKSUMS} is missing or damaged: {e}') from e
  expected = contents(config, weights)
  context = None if cached else _no_cache
  opening = {name: storage.open_array(name, f'{path}/{name}', context=context) for name in expected}
  tensors = {}
  for name, (shape, dtype) in expected.items():
    store = opening[name].store()
    if store.shape != shape or store.dtype.numpy_dtype != _DTYPES[dtype]:
      raise CheckpointError(f'{name}: {path}/{name} is {store.dtype.name} {list(store.shape)}, but {path}/{CONFIG} '
                            f'says {dtype} {list(shape)}')
    if name not in checksums:
      raise CheckpointError(f'{path}/{CHECKSUMS} lacks {name}')
    tensors[name] = ServingTensor(name, f'{path}/{name}', store, checksums[name])
  return tensors
