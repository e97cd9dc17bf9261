"""The processing of one slice: read, measure, round, write."""

import bisect
from collections import Counter
from collections.abc import Callable, Mapping
import dataclasses
import functools
import itertools
import math
import threading
from typing import Any

import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.arrays import Rectangle
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.conversion.not_finite import check_finite
from t5x_inference_ext.checkpoints.conversion.outputs import ArrayWrite, Output
from t5x_inference_ext.checkpoints.conversion.pipeline import PipelineJob
from t5x_inference_ext.checkpoints.conversion.raw_array import FINGERPRINTS, RawArray
from t5x_inference_ext.checkpoints.conversion.rounding_error import RoundingError
from t5x_inference_ext.checkpoints.conversion.slices import ConversionPlan, StoredBlock, TensorSlice
from t5x_inference_ext.quantization import rounding
from t5x_inference_ext.quantization.formats import is_quantized

# Function that takes the final values of a block, to write them or to compare them with an output.
PutWrites = Callable[[list[ArrayWrite]], None]
Finished = Callable[[dict[str, Any], Counter[tuple[RawArray, int]]], None]


class MemoryBudget:
  """A memory budget for blocks that a later step needs. Blocks beyond it are read a second time."""

  def __init__(self, nbytes: int) -> None:
    self._free, self._lock = nbytes, threading.Lock()

  def acquire(self, nbytes: int) -> bool:
    """Reserve memory; return whether there was enough."""
    with self._lock:
      if self._free < nbytes:
        return False
      self._free -= nbytes
      return True

  def release(self, nbytes: int) -> None:
    """Give reserved memory back."""
    with self._lock:
      self._free += nbytes

  def has(self, nbytes: int) -> bool:
    """Return whether `nbytes` of the budget are free."""
    return self._free >= nbytes


@dataclasses.dataclass(frozen=True)
class SliceContext:
  """Data that all slices of a conversion share.

  Attributes:
    source: The checkpoint read.
    output: The format written.
    plan: All slices.
    put: Function that takes the values to write.
    budget: Budget for blocks that are needed again.
    search: Whether scales are searched for the least squared error.
    progress: Called with the names of the tensors of a written block, and the block's bytes.
    finished: Called with each slice's record, and a dict from (array, chunk's index) to the bytes
      that the slice wrote.
  """

  source: Checkpoint
  output: Output
  plan: ConversionPlan
  put: PutWrites
  budget: MemoryBudget
  search: bool
  progress: Callable[[str, int], None]
  finished: Finished


class WrittenSums:
  """Fingerprints of a slice's writes, by array, and the bytes written into each chunk."""

  def __init__(self, context: SliceContext) -> None:
    self._context, self._lock = context, threading.Lock()
    self._by_array: Counter[str] = Counter()
    self._nbytes: Counter[tuple[RawArray, int]] = Counter()

  def put(self, writes: list[ArrayWrite]) -> None:
    """Write values, and add them to the fingerprints."""
    self._context.put(writes)
    for array, bounds, values in writes:
      fingerprint = array.fingerprint(bounds, values)
      with self._lock:
        self._by_array[array.name] += fingerprint
        for chunk, part in array.overlaps(bounds):
          self._nbytes[array, chunk] += array.dtype.itemsize * math.prod(
            s.stop - s.start for s in part
          )

  def finish(self, number: int, errors: Mapping[str, RoundingError]) -> None:
    """Record the slice `number` as finished."""
    record = {
      'slice': number,
      'fingerprints': {name: total % FINGERPRINTS for name, total in self._by_array.items()},
      'errors': {name: dataclasses.astuple(error) for name, error in errors.items()},
    }
    self._context.finished(record, self._nbytes)


