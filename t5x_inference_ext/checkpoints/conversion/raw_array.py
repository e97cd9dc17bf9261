"""zarr arrays that can be written in pieces of any shape.

The arrays are zarr version 2, in C order, uncompressed, with one preallocated file per chunk. They
are uncompressed because one chunk of a T5X checkpoint (all layers of some rows and columns) is
spread over many output chunks, one per layer, and each output chunk gets values from many source
chunks. A compressed output chunk would have to stay in memory until it is complete.
"""

from collections.abc import Iterable, Iterator
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

# Names of the stored element types; two int4 values share a byte (packed_array.py).
ZARR_DTYPES = {'int4': '|u1', 'int8': '|i1', 'bfloat16': 'bfloat16', 'float32': '<f4'}
# Fingerprints are summed modulo this.
FINGERPRINTS = 2**32
# Bytes of a chunk that are read back at a time.
_READ_BYTES = 2**22
# Units that are fingerprinted at a time, few enough to stay in the processor's cache.
_FINGERPRINT_UNITS = 2**17


class RawArray:
  """One array in its own directory.

  Attributes:
    name: Name of the array and of its directory.
    path: The directory.
    shape: Shape of the array.
    dtype: Dtype of the array, one of ZARR_DTYPES.
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
    """Bytes of a stored chunk, including padding at the array's end."""
    return math.prod(self.chunk) * self.dtype.itemsize

  @property
  def nbytes(self) -> int:
    """Bytes of all chunks on disk."""
    return math.prod(self.grid) * self.chunk_bytes

  @property
  def metadata(self) -> dict[str, Any]:
    """The content of METADATA. It has no fill value, so a missing chunk means lost data."""
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
    """The file METADATA, as bytes."""
    return json.dumps(self.metadata).encode()

  def create(self) -> None:
    """Make the directory, and all chunks as zeros. Raises OSError if the disk is full."""
    os.makedirs(self.path, exist_ok=True)
    for number in self.chunks():
      files.allocate(self._path(number), self.chunk_bytes)
    files.write_file(os.path.join(self.path, self.METADATA), self.metadata_file)

  def is_created(self) -> bool:
    """Return whether all files that create() makes exist, with their full sizes."""
    try:
      with open(os.path.join(self.path, self.METADATA), 'rb') as f:
        same = f.read() == self.metadata_file
      return same and all(os.path.getsize(self._path(n)) == self.chunk_bytes for n in self.chunks())
    except OSError:
      return False

  def write(self, pieces: list[tuple[Bounds, np.ndarray]]) -> None:
    """Write pairs (bounds, values). Threads may write disjoint parts of a chunk at once."""
    for number, blocks in self._by_chunk(pieces).items():
      files.write_blocks(self._path(number), self.chunk, blocks)

  def _by_chunk(
    self, pieces: list[tuple[Bounds, np.ndarray]]
  ) -> dict[int, list[files.IndexedValues]]:
    """Cut values at the borders of chunks.

    Args:
      pieces: Pairs (bounds in the array, values).

    Returns:
      Index of a chunk -> its pairs (index inside the chunk, values).
    """
    by_chunk: dict[int, list[files.IndexedValues]] = {}
    for bounds, values in pieces:
      for number, inside in self.overlaps(bounds):
        place = self._place(number)
        first = tuple(p * c - b for p, c, (b, _) in zip(place, self.chunk, bounds))
        taken = tuple(slice(f + s.start, f + s.stop) for f, s in zip(first, inside))
        by_chunk.setdefault(number, []).append((inside, values[taken]))
    return by_chunk

  def overlaps(self, bounds: Bounds) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """Yield (chunk's index, index of the overlap in the chunk) for chunks that overlap `bounds`."""
    for place in itertools.product(
      *(range(b // c, -(-e // c)) for (b, e), c in zip(bounds, self.chunk))
    ):
      inside = (
        slice(max(b - p * c, 0), min(e - p * c, c))
        for p, c, (b, e) in zip(place, self.chunk, bounds)
      )
      yield int(np.ravel_multi_index(place, self.grid)), tuple(inside)

  def chunks(self) -> range:
    """Return the indices of the chunks, in C order of their grid."""
    return range(math.prod(self.grid))

  def values_bytes(self, number: int) -> int:
    """Return the bytes of a chunk's values, without padding."""
    return math.prod(e - b for b, e in self._bounds(number)) * self.dtype.itemsize

  def sync(self, number: int) -> None:
    """Flush a chunk to the disk and drop it from the page cache."""
    files.sync(self._path(number))

  def read_back(self, number: int) -> tuple[int, int]:
    """Flush a chunk to the disk, and read it back from the disk.

    Returns:
      CRC-32 and fingerprint of the chunk's values, excluding padding.
    """
    self.sync(number)
    bounds = self._bounds(number)
    axis = next((a for a, n in enumerate(self.chunk) if n > 1), 0)  # the file is rows of this axis
    inner = self.chunk[axis + 1 :]
    step = max(1, _READ_BYTES // (math.prod(inner) * self.dtype.itemsize))
    inside = tuple(slice(e - b) for b, e in bounds[axis + 1 :])
    begin, end = bounds[axis]
    crc = fingerprint = 0
    with open(self._path(number), 'rb') as f:
      for first in range(begin, end, step):
        last = min(first + step, end)
        values = np.fromfile(f, self.dtype, (last - first) * math.prod(inner))
        values = values.reshape(last - first, *inner)[:, *inside]
        crc = checksum(values, crc)
        part = (*bounds[:axis], (first, last), *bounds[axis + 1 :])
        fingerprint += self.fingerprint(part, values)
    return crc, fingerprint % FINGERPRINTS

  def fingerprint(self, bounds: Bounds, values: np.ndarray) -> int:
    """Return the sum of all units, each weighted by its position in the array, mod FINGERPRINTS.

    A unit is one byte of int8 values and two bytes of other dtypes, which halves the time.

    However an array is cut into pieces, their fingerprints add up to the array's. So the expected
    sum is known before anything is read back. The position weights are pseudo-random, so that
    swapping two values changes the sum. (A CRC-32 can't be summed like this: it would take a call
    for each row of each piece.)

    Args:
      bounds: Bounds of the values in the array.
      values: [...], in the array's dtype.
    """
    *outer, (begin, end) = bounds
    unit = np.dtype(np.uint8 if self.dtype.itemsize == 1 else '<u2')
    width = self.dtype.itemsize // unit.itemsize
    column_weights = _weights(np.arange(begin * width, end * width))
    rows = np.zeros((), np.int64)  # the index of each row in the array
    for (b, e), n in zip(outer, self.shape):
      rows = rows[..., None] * n + np.arange(b, e)
    row_weights = _weights(rows.reshape(-1))
    data = np.ascontiguousarray(values).reshape(len(row_weights), -1).view(unit)
    step = max(1, _FINGERPRINT_UNITS // data.shape[1])
    total = 0
    for i in range(0, len(data), step):
      sums = np.einsum('rc,c->r', data[i : i + step].astype(np.uint32), column_weights)
      total += int((sums * row_weights[i : i + step]).sum(dtype=np.uint64))
    return total % FINGERPRINTS

  def _bounds(self, number: int) -> Bounds:
    """Return the bounds of a chunk in the array."""
    return tuple(
      (p * c, min((p + 1) * c, n)) for p, c, n in zip(self._place(number), self.chunk, self.shape)
    )

  def _place(self, number: int) -> tuple[int, ...]:
    """Return the position of a chunk in the grid of chunks."""
    return tuple(map(int, np.unravel_index(number, self.grid)))

  def _path(self, number: int) -> str:
    return os.path.join(self.path, '.'.join(map(str, self._place(number))))


def _weights(places: np.ndarray) -> np.ndarray:
  """Return a pseudo-random odd uint32 weight for each position in an array (splitmix64)."""
  x = (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return (x >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def array_files(arrays: Iterable[RawArray]) -> dict[str, bytes]:
  """Return the metadata files of arrays: name in the checkpoint -> content."""
  return {f'{array.name}/{array.METADATA}': array.metadata_file for array in arrays}
