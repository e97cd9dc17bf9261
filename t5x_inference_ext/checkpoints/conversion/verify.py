"""Verification of a finished checkpoint, against its manifest and against its source."""

from collections.abc import Mapping
import functools
import json
import math
import threading
from typing import Any

import numpy as np

from t5x_inference_ext.checkpoints import serving, storage
from t5x_inference_ext.checkpoints.adapters.folding import FOLDED_NOTE
from t5x_inference_ext.checkpoints.calibration.rows import CALIBRATED_NOTE
from t5x_inference_ext.checkpoints.checkpoint import TREES, open_checkpoint
from t5x_inference_ext.checkpoints.conversion import t5x_output
from t5x_inference_ext.checkpoints.conversion.conversion import Conversion, ConversionProgress
from t5x_inference_ext.checkpoints.conversion.options import ConvertOptions
from t5x_inference_ext.checkpoints.conversion.output import ArrayWrite
from t5x_inference_ext.checkpoints.conversion.raw_array import ZARR_DTYPES
from t5x_inference_ext.checkpoints.manifest import check_manifest
from t5x_inference_ext.checkpoints.serving_tensor import ServingTensor
from t5x_inference_ext.checkpoints.workers import run_jobs, worker_count
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError
from t5x_inference_ext.quantization.nibbles import INT4


def verify(
  path: str,
  source: str | None = None,
  *,
  workers: int | None = None,
  rescale_logits: bool | None = None,
  progress: ConversionProgress = lambda what, done, total: None,
) -> list[str]:
  """Compare every file of a checkpoint that a conversion wrote with its recorded checksum.

  Args:
    path: Finished checkpoint, in any format that conversions write.
    source: Checkpoint that it was made from. It is converted again, in memory, and compared value
      by value.
    workers: Number of threads; None: one per core.
    rescale_logits: Value of this convention for the source; None takes the value that the
      conversion recorded.
    progress: Called after every chunk.

  Returns:
    Lines with the results.

  Raises:
    CheckpointError: A file or value differs from the record; the message names the first one.
  """
  threads = worker_count(workers)
  path = storage.normalize(path)
  manifest_name, manifest = read_manifest(path)
  small_files = check_manifest(path, manifest_name, manifest)
  for note, how in (FOLDED_NOTE, 'an adapter folded in'), (CALIBRATED_NOTE, 'a calibration text'):
    if source is not None and _has_note(manifest, note):
      raise CheckpointError(
        f'{path} was made with {how}, so its values are not those of {source}: verify it alone'
      )
  tensors = serving.read_listed(path, _listed(manifest), manifest_name, cached=False)
  total = sum(t.nbytes for t in tensors.values())
  lock = threading.Lock()

  def check_chunk(tensor: ServingTensor, number: int, index: tuple[slice, ...]) -> None:
    tensor.check(number, index)
    tensor.check_padding(index)
    with lock:
      nbytes = math.prod(s.stop - s.start for s in index) * tensor.dtype.itemsize
      progress(f'verify {tensor.name}', nbytes, total)

  chunks = [(tensor, *chunk) for tensor in tensors.values() for chunk in tensor.chunks()]
  run_jobs([functools.partial(check_chunk, *chunk) for chunk in chunks], threads)
  if small_files:
    chunk_files = {f'{tensor.name}/{tensor.file(index)}' for tensor, _, index in chunks}
    expected = {manifest_name, *small_files, *chunk_files}
    extra = sorted(set(storage.list_files(path)) - expected)
    if extra:
      raise CheckpointError(
        f'{path} holds {", ".join(extra[:3])}{", ..." if len(extra) > 3 else ""}, which '
        f'{manifest_name} does not list: remove files that are not part of the checkpoint'
      )
  lines = [
    f'{path}: {len(tensors)} tensors, {len(chunks)} chunks, {total / 1e6:.1f} MB are as recorded '
    f'in {manifest_name}'
  ]
  if source is not None:
    _compare(path, manifest, source, threads, rescale_logits, progress)
    lines.append(f'and what {source} converts to')
  return lines


