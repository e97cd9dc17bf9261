"""What a conversion is cut into: slices, each made of blocks of stored chunks.

A block is what is decoded at a time: whole stored chunks, at least one. A slice is what is finished, and recorded, at a
time. Where int8 scales have to be found, a slice is all that is summed into its output channels: all rows of some
columns of some layers, of every array that shares the scales. Elsewhere it is any box of chunks.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import math

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.arrays import SourceArray
from t5x_inference_ext.checkpoints.tensor import Bounds
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError

SLICE_BYTES = 256 * 2**20
BLOCK_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class StoredBlock:
  """Whole chunks of one array: its number in the plan, and factored bounds."""

  array: int
  bounds: Bounds


@dataclasses.dataclass(frozen=True)
class TensorSlice:
  """One unit of progress.

  Attributes:
    number: its place in the plan.
    boxes: what it covers, of one or several arrays.
    scaled: whether scales are to be found for its channels.
  """

  number: int
  boxes: tuple[StoredBlock, ...]
  scaled: bool


class ConversionPlan:
  """All slices of a conversion.

  Attributes:
    arrays: the source's.
    slices: in order of their numbers.
    block_bytes: the largest block's, as stored.
    slice_bytes: the largest slice's.
  """

  def __init__(
    self,
    arrays: Sequence[SourceArray],
    config: ModelConfig,
    finds_scales: bool,
    slice_bytes: int = SLICE_BYTES,
  ):
    self.arrays = tuple(arrays)
    kinds = params.parameters(config)
    by_scale, single = {}, []
    for i, array in enumerate(self.arrays):
      scales = sorted(
        {kinds[part.name].scale for part in array.arrangement.parts if kinds[part.name].scale}
      )
      if scales and finds_scales:
        by_scale.setdefault(scales[0], []).append(
          i
        )  # arrays that share one scale share all: output matrices
      else:
        single.append(i)
    boxes = [
      ((StoredBlock(i, b),), False)
      for i in single
      for b in _boxes(self.arrays[i].arrangement.factored, self._cell(i, slice_bytes))
    ]
    for indices in by_scale.values():
      boxes += [(cut, True) for cut in self._columns(indices, slice_bytes)]
    self.slices = tuple(TensorSlice(n, cut, scaled) for n, (cut, scaled) in enumerate(boxes))
    self.slice_bytes = max(self.nbytes(s) for s in self.slices)
    self.block_bytes = max(
      self.arrays[i].nbytes(tuple((0, n) for n in self._cell(i, BLOCK_BYTES)))
      for i in range(len(self.arrays))
    )

  def nbytes(self, s: TensorSlice) -> int:
    """What it holds of the source, decoded."""
    return sum(self.arrays[box.array].nbytes(box.bounds) for box in s.boxes)

  def blocks(self, s: TensorSlice) -> list[StoredBlock]:
    return [
      StoredBlock(box.array, bounds)
      for box in s.boxes
      for bounds in _boxes(
        box.bounds,
        self._cell(box.array, BLOCK_BYTES, tuple(end - begin for begin, end in box.bounds)),
      )
    ]

  def _cell(self, index: int, nbytes: int, within: Sequence[int] | None = None) -> tuple[int, ...]:
    """Whole chunks of an array of up to nbytes, or one chunk: grown along its last axes first, as they are stored."""
    array = self.arrays[index]
    return _grow(
      array.chunk, within or array.arrangement.factored, array.tensor.dtype.itemsize, nbytes
    )

  def _columns(self, indices: list[int], slice_bytes: int) -> Iterator[tuple[StoredBlock, ...]]:
    """Cuts arrays that share scales across layers and outputs alike, at borders of chunks of all of them."""
    arrays = [self.arrays[i] for i in indices]
    split = [1 + len(a.arrangement.inputs) for a in arrays]
    kept = [(a.arrangement.factored[0], *a.arrangement.outputs) for a in arrays]
    if any(sizes != kept[0] for sizes in kept):
      raise CheckpointError(
        f'{" and ".join(a.tensor.path for a in arrays)} have one scale for each channel together, '
        f'but different output axes {kept}'
      )
    chunks = [(a.chunk[0], *a.chunk[n:]) for a, n in zip(arrays, split)]
    cell = tuple(min(n, math.lcm(*sides)) for n, *sides in zip(kept[0], *chunks))
    rows = sum(math.prod(a.arrangement.inputs) * a.tensor.dtype.itemsize for a in arrays)
    cell = _grow(cell, kept[0], rows, slice_bytes)
    for first, *outputs in _boxes(kept[0], cell):
      yield tuple(
        StoredBlock(i, (first, *((0, n) for n in a.arrangement.inputs), *outputs))
        for i, a in zip(indices, arrays)
      )


def _grow(cell: Sequence[int], shape: Sequence[int], itemsize: int, nbytes: int) -> tuple[int, ...]:
  """A multiple of cell, of up to nbytes, within shape: the last axes are completed first."""
  cell = [min(c, n) for c, n in zip(cell, shape)]
  for axis in reversed(range(len(cell))):
    fits = nbytes // max(1, math.prod(cell) * itemsize)
    if fits >= 2:
      cell[axis] = min(shape[axis], cell[axis] * fits)
    if cell[axis] < shape[axis]:
      break
  return tuple(cell)


def _boxes(shape: Sequence, cell: Sequence[int]) -> Iterator[Bounds]:
  """Cuts a shape, or bounds, into boxes of a cell's size; they start at multiples of it from where the bounds begin."""
  bounds = [n if isinstance(n, tuple) else (0, n) for n in shape]
  ranges = (
    [(i, min(i + c, end)) for i in range(begin, end, c)] for (begin, end), c in zip(bounds, cell)
  )
  yield from itertools.product(*ranges)
