"""The index map between stored arrays and canonical tensors.

Loading, conversion and the writer of T5X checkpoints all use this map.

A stored array is processed in *factored* order [L, *inputs, *outputs]: the layer axis first, then
the axes that a matmul sums over, then the axes that it keeps. A canonical tensor is addressed as
one matrix per layer, [L, rows, columns]: rows are the merged inputs, columns the merged outputs. A
norm is a matrix with one row; a tensor without a layer axis has L = 1.
"""

from collections.abc import Iterator
import dataclasses
import math
from typing import NamedTuple

import numpy as np

from t5x_inference_ext.checkpoints.merged_axes import (
  ArrayIndex,
  covering_box,
  merged_ranges,
  split_range,
)
from t5x_inference_ext.checkpoints.tensor import Bounds, Span, Tensor
from t5x_inference_ext.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class KernelPart:
  """One canonical tensor inside a stored array, on the array's part axis.

  Attributes:
    name: Name of the canonical tensor.
    start: First index of the tensor on the part axis.
    width: Number of indices of the tensor on the part axis.
    factor: Canonical value = stored value * factor, or factor / stored value if `reciprocal`.
    reciprocal: Whether the array stores reciprocals, as flaxformer does for the scales of quantized
      kernels.
  """

  name: str
  start: int
  width: int
  factor: float = 1.0
  reciprocal: bool = False

  def canonical_dtype(self, stored: np.dtype) -> np.dtype:
    """Return the dtype of canonical values, given the stored dtype.

    A factor that is a power of two is exact in every dtype; other factors need float32.
    """
    exact = math.frexp(self.factor)[0] == 0.5
    return stored if exact else np.dtype(np.float32)

  def to_canonical(self, values: np.ndarray) -> np.ndarray:
    """Convert stored values to canonical values."""
    if self.reciprocal:
      with np.errstate(divide='ignore', over='ignore'):
        values = values.dtype.type(1) / values
    if self.factor == 1:
      return values
    dtype = self.canonical_dtype(values.dtype)
    return values.astype(dtype, copy=False) * dtype.type(self.factor)

  def to_stored(self, values: np.ndarray) -> np.ndarray:
    """Convert canonical values to stored values: the inverse of to_canonical."""
    if self.factor != 1:
      values = values / values.dtype.type(self.factor)
    return 1 / values if self.reciprocal else values


class Rectangle(NamedTuple):
  """A block of a canonical tensor: a range [begin, end) of layers, of rows and of columns."""

  layers: Span
  rows: Span
  columns: Span


