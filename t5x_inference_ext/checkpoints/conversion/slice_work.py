"""One slice on its way: read, measured, rounded, written."""

import bisect
from collections.abc import Callable
import dataclasses
import itertools
import math
import threading

import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.arrays import Rectangle
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.conversion.not_finite import check_finite
from t5x_inference_ext.checkpoints.conversion.outputs import ArrayWrite, Output
from t5x_inference_ext.checkpoints.conversion.raw_array import byte_sum
from t5x_inference_ext.checkpoints.conversion.rounding_error import RoundingError
from t5x_inference_ext.checkpoints.conversion.slices import ConversionPlan, StoredBlock, TensorSlice
from t5x_inference_ext.quantization import rounding

# What to do with values that are final, those of a block at once: write them, or compare them with what is there.
Put = Callable[[list[ArrayWrite]], None]


class Hold:
  """Memory for blocks that are needed again: what does not fit is read again."""

  def __init__(self, nbytes: int):
    self._free, self._lock = nbytes, threading.Lock()

  def take(self, nbytes: int) -> bool:
    with self._lock:
      if self._free < nbytes:
        return False
      self._free -= nbytes
      return True

  def give(self, nbytes: int) -> None:
    with self._lock:
      self._free += nbytes

  def has(self, nbytes: int) -> bool:
    return self._free >= nbytes


@dataclasses.dataclass(frozen=True)
class Job:
  """What all slices of a conversion share.

  Attributes:
    source, output, plan, put, hold: see their classes.
    search: whether scales are searched for the least squared error.
    progress: told what was written, and how many bytes of the source it was.
    finished: called with each slice's record.
  """

  source: Checkpoint
  output: Output
  plan: ConversionPlan
  put: Put
  hold: Hold
  search: bool
  progress: Callable[[str, int], None]
  finished: Callable[[dict], None]


