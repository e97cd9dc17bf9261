"""zarr arrays of a checkpoint, opened and read through tensorstore."""

import itertools
import math
import os

import numpy as np
import tensorstore as ts

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.tensor import Bounds, Tensor
from t5x_inference_ext.errors import CheckpointError

# Decoded chunks are cached, so that reading a multi-layer chunk one layer at a time decodes it
# once.
CACHE_BYTES = 512 * 2**20
_cached = ts.Context({'cache_pool': {'total_bytes_limit': CACHE_BYTES}})
# No cache: for values that are read only once, or have to be read from the disk again.
_uncached = ts.Context({'cache_pool': {'total_bytes_limit': 0}})


class ZarrTensor(Tensor):
  """A stored zarr array.

  A missing chunk is an error here; tensorstore alone would return fill values.
  """

  def __init__(self, name: str, path: str, store: ts.TensorStore, spec: dict) -> None:
    """Wrap an opened array.

    Args:
      name: Name of the parameter, for messages.
      path: Directory of the array.
      store: The opened array.
      spec: tensorstore's spec for opening the array.
    """
    super().__init__(store.shape, store.dtype.numpy_dtype, path)
    self.name = name
    stored_chunk = store.chunk_layout.read_chunk.shape or ()
    self.chunk = tuple(c or n for c, n in zip(stored_chunk, self.shape))
    self._store, self._spec = store, spec
    self._trailers = _GzipTrailers.of(store)

  def uncached(self) -> 'ZarrTensor':
    return OpeningArray(self.name, self.path, self._spec, cached=False).tensor()

  def _read(self, bounds: Bounds) -> np.ndarray:
    trailers = self._trailers.read(bounds) if self._trailers else {}
    try:
      values = np.asarray(self._store[tuple(slice(*b) for b in bounds)].read().result())
    except ValueError as e:
      raise CheckpointError(f'{self.name}: damaged data in {self.path}: {storage.reason(e)}') from e
    if self._trailers and (damage := self._trailers.damage(trailers)):
      raise CheckpointError(f'{self.name}: damaged data in {self.path}/{damage}')
    return values


class _GzipTrailers:
  """The last bytes of an array's gzip chunks, each read once.

  A gzip stream ends with a checksum and, in its last 4 bytes, its decompressed size. tensorstore
  compares both, but accepts a stream that was cut off within these bytes.
  """

  _BYTES = 4

  def __init__(self, store: ts.TensorStore, metadata: dict) -> None:
    assert store.kvstore is not None  # every zarr array has a kvstore
    self._kvstore, self._chunk = store.kvstore, tuple(metadata['chunks'])
    self._separator = metadata.get('dimension_separator', '.')
    size = math.prod(self._chunk) * store.dtype.numpy_dtype.itemsize
    self._expected = (size % 2 ** (8 * self._BYTES)).to_bytes(self._BYTES, 'little')
    self._checked: set[str] = set()

  @classmethod
  def of(cls, store: ts.TensorStore) -> '_GzipTrailers | None':
    """Make a _GzipTrailers for an array of T5X (gzip, zarr version 2); None for other arrays."""
    spec = store.spec().to_json()
    compressor = spec['metadata'].get('compressor') or {}
    is_gzip = spec['driver'] == 'zarr' and compressor.get('id') == 'gzip'
    return cls(store, spec['metadata']) if is_gzip else None

  def read(self, bounds: Bounds) -> dict[str, ts.Future]:
    """Start reading trailers of chunks in `bounds`, once each; return chunk key -> future."""
    ranges = (range(begin // c, -(-end // c)) for (begin, end), c in zip(bounds, self._chunk))
    keys = (self._separator.join(map(str, place)) or '0' for place in itertools.product(*ranges))
    tail = slice(-self._BYTES, None)
    return {k: self._kvstore.read(k, byte_range=tail) for k in keys if k not in self._checked}

  def damage(self, trailers: dict[str, ts.Future]) -> str | None:
    """Return a message about the first chunk that is cut off; None if all chunks are complete."""
    for key, trailer in trailers.items():
      try:
        found = trailer.result()
      except ValueError as e:
        return f'{key}: {storage.reason(e)}'
      if found.state == 'value' and found.value != self._expected:
        return f'{key}: the end of the file is missing'
      self._checked.add(key)
    return None


class OpeningArray:
  """An array that is being opened: start many with open_array, then wait for each."""

  def __init__(self, name: str, path: str, spec: dict, cached: bool) -> None:
    self.name, self.path, self._spec = name, path, spec
    context = _cached if cached else _uncached
    try:
      self._future = ts.open(ts.Spec(spec), open=True, read=True, context=context)
    except ValueError as e:  # a path that no file can have
      raise self._error(storage.reason(e)) from e

  def store(self) -> ts.TensorStore:
    """Wait for the array; on failure raise CheckpointError, naming parameter and directory."""
    try:
      store = self._future.result()
    except ValueError as e:
      raise self._error(storage.reason(e)) from e
    chunk = store.chunk_layout.read_chunk.shape or ()
    nbytes = math.prod(c or 1 for c in chunk) * store.dtype.numpy_dtype.itemsize
    # tensorstore kills the process if it can't allocate a chunk.
    if nbytes > os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'):
      raise self._error(
        f'chunks of {list(chunk)} are {nbytes / 1e9:.0f} GB each, more than the memory'
      )
    return store

  def tensor(self) -> ZarrTensor:
    """Wait for the array; on failure raise CheckpointError, naming parameter and directory."""
    return ZarrTensor(self.name, self.path, self.store(), self._spec)

  def _error(self, reason: str) -> CheckpointError:
    return CheckpointError(f'{self.name}: no readable zarr array at {self.path}: {reason}')


def open_array(
  name: str,
  path: str,
  *,
  driver: str = 'zarr',
  base: dict | None = None,
  key: str = '',
  zeros_are_stored: bool = True,
  cached: bool = True,
) -> OpeningArray:
  """Start opening a zarr array.

  Args:
    name: Name of the parameter, for messages.
    path: Directory of the array.
    driver: 'zarr' (version 2) or 'zarr3'.
    base: Spec of a key-value store that holds the array under `key`; None if the array is a
      directory.
    key: Key of the array in `base`.
    zeros_are_stored: False only if the writer is known to leave out chunks that hold only the fill
      value. Otherwise a missing chunk is an error.
    cached: Whether decoded chunks are cached for later reads; False reads from the disk each time.
  """
  store = storage.kvstore(path) if base is None else {**base, 'path': key.rstrip('/') + '/'}
  spec = {'driver': driver, 'kvstore': store, 'fill_missing_data_reads': not zeros_are_stored}
  return OpeningArray(name, path, spec, cached)