@dataclasses.dataclass(frozen=True)
class KernelLayout:
  """The positions of canonical tensors in a stored array.

  Attributes:
    layers: L, or None for an array without a layer axis.
    layer_axis: Position of the layer axis in the stored array.
    inputs: Sizes of the axes that a matmul sums over, in stored order.
    outputs: Sizes of the axes that a matmul keeps, in stored order.
    parts: The canonical tensors, concatenated on the part axis.
    axis: Position of the part axis in inputs + outputs.
  """

  layers: int | None
  layer_axis: int
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  parts: tuple[KernelPart, ...]
  axis: int

  @property
  def factored(self) -> tuple[int, ...]:
    """Shape of the array in factored order."""
    return (self.layers or 1, *self.inputs, *self.outputs)

  def to_factored(self, stored: tuple) -> tuple:
    """Reorder sizes or ranges from the stored to the factored order of axes."""
    if self.layers is None:
      return ((0, 1) if isinstance(stored[0], tuple) else 1, *stored)
    axis = self.layer_axis
    return (stored[axis], *stored[:axis], *stored[axis + 1 :])

  def to_stored(self, factored: tuple) -> tuple:
    """Reorder sizes or ranges from the factored to the stored order of axes."""
    if self.layers is None:
      return factored[1:]
    axis = self.layer_axis
    return (*factored[1 : axis + 1], factored[0], *factored[axis + 1 :])

  def canonical_shape(self, part: KernelPart) -> tuple[int, ...]:
    """Return a canonical tensor's shape: [L, rows, columns], without L or rows if it has none."""
    rows, columns = self._merged_axes(part)
    layers = () if self.layers is None else (self.layers,)
    is_matrix = self.inputs and not part.reciprocal
    return (*layers, *((math.prod(rows),) if is_matrix else ()), math.prod(columns))

  def rectangles(self, bounds: Bounds) -> Iterator[tuple[KernelPart, Rectangle, ArrayIndex]]:
    """Cut a block of the array into rectangles of canonical tensors.

    Args:
      bounds: The block, in factored order.

    Yields:
      Tuples (part, rectangle, index). `block[index]` has the rectangle's values, shape [layers,
      rows, columns].
    """
    split, place = 1 + len(self.inputs), 1 + self.axis
    for part in self.parts:
      begin, end = max(bounds[place][0], part.start), min(bounds[place][1], part.start + part.width)
      if begin >= end:
        continue
      offsets = [0] * len(bounds)
      offsets[place] = begin - bounds[place][0]
      local = [*bounds]
      local[place] = (begin - part.start, end - part.start)
      row_axes, column_axes = self._merged_axes(part)
      for rows, row_index in merged_ranges(local[1:split], row_axes, offsets[1:split]):
        for columns, column_index in merged_ranges(local[split:], column_axes, offsets[split:]):
          yield part, Rectangle(bounds[0], rows, columns), (slice(None), *row_index, *column_index)

  def pieces(self, part: KernelPart, rectangle: Rectangle) -> Iterator[tuple[Bounds, ArrayIndex]]:
    """Cut a canonical rectangle into blocks of the array.

    Yields:
      Pairs (bounds, index). `bounds` is a block of the array, in factored order.
      `rectangle_values[index]` has the block's values, in factored order.
    """
    row_axes, column_axes = self._merged_axes(part)
    for rows, row_index in split_range(rectangle.rows, row_axes):
      for columns, column_index in split_range(rectangle.columns, column_axes):
        bounds = self._shifted(part, (rectangle.layers, *rows, *columns))
        yield bounds, (slice(None), *row_index, *column_index)

  def covering(self, part: KernelPart, rectangle: Rectangle) -> tuple[Bounds, int, int]:
    """Return the smallest block of the array that holds a canonical rectangle.

    Returns:
      The block's bounds in factored order, then the row and the column at which the rectangle
      begins, counted in the block as a matrix [merged inputs, merged outputs].
    """
    row_axes, column_axes = self._merged_axes(part)
    rows, first_row = covering_box(rectangle.rows, row_axes)
    columns, first_column = covering_box(rectangle.columns, column_axes)
    return self._shifted(part, (rectangle.layers, *rows, *columns)), first_row, first_column

  def _merged_axes(self, part: KernelPart) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sizes of the axes that are merged into a part's rows, and into its columns."""
    sizes = [*self.inputs, *self.outputs]
    sizes[self.axis] = part.width
    return tuple(sizes[: len(self.inputs)]), tuple(sizes[len(self.inputs) :])

  def _shifted(self, part: KernelPart, bounds: Bounds) -> Bounds:
    """Convert factored bounds within a part to bounds within the array."""
    place = 1 + self.axis
    begin, end = bounds[place]
    return (*bounds[:place], (begin + part.start, end + part.start), *bounds[place + 1 :])