class SliceWork:
  """A slice. A pipeline.Work."""

  def __init__(self, job: Job, piece: TensorSlice):
    self._job, self._slice = job, piece
    self._kinds = params.parameters(job.source.config)
    self._blocks = job.plan.blocks(piece)
    self._steps = iter(
      [
        *((self._measure, *((self._search,) if job.search else ())) if piece.scaled else ()),
        self._write,
      ]
    )
    self._lock = threading.Lock()
    self._held = {}
    self._layers = piece.boxes[0].bounds[0]
    # Of a channel's scale, the slice's columns alone, side by side: by scale, (begin, end) in the tensor -> place here.
    self._columns = self._channels() if piece.scaled else {}
    self._maxima, self._squares, self._scales = {}, {}, {}
    self._sums, self._errors = {}, {}

  def may_start(self) -> bool:
    return not self._slice.scaled or self._job.hold.has(self._job.plan.block_bytes)

  def jobs(self) -> list[Callable[[], None]] | None:
    if self._squares:
      self._choose()
    elif self._maxima and not self._scales:
      self._find_scales()
    step = next(self._steps, None)
    if step is None:
      self._finish()
      return None
    return [lambda b=block, i=i: step(i, b) for i, block in enumerate(self._blocks)]

  def _values(self, block: StoredBlock) -> np.ndarray:
    return self._job.plan.arrays[block.array].read(block.bounds)

  def _measure(self, number: int, block: StoredBlock) -> None:
    array, values = self._job.plan.arrays[block.array], self._values(block)
    for part, rectangle, w in array.rectangles(values, block.bounds):
      largest = rounding.largest(w)
      scale = self._kinds[part.name].scale
      place = self._place(scale, rectangle)
      with self._lock:
        maxima = self._buffer(self._maxima, part.name, scale, np.float32)
        np.maximum(maxima[place], largest, out=maxima[place])
    if self._job.hold.take(values.nbytes):
      self._held[number] = values

  def _find_scales(self) -> None:
    together = {}
    for name, maxima in self._maxima.items():
      check_finite(self._job.source, name, maxima, self._layers[0], np.int8)
      together.setdefault(self._kinds[name].scale, []).append(maxima)
    self._scales = {
      scale: rounding.scales_of(np.maximum.reduce(maxima)) for scale, maxima in together.items()
    }

  def _search(self, number: int, block: StoredBlock) -> None:
    array = self._job.plan.arrays[block.array]
    values = self._held[number] if number in self._held else self._values(block)
    for part, rectangle, w in array.rectangles(values, block.bounds):
      scale = self._kinds[part.name].scale
      place = self._place(scale, rectangle)
      squares = rounding.squared_errors(w, self._scales[scale][place])
      with self._lock:
        self._buffer(self._squares, scale, scale, np.int64, len(rounding.SEARCHED))[:, *place] += (
          squares
        )

  def _choose(self) -> None:
    for scale, squares in self._squares.items():
      self._scales[scale] = rounding.best_scales(self._scales[scale], squares)
    self._squares = {}

  def _write(self, number: int, block: StoredBlock) -> None:
    array, output = self._job.plan.arrays[block.array], self._job.output
    held = self._held.pop(number, None)
    values = self._values(block) if held is None else held
    errors, placements, names = {}, [], []
    for part, rectangle, w in array.rectangles(values, block.bounds):
      scale_name, scale = self._kinds[part.name].scale, None
      if self._slice.scaled:
        place = self._place(scale_name, rectangle)
        scale, magnitude = self._scales[scale_name][place], self._maxima[part.name][place].max()
      elif scale_name is not None and self._job.source.weights == 'int8':
        scale = self._job.source.tensors[scale_name].read(
          (slice(*rectangle.layers), slice(*rectangle.columns))
        )
        magnitude = rounding.QMAX * scale.max()
      else:
        largest = rounding.largest(w)
        check_finite(
          self._job.source, part.name, largest, rectangle.layers[0], output.dtype(part.name)
        )
        magnitude = largest.max()
      written = _written(w, scale, output.dtype(part.name))
      errors.setdefault(part.name, RoundingError()).add(w, written, scale, float(magnitude))
      placements.extend(output.placements(part.name, rectangle, written))
      names.append(part.name)
    self._put(placements)
    with self._lock:
      self._errors[number] = errors
    if held is not None:
      self._job.hold.give(held.nbytes)
    where = f'layers {block.bounds[0][0]}-{block.bounds[0][1] - 1} ' if self._slice.scaled else ''
    self._job.progress(where + ' '.join(dict.fromkeys(names)), values.nbytes)

  def _finish(self) -> None:
    for scale, places in self._columns.items():
      for columns, place in places.items():
        values = self._scales[scale][:, None, place : place + columns[1] - columns[0]]
        self._put(
          list(self._job.output.placements(scale, Rectangle(self._layers, (0, 1), columns), values))
        )
    errors = {}
    for _, of_block in sorted(self._errors.items()):
      for name, error in of_block.items():
        errors.setdefault(name, RoundingError()).merge(error)
    self._job.finished(
      {
        'slice': self._slice.number,
        'sums': self._sums,
        'errors': {name: error.to_list() for name, error in errors.items()},
      }
    )

  def _put(self, placements: list[ArrayWrite]) -> None:
    self._job.put(placements)
    for array, _, values in placements:
      total = byte_sum(values)
      with self._lock:
        self._sums[array.name] = self._sums.get(array.name, 0) + total

  def _channels(self) -> dict[str, dict[tuple[int, int], int]]:
    columns = {}
    for box in self._slice.boxes:
      for part, rectangle, _ in self._job.plan.arrays[box.array].arrangement.rectangles(box.bounds):
        columns.setdefault(self._kinds[part.name].scale, set()).add(rectangle.columns)
    places = {}
    for scale, ranges in columns.items():
      ranges = sorted(ranges)
      ends = itertools.accumulate(end - begin for begin, end in ranges)
      places[scale] = {r: place - (r[1] - r[0]) for r, place in zip(ranges, ends)}
    return places

  def _place(self, scale: str, rectangle: Rectangle) -> tuple[slice, slice]:
    """Of a rectangle's layers and columns in the slice's buffers."""
    ranges = list(self._columns[scale])
    begin, end = rectangle.columns
    first = ranges[bisect.bisect_right(ranges, (begin, math.inf)) - 1]
    place = self._columns[scale][first] + begin - first[0]
    return slice(*(i - self._layers[0] for i in rectangle.layers)), slice(
      place, place + end - begin
    )

  def _buffer(
    self, buffers: dict[str, np.ndarray], name: str, scale: str, dtype: type, *lead: int
  ) -> np.ndarray:
    """[*lead, layers, columns] of the slice."""
    if name not in buffers:
      columns = sum(end - begin for begin, end in self._columns[scale])
      buffers[name] = np.zeros((*lead, self._layers[1] - self._layers[0], columns), dtype)
    return buffers[name]


def _written(w: np.ndarray, scale: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
  """w [layers, rows, columns], float or int8, as it is written; scale [layers, columns] where either is int8."""
  if dtype == np.int8:
    return w if w.dtype == np.int8 else rounding.quantize_layers(w, scale)
  return (rounding.dequantize(w, scale[:, None]) if w.dtype == np.int8 else w).astype(
    dtype, copy=False
  )
