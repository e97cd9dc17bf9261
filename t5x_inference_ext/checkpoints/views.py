"""Views of lazy tensors: transposed, with rows in another order, scaled, rounded, constant."""

import numpy as np
import numpy.typing as npt

from t5x_inference_ext.checkpoints.tensor import Bounds, Tensor
from t5x_inference_ext.quantization import rounding


class Transposed(Tensor):
  """A tensor with its last two axes swapped."""

  def __init__(self, source: Tensor) -> None:
    super().__init__(_exchanged(source.shape), source.dtype, source.path)
    self._source, self.chunk = source, _exchanged(source.chunk)

  def uncached(self) -> 'Transposed':
    return Transposed(self._source.uncached())

  def _read(self, bounds: Bounds) -> np.ndarray:
    values = self._source.read(tuple(slice(*b) for b in _exchanged(bounds)))
    return values.swapaxes(-1, -2)


def _exchanged(sizes: tuple) -> tuple:
  return (*sizes[:-2], sizes[-1], sizes[-2])


class Reordered(Tensor):
  """Selected indices of a tensor's axis in a given order, such as the heads of one fused part.

  The view reads `unit` indices together, as the smallest range of `source` that contains them. So
  the indices of a unit, such as a head, should be close together in `source`.
  """

  def __init__(self, source: Tensor, axis: int, order: npt.NDArray[np.int64], unit: int) -> None:
    """Wrap a tensor.

    Args:
      source: The tensor.
      axis: Axis of the reordered indices.
      order: Index in `source` of each index of the view.
      unit: Number of indices that are read together.
    """
    super().__init__(
      (*source.shape[:axis], len(order), *source.shape[axis + 1 :]), source.dtype, source.path
    )
    self._source, self._axis, self._order, self._unit = source, axis, order, unit
    self.chunk = (*source.chunk[:axis], unit, *source.chunk[axis + 1 :])

  def uncached(self) -> 'Reordered':
    return Reordered(self._source.uncached(), self._axis, self._order, self._unit)

  def _read(self, bounds: Bounds) -> np.ndarray:
    out = np.empty([end - begin for begin, end in bounds], self.dtype)
    index = [slice(*b) for b in bounds]
    place: list[slice | np.ndarray] = [slice(None)] * len(bounds)
    first, end = bounds[self._axis]
    begin = first
    while begin < end:
      stop = min(end, (begin // self._unit + 1) * self._unit)
      wanted = self._order[begin:stop]
      low = int(wanted.min())
      index[self._axis] = slice(low, int(wanted.max()) + 1)
      place[self._axis] = slice(begin - first, stop - first)
      out[tuple(place)] = self._source.read(tuple(index)).take(wanted - low, self._axis)
      begin = stop
    return out


class Affine(Tensor):
  """The float32 values (x + offset) * factor of a tensor x."""

  def __init__(self, source: Tensor, factor: float = 1.0, offset: float = 0.0) -> None:
    super().__init__(source.shape, np.float32, source.path)
    self._source, self._factor, self._offset = source, np.float32(factor), np.float32(offset)
    self.chunk = source.chunk

  def uncached(self) -> 'Affine':
    return Affine(self._source.uncached(), float(self._factor), float(self._offset))

  def _read(self, bounds: Bounds) -> np.ndarray:
    values = self._source.read(tuple(slice(*b) for b in bounds)).astype(np.float32)
    values += self._offset
    values *= self._factor
    return values


class RoundedTable(Tensor):
  """The float32 values that a table [V, E] stands for after a conversion quantizes its rows."""

  def __init__(self, source: Tensor, dtype: np.dtype, search: bool) -> None:
    """Wrap a table.

    Args:
      source: The float table.
      dtype: The quantized dtype.
      search: Whether the conversion searches scales for the least squared error.
    """
    super().__init__(source.shape, np.float32, source.path)
    self._source, self._rounding = source, (dtype, search)

  def _read(self, bounds: Bounds) -> np.ndarray:
    rows, columns = (slice(*b) for b in bounds)
    channels = self._source.read((rows, slice(None)))[..., None]  # each row is a layer [E, 1]
    return rounding.rounded_weights(channels, *self._rounding)[:, columns, 0]


class Constant(Tensor):
  """A float32 tensor of equal values, for a tensor that the checkpoint lacks."""

  def __init__(self, shape: tuple[int, ...], value: float, path: str) -> None:
    super().__init__(shape, np.float32, path)
    self._value = value

  def _read(self, bounds: Bounds) -> np.ndarray:
    return np.full([end - begin for begin, end in bounds], self._value, np.float32)


class Reshaped(Tensor):
  """A small tensor in another shape, read whole."""

  def __init__(self, source: Tensor, shape: tuple[int, ...]) -> None:
    super().__init__(shape, source.dtype, source.path)
    self._source = source

  def uncached(self) -> 'Reshaped':
    return Reshaped(self._source.uncached(), self.shape)

  def _read(self, bounds: Bounds) -> np.ndarray:
    return self._source.read().reshape(self.shape)[tuple(slice(*b) for b in bounds)]