@dataclasses.dataclass(frozen=True)
class SourceArray:
  """A stored array of a checkpoint, read block by block.

  Attributes:
    tensor: The array, as stored.
    arrangement: The positions of canonical tensors in the array.
    by_row: Whether the array is a table whose rows are taken as layers (`by_row`).
  """

  tensor: Tensor
  arrangement: KernelLayout
  by_row: bool = False

  @property
  def chunk(self) -> tuple[int, ...]:
    """Shape of a stored chunk in factored order."""
    return self.arrangement.to_factored(self.tensor.chunk)

  def nbytes(self, bounds: Bounds) -> int:
    """Return the size of a block in bytes."""
    return math.prod(e - b for b, e in bounds) * self.tensor.dtype.itemsize

  def read(self, bounds: Bounds) -> np.ndarray:
    """Read a block in factored order, as stored: without applying the parts' factors."""
    values = self.tensor.read(tuple(slice(*b) for b in self.arrangement.to_stored(bounds)))
    if self.arrangement.layers is None:
      return values[None]
    return np.moveaxis(values, self.arrangement.layer_axis, 0)

  def rectangles(
    self, values: np.ndarray, bounds: Bounds
  ) -> Iterator[tuple[KernelPart, Rectangle, np.ndarray]]:
    """Cut a block of values into canonical rectangles.

    Yields:
      Tuples (part, rectangle, rectangle's values). The last are [layers, rows, columns], usually a
      view of `values`.
    """
    for part, rectangle, index in self.arrangement.rectangles(bounds):
      yield part, rectangle, part.to_canonical(values[index])

  def tensors(self) -> dict[str, 'CanonicalTensor']:
    """Return the canonical tensors in the array, by name."""
    return {part.name: CanonicalTensor(self, part) for part in self.arrangement.parts}


class CanonicalTensor(Tensor):
  """A canonical tensor, read from the stored array that holds it."""

  def __init__(self, array: SourceArray, part: KernelPart) -> None:
    super().__init__(
      array.arrangement.canonical_shape(part),
      part.canonical_dtype(array.tensor.dtype),
      array.tensor.path,
    )
    self._array, self._part = array, part

  def _read(self, bounds: Bounds) -> np.ndarray:
    remaining = list(bounds)
    layers = (0, 1) if self._array.arrangement.layers is None else remaining.pop(0)
    columns = remaining.pop()
    rows = remaining[0] if remaining else (0, 1)
    block, row, column = self._array.arrangement.covering(
      self._part, Rectangle(layers, rows, columns)
    )
    split = 1 + len(self._array.arrangement.inputs)
    sizes = [end - begin for begin, end in block]
    stored = self._array.read(block).reshape(
      sizes[0], math.prod(sizes[1:split]), math.prod(sizes[split:])
    )
    stored = stored[:, row : row + rows[1] - rows[0], column : column + columns[1] - columns[0]]
    values = self._part.to_canonical(stored)
    if self._part.reciprocal and (np.isinf(values) & np.isfinite(stored)).any():
      raise CheckpointError(
        f'{self._part.name}: {self.path} holds scales of 0 (or too small to divide by), but '
        'quantized weights are divided by them: export the quantized checkpoint again'
      )
    return values.reshape([end - begin for begin, end in bounds])


def by_row(array: SourceArray) -> SourceArray:
  """Return a table [V, E] as V layers of a matrix [E, 1]: each row is an output channel.

  The channels of a matrix [L, in, out] are columns, and those of a table its rows. This view lets
  one algorithm find the scales of both.
  """
  (part,), (rows, features) = array.arrangement.parts, array.tensor.shape
  part = dataclasses.replace(part, start=0, width=features)
  return SourceArray(array.tensor, KernelLayout(rows, 0, (features,), (), (part,), 0), by_row=True)


def whole_array(tensor: Tensor, name: str, layer_axis: int | None) -> SourceArray:
  """Return a stored array that holds a single canonical tensor, a matrix or a vector.

  Args:
    tensor: The array, as stored.
    name: Name of the canonical tensor.
    layer_axis: Position of the layer axis; None if there is none.
  """
  sizes = list(tensor.shape)
  layers = None if layer_axis is None else sizes.pop(layer_axis)
  part = KernelPart(name, 0, sizes[0])
  layout = KernelLayout(layers, layer_axis or 0, tuple(sizes[:-1]), (sizes[-1],), (part,), 0)
  return SourceArray(tensor, layout)
