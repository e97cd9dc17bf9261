"""Lazy tensors: views on what is stored, of which only the needed part is ever read."""

from collections.abc import Sequence
import math

import numpy as np

from t5x_inference_ext.errors import CheckpointError

# [begin, end) of every axis.
Bounds = tuple[tuple[int, int], ...]


class Tensor:
  """An array that is read in slices.

  Attributes:
    shape: its shape.
    dtype: of what read() returns; may be ml_dtypes' bfloat16.
    path: the file or directory that holds it, for messages.
    chunk: the shape of what is stored, and so decoded, as one piece.
  """

  def __init__(self, shape: Sequence[int], dtype: np.dtype, path: str):
    self.shape = tuple(int(n) for n in shape)
    self.dtype = np.dtype(dtype)
    self.path = path
    self.chunk = self.shape

  def uncached(self) -> 'Tensor':
    """The same tensor without a cache of decoded chunks: for those who read each chunk once."""
    return self

  def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
    """The values at `index`, reading little more than them.

    Args:
      index: a slice of step 1 for each axis; missing ones mean all. None reads the whole tensor.

    Raises:
      CheckpointError: the stored data is missing or damaged; names the parameter and the file.
      IndexError: an index with steps or with too many axes.
    """
    index = index or ()
    if len(index) > len(self.shape):
      raise IndexError(f'{len(index)} slices for a tensor of shape {self.shape}')
    bounds = []
    for s, n in zip(tuple(index) + (slice(None),) * (len(self.shape) - len(index)), self.shape):
      begin, end, step = s.indices(n)
      if step != 1:
        raise IndexError(f'only slices of step 1 can be read, got {s}')
      bounds.append((begin, max(begin, end)))
    if any(begin == end for begin, end in bounds):
      return np.empty([end - begin for begin, end in bounds], self.dtype)
    return self._read(tuple(bounds))

  def _read(self, bounds: Bounds) -> np.ndarray:
    """The values within `bounds`, none of which is empty."""
    raise NotImplementedError

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

  def __repr__(self) -> str:
    return f'{type(self).__name__}({self.dtype.name}{list(self.shape)} at {self.path})'


def _slices(bounds: Bounds) -> tuple[slice, ...]:
  return tuple(slice(*b) for b in bounds)


class InMemory(Tensor):
  """A small array that came with the checkpoint's index (T5X writes parameters without a partition so)."""

  def __init__(self, values: np.ndarray, path: str):
    super().__init__(values.shape, values.dtype, path)
    self._values = values

  def _read(self, bounds):
    return self._values[_slices(bounds)]


class Stack(Tensor):
  """Tensors of one shape, one for each layer, stacked along `axis`: per-layer trees seen as scanned ones."""

  def __init__(self, parts: Sequence[Tensor], axis: int):
    shape = list(parts[0].shape)
    shape.insert(axis, len(parts))
    super().__init__(shape, np.result_type(*(p.dtype for p in parts)), parts[0].path)
    self._parts, self._axis = tuple(parts), axis
    self.chunk = parts[0].chunk[:axis] + (1,) + parts[0].chunk[axis:]

  def uncached(self):
    return Stack([part.uncached() for part in self._parts], self._axis)

  def _read(self, bounds):
    begin, end = bounds[self._axis]
    rest = _slices(bounds[: self._axis] + bounds[self._axis + 1 :])
    return np.stack(
      [p.read(rest).astype(self.dtype, copy=False) for p in self._parts[begin:end]], self._axis
    )


class Moved(Tensor):
  """A tensor with one axis brought to the front: layers, wherever they are stored."""

  def __init__(self, source: Tensor, axis: int):
    super().__init__(
      (source.shape[axis],) + source.shape[:axis] + source.shape[axis + 1 :],
      source.dtype,
      source.path,
    )
    self._source, self._axis = source, axis

  def _read(self, bounds):
    stored = bounds[1 : self._axis + 1] + bounds[:1] + bounds[self._axis + 1 :]
    return np.moveaxis(self._source.read(_slices(stored)), self._axis, 0)


