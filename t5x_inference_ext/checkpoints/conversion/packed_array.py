"""zarr arrays of int4 matrices, stored two rows to a byte, that can be written in pieces."""

from collections.abc import Iterator
import math
import threading
from typing import Any

import numpy as np

from t5x_inference_ext.checkpoints.conversion import files
from t5x_inference_ext.checkpoints.conversion.raw_array import FINGERPRINTS, RawArray
from t5x_inference_ext.checkpoints.manifest import checksum
from t5x_inference_ext.checkpoints.tensor import Bounds
from t5x_inference_ext.quantization.nibbles import (
  HIGH,
  INT4,
  LOW,
  pack,
  packed_rows,
  packed_shape,
  unpack,
)


class PackedArray(RawArray):
  """An int4 array. Its shape, chunks, pieces and fingerprints are those of the values.

  Chunks have an even number of rows, so that no byte belongs to two chunks. Pieces may begin or end
  at any row: of a byte that two pieces share, each writes its own bits, one at a time.
  """

  def __init__(
    self, directory: str, name: str, shape: tuple[int, ...], chunk: tuple[int, ...]
  ) -> None:
    assert chunk[-2] % 2 == 0, 'chunks have whole bytes'
    super().__init__(directory, name, shape, INT4, chunk)
    self._lock = threading.Lock()

  @property
  def chunk_bytes(self) -> int:
    return math.prod(packed_shape(self.chunk))

  @property
  def metadata(self) -> dict[str, Any]:
    stored = {'chunks': list(packed_shape(self.chunk)), 'shape': list(packed_shape(self.shape))}
    return {**super().metadata, **stored}

  def write(self, pieces: list[tuple[Bounds, np.ndarray]]) -> None:
    chunk = packed_shape(self.chunk)
    for number, blocks in self._by_chunk(pieces).items():
      path, whole = self._path(number), []
      for inside, values in blocks:
        for rows, packed, mask in self._bytes(number, inside[-2], values):
          index = (*inside[:-2], rows, inside[-1])
          if mask is None:
            whole.append((index, packed))
            continue
          with self._lock:
            files.write_bits(path, chunk, index, packed, mask)
      if whole:
        files.write_blocks(path, chunk, whole)

  def _bytes(
    self, number: int, rows: slice, values: np.ndarray
  ) -> Iterator[tuple[slice, np.ndarray, np.uint8 | None]]:
    """Cut rows of values in a chunk into rows of bytes.

    Yields:
      The rows of bytes in the chunk, the bytes, and which of their bits to write; None: all.
    """
    begin, end = rows.start, rows.stop
    if begin % 2:
      yield slice(begin // 2, begin // 2 + 1), pack(values[..., :1, :]) << np.uint8(4), HIGH
      begin, values = begin + 1, values[..., 1:, :]
    first, last = self._bounds(number)[-2]
    if end % 2 and end < last - first:  # the next row has the other bits of the last byte
      yield slice(end // 2, end // 2 + 1), pack(values[..., -1:, :]), LOW
      end, values = end - 1, values[..., :-1, :]
    if begin < end:
      yield slice(begin // 2, packed_rows(end)), pack(values), None

  def read_back(self, number: int) -> tuple[int, int]:
    self.sync(number)
    bounds = self._bounds(number)
    sizes = [end - begin for begin, end in bounds]
    stored = np.fromfile(self._path(number), np.uint8).reshape(packed_shape(self.chunk))
    stored = stored[tuple(slice(n) for n in packed_shape(tuple(sizes)))]
    values = unpack(stored, 0, sizes[-2])
    return checksum(stored), self.fingerprint(bounds, values) % FINGERPRINTS

  def fingerprint(self, bounds: Bounds, values: np.ndarray) -> int:
    return super().fingerprint(bounds, values.view(np.uint8) & LOW)