class SliceWork:
  """A slice of float tensors, or of quantized tensors without their scales. A PipelineWork.

  Its buffers hold only the columns of the slice's own channels, concatenated.
  """

  def __init__(self, context: SliceContext, piece: TensorSlice) -> None:
    self._context, self._slice = context, piece
    self._kinds = params.parameters(context.source.config)
    self._blocks = context.plan.blocks(piece)
    steps = [self._measure, *([self._search] if context.search else [])] if piece.scaled else []
    self._steps = iter([*steps, self._write])
    self._lock = threading.Lock()
    self._layers = piece.boxes[0].bounds[0]
    # Name of scales -> {columns (begin, end) in the tensor -> first column in a buffer}.
    self._columns = self._channels() if piece.scaled else {}
    self._held: dict[int, np.ndarray] = {}  # held values of blocks, by block number
    self._maxima: dict[str, np.ndarray] = {}  # max|w| [layers, columns], by tensor
    self._squares: dict[str, np.ndarray] = {}  # [candidate scales, layers, columns], by scale
    self._scales: dict[str, np.ndarray] = {}  # [layers, columns], by scale
    self._dtypes: dict[str, np.dtype] = {}  # dtypes to write, by scale
    self._errors: dict[int, dict[str, RoundingError]] = {}  # by block number, then by tensor
    self._sums = WrittenSums(context)

  def may_start(self) -> bool:
    """Return whether there is memory left to hold a block."""
    return not self._slice.scaled or self._context.budget.has(self._context.plan.block_bytes)

  def jobs(self) -> list[PipelineJob] | None:
    """Return the next step's jobs, one per block."""
    if self._squares:
      for scale, squares in self._squares.items():
        self._scales[scale] = rounding.best_scales(
          self._scales[scale], squares, self._dtypes[scale]
        )
      self._squares = {}
    elif self._maxima and not self._scales:
      self._find_scales()
    step = next(self._steps, None)
    if step is None:
      self._finish()
      return None
    return [functools.partial(step, number, block) for number, block in enumerate(self._blocks)]

  def _values(self, block: StoredBlock) -> np.ndarray:
    return self._context.plan.arrays[block.array].read(block.bounds)

  def _measure(self, number: int, block: StoredBlock) -> None:
    """Find the largest magnitudes in a block, and keep the block if there is memory."""
    values = self._values(block)
    for part, rectangle, w in self._context.plan.arrays[block.array].rectangles(
      values, block.bounds
    ):
      largest = rounding.largest(w)
      scale = self._scale(part.name)
      place = self._place(scale, rectangle)
      with self._lock:
        maxima = self._buffer(self._maxima, part.name, scale, np.float32)
        np.maximum(maxima[place], largest, out=maxima[place])
    if self._context.budget.acquire(values.nbytes):
      self._held[number] = values

  def _find_scales(self) -> None:
    together: dict[str, list[np.ndarray]] = {}
    for name, maxima in self._maxima.items():
      dtype = self._dtypes[self._scale(name)] = self._context.output.dtype(name)
      check_finite(self._context.source, name, maxima, self._layers[0], dtype)
      together.setdefault(self._scale(name), []).append(maxima)
    self._scales = {
      scale: rounding.scales_of(np.maximum.reduce(maxima), self._dtypes[scale])
      for scale, maxima in together.items()
    }

  def _search(self, number: int, block: StoredBlock) -> None:
    """Add a block's squared errors for each candidate scale."""
    values = self._held[number] if number in self._held else self._values(block)
    for part, rectangle, w in self._context.plan.arrays[block.array].rectangles(
      values, block.bounds
    ):
      scale = self._scale(part.name)
      place = self._place(scale, rectangle)
      squares = rounding.squared_errors(w, self._scales[scale][place], self._dtypes[scale])
      with self._lock:
        count = len(rounding.searched(self._dtypes[scale]))
        buffer = self._buffer(self._squares, scale, scale, np.int64, count)
        buffer[:, *place] += squares

  def _write(self, number: int, block: StoredBlock) -> None:
    """Round and write a block."""
    context, held = self._context, self._held.pop(number, None)
    values = self._values(block) if held is None else held
    errors: dict[str, RoundingError] = {}
    writes: list[ArrayWrite] = []
    array = context.plan.arrays[block.array]
    for part, rectangle, w in array.rectangles(values, block.bounds):
      dtype = context.output.dtype(part.name)
      scale, magnitude = self._scale_and_magnitude(part.name, rectangle, w, dtype)
      error = errors.setdefault(part.name, RoundingError())
      written = error.round(w, scale, dtype, magnitude)
      if array.by_row:
        layers, rows, columns = rectangle
        rectangle, written = Rectangle(columns, layers, rows), np.moveaxis(written, 2, 0)
      writes.extend(context.output.placements(part.name, rectangle, written))
    self._sums.put(writes)
    with self._lock:
      self._errors[number] = errors
    if held is not None:
      context.budget.release(held.nbytes)
    first, end = block.bounds[0]
    unit = 'rows' if array.by_row else 'layers'
    where = f'{unit} {first}-{end - 1} ' if self._slice.scaled else ''
    context.progress(where + ' '.join(errors), values.nbytes)

  def _scale_and_magnitude(
    self, name: str, rectangle: Rectangle, w: np.ndarray, dtype: np.dtype
  ) -> tuple[np.ndarray | None, float]:
    """Return scales [layers, columns] of a rectangle w (None if all is float), and max|w|."""
    source = self._context.source
    if self._slice.scaled:
      place = self._place(self._scale(name), rectangle)
      return self._scales[self._scale(name)][place], float(self._maxima[name][place].max())
    if is_quantized(w.dtype) and self._kinds[name].scale is not None:
      stored = source.tensors[self._scale(name)]  # [L, out], or [V] of a table by row
      index = (slice(*rectangle.layers), slice(*rectangle.columns))[: len(stored.shape)]
      scale = stored.read(index).reshape(w.shape[0], w.shape[2])
      return scale, float(rounding.largest_unit(w.dtype) * np.abs(scale).max())
    largest = rounding.largest(w)
    check_finite(source, name, largest, rectangle.layers[0], dtype)
    return None, float(largest.max())

  def _finish(self) -> None:
    """Write the slice's scales, and record the slice as finished."""
    by_row = self._context.plan.arrays[self._slice.boxes[0].array].by_row
    for scale, places in self._columns.items():
      for columns, place in places.items():
        values = self._scales[scale][:, None, place : place + columns[1] - columns[0]]
        rectangle = Rectangle(self._layers, (0, 1), columns)
        if by_row:
          rectangle, values = Rectangle(columns, (0, 1), self._layers), values.swapaxes(0, 2)
        self._sums.put(list(self._context.output.placements(scale, rectangle, values)))
    errors: dict[str, RoundingError] = {}
    for _, block_errors in sorted(self._errors.items()):
      for name, error in block_errors.items():
        errors.setdefault(name, RoundingError()).merge(error)
    self._sums.finish(self._slice.number, errors)

  def _scale(self, name: str) -> str:
    """Return the name of the scales of the matrix `name`."""
    scale = self._kinds[name].scale
    assert scale is not None
    return scale

  def _channels(self) -> dict[str, dict[tuple[int, int], int]]:
    columns: dict[str, set[tuple[int, int]]] = {}
    for box in self._slice.boxes:
      arrangement = self._context.plan.arrays[box.array].arrangement
      for part, rectangle, _ in arrangement.rectangles(box.bounds):
        columns.setdefault(self._scale(part.name), set()).add(rectangle.columns)
    places = {}
    for scale, found in columns.items():
      ranges = sorted(found)
      widths = (end - begin for begin, end in ranges)
      places[scale] = dict(zip(ranges, itertools.accumulate(widths, initial=0)))
    return places

  def _place(self, scale: str, rectangle: Rectangle) -> tuple[slice, slice]:
    """Return the index of a rectangle's layers and columns in the slice's buffers."""
    ranges = list(self._columns[scale])
    begin, end = rectangle.columns
    first = ranges[bisect.bisect_right(ranges, (begin, math.inf)) - 1]
    place = self._columns[scale][first] + begin - first[0]
    layers = slice(*(i - self._layers[0] for i in rectangle.layers))
    return layers, slice(place, place + end - begin)

  def _buffer(
    self, buffers: dict[str, np.ndarray], name: str, scale: str, dtype: type, *lead: int
  ) -> np.ndarray:
    """Return the named buffer [*lead, layers, columns]; its first use makes it, of zeros."""
    if name not in buffers:
      columns = sum(end - begin for begin, end in self._columns[scale])
      buffers[name] = np.zeros((*lead, self._layers[1] - self._layers[0], columns), dtype)
    return buffers[name]
