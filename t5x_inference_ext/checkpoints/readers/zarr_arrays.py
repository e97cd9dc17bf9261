"""zarr arrays of a checkpoint, wherever it is: opened, and read as tensors."""

import numpy as np
import tensorstore as ts

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.readers.gzip_array import ChunkCache, GzipArray
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.errors import CheckpointError

# Decoded chunks are kept, so that reading one layer after another out of a chunk that holds several decodes it once.
CACHE_BYTES = 512 * 2**20
_cache, _context = (
  ChunkCache(CACHE_BYTES),
  ts.Context({'cache_pool': {'total_bytes_limit': CACHE_BYTES}}),
)
# What is read once, or must come from the disk, is not kept.
_no_cache = ts.Context({'cache_pool': {'total_bytes_limit': 0}})


class Stored(Tensor):
  """An array that tensorstore decodes.

  Missing chunks are errors, where tensorstore would give zeros.
  """

  def __init__(self, name: str, path: str, store: ts.TensorStore, spec: dict):
    super().__init__(store.shape, store.dtype.numpy_dtype, path)
    self.name = name
    self.chunk = tuple(
      c or n for c, n in zip(store.chunk_layout.read_chunk.shape or (), self.shape)
    )
    self._store, self._spec = store, spec

  def uncached(self):
    return Opening(self.name, self.path, self._spec, cached=False).tensor()

  def _read(self, bounds):
    try:
      return np.asarray(self._store[tuple(slice(*b) for b in bounds)].read().result())
    except ValueError as e:
      raise CheckpointError(f'{self.name}: damaged data in {self.path}: {storage.reason(e)}') from e


class Opening:
  """An array being opened: start many with open_array, then wait for each."""

  def __init__(self, name: str, path: str, spec: dict, cached: bool):
    self.name, self.path, self._spec, self._cached = name, path, spec, cached
    try:
      self._future = ts.open(
        ts.Spec(spec), open=True, read=True, context=_context if cached else _no_cache
      )
    except ValueError as e:  # a path that no file has
      raise self._error(e) from e

  def store(self) -> ts.TensorStore:
    """Raises CheckpointError, naming the parameter and the directory."""
    try:
      return self._future.result()
    except ValueError as e:
      raise self._error(e) from e

  def _error(self, e: ValueError) -> CheckpointError:
    return CheckpointError(
      f'{self.name}: no readable zarr array at {self.path}: {storage.reason(e)}'
    )

  def tensor(self) -> Tensor:
    store = self.store()
    if (
      self._spec['driver'] == 'zarr'
      and not self._spec['fill_missing_data_reads']
      and GzipArray.supports(store)
    ):
      return GzipArray(self.name, self.path, store, _cache if self._cached else None)
    return Stored(self.name, self.path, store, self._spec)


def open_array(
  name: str,
  path: str,
  *,
  driver: str = 'zarr',
  base: dict | None = None,
  key: str = '',
  zeros_are_stored: bool = True,
  cached: bool = True,
) -> Opening:
  """Starts opening a zarr array.

  Args:
    name: the parameter, for messages.
    path: its directory.
    driver: 'zarr' (version 2) or 'zarr3'.
    base: the spec of a key-value store that holds it under `key`, where it is not a directory of its own.
    key: see base.
    zeros_are_stored: False only where the writer is known to leave out chunks that are all fill value; everywhere else
      a chunk that is not there has been lost.
    cached: whether decoded chunks are kept for later reads; False reads from the disk each time.
  """
  store = storage.kvstore(path) if base is None else {**base, 'path': key.rstrip('/') + '/'}
  spec = {'driver': driver, 'kvstore': store, 'fill_missing_data_reads': not zeros_are_stored}
  return Opening(name, path, spec, cached)
