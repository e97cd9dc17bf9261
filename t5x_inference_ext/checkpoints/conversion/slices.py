"""The units of a conversion: slices, each made of blocks of stored chunks.

A block is the unit of decoding: whole stored chunks, at least one. A slice is the unit of progress:
it is finished and recorded as a whole. If scales have to be found, a slice has all input rows of
some output channels in some layers, from every array that shares these scales. Otherwise a slice is
any box of chunks.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import itertools
import math

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.arrays import SourceArray
from t5x_inference_ext.checkpoints.tensor import Bounds
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError

BLOCK_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class StoredBlock:
  """Whole chunks of one array.

  Attributes:
    array: Index of the array in the plan.
    bounds: Bounds of the block, in factored order.
  """

  array: int
  bounds: Bounds


@dataclasses.dataclass(frozen=True)
class TensorSlice:
  """One unit of progress.

  Attributes:
    number: Index of the slice in the plan.
    boxes: The boxes that the slice covers, in one or several arrays.
    scaled: Whether scales have to be found for its channels.
  """

  number: int
  boxes: tuple[StoredBlock, ...]
  scaled: bool


class ConversionPlan:
  """All slices of a conversion.

  Attributes:
    arrays: The source's arrays.
    slices: All slices, in the order of their numbers.
    block_bytes: Bytes of the largest block, as stored.
    slice_bytes: Bytes of the largest slice, as stored.
  """

  def __init__(
    self,
    arrays: Sequence[SourceArray],
    config: ModelConfig,
    finds_scales: Callable[[str], bool],
    slice_bytes: int,
  ) -> None:
    """Plan a conversion.

    Args:
      arrays: The source's arrays.
      config: The model.
      finds_scales: Returns whether the scales of the tensor of this name have to be found.
      slice_bytes: Approximate bytes of a slice, as stored.
    """
    self.arrays = tuple(arrays)
    kinds = params.parameters(config)
    by_scale: dict[str, list[int]] = {}
    boxes: list[tuple[tuple[StoredBlock, ...], bool]] = []
    for i, array in enumerate(self.arrays):
      names = [part.name for part in array.arrangement.parts]
      scales = sorted(filter(None, (kinds[name].scale for name in names)))
      if scales and any(map(finds_scales, names)):
        # Group arrays by their first scale: arrays that share one scale share all of them.
        by_scale.setdefault(scales[0], []).append(i)
      else:
        cell = self._cell(i, slice_bytes)
        boxes += [((StoredBlock(i, b),), False) for b in _boxes(array.arrangement.factored, cell)]
    for indices in by_scale.values():
      boxes += [(cut, True) for cut in self._columns(indices, slice_bytes)]
    self.slices = tuple(TensorSlice(n, cut, scaled) for n, (cut, scaled) in enumerate(boxes))
    self.slice_bytes = max(self.nbytes(s) for s in self.slices)
    self.block_bytes = max(
      self.arrays[i].nbytes(tuple((0, n) for n in self._cell(i, BLOCK_BYTES)))
      for i in range(len(self.arrays))
    )

  def nbytes(self, s: TensorSlice) -> int:
    """Return the decoded bytes of a slice's source data."""
    return sum(self.arrays[box.array].nbytes(box.bounds) for box in s.boxes)

  def blocks(self, s: TensorSlice) -> list[StoredBlock]:
    """Return the blocks of a slice."""
    return [
      StoredBlock(box.array, bounds)
      for box in s.boxes
      for bounds in _boxes(
        box.bounds,
        self._cell(box.array, BLOCK_BYTES, tuple(end - begin for begin, end in box.bounds)),
      )
    ]

  def _cell(self, index: int, nbytes: int, within: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return a block shape of whole chunks with at most `nbytes`, but at least one chunk.

    The shape grows along the last axes first, because these are contiguous in storage.
    """
    array = self.arrays[index]
    return _grow(
      array.chunk, within or array.arrangement.factored, array.tensor.dtype.itemsize, nbytes
    )

  def _columns(self, indices: list[int], slice_bytes: int) -> Iterator[tuple[StoredBlock, ...]]:
    """Cut arrays that share scales into equal ranges of layers and outputs, in whole chunks."""
    arrays = [self.arrays[i] for i in indices]
    split = [1 + len(a.arrangement.inputs) for a in arrays]
    kept = [(a.arrangement.factored[0], *a.arrangement.outputs) for a in arrays]
    if any(sizes != kept[0] for sizes in kept):
      raise CheckpointError(
        f'{" and ".join(a.tensor.path for a in arrays)} share one scale per channel, '
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
  """Grow `cell` by whole multiples within `shape`, to at most `nbytes`, the last axes first."""
  grown = [min(c, n) for c, n in zip(cell, shape)]
  for axis in reversed(range(len(grown))):
    fits = nbytes // max(1, math.prod(grown) * itemsize)
    if fits >= 2:
      grown[axis] = min(shape[axis], grown[axis] * fits)
    if grown[axis] < shape[axis]:
      break
  return tuple(grown)


def _boxes(
  shape: Sequence[int | tuple[int, int]], cell: Sequence[int]
) -> Iterator[tuple[tuple[int, int], ...]]:
  """Cut a shape, or bounds, into boxes of shape `cell`; the last boxes may be smaller."""
  bounds = [n if isinstance(n, tuple) else (0, n) for n in shape]
  ranges = (
    [(i, min(i + c, end)) for i in range(begin, end, c)] for (begin, end), c in zip(bounds, cell)
  )
  yield from itertools.product(*ranges)