def _listed(manifest: dict[str, Any]) -> serving.Listed:
  """Return (shape, dtype name) of a manifest's tensors, by name."""
  return {name: (tuple(t['shape']), t['dtype']) for name, t in manifest['tensors'].items()}


def _compare(
  path: str,
  manifest: dict[str, Any],
  source: str,
  workers: int,
  rescale_logits: bool | None,
  progress: ConversionProgress,
) -> None:
  """Raise CheckpointError if a checkpoint's bits differ from a conversion of its source."""
  made_from = manifest['source']
  if rescale_logits is None and made_from['format'] in TREES:
    # Earlier versions recorded null, and meant True.
    rescale_logits = made_from.get('rescale_logits') is not False
  is_serving_source = made_from['format'] == 'serving'
  model = None if is_serving_source else ModelConfig.from_dict(manifest['model'])
  checkpoint = open_checkpoint(source, config=model, rescale_logits=rescale_logits)
  recorded = made_from.get('step')
  if checkpoint.step != recorded:
    raise CheckpointError(
      f'{path} was made from step {recorded}, but {source} is step {checkpoint.step}'
    )
  is_serving = manifest['format'] == serving.SERVING_FORMAT
  t5x_format = 't5x_int8' if manifest['weights'] == 'int8' else 't5x_float'
  options = ConvertOptions(
    format='serving' if is_serving else t5x_format,
    weights=manifest['weights'].partition(',')[0],
    bits=manifest['weights'].partition(',')[2],
    workers=workers,
    scale_search=manifest.get('options', {}).get('scale_search', 'absmax'),
  )
  listed = _listed(manifest)
  stored = serving.unpacked(serving.read_listed(path, listed, ''), listed)

  def compare(writes: list[ArrayWrite]) -> None:
    for array, bounds, values in writes:
      found = stored[array.name].read(tuple(slice(*b) for b in bounds))
      # Compare bits instead of values: 0 and -0 are equal values with different bits.
      bits = f'u{found.itemsize}'
      if found.dtype == INT4:  # whose bytes may have a sign, or not
        found, values = found.astype(np.int8), values.astype(np.int8)
      different = found.view(bits) != np.ascontiguousarray(values).view(bits)
      if different.any():
        first = [int(i[0]) + b for i, (b, _) in zip(np.nonzero(different), bounds)]
        raise CheckpointError(
          f'{array.name}: {int(different.sum())} values from {first} on in {path}/{array.name} '
          f'differ from a conversion of {source}'
        )

  Conversion(checkpoint, options, path, progress).compare(compare)


def read_manifest(path: str) -> tuple[str, dict[str, Any]]:
  """Return the name and content of the file that lists a checkpoint's tensors.

  Raises:
    CheckpointError: There is no such file, or it is damaged.
  """
  for name, kind in (
    (serving.CONFIG, serving.SERVING_FORMAT),
    (t5x_output.MANIFEST, t5x_output.T5X_MANIFEST_FORMAT),
  ):
    data = storage.read_file(path, name)
    if data is None:
      continue
    try:
      manifest = json.loads(data)
      if manifest['format'] != kind:
        raise CheckpointError(f'{path}/{name}: format {manifest["format"]!r} is not {kind!r}')
      if name == serving.CONFIG:
        serving.read_serving_header(path, data)
      sound = all(
        isinstance(t['shape'], list) and t['dtype'] in ZARR_DTYPES
        for t in manifest['tensors'].values()
      )
      if sound and isinstance(manifest['source'], dict) and manifest['weights']:
        return name, manifest
    except CheckpointError:
      raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
      pass
    raise CheckpointError(f'{path}/{name} is damaged')
  open_checkpoint(path)  # raises a more precise error if this is not a checkpoint
  raise CheckpointError(
    f'{path} was not written by a conversion: it has no manifest ({serving.CONFIG} or '
    f'{t5x_output.MANIFEST}) to verify it against'
  )


def _has_note(manifest: Mapping[str, Any], beginning: str) -> bool:
  source = manifest.get('source')
  notes = source.get('notes') if isinstance(source, dict) else None
  return isinstance(notes, list) and any(str(n).startswith(beginning) for n in notes)
