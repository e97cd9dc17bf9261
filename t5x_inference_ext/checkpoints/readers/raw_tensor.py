"""Arrays stored in a file without encoding: little-endian, in C order, uncompressed."""

from collections.abc import Sequence
import itertools
import math

import numpy as np
import numpy.typing as npt

from t5x_inference_ext.checkpoints.readers.stored_bytes import StoredBytes
from t5x_inference_ext.checkpoints.tensor import Bounds, Tensor


class RawTensor(Tensor):
  """An array in a file. Reading a slice reads only the slice's bytes."""

  def __init__(
    self, file: StoredBytes, offset: int, shape: Sequence[int], dtype: npt.DTypeLike
  ) -> None:
    """Wrap an array.

    Args:
      file: The file.
      offset: Position of the array's first byte in the file.
      shape: Shape of the array.
      dtype: Dtype of the array.
    """
    super().__init__(shape, dtype, file.path)
    self._file, self._offset = file, offset
    # Any range of bytes can be read, so the chunk is nominal: whole rows, which are contiguous.
    self.chunk = (*(1 for _ in self.shape[:-1]), *self.shape[-1:])

  def _read(self, bounds: Bounds) -> np.ndarray:
    out = np.empty([end - begin for begin, end in bounds], self.dtype)
    # The trailing axes that are read whole, with the range of the axis before them, are one range
    # of bytes. Loop over all axes before that one.
    inner = len(bounds)
    while inner and bounds[inner - 1] == (0, self.shape[inner - 1]):
      inner -= 1
    looped = max(0, inner - 1)
    strides = [math.prod(self.shape[axis + 1 :]) for axis in range(len(bounds))]
    first = sum(begin * stride for (begin, _), stride in zip(bounds[looped:], strides[looped:]))
    runs = out.reshape(math.prod(out.shape[:looped]), -1).view(np.uint8)
    places = itertools.product(*(range(begin, end) for begin, end in bounds[:looped]))
    for run, place in zip(runs, places):
      start = first + sum(i * stride for i, stride in zip(place, strides))
      self._file.read_into(self._offset + start * self.dtype.itemsize, run)
    return out
