"""A conversion from its plan to the finished directory: what is left to do, done by this shard, sealed by the last."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import functools
import importlib.metadata
import json
import os
import threading
import zlib

import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.arrays import Rectangle, SourceArray
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.conversion import read_back
from t5x_inference_ext.checkpoints.conversion.not_finite import NotFinite, check_finite
from t5x_inference_ext.checkpoints.conversion.options import ConvertOptions, Report
from t5x_inference_ext.checkpoints.conversion.outputs import ArrayWrite, make_output
from t5x_inference_ext.checkpoints.conversion.pipeline import Pipeline
from t5x_inference_ext.checkpoints.conversion.raw_array import byte_sum
from t5x_inference_ext.checkpoints.conversion.rounding_error import RoundingError
from t5x_inference_ext.checkpoints.conversion.slice_work import Hold, Job, SliceWork
from t5x_inference_ext.checkpoints.conversion.slices import ConversionPlan
from t5x_inference_ext.checkpoints.conversion.work_directory import SYNCED, WorkDirectory
from t5x_inference_ext.checkpoints.workers import cores
from t5x_inference_ext.errors import CheckpointError
from t5x_inference_ext.text_format import megabytes

# Python, numpy, tensorstore; and what a worker has at a time: a block compressed, decoded, in order, and temporaries.
_BASE_BYTES = 150 * 2**20
_BLOCKS_A_WORKER = 3.5

# (what is being done, bytes of the source it was, bytes of the source in all)
ConversionProgress = Callable[[str, int, int], None]


class Conversion:
  """One source on its way into one output.

  Attributes:
    source: the checkpoint.
    output: what is written.
    plan: its slices.
    identity: all on which the output's bytes depend, JSON-ready: a run goes on only where this is the same.
  """

  def __init__(
    self, source: Checkpoint, options: ConvertOptions, directory: str, progress: ConversionProgress
  ):
    self.source, self.options = source, options
    provenance = {
      'path': source.path,
      'format': source.format,
      'step': source.step,
      'notes': list(source.notes),
      'form': source.form,
      'rescale_logits': source.rescale_logits,
      'index_crc32': _index_checksum(source.path),
    }
    asked = {'scale_search': options.scale_search}
    self.output = make_output(
      source, directory, options.format, options.weights, provenance, _version(), asked
    )
    finds_scales = self.output.weights == 'int8' and source.weights != 'int8'
    arrays = [SourceArray(a.tensor.uncached(), a.arrangement) for a in source.arrays]
    self.plan = ConversionPlan(arrays, source.config, finds_scales, options.slice_bytes)
    self._finds_scales = finds_scales
    self._total = sum(a.tensor.nbytes for a in arrays)
    self._progress, self._progress_lock = progress, threading.Lock()
    self.identity = json.loads(
      json.dumps(
        {
          'source': provenance,
          'model': source.config.to_dict(),
          'format': options.format,
          'weights': self.output.weights,
          **asked,
          'slice_bytes': options.slice_bytes,
          'version': _version(),
          'arrays': {a.name: a.metadata for a in self.output.arrays},
        }
      )
    )

  @functools.cached_property
  def workers(self) -> int:
    return self.options.workers or cores()

  @property
  def peak_bytes(self) -> int:
    """About how much memory the process takes."""
    held = min(self.options.hold_bytes, self.plan.slice_bytes) if self._finds_scales else 0
    return int(_BASE_BYTES + held + self.workers * _BLOCKS_A_WORKER * self.plan.block_bytes)

  def description(self) -> Iterator[str]:
    """What will be done, for people, in lines."""
    yield (
      f'{len(self.plan.slices)} slices of up to {megabytes(self.plan.slice_bytes)}, in blocks of up to '
      f'{megabytes(self.plan.block_bytes)}, by {self.workers} workers; about {megabytes(self.peak_bytes)} of memory; the output '
      f'takes {megabytes(sum(a.nbytes for a in self.output.arrays))} of disk'
    )
    again = sum(
      max(0, self.plan.nbytes(s) - self.options.hold_bytes) for s in self.plan.slices if s.scaled
    )
    if again:
      times = 'a third time' if self.options.scale_search == 'mse' else 'twice'
      yield f'{megabytes(again)} of {megabytes(self._total)} are read {times}: columns of chunks are larger than what is held'

  def run(self, work: WorkDirectory) -> Report:
    """Does what this shard has to do; the last one to have done it makes the output appear."""
    scales_slice = len(self.plan.slices)
    alone = False  # in the directory, whose contents are then ours to remove
    try:
      with contextlib.ExitStack() as shard:
        with work.setup():
          shard.enter_context(work.working(self.options.shard_id))
          adopted = work.adopt(self.identity)
          alone = self.options.num_shards == 1
          if not adopted:
            for array in self.output.arrays:
              array.create()
            work.start(self.identity)
        done = {entry['slice'] for entry in work.entries() if 'slice' in entry}
        todo = [
          n
          for n in range(scales_slice + 1)
          if n % self.options.num_shards == self.options.shard_id and n not in done
        ]
        self._convert(todo, self._write, work.record)
        if self.options.num_shards > 1:
          self._sync(work)
      if self.options.num_shards > 1:
        with work.sealing() as claim:
          if claim is not None and scales_slice < len(
            {e['slice'] for e in work.entries() if 'slice' in e}
          ):
            self._read_back(work, claim)
      with work.finishing() as last:
        entries = work.entries() if last else []
        slices = {entry['slice']: entry for entry in entries if 'slice' in entry}
        if len(slices) <= scales_slice:
          return self.report(work.path, slices.values(), finished=False)
        self._read_back(work)
        checksums = read_back.checksums(self.output.arrays, slices.values(), work.entries())
        errors = {name: error.summary() for name, error in self._errors(slices.values()).items()}
        for name, data in self.output.headers(checksums, errors):
          work.write_file(name, data)
        work.finish()
    except (CheckpointError, OSError) as e:
      # Nothing is worth keeping of a source that can't be converted, nor where nothing is finished.
      if alone and (
        isinstance(e, NotFinite) or not any('slice' in entry for entry in work.entries())
      ):
        with contextlib.suppress(OSError):
          work.discard()
      raise
    return self.report(work.path, slices.values())

  def compare(self, put: Callable[[list[ArrayWrite]], None]) -> None:
    """Gives `put` all that a conversion would write, those of a block at once."""
    self._convert(range(len(self.plan.slices) + 1), put, lambda entry: None)

  def _convert(
    self, numbers, put: Callable[[list[ArrayWrite]], None], record: Callable[[dict], None]
  ) -> None:
    job = Job(
      self.source,
      self.output,
      self.plan,
      put,
      Hold(self.options.hold_bytes),
      self.options.scale_search == 'mse',
      self._told,
      record,
    )
    works = (
      SliceWork(job, self.plan.slices[n]) if n < len(self.plan.slices) else _Scales(self, job)
      for n in numbers
    )
    Pipeline(works, self.workers).run()

  def _write(self, placements: list[ArrayWrite]) -> None:
    by_array = {}
    for array, bounds, values in placements:
      by_array.setdefault(array, []).append((bounds, values))
    for array, pieces in by_array.items():
      array.write(pieces)

  def _read_back(self, work: WorkDirectory, claim: Callable[[int], bool] | None = None) -> None:
    read_back.read_back(
      self.output.arrays, work.entries, work.record, self.workers, self._progress, claim
    )

  def _sync(self, work: WorkDirectory) -> None:
    for array in self.output.arrays:
      for number in array.chunks():
        array.sync(number)
    work.record({SYNCED: True})

  def _told(self, what: str, nbytes: int) -> None:
    with self._progress_lock:
      self._progress(what, nbytes, self._total)

  def _errors(self, slices: Iterable[dict]) -> dict[str, RoundingError]:
    """By tensor. slices: their records."""
    errors = (
      {name: RoundingError() for name in params.parameters(self.source.config)} if slices else {}
    )
    for entry in sorted(slices, key=lambda e: e['slice']):
      for name, values in entry['errors'].items():
        errors[name].merge(RoundingError(*values))
    return errors

  def report(self, path: str, slices: Iterable[dict], finished: bool = True) -> Report:
    """What came of it. slices: their records."""
    sizes = {a.name: _disk_usage(os.path.join(path, a.name)) for a in self.output.arrays}
    kinds = {**params.parameters(self.source.config), **params.scales(self.source.config)}
    layer_bytes = sum(size for name, size in sizes.items() if self.output.is_layer_weight(name))
    return Report(
      self.source,
      path,
      self.output.weights,
      finished,
      self._errors(slices),
      source_bytes=sum(t.nbytes for t in self.source.tensors.values()),
      output_bytes=_disk_usage(path),
      layer_bytes=layer_bytes,
      layer_float32_bytes=sum(
        4 * int(np.prod(p.shape)) for p in kinds.values() if p.kind == 'matrix'
      ),
    )


class _Scales:
  """The scales of weights that were int8 already: the last slice. Nothing, for others. A pipeline.Work."""

  def __init__(self, conversion: Conversion, job: Job):
    self._job, self._started = job, False
    self._conversion, self._sums, self._lock = conversion, {}, threading.Lock()

  def may_start(self) -> bool:
    return True

  def jobs(self) -> list[Callable[[], None]] | None:
    if self._started:
      self._job.finished({'slice': len(self._job.plan.slices), 'sums': self._sums, 'errors': {}})
      return None
    self._started = True
    if self._job.source.weights != 'int8':
      return []
    return [functools.partial(self._scale, name) for name in params.scales(self._job.source.config)]

  def _scale(self, name: str) -> None:
    values = self._job.source.tensors[name].read()  # [L, out]: 90 MB in all for palm_540b
    check_finite(self._job.source, name, values, 0)
    if self._job.output.weights == 'int8':
      layers, columns = values.shape
      rectangle = Rectangle((0, layers), (0, 1), (0, columns))
      placements = list(self._job.output.placements(name, rectangle, values[:, None]))
      self._job.put(placements)
      for array, _, written in placements:
        with self._lock:
          self._sums[array.name] = self._sums.get(array.name, 0) + byte_sum(written)


def _index_checksum(path: str) -> int:
  """Of the small files that say what a checkpoint is: another checkpoint in its place has others."""
  total = 0
  for name in (
    'checkpoint',
    'serving_config.json',
    'checksums.json',
    '_METADATA',
    'manifest.ocdbt',
    'state/_METADATA',
    'state/manifest.ocdbt',
    'state/checkpoint',
  ):
    with contextlib.suppress(CheckpointError):
      total = zlib.crc32(storage.read_file(path, name) or b'', total)
  return total


def _version() -> str:
  try:
    return importlib.metadata.version('t5x_inference_ext')
  except importlib.metadata.PackageNotFoundError:
    return 'from source'


def _disk_usage(path: str) -> int:
  """Bytes in all files below a directory."""
  return sum(
    os.path.getsize(os.path.join(root, name)) for root, _, names in os.walk(path) for name in names
  )
