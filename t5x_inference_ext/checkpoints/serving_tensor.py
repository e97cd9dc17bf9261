"""Stored arrays of a serving checkpoint, whose chunks are verified when they are first read."""

from collections.abc import Iterator, Sequence
import itertools
import math

import numpy as np
import tensorstore as ts

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.manifest import checksum
from t5x_inference_ext.checkpoints.tensor import Bounds, Tensor
from t5x_inference_ext.errors import CheckpointError
from t5x_inference_ext.quantization.nibbles import INT4, packed_rows, unpack

CHECKSUMS = 'checksums.json'


class ServingTensor(Tensor):
  """A tensor of a serving checkpoint.

  Attributes:
    checksums: The recorded CRC-32 of each chunk, in C order of the chunk grid.
  """

  def __init__(self, name: str, path: str, store: ts.TensorStore, checksums: list[int]) -> None:
    """Wrap an opened array.

    Args:
      name: Name of the tensor.
      path: Directory of the tensor.
      store: The opened array.
      checksums: CRC-32 of each chunk, in C order of the chunk grid.
    """
    super().__init__(store.shape, store.dtype.numpy_dtype, path)
    self.name = name
    self._store = store
    self.chunk = tuple(c or 1 for c in store.chunk_layout.read_chunk.shape or ())
    self._grid = tuple(-(-n // c) for n, c in zip(self.shape, self.chunk))
    self.checksums = checksums
    self._verified: set[int] = set()
    count = math.prod(self._grid)
    if len(checksums) != count:
      raise CheckpointError(
        f'{name}: {path} has {count} chunks, but {CHECKSUMS} lists {len(checksums)}'
      )

  def chunks(self, bounds: Bounds | None = None) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """Yield the number and index of each chunk that overlaps `bounds`, in C order of the grid."""
    bounds = bounds or tuple((0, n) for n in self.shape)
    ranges = (range(begin // c, -(-end // c)) for (begin, end), c in zip(bounds, self.chunk))
    for place in itertools.product(*ranges):
      index = tuple(
        slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(place, self.chunk, self.shape)
      )
      yield int(np.ravel_multi_index(place, self._grid)), index

  def check(self, number: int, index: tuple[slice, ...]) -> np.ndarray:
    """Return the values of a chunk; raise CheckpointError if its checksum differs."""
    values = self._load(index)
    if number not in self._verified:
      if checksum(values) != self.checksums[number]:
        raise CheckpointError(
          f'{self.name}: damaged data in {self.path}/{self.file(index)}: its checksum is not the '
          f'one recorded in {CHECKSUMS}; convert again'
        )
      self._verified.add(number)
    return values

  def check_padding(self, index: tuple[slice, ...]) -> None:
    """Raise CheckpointError if a chunk has bytes other than zero beyond the array's end."""
    inside = tuple(slice(0, s.stop - s.start) for s in index)
    if all(s.stop == c for s, c in zip(inside, self.chunk)):
      return
    key = self.file(index)
    assert self._store.kvstore is not None  # every zarr array has a kvstore
    stored = self._store.kvstore.read(key).result().value
    if len(stored) != math.prod(self.chunk) * self.dtype.itemsize:
      return  # compressed: written by an earlier version
    values = np.frombuffer(stored, np.uint8).reshape(*self.chunk, self.dtype.itemsize).copy()
    values[inside] = 0
    if values.any():
      raise CheckpointError(
        f'{self.name}: damaged data in {self.path}/{key}: the padding beyond the array is '
        'not zero; convert again'
      )

  def file(self, index: tuple[slice, ...]) -> str:
    """Return the name of a chunk's file."""
    return '.'.join(str(s.start // c) for s, c in zip(index, self.chunk))

  def _load(self, index: tuple[slice, ...]) -> np.ndarray:
    """Return the values at `index` without verifying checksums."""
    try:
      return np.asarray(self._store[index].read().result())
    except ValueError as e:
      raise CheckpointError(f'{self.name}: damaged data in {self.path}: {storage.reason(e)}') from e

  def _read(self, bounds: Bounds) -> np.ndarray:
    index = tuple(slice(*b) for b in bounds)
    chunks = list(self.chunks(bounds))
    if [i for _, i in chunks] == [index]:  # exactly one chunk: `check` reads and verifies it
      return self.check(*chunks[0])
    for number, chunk in chunks:
      if number not in self._verified:
        self.check(number, chunk)
    return self._load(index)


class PackedTensorRows(Tensor):
  """An int4 tensor of a serving checkpoint, which stores two rows to a byte.

  Attributes:
    stored: The bytes, [.., rows / 2, columns].
  """

  def __init__(self, stored: ServingTensor, shape: Sequence[int]) -> None:
    super().__init__(shape, INT4, stored.path)
    self.stored = stored
    self.chunk = (*stored.chunk[:-2], 2 * stored.chunk[-2], stored.chunk[-1])

  def _read(self, bounds: Bounds) -> np.ndarray:
    *lead, (begin, end), columns = bounds
    rows = begin // 2, packed_rows(end)
    packed = self.stored.read(tuple(slice(*b) for b in (*lead, rows, columns)))
    return unpack(packed, begin % 2, end - begin)
