"""zarr arrays that are written in pieces of any shape: version 2, C order, uncompressed, one allocated file a chunk.

Uncompressed, because what is read as one chunk of a T5X checkpoint (all layers of some rows and columns) ends up in
many chunks, each of one layer, and each of those gets its values from many chunks read: a compressed chunk would have
to be held in memory until it is complete.
"""

from collections.abc import Iterable, Iterator
import itertools
import json
import math
import os

import numpy as np

from t5x_inference_ext.checkpoints.conversion import files
from t5x_inference_ext.checkpoints.manifest import checksum
from t5x_inference_ext.checkpoints.tensor import Bounds

ZARR_DTYPES = {'int8': '|i1', 'bfloat16': 'bfloat16', 'float32': '<f4'}


class RawArray:
  """One array below a directory.

  Attributes:
    name, path: its directory's.
    shape, dtype, chunk: its own.
  """

  METADATA = '.zarray'

  def __init__(
    self, directory: str, name: str, shape: tuple[int, ...], dtype: np.dtype, chunk: tuple[int, ...]
  ):
    self.name, self.shape, self.dtype, self.chunk = (
      name,
      tuple(shape),
      np.dtype(dtype),
      tuple(chunk),
    )
    self.path = os.path.join(directory, name)
    self._grid = tuple(-(-n // c) for n, c in zip(self.shape, self.chunk))

  @property
  def chunk_bytes(self) -> int:
    """Of a stored chunk, padding at the array's end included."""
    return math.prod(self.chunk) * self.dtype.itemsize

  @property
  def nbytes(self) -> int:
    """On disk."""
    return math.prod(self._grid) * self.chunk_bytes

  @property
  def metadata_file(self) -> bytes:
    """What METADATA holds."""
    return json.dumps(self.metadata).encode()

  @property
  def metadata(self) -> dict:
    """The same, parsed. No fill value: a chunk that is not there has been lost."""
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

  def create(self) -> None:
    """Makes the directory, and all chunks as zeros. Raises OSError where the disk is too small."""
    os.makedirs(self.path, exist_ok=True)
    for number in range(math.prod(self._grid)):
      files.allocate(self._path(number), self.chunk_bytes)
    files.write_file(os.path.join(self.path, self.METADATA), self.metadata_file)

  def write(self, pieces: list[tuple[Bounds, np.ndarray]]) -> None:
    """Writes values within bounds; other threads and processes may be writing others, also of the same chunks."""
    by_chunk = {}
    for bounds, values in pieces:
      ranges = (range(b // c, -(-e // c)) for (b, e), c in zip(bounds, self.chunk))
      for place in itertools.product(*ranges):
        spans = [
          (max(b, p * c), min(e, (p + 1) * c)) for p, c, (b, e) in zip(place, self.chunk, bounds)
        ]
        inside = tuple(
          slice(b - p * c, e - p * c) for p, c, (b, e) in zip(place, self.chunk, spans)
        )
        taken = tuple(slice(s - b, e - b) for (s, e), (b, _) in zip(spans, bounds))
        by_chunk.setdefault(place, []).append((inside, values[taken]))
    for place, blocks in by_chunk.items():
      files.write_blocks(
        self._path(int(np.ravel_multi_index(place, self._grid))), self.chunk, blocks
      )

  def chunks(self) -> Iterator[int]:
    """The numbers of the chunks, in C order of their grid."""
    return iter(range(math.prod(self._grid)))

  def values_bytes(self, number: int) -> int:
    """Of a chunk without padding."""
    return math.prod(s.stop for s in self._values(number)) * self.dtype.itemsize

  def sync(self, number: int) -> None:
    files.sync(self._path(number))

  def seal(self, number: int) -> tuple[int, int]:
    """Puts a chunk on the disk and reads it back: (CRC-32 of its values without padding, sum of their bytes)."""
    self.sync(number)
    values = np.fromfile(self._path(number), self.dtype).reshape(self.chunk)[self._values(number)]
    return checksum(values), byte_sum(values)

  def _values(self, number: int) -> tuple[slice, ...]:
    place = np.unravel_index(number, self._grid)
    return tuple(slice(0, int(min(c, n - p * c))) for p, c, n in zip(place, self.chunk, self.shape))

  def _path(self, number: int) -> str:
    return os.path.join(self.path, '.'.join(map(str, np.unravel_index(number, self._grid))))


def byte_sum(values: np.ndarray) -> int:
  """The sum of all bytes: the same for an array as for its pieces together, in any order."""
  return int(np.ascontiguousarray(values).view(np.uint8).sum(dtype=np.uint64))


def array_files(arrays: Iterable[RawArray]) -> dict[str, bytes]:
  """Return the metadata files of arrays, by their names in the checkpoint."""
  return {f'{array.name}/{array.METADATA}': array.metadata_file for array in arrays}
