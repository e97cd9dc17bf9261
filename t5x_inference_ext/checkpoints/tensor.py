"""Lazy tensors: stored arrays that are read in slices, when needed."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from t5x_inference_ext.errors import CheckpointError
from t5x_inference_ext.quantization.formats import stored_size

# Span: [begin, end) along one axis. Bounds: a span for every axis.
Span: TypeAlias = tuple[int, int]
Bounds: TypeAlias = tuple[Span, ...]


class Tensor:
  """An array whose values are read on demand, slice by slice.

  Attributes:
    shape: Shape of the array.
    dtype: Dtype of the values that read() returns; may be ml_dtypes.bfloat16.
    path: File or directory that holds the array, for messages.
    chunk: Shape of a chunk, the smallest part that can be decoded.
  """

  def __init__(self, shape: Sequence[int], dtype: npt.DTypeLike, path: str) -> None:
    self.shape = tuple(int(n) for n in shape)
    self.dtype = np.dtype(dtype)
    self.path = path
    self.chunk = self.shape

  def uncached(self) -> 'Tensor':
    """Return this tensor without a cache of decoded chunks, for reading each chunk once."""
    return self

  def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
    """Return the values at `index`. Whole chunks are decoded for them.

    Args:
      index: A slice of step 1 for each axis; missing slices mean whole axes. None reads the whole
        tensor.

    Raises:
      CheckpointError: The stored data is missing or damaged; the message names the parameter and
        the file.
      IndexError: The index has steps, or too many axes.
    """
    index = index or ()
    if len(index) > len(self.shape):
      raise IndexError(f'{len(index)} slices for a tensor of shape {self.shape}')
    bounds = []
    for s, n in zip((*index, *(slice(None),) * (len(self.shape) - len(index))), self.shape):
      begin, end, step = s.indices(n)
      if step != 1:
        raise IndexError(f'only slices of step 1 can be read, got {s}')
      bounds.append((begin, max(begin, end)))
    if any(begin == end for begin, end in bounds):
      return np.empty([end - begin for begin, end in bounds], self.dtype)
    return self._read(tuple(bounds))

  def _read(self, bounds: Bounds) -> np.ndarray:
    """Read the values within `bounds`. No span is empty."""
    raise NotImplementedError

  @property
  def nbytes(self) -> int:
    """Bytes of all values, uncompressed; two int4 values share a byte."""
    return stored_size(int(np.prod(self.shape, dtype=np.int64)), self.dtype)

  def __repr__(self) -> str:
    return f'{type(self).__name__}({self.dtype.name}{list(self.shape)} at {self.path})'


def _slices(bounds: Bounds) -> tuple[slice, ...]:
  return tuple(slice(*b) for b in bounds)


class InMemory(Tensor):
  """A small array inside the checkpoint's index: T5X stores unpartitioned parameters there."""

  def __init__(self, values: np.ndarray, path: str) -> None:
    super().__init__(values.shape, values.dtype, path)
    self._values = values

  def _read(self, bounds: Bounds) -> np.ndarray:
    return self._values[_slices(bounds)]


class Stack(Tensor):
  """Per-layer tensors of equal shapes, presented as one tensor stacked along `axis`."""

  def __init__(self, layers: Sequence[Tensor], axis: int) -> None:
    first = layers[0]
    super().__init__(
      (*first.shape[:axis], len(layers), *first.shape[axis:]),
      np.result_type(*(layer.dtype for layer in layers)),
      first.path,
    )
    self._layers, self._axis = tuple(layers), axis
    self.chunk = (*first.chunk[:axis], 1, *first.chunk[axis:])

  def uncached(self) -> 'Stack':
    return Stack([layer.uncached() for layer in self._layers], self._axis)

  def _read(self, bounds: Bounds) -> np.ndarray:
    begin, end = bounds[self._axis]
    within = _slices(bounds[: self._axis] + bounds[self._axis + 1 :])
    values = [
      layer.read(within).astype(self.dtype, copy=False) for layer in self._layers[begin:end]
    ]
    if len(values) == 1:  # without a copy
      return np.expand_dims(values[0], self._axis)
    return np.stack(values, self._axis)


class Cast(Tensor):
  """A tensor whose values are cast to another dtype as they are read.

  Casts to integers must be exact; T5X's legacy writer stores int8 kernels as floats of equal value.
  """

  def __init__(self, source: Tensor, dtype: npt.DTypeLike, name: str) -> None:
    super().__init__(source.shape, dtype, source.path)
    self._source, self._name = source, name
    self.chunk = source.chunk

  def uncached(self) -> 'Cast':
    return Cast(self._source.uncached(), self.dtype, self._name)

  def _read(self, bounds: Bounds) -> np.ndarray:
    values = self._source.read(_slices(bounds))
    if self.dtype.kind != 'i':
      return values.astype(self.dtype)
    values = values.astype(np.float32)
    limits = np.iinfo(self.dtype)
    # Compare before the cast: casting NaN or out-of-range values to integers is undefined.
    if not np.all((values >= limits.min) & (values <= limits.max) & (values == np.rint(values))):
      raise CheckpointError(
        f'{self._name}: {self.path} should hold {self.dtype.name} values, but holds other values'
      )
    return values.astype(self.dtype)
