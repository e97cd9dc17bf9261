"""Convert a checkpoint into another format, resumable and verified (docs/convert.md).

Blocks of stored chunks are read once, converted, and written into uncompressed arrays whose space
was reserved before. For int8, a slice holds everything that is summed into its output channels, so
their scales come from the same reading. What does not fit into `hold_bytes` is read a second time
(a third, with a search for scales).
"""

from collections.abc import Callable
import dataclasses
import os
from typing import Any

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint, open_checkpoint
from t5x_inference_ext.checkpoints.conversion.conversion import Conversion, ConversionProgress
from t5x_inference_ext.checkpoints.conversion.options import ConvertOptions, Report
from t5x_inference_ext.checkpoints.conversion.staging import Staging
from t5x_inference_ext.checkpoints.conversion.work_directory import WorkDirectory
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError, UserError


def convert(
  input_checkpoint: str,
  output_checkpoint: str,
  weights: str = 'int8',
  norm_scale: str | None = None,
  *,
  config: ModelConfig | None = None,
  rescale_logits: bool | None = None,
  staging: str | None = None,
  found: Callable[[Checkpoint], None] = lambda checkpoint: None,
  planned: Callable[[str], None] = lambda line: None,
  progress: ConversionProgress = lambda what, done, total: None,
  **options: Any,
) -> Report:
  """Write the checkpoint `output_checkpoint`: complete and verified, or not at all.

  What a killed or failed run has finished is in `output_checkpoint`.unfinished, or in the staging
  directory, and the same call goes on from there.

  Args:
    input_checkpoint: directory of a checkpoint of any format.
    output_checkpoint: directory to make, of any name: local, or gs://.
    weights: field of ConvertOptions.
    norm_scale: as in open_checkpoint.
    config: as in open_checkpoint.
    rescale_logits: as in open_checkpoint.
    staging: local directory in which an output in a bucket is made before it is uploaded.
    found: called with the checkpoint that was opened.
    planned: called with each line that says what will be done.
    progress: called after every block.
    **options: other fields of ConvertOptions.

  Raises:
    CheckpointError: the input can't be read, or holds NaN or infinite values; the output exists, or
      can't be written.
    UserError: unknown options.
  """
  convert_options = ConvertOptions(weights=weights, **options)
  staged = _staging(output_checkpoint, staging)
  work = WorkDirectory(output_checkpoint if staged is None else staged.local)
  if staged is not None:
    staged.check_target()
  elif not os.path.isdir(work.root):
    work.check_absent()
  source = open_checkpoint(
    input_checkpoint, norm_scale=norm_scale, config=config, rescale_logits=rescale_logits
  )
  found(source)
  conversion = Conversion(source, convert_options, work.payload, progress)
  if staged is None:
    return _convert(conversion, work, planned)
  try:
    report = _convert_staged(conversion, work, staged, planned)
    if report.finished and os.path.isdir(staged.local):
      staged.upload(conversion.output.header, conversion.workers, progress)
  except OSError as e:
    raise CheckpointError(
      f"can't write to {e.filename}: {e.strerror}; what is finished is kept in {staged.root}, and "
      'the same command goes on from there'
    ) from e
  return dataclasses.replace(report, output=staged.path)


def _convert(conversion: Conversion, work: WorkDirectory, planned: Callable[[str], None]) -> Report:
  """Do what is left to do of a conversion into a local directory."""
  if work.finished_before(conversion.identity):
    planned(f'{work.path} was finished before')
    work.clear()
    return conversion.report(work.path)
  for line in conversion.description():
    planned(line)
  try:
    return conversion.run(work, planned)
  except OSError as e:
    work.check_absent()  # another process has finished it meanwhile
    kept = ''
    if os.path.isdir(work.root):
      kept = f'; what is finished is kept in {work.root}, and the same command goes on from there'
    raise CheckpointError(f"can't write to {work.path}: {e.filename}: {e.strerror}{kept}") from e


def _convert_staged(
  conversion: Conversion, work: WorkDirectory, staged: Staging, planned: Callable[[str], None]
) -> Report:
  """Do what is left to do of a conversion into a staging directory."""
  if staged.adopt(conversion.identity):
    planned(f'{staged.path} was finished before')
    return conversion.report(staged.local)
  largest_file = max(a.chunk_bytes for a in conversion.output.arrays)
  planned(staged.description(largest_file, conversion.workers))
  if os.path.isdir(staged.local) and not os.path.isdir(work.root):
    return conversion.report(staged.local)
  try:
    return _convert(conversion, work, planned)
  except CheckpointError:
    if not os.path.isdir(work.root) and not os.path.isdir(staged.local):  # nothing worth keeping
      staged.remove()
    raise


def _staging(output: str, directory: str | None) -> Staging | None:
  """Return the staging directory of an output in a bucket. Raises UserError for only one."""
  remote = storage.is_remote(os.fspath(output))
  if remote and directory is not None:
    return Staging(output, directory)
  if remote:
    raise UserError(
      f'{output} is in a bucket, where nothing can be written in pieces: --staging=DIR says in '
      'which local directory the checkpoint is made before it is uploaded'
    )
  if directory is not None:
    raise UserError(f'--staging={directory} is for outputs in a bucket, and {output} is not in one')
  return None