class Window(Tensor):
  """A range of one axis: one matrix of those that a fused kernel holds side by side."""

  def __init__(self, source: Tensor, axis: int, start: int, width: int):
    super().__init__(
      source.shape[:axis] + (width,) + source.shape[axis + 1 :], source.dtype, source.path
    )
    self._source, self._axis, self._start = source, axis, start

  def _read(self, bounds):
    begin, end = bounds[self._axis]
    window = (self._start + begin, self._start + end)
    return self._source.read(_slices(bounds[: self._axis] + (window,) + bounds[self._axis + 1 :]))


class Merged(Tensor):
  """Two neighbouring axes as one: [., H, C, .] as [., H*C, .], heads and their columns."""

  def __init__(self, source: Tensor, axis: int):
    heads, columns = source.shape[axis : axis + 2]
    super().__init__(
      source.shape[:axis] + (heads * columns,) + source.shape[axis + 2 :], source.dtype, source.path
    )
    self._source, self._axis, self._columns = source, axis, columns

  def _read(self, bounds):
    axis, columns = self._axis, self._columns
    begin, end = bounds[axis]
    first, last = begin // columns, (end - 1) // columns
    if first == last:  # within one head: only those columns
      within = (begin - first * columns, end - first * columns)
    else:  # the covering heads, trimmed below
      within = (0, columns)
    values = self._source.read(
      _slices(bounds[:axis] + ((first, last + 1), within) + bounds[axis + 1 :])
    )
    merged = values.reshape(*values.shape[:axis], -1, *values.shape[axis + 2 :])
    offset = begin - first * columns - within[0]
    return merged[(slice(None),) * axis + (slice(offset, offset + end - begin),)]


class Scaled(Tensor):
  """Floats times a constant that the trained model applied elsewhere: exactly for powers of two, else in float32."""

  def __init__(self, source: Tensor, factor: float):
    exact = math.frexp(factor)[0] == 0.5
    super().__init__(source.shape, source.dtype if exact else np.float32, source.path)
    self._source, self._factor = source, factor

  def _read(self, bounds):
    return self._source.read(_slices(bounds)).astype(self.dtype, copy=False) * self.dtype.type(
      self._factor
    )


class Reciprocal(Tensor):
  """1 / a tensor of floats."""

  def __init__(self, source: Tensor):
    super().__init__(source.shape, source.dtype, source.path)
    self._source = source

  def _read(self, bounds):
    with np.errstate(divide='ignore'):  # conversions refuse infinite scales
      return self.dtype.type(1) / self._source.read(_slices(bounds))


class Squeezed(Tensor):
  """A tensor without one of its axes of size 1."""

  def __init__(self, source: Tensor, axis: int):
    super().__init__(source.shape[:axis] + source.shape[axis + 1 :], source.dtype, source.path)
    self._source, self._axis = source, axis

  def _read(self, bounds):
    return self._source.read(
      _slices(bounds[: self._axis] + ((0, 1),) + bounds[self._axis :])
    ).squeeze(self._axis)


class Cast(Tensor):
  """Another dtype. Integers must be exact: T5X's legacy writer widens int8 kernels to floats of the same values."""

  def __init__(self, source: Tensor, dtype: np.dtype, name: str):
    super().__init__(source.shape, dtype, source.path)
    self._source, self._name = source, name
    self.chunk = source.chunk

  def uncached(self):
    return Cast(self._source.uncached(), self.dtype, self._name)

  def _read(self, bounds):
    values = self._source.read(_slices(bounds))
    if self.dtype.kind != 'i':
      return values.astype(self.dtype)
    values = values.astype(np.float32)
    limits = np.iinfo(self.dtype)
    # Not `!=` after a cast: casting NaN or values out of range to integers is undefined.
    if not np.all((values >= limits.min) & (values <= limits.max) & (values == np.rint(values))):
      raise CheckpointError(
        f'{self._name}: {self.path} should hold {self.dtype.name} values, but holds others'
      )
    return values.astype(self.dtype)
