"""zarr arrays that are written in pieces of any shape.

They have version 2, C order, no compression, and one allocated file a chunk.
They are uncompressed because one chunk of a T5X checkpoint (all layers of some rows and columns)
ends up in many chunks, each of one layer, and each of those gets its values from many source
chunks. A compressed chunk would have to be held in memory until it is complete.
"""

from collections.abc import Iterable
import functools
import itertools
import json
import math
import os
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from t5x_inference_ext.checkpoints.conversion import files
from t5x_inference_ext.checkpoints.manifest import checksum
from t5x_inference_ext.checkpoints.tensor import Bounds

ZARR_DTYPES = {'int8': '|i1', 'bfloat16': 'bfloat16', 'float32': '<f4'}
# Fingerprints are summed modulo this.
FINGERPRINTS = 2**32
# Rows of a piece are fingerprinted so many bytes at a time, to stay in the processor's cache.
_FINGERPRINT_BYTES = 2**18


class RawArray:
  """One array, in a directory of its own.

  Attributes:
    name: Name of the array and of its directory.
    path: The directory.
    shape: Shape of the array.
    dtype: Its dtype, one of ZARR_DTYPES.
    chunk: Shape of a chunk.
    grid: Number of chunks along each axis.
  """

  METADATA = '.zarray'

  def __init__(
    self,
    directory: str,
    name: str,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    chunk: tuple[int, ...],
  ) -> None:
    self.name, self.path = name, os.path.join(directory, name)
    self.shape, self.dtype, self.chunk = tuple(shape), np.dtype(dtype), tuple(chunk)
    self.grid = tuple(-(-n // c) for n, c in zip(self.shape, self.chunk))

  @property
  def chunk_bytes(self) -> int:
    """Bytes of a stored chunk, padding at the array's end included."""
    return math.prod(self.chunk) * self.dtype.itemsize

  @property
  def nbytes(self) -> int:
    """Bytes on disk of all chunks."""
    return math.prod(self.grid) * self.chunk_bytes

  @functools.cached_property
  def metadata(self) -> dict[str, Any]:
    """The content of METADATA. There is no fill value: a chunk that is not there has been lost."""
    return {
      'chunks': list(self.chunk),
      'compressor': None,
      'dimension_separator': '.',
      'dtype': ZARR_DTYPES[self.dtype.name],
      'fill_value': None,
      'filters': None,
      'order': 'C',
      'shape': list(self.shape),
      'zarr_format': 2,
    }

  @property
  def metadata_file(self) -> bytes:
    """The file METADATA."""
    return json.dumps(self.metadata).encode()

  def create(self) -> None:
    """Make the directory, and all chunks as zeros. Raises OSError where the disk is too small."""
    os.makedirs(self.path, exist_ok=True)
    for number in self.chunks():
      files.allocate(self._path(number), self.chunk_bytes)
    files.write_file(os.path.join(self.path, self.METADATA), self.metadata_file)

  def is_created(self) -> bool:
    """Return whether all files that create() makes are there, and as large."""
    try:
      with open(os.path.join(self.path, self.METADATA), 'rb') as f:
        same = f.read() == self.metadata_file
      return same and all(os.path.getsize(self._path(n)) == self.chunk_bytes for n in self.chunks())
    except OSError:
      return False

  def write(self, pieces: list[tuple[Bounds, np.ndarray]]) -> None:
    """Write values within bounds; others may write other parts of the same chunks meanwhile."""
    by_chunk: dict[tuple[int, ...], list[files.IndexedValues]] = {}
    for bounds, values in pieces:
      for place in itertools.product(
        *(range(b // c, -(-e // c)) for (b, e), c in zip(bounds, self.chunk))
      ):
        inside, taken = [], []
        for p, c, (b, e) in zip(place, self.chunk, bounds):
          first, last = max(b, p * c), min(e, (p + 1) * c)
          inside.append(slice(first - p * c, last - p * c))
          taken.append(slice(first - b, last - b))
        by_chunk.setdefault(place, []).append((tuple(inside), values[tuple(taken)]))
    for place, blocks in by_chunk.items():
      files.write_blocks(os.path.join(self.path, '.'.join(map(str, place))), self.chunk, blocks)

  def chunks(self) -> range:
    """Return the numbers of the chunks, in C order of their grid."""
    return range(math.prod(self.grid))

  def values_bytes(self, number: int) -> int:
    """Return the bytes of a chunk without padding."""
    return math.prod(e - b for b, e in self._bounds(number)) * self.dtype.itemsize

  def sync(self, number: int) -> None:
    """Flush a chunk to the disk and drop it from the page cache."""
    files.sync(self._path(number))

  def read_back(self, number: int) -> tuple[int, int]:
    """Flush a chunk and read it from the disk.

    Returns:
      CRC-32 and fingerprint of its values, without padding.
    """
    self.sync(number)
    bounds = self._bounds(number)
    values = np.fromfile(self._path(number), self.dtype).reshape(self.chunk)
    values = values[tuple(slice(e - b) for b, e in bounds)]
    return checksum(values), self.fingerprint(bounds, values)

  def fingerprint(self, bounds: Bounds, values: np.ndarray) -> int:
    """Return the sum of all bytes, each weighted by its place in the array, modulo FINGERPRINTS.

    The fingerprints of pieces add up to that of the array, in any order and however it is cut, so
    it is known of what was written before anything is read back. Weights are pseudo-random: two
    values exchanged change the sum. (A CRC-32 of pieces in any order would take a call for each row
    of each piece.)

    Args:
      bounds: of the values in the array.
      values: [...], of the array's dtype.
    """
    *outer, (begin, end) = bounds
    width = self.dtype.itemsize
    column_weights = _weights(np.arange(begin * width, end * width))
    rows = np.zeros((), np.int64)  # the number of each row in the array
    for (b, e), n in zip(outer, self.shape):
      rows = rows[..., None] * n + np.arange(b, e)
    row_weights = _weights(rows.reshape(-1))
    data = np.ascontiguousarray(values).reshape(len(row_weights), -1).view(np.uint8)
    step = max(1, _FINGERPRINT_BYTES // data.shape[1])
    total = 0
    for i in range(0, len(data), step):
      sums = np.einsum('rc,c->r', data[i : i + step].astype(np.uint32), column_weights)
      total += int((sums * row_weights[i : i + step]).sum(dtype=np.uint64))
    return total % FINGERPRINTS

  def _bounds(self, number: int) -> Bounds:
    """Return the bounds of a chunk in the array."""
    place = map(int, np.unravel_index(number, self.grid))
    return tuple((p * c, min((p + 1) * c, n)) for p, c, n in zip(place, self.chunk, self.shape))

  def _path(self, number: int) -> str:
    return os.path.join(self.path, '.'.join(map(str, np.unravel_index(number, self.grid))))


def _weights(places: np.ndarray) -> np.ndarray:
  """Return pseudo-random odd uint32 weights of places (splitmix64)."""
  x = (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return (x >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def array_files(arrays: Iterable[RawArray]) -> dict[str, bytes]:
  """Return the metadata files of arrays, by their names in the checkpoint."""
  return {f'{array.name}/{array.METADATA}': array.metadata_file for array in arrays}
