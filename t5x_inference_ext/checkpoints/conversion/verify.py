"""A finished checkpoint, re-read: against its manifest, and against the source that it was made from."""

from collections.abc import Callable
import json
import math
import threading

import numpy as np

from t5x_inference_ext.checkpoints import serving, storage
from t5x_inference_ext.checkpoints.checkpoint import open_checkpoint
from t5x_inference_ext.checkpoints.conversion import t5x_output
from t5x_inference_ext.checkpoints.conversion.conversion import Conversion
from t5x_inference_ext.checkpoints.conversion.options import ConvertOptions
from t5x_inference_ext.checkpoints.manifest import check_manifest
from t5x_inference_ext.checkpoints.workers import cores, run_jobs
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError

# (what is being done, bytes that it was, bytes in all)
VerifyProgress = Callable[[str, int, int], None]


def verify(
  path: str,
  source: str | None = None,
  *,
  workers: int | None = None,
  rescale_logits: bool | None = None,
  progress: VerifyProgress = lambda what, done, total: None,
) -> list[str]:
  """Reads every file of a checkpoint that a conversion wrote, and compares it with the checksum recorded.

  Args:
    path: a finished checkpoint, of any format that conversions write.
    source: the checkpoint that it was made from: is converted again, in memory, and compared value by value.
    workers: threads; None is one a core.
    rescale_logits: of the source, as it was given to the conversion; None takes what the conversion recorded.
    progress: told after every chunk.

  Returns:
    What was found, in lines for people.

  Raises:
    CheckpointError: the first thing that is not as recorded.
  """
  path = storage.normalize(path)
  manifest_name, manifest = read_manifest(path)
  small_files = check_manifest(path, manifest_name, manifest)
  listed = {name: (tuple(t['shape']), t['dtype']) for name, t in manifest['tensors'].items()}
  tensors = serving.read_listed(path, listed, manifest_name, cached=False)
  total = sum(t.nbytes for t in tensors.values())
  lock = threading.Lock()

  def check_chunk(tensor, number, index):
    tensor.check(number, index)
    tensor.check_padding(index)
    with lock:
      nbytes = math.prod(s.stop - s.start for s in index) * tensor.dtype.itemsize
      progress(f'verify {tensor.name}', nbytes, total)

  workers = workers or cores()
  run_jobs(
    [lambda t=t, c=c: check_chunk(t, *c) for t in tensors.values() for c in t.chunks()], workers
  )
  chunks = [f'{name}/{t.file(index)}' for name, t in tensors.items() for _, index in t.chunks()]
  extra = (
    sorted(set(storage.list_files(path)) - {manifest_name, *small_files, *chunks})
    if small_files
    else []
  )
  if extra:
    raise CheckpointError(
      f'{path} holds {", ".join(extra[:3])}{", ..." if len(extra) > 3 else ""}, of which '
      f'{manifest_name} knows nothing: remove what is not of the checkpoint'
    )
  lines = [
    f'{path}: {len(tensors)} tensors, {len(chunks)} chunks, {total / 1e6:.1f} MB are as recorded in {manifest_name}'
  ]
  if source is not None:
    _compare(path, manifest, source, workers, rescale_logits, progress)
    lines.append(f'and what {source} converts to')
  return lines


def _compare(
  path: str,
  manifest: dict,
  source: str,
  workers: int,
  rescale_logits: bool | None,
  progress: VerifyProgress,
) -> None:
  model = ModelConfig.from_dict(manifest['model'])
  if rescale_logits is None:
    rescale_logits = manifest['source'].get('rescale_logits')
  checkpoint = open_checkpoint(
    source,
    config=None if manifest['source']['format'] == 'serving' else model,
    rescale_logits=rescale_logits,
  )
  recorded = manifest['source'].get('step')
  if checkpoint.step != recorded:
    raise CheckpointError(
      f'{path} was made from step {recorded}, but {source} is step {checkpoint.step}'
    )
  form = (
    'serving'
    if manifest['format'] == serving.SERVING_FORMAT
    else ('t5x_int8' if manifest['weights'] == 'int8' else 't5x_float')
  )
  weights = manifest['weights'] if form == 'serving' else 'int8'
  options = ConvertOptions(
    format=form,
    weights=weights,
    workers=workers,
    scale_search=manifest.get('options', {}).get('scale_search', 'absmax'),
  )
  stored = serving.read_listed(
    path, {n: (tuple(t['shape']), t['dtype']) for n, t in manifest['tensors'].items()}, ''
  )

  def compare_all(placements):
    for placement in placements:
      compare(*placement)

  def compare(array, bounds, values):
    found = stored[array.name].read(tuple(slice(*b) for b in bounds))
    # Bits, not values: NaN is not among them, but zeros have signs.
    different = found.view(f'u{found.itemsize}') != np.ascontiguousarray(values).view(
      f'u{found.itemsize}'
    )
    if different.any():
      first = [int(i[0]) + b for i, (b, _) in zip(np.nonzero(different), bounds)]
      raise CheckpointError(
        f'{array.name}: {int(different.sum())} values from {first} on in {path}/{array.name} are '
        f'not what {source} converts to'
      )

  Conversion(checkpoint, options, path, progress).compare(compare_all)


def read_manifest(path: str) -> tuple[str, dict]:
  """The name and content of the file that lists a checkpoint's tensors. Raises CheckpointError where there is none."""
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
      if (
        all(
          isinstance(t['shape'], list) and t['dtype'] in ('int8', 'bfloat16', 'float32')
          for t in manifest['tensors'].values()
        )
        and isinstance(manifest['source'], dict)
        and manifest['weights']
      ):
        return name, manifest
    except (ValueError, TypeError, KeyError, AttributeError) as e:
      if isinstance(e, CheckpointError):
        raise
    raise CheckpointError(f'{path}/{name} is damaged')
  open_checkpoint(path)  # its own error, if it is no checkpoint at all
  raise CheckpointError(
    f'{path} was not written by a conversion: it has no manifest ({serving.CONFIG} or '
    f'{t5x_output.MANIFEST}) to verify it against'
  )
