"""A conversion, from its plan to the finished directory.

Each shard converts its slices; the last shard to finish completes the output.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
import contextlib
import dataclasses
import json
import os
import threading
from typing import Any

import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.arrays import SourceArray, by_row
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.conversion import files, read_back
from t5x_inference_ext.checkpoints.conversion.not_finite import NotFinite
from t5x_inference_ext.checkpoints.conversion.options import ConvertOptions, Report
from t5x_inference_ext.checkpoints.conversion.output import ArrayWrite
from t5x_inference_ext.checkpoints.conversion.outputs import make_output
from t5x_inference_ext.checkpoints.conversion.pipeline import Pipeline, PipelineWork
from t5x_inference_ext.checkpoints.conversion.provenance import conversion_record
from t5x_inference_ext.checkpoints.conversion.raw_array import RawArray
from t5x_inference_ext.checkpoints.conversion.rounding_error import RoundingError
from t5x_inference_ext.checkpoints.conversion.scales_work import ScalesWork
from t5x_inference_ext.checkpoints.conversion.slice_work import (
  Finished,
  MemoryBudget,
  PutWrites,
  SliceContext,
  SliceWork,
)
from t5x_inference_ext.checkpoints.conversion.slices import ConversionPlan
from t5x_inference_ext.checkpoints.conversion.work_directory import SYNCED, WorkDirectory
from t5x_inference_ext.checkpoints.tensor import Bounds
from t5x_inference_ext.checkpoints.workers import worker_count
from t5x_inference_ext.errors import CheckpointError
from t5x_inference_ext.quantization.formats import is_quantized
from t5x_inference_ext.text_format import megabytes

# Estimated memory: _BASE_BYTES for Python, numpy and tensorstore, and _BLOCKS_A_WORKER blocks per
# worker (a block compressed, decoded and reordered, and temporaries).
_BASE_BYTES = 150 * 2**20
_BLOCKS_A_WORKER = 3.5
# Version of the journal's records. A run can only continue from records of its own version.
_JOURNAL = 3

# Arguments: (current step, bytes just processed, total bytes).
ConversionProgress = Callable[[str, int, int], None]
# A finished slice's record in the journal.
_Record = dict[str, Any]


class Conversion:
  """One conversion, from a source to an output.

  Attributes:
    source: The checkpoint read.
    output: The format written.
    plan: All slices to convert.
    workers: Number of threads.
    identity: Everything that the output's bytes depend on, JSON-ready. A run can only continue an
      earlier one with equal identity.
  """

  def __init__(
    self, source: Checkpoint, options: ConvertOptions, directory: str, progress: ConversionProgress
  ) -> None:
    self.source, self._options = source, options
    self.workers = worker_count(options.workers)
    record = conversion_record(source, options.search)
    self.output = make_output(source, directory, options, record)
    arrays = [self._array(a) for a in source.arrays]
    self.plan = ConversionPlan(arrays, source.config, self._finds_scales, options.slice_size)
    self._total = sum(a.tensor.nbytes for a in arrays)
    self._progress, self._progress_lock = progress, threading.Lock()
    identity = {
      **record,
      'journal': _JOURNAL,
      'model': source.config.to_dict(),
      'format': options.format,
      'weights': self.output.weights,
      'slice_bytes': options.slice_size,
      'arrays': {a.name: a.metadata for a in self.output.arrays},
    }
    self.identity = json.loads(json.dumps(identity))

  def _array(self, array: SourceArray) -> SourceArray:
    """Return an array as it is read: uncached; quantized tables, or those to quantize, by row."""
    array = dataclasses.replace(array, tensor=array.tensor.uncached())
    name = array.arrangement.parts[0].name
    quantized = self._is_quantized(name) or is_quantized(self.output.dtype(name))
    return by_row(array) if name in params.TABLES and quantized else array

  def _is_quantized(self, name: str) -> bool:
    """Return whether a tensor is quantized in the source."""
    return is_quantized(self.source.tensors[name].dtype)

  def _finds_scales(self, name: str) -> bool:
    return is_quantized(self.output.dtype(name)) and not self._is_quantized(name)

  @property
  def peak_bytes(self) -> int:
    """Estimate of the memory of the process, in bytes."""
    scaled = any(s.scaled for s in self.plan.slices)
    held = min(self._options.held_size, self.plan.slice_bytes) if scaled else 0
    return int(_BASE_BYTES + held + self.workers * _BLOCKS_A_WORKER * self.plan.block_bytes)

  def description(self) -> Iterator[str]:
    """Yield lines that say what will be done."""
    yield (
      f'{len(self.plan.slices)} slices of up to {megabytes(self.plan.slice_bytes)}, in blocks of '
      f'up to {megabytes(self.plan.block_bytes)}, by {self.workers} workers; about '
      f'{megabytes(self.peak_bytes)} of memory; the output takes '
      f'{megabytes(sum(a.nbytes for a in self.output.arrays))} of disk'
    )
    scaled = (self.plan.nbytes(s) for s in self.plan.slices if s.scaled)
    again = sum(max(0, nbytes - self._options.held_size) for nbytes in scaled)
    if again:
      times = 'a third time' if self._options.search == 'mse' else 'twice'
      yield (
        f'{megabytes(again)} of {megabytes(self._total)} are read {times}: columns of chunks are '
        'larger than hold_bytes'
      )

  def run(self, work: WorkDirectory, warn: Callable[[str], None]) -> Report:
    """Convert this shard's slices; if all other shards are done, also complete the output.

    Args:
      work: The work directory.
      warn: Called with one line of text if the work of an earlier run can't be used.
    """
    alone = False  # whether no other process uses the directory
    try:
      with contextlib.ExitStack() as shard:
        with work.setup():
          shard.enter_context(work.working(self._options.shard_id))
          adopted = work.adopt(self.identity, lambda: self._is_laid_out(warn))
          alone = self._options.num_shards == 1
          if not adopted:
            for array in self.output.arrays:
              array.create()
            work.start(self.identity)
        self._convert_shard(work)
      if self._options.num_shards > 1:
        with work.reading_back() as claim:
          if claim is not None and self._is_complete(_slices(work)):
            self._read_back(work).run(self.workers, claim)
      with work.finishing() as last:
        slices = _slices(work) if last else {}
        if not self._is_complete(slices):
          return self.report(work.path, slices.values(), finished=False)
        self._read_back(work).run(self.workers)
        self._publish(work, slices)
    except (CheckpointError, OSError) as e:
      # Remove the work directory if the source can't be converted, or if no slice is finished.
      if alone and (isinstance(e, NotFinite) or not self._has_results(work)):
        with contextlib.suppress(OSError):
          work.discard()
      raise
    return self.report(work.path, slices.values())

  def compare(self, put: PutWrites) -> None:
    """Convert the source block by block, and pass the values to `put` instead of writing them."""
    self._convert(range(len(self.plan.slices) + 1), put, lambda record, nbytes: None)

  def _is_laid_out(self, warn: Callable[[str], None]) -> bool:
    missing = next((a for a in self.output.arrays if not a.is_created()), None)
    if missing is not None:
      warn(f'{missing.path} is no longer complete: converting everything again')
    return missing is None

  def _has_results(self, work: WorkDirectory) -> bool:
    """Return whether the work directory has anything that another run can continue from."""
    return bool(_slices(work))

  def _is_complete(self, slices: dict[int, _Record]) -> bool:
    return len(slices) > len(self.plan.slices)  # one more than in the plan, for the scales

  def _convert_shard(self, work: WorkDirectory) -> None:
    """Convert this shard's unfinished slices."""
    done, shards = _slices(work), self._options.num_shards
    mine = range(self._options.shard_id, len(self.plan.slices) + 1, shards)
    with self._read_back(work).ahead() as written:

      def finished(record: _Record, nbytes: Counter[tuple[RawArray, int]]) -> None:
        work.record(record)
        if shards == 1:
          written(nbytes)

      self._convert([n for n in mine if n not in done], _write, finished)
    if shards > 1:
      for array in self.output.arrays:
        for number in array.chunks():
          array.sync(number)
      work.record({SYNCED: True})

  def _convert(self, numbers: Iterable[int], put: PutWrites, finished: Finished) -> None:
    search = self._options.search == 'mse'
    budget = MemoryBudget(self._options.held_size)
    context = SliceContext(
      self.source, self.output, self.plan, put, budget, search, self._report_progress, finished
    )

    def works() -> Iterator[PipelineWork]:
      for n in numbers:
        is_slice = n < len(self.plan.slices)
        yield SliceWork(context, self.plan.slices[n]) if is_slice else ScalesWork(context)

    Pipeline(works(), self.workers).run()

  def _read_back(self, work: WorkDirectory) -> read_back.ReadBack:
    return read_back.ReadBack(self.output.arrays, work.entries, work.record, self._progress)

  def _publish(self, work: WorkDirectory, slices: dict[int, _Record]) -> None:
    """Write the small files, and move the output to its final path."""
    checksums = read_back.checksums(self.output.arrays, slices.values(), work.entries())
    errors = {name: error.summary() for name, error in self._errors(slices.values()).items()}
    for name, data in self.output.headers(checksums, errors):
      files.write_file(os.path.join(work.payload, name), data)
    work.finish()

  def _report_progress(self, what: str, nbytes: int) -> None:
    with self._progress_lock:
      self._progress(what, nbytes, self._total)

  def _errors(self, slices: Collection[_Record]) -> dict[str, RoundingError]:
    """Return tensor name -> rounding errors; {} if the slices' records have none."""
    errors = (
      {name: RoundingError() for name in params.parameters(self.source.config)} if slices else {}
    )
    for entry in sorted(slices, key=lambda e: e['slice']):
      for name, values in entry['errors'].items():
        errors[name].merge(RoundingError(*values))
    return errors

  def report(self, path: str, slices: Collection[_Record] = (), finished: bool = True) -> Report:
    """Return the report of the conversion into `path`, with errors from the slices' records."""
    sizes = {a.name: _disk_usage(os.path.join(path, a.name)) for a in self.output.arrays}
    matrices = (p for p in params.parameters(self.source.config).values() if p.kind == 'matrix')
    return Report(
      self.source,
      path,
      self.output.weights,
      finished,
      self._errors(slices),
      source_bytes=sum(t.nbytes for t in self.source.tensors.values()),
      output_bytes=_disk_usage(path),
      layer_bytes=sum(n for name, n in sizes.items() if self.output.is_layer_weight(name)),
      layer_float32_bytes=sum(4 * int(np.prod(p.shape)) for p in matrices),
    )


def _write(writes: list[ArrayWrite]) -> None:
  by_array: dict[RawArray, list[tuple[Bounds, np.ndarray]]] = {}
  for array, bounds, values in writes:
    by_array.setdefault(array, []).append((bounds, values))
  for array, pieces in by_array.items():
    array.write(pieces)


def _slices(work: WorkDirectory) -> dict[int, _Record]:
  """Return the records of finished slices, by number."""
  return {entry['slice']: entry for entry in work.entries() if 'slice' in entry}


def _disk_usage(path: str) -> int:
  """Return the total bytes of all files below a directory."""
  return sum(
    os.path.getsize(os.path.join(root, name)) for root, _, names in os.walk(path) for name in names
  )
