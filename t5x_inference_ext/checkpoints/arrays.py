"""Stored arrays and the canonical matrices inside them: blocks of the one as rectangles of the others, and back.

An array is worked on in *factored* order [L, *inputs, *outputs]: the layer axis in front, then the axes that a matmul
sums over, then those it keeps. A canonical tensor is addressed as a matrix a layer, [L, rows, columns]: rows are the
inputs merged, columns the outputs. A norm is one row; what is not of a layer has L = 1.
"""

from collections.abc import Iterator
import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np

from t5x_inference_ext.checkpoints.tensor import Bounds, Tensor


@dataclasses.dataclass(frozen=True)
class KernelPart:
  """A canonical tensor inside an array.

  Attributes:
    name: canonical.
    start, width: the range of the array's part axis that is this tensor.
    factor: canonical values are stored values times this.
  """

  name: str
  start: int
  width: int
  factor: float = 1.0


class Rectangle(NamedTuple):
  """A part of a canonical tensor: [begin, end) of layers, rows and columns."""

  layers: tuple[int, int]
  rows: tuple[int, int]
  columns: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class KernelLayout:
  """How an array holds canonical tensors.

  Attributes:
    layers: L, or None for an array without a layer axis.
    layer_axis: where it is, as stored.
    inputs, outputs: the sizes of the other axes, in stored order.
    parts: side by side on one axis.
    axis: that axis, counted in inputs + outputs.
  """

  layers: int | None
  layer_axis: int
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  parts: tuple[KernelPart, ...]
  axis: int

  @property
  def factored(self) -> tuple[int, ...]:
    return (self.layers or 1, *self.inputs, *self.outputs)

  def to_factored(self, stored: tuple) -> tuple:
    """Sizes or ranges of the stored axes, in factored order."""
    if self.layers is None:
      return ((0, 1) if isinstance(stored[0], tuple) else 1, *stored)
    axis = self.layer_axis
    return (stored[axis], *stored[:axis], *stored[axis + 1 :])

  def to_stored(self, factored: tuple) -> tuple:
    """The inverse of to_factored."""
    if self.layers is None:
      return factored[1:]
    axis = self.layer_axis
    return (*factored[1 : axis + 1], factored[0], *factored[axis + 1 :])

  def rectangles(self, bounds: Bounds) -> Iterator[tuple[KernelPart, Rectangle, tuple]]:
    """The canonical rectangles within factored `bounds`.

    Yields:
      The part, the rectangle, and the index that takes its values [layers, rows, columns] out of the block of `bounds`.
    """
    split, place = 1 + len(self.inputs), 1 + self.axis
    for part in self.parts:
      begin, end = max(bounds[place][0], part.start), min(bounds[place][1], part.start + part.width)
      if begin >= end:
        continue
      clipped = (*bounds[:place], (begin, end), *bounds[place + 1 :])
      origin = [0] * len(bounds)
      origin[place] = part.start
      local = [(b - o, e - o) for (b, e), o in zip(clipped, origin)]
      sizes = [*self.factored]
      sizes[place] = part.width
      offsets = [b - first for (b, _), (first, _) in zip(clipped, bounds)]
      for rows, row_index in _merge(local[1:split], sizes[1:split], offsets[1:split]):
        for columns, column_index in _merge(local[split:], sizes[split:], offsets[split:]):
          yield part, Rectangle(bounds[0], rows, columns), (slice(None), *row_index, *column_index)

  def pieces(self, part: KernelPart, rectangle: Rectangle) -> Iterator[tuple[Bounds, tuple]]:
    """Where a canonical rectangle of `part` goes.

    Yields:
      Factored bounds, and the index that takes their values, in factored order, out of those of the rectangle.
    """
    split, place = 1 + len(self.inputs), 1 + self.axis
    sizes = [*self.factored]
    sizes[place] = part.width
    for rows, row_index in _unmerge(rectangle.rows, sizes[1:split]):
      for columns, column_index in _unmerge(rectangle.columns, sizes[split:]):
        bounds = [rectangle.layers, *rows, *columns]
        bounds[place] = (bounds[place][0] + part.start, bounds[place][1] + part.start)
        yield tuple(bounds), (slice(None), *row_index, *column_index)


@dataclasses.dataclass(frozen=True)
class SourceArray:
  """A stored array of a checkpoint that is read block by block.

  Attributes:
    tensor: as stored.
    arrangement: of the canonical tensors in it.
  """

  tensor: Tensor
  arrangement: KernelLayout

  @property
  def chunk(self) -> tuple[int, ...]:
    """In factored order."""
    return self.arrangement.to_factored(self.tensor.chunk)

  def nbytes(self, bounds: Bounds) -> int:
    return math.prod(e - b for b, e in bounds) * self.tensor.dtype.itemsize

  def read(self, bounds: Bounds) -> np.ndarray:
    """The values in factored order, as stored: parts' factors are not applied."""
    values = self.tensor.read(tuple(slice(*b) for b in self.arrangement.to_stored(bounds)))
    return (
      values[None]
      if self.arrangement.layers is None
      else np.moveaxis(values, self.arrangement.layer_axis, 0)
    )

  def rectangles(
    self, values: np.ndarray, bounds: Bounds
  ) -> Iterator[tuple[KernelPart, Rectangle, np.ndarray]]:
    """The canonical rectangles in a block that was read, with values [layers, rows, columns], mostly views."""
    for part, rectangle, index in self.arrangement.rectangles(bounds):
      part_values = values[index]
      if part.factor != 1:
        if math.frexp(part.factor)[0] != 0.5:  # only a power of two is the same in every dtype
          part_values = part_values.astype(np.float32)
        part_values = part_values * part_values.dtype.type(part.factor)
      yield part, rectangle, part_values


def whole_array(tensor: Tensor, name: str, layered: bool) -> SourceArray:
  """A canonical tensor stored by itself: [L, in, out], [L, E], [E] or [V, E]."""
  layers, *sizes = tensor.shape if layered else (None, *tensor.shape)
  inputs = tuple(sizes[:-1])
  part = KernelPart(name, 0, sizes[0])
  return SourceArray(tensor, KernelLayout(layers, 0, inputs, (sizes[-1],), (part,), 0))


def _merge(local, sizes, offsets) -> Iterator[tuple[tuple[int, int], tuple]]:
  """Ranges of several axes merged into one: contiguous ranges of the merged axis, and what to take of each axis."""
  if not local:
    yield (0, 1), (None,)
    return
  begin, end = local[-1]
  inner = slice(offsets[-1], offsets[-1] + end - begin)
  for outer in itertools.product(*(range(b, e) for b, e in local[:-1])):
    base = 0
    for i, n in zip(outer, sizes):
      base = base * n + i
    base *= sizes[-1]
    yield (
      (base + begin, base + end),
      (*(o + i - b for o, i, (b, _) in zip(offsets, outer, local)), inner),
    )


def _unmerge(span: tuple[int, int], sizes) -> Iterator[tuple[tuple[tuple[int, int], ...], tuple]]:
  """A range of a merged axis as ranges of the axes in it, and what to take of the merged range for each."""
  if not sizes:
    yield (), (0,)
    return
  inner, position = sizes[-1], span[0]
  while position < span[1]:
    end = min(span[1], (position // inner + 1) * inner)
    outer, rest = [], position // inner
    for n in reversed(sizes[:-1]):
      outer.insert(0, (rest % n, rest % n + 1))
      rest //= n
    first = position % inner
    yield (
      (*outer, (first, first + end - position)),
      (*((None,) * len(outer)), slice(position - span[0], end - span[0])),
    )
    position = end
