"""Files and zarr arrays of a checkpoint, on a local disk or in a bucket (gs://), all through tensorstore."""

import itertools
import math
import os
import re

import numpy as np
import tensorstore as ts

from t5x_inference_ext.checkpoints.tensor import Bounds, Tensor
from t5x_inference_ext.errors import CheckpointError

# Decoded chunks are kept, so that reading one layer after another out of a chunk that holds several decodes it once.
CACHE_BYTES = 512 * 2**20
_context = ts.Context({'cache_pool': {'total_bytes_limit': CACHE_BYTES}})
# What is read once, or must come from the disk, is not kept.
no_cache = ts.Context({'cache_pool': {'total_bytes_limit': 0}})


def is_remote(path: str) -> bool:
  return path.startswith('gs://')


def normalize(path) -> str:
  """An absolute path without a trailing slash; gs:// addresses are only stripped."""
  path = os.fspath(path)
  return path.rstrip('/') if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def kvstore(path: str) -> dict:
  """tensorstore's spec of a directory."""
  if is_remote(path):
    bucket, _, key = path.removeprefix('gs://').partition('/')
    return {'driver': 'gcs', 'bucket': bucket, 'path': key and key.rstrip('/') + '/'}
  return {'driver': 'file', 'path': path.rstrip('/') + '/'}


def read_file(directory: str, name: str) -> bytes | None:
  """A whole small file, or None where there is none."""
  if not is_remote(directory):
    path = os.path.join(directory, name)
    if not os.path.isfile(path):
      return None
    try:
      with open(path, 'rb') as f:
        return f.read()
    except OSError as e:
      raise CheckpointError(f'can\'t read {path}: {e.strerror}') from e
  try:
    result = ts.KvStore.open(kvstore(directory), context=_context).result().read(name).result()
  except ValueError as e:
    raise CheckpointError(f'can\'t read {directory}/{name}: {reason(e)}') from e
  return bytes(result.value) if result.state == 'value' else None


def reason(error: Exception) -> str:
  """tensorstore's message without its status code and spec dump."""
  text = re.sub(r'\s*\[(tensorstore_spec|source locations)=.*', '', str(error), flags=re.DOTALL)
  return re.sub(r'^[A-Z_]+: ', '', text)


class Stored(Tensor):
  """A zarr array.

  Missing chunks are errors, where tensorstore would give zeros.
  """

  def __init__(self, name: str, path: str, store: ts.TensorStore, spec: dict):
    super().__init__(store.shape, store.dtype.numpy_dtype, path)
    self.name = name
    self.chunk = tuple(c or n for c, n in zip(store.chunk_layout.read_chunk.shape or (), self.shape))
    self._store, self._spec = store, spec
    metadata = store.spec().to_json().get('metadata', {})
    self._ends_told = (metadata.get('compressor') or {}).get('id') == 'gzip' and metadata.get('zarr_format') == 2
    self._separator, self._complete = metadata.get('dimension_separator', '.'), set()

  def uncached(self):
    return Opening(self.name, self.path, self._spec, no_cache).tensor()

  def _read(self, bounds):
    try:
      if self._ends_told:
        self._check_ends(bounds)
      return np.asarray(self._store[tuple(slice(*b) for b in bounds)].read().result())
    except ValueError as e:
      raise CheckpointError(f'{self.name}: damaged data in {self.path}: {reason(e)}') from e


  def _check_ends(self, bounds: Bounds) -> None:
    """Raises CheckpointError for a gzip file without its end.

    tensorstore stops when it has all values, and so does not miss the checksum that follows them. A file's last four
    bytes are the length of what was compressed.
    """
    expected = math.prod(self.chunk) * self.dtype.itemsize % 2**32
    ranges = (range(begin // c, -(-end // c)) for (begin, end), c in zip(bounds, self.chunk))
    keys = [self._separator.join(map(str, place)) or '0' for place in itertools.product(*ranges)]
    ends = {key: self._store.kvstore.read(key, byte_range=slice(-4, None))
            for key in keys if key not in self._complete}
    for key, end in ends.items():
      try:
        result = end.result()
      except ValueError as e:  # shorter than four bytes
        raise CheckpointError(f'{self.name}: damaged data in {self.path}/{key}: {reason(e)}') from e
      if result.state == 'value' and int.from_bytes(result.value, 'little') != expected:
        raise CheckpointError(f'{self.name}: damaged data in {self.path}/{key}: the end of the file is not there')
      self._complete.add(key)


class Opening:
  """An array being opened: start many with open_array, then wait for each."""

  def __init__(self, name: str, path: str, spec: dict, context: ts.Context):
    self.name, self.path, self._spec = name, path, spec
    self._future = ts.open(ts.Spec(spec), open=True, read=True, context=context)

  def store(self) -> ts.TensorStore:
    """Raises CheckpointError, naming the parameter and the directory."""
    try:
      return self._future.result()
    except ValueError as e:
      raise CheckpointError(f'{self.name}: no readable zarr array at {self.path}: {reason(e)}') from e

  def tensor(self) -> Stored:
    return Stored(self.name, self.path, self.store(), self._spec)


def open_array(name: str, path: str, *, driver: str = 'zarr', base: dict | None = None, key: str = '',
               zeros_are_stored: bool = True, context: ts.Context | None = None) -> Opening:
  """Starts opening a zarr array.

  Args:
    name: the parameter, for messages.
    path: its directory.
    driver: 'zarr' (version 2) or 'zarr3'.
    base: the spec of a key-value store that holds it under `key`, where it is not a directory of its own.
    key: see base.
    zeros_are_stored: False only where the writer is known to leave out chunks that are all fill value; everywhere else
      a chunk that is not there has been lost.
    context: with the cache to use, where not the shared one.
  """
  store = kvstore(path) if base is None else {**base, 'path': key.rstrip('/') + '/'}
  spec = {'driver': driver, 'kvstore': store, 'fill_missing_data_reads': not zeros_are_stored}
  return Opening(name, path, spec, context or _context)
