"""Convert a checkpoint into another format, resumable and verified (docs/convert.md).

Blocks of stored chunks are read once, converted, and written into uncompressed arrays with
preallocated space. For int8, a slice has all inputs of its output channels, so that reading it once
gives its scales. Blocks that do not fit into `hold_bytes` are read a second time to write them (and
a third time if scales are searched).
"""

from collections.abc import Callable
import dataclasses
import os
from typing import Any

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.adapters.folding import fold_adapter
from t5x_inference_ext.checkpoints.adapters.read import read_adapter
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint, open_checkpoint
from t5x_inference_ext.checkpoints.conventions import CONVENTION_NAMES
from t5x_inference_ext.checkpoints.conversion.conversion import Conversion, ConversionProgress
from t5x_inference_ext.checkpoints.conversion.options import ConvertOptions, Report
from t5x_inference_ext.checkpoints.conversion.staging import Staging
from t5x_inference_ext.checkpoints.conversion.work_directory import WorkDirectory
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError, UserError
from t5x_inference_ext.text.vocabulary_files import choose_settings


def convert(
  input_checkpoint: str,
  output_checkpoint: str,
  weights: str = 'int8',
  *,
  config: ModelConfig | None = None,
  vocabulary: str | None = None,
  staging: str | None = None,
  adapter: str | None = None,
  calibration: str | None = None,
  found: Callable[[Checkpoint], None] = lambda checkpoint: None,
  planned: Callable[[str], None] = lambda line: None,
  progress: ConversionProgress = lambda what, done, total: None,
  **options: Any,
) -> Report:
  """Convert a checkpoint into a complete and verified one at `output_checkpoint`.

  The finished work of a killed or failed run is kept in `output_checkpoint`.unfinished, or in the
  staging directory. Another call with the same arguments continues from there.

  Args:
    input_checkpoint: Directory of a checkpoint of any format.
    output_checkpoint: Directory to make, with any name; local, or gs://.
    weights: Field of ConvertOptions.
    config: Argument of open_checkpoint.
    vocabulary: Vocabulary to put into a serving checkpoint: 'bytes', a SentencePiece .model file or
      a tokenizer.json; None: the source's own, else bytes for a model of 384 rows.
    staging: Local directory in which an output in a bucket is made before it is uploaded.
    adapter: LoRA or (IA)^3 to fold into the weights; a directory that PEFT saved.
    calibration: File of token ids (.npy) or text, for whose activations int8 or int4 weights are
      rounded by GPTQ.
    found: Function that is called with the opened checkpoint.
    planned: Function that is called with each line of the plan's description.
    progress: Called after every block.
    **options: Other fields of ConvertOptions, and conventions, arguments of open_checkpoint.

  Raises:
    CheckpointError: The input can't be read, or holds NaN or infinite values; or the output exists,
      or can't be written.
    UserError: An option is unknown, or the vocabulary does not fit the model.
  """
  conventions = {name: options.pop(name) for name in CONVENTION_NAMES if name in options}
  convert_options = ConvertOptions(weights=weights, **options)
  staged = _staging(output_checkpoint, staging)
  work = WorkDirectory(output_checkpoint if staged is None else staged.local)
  if staged is not None:
    staged.check_target()
  elif not os.path.isdir(work.root):
    work.check_absent()
  source = open_checkpoint(input_checkpoint, config=config, **conventions)
  if adapter is not None:
    source = fold_adapter(source, read_adapter(adapter, source))
  source = _with_vocabulary(source, vocabulary, convert_options)
  found(source)
  if calibration is None:
    conversion = Conversion(source, convert_options, work.payload, progress)
  else:  # imports jax, which other conversions do without
    from t5x_inference_ext.checkpoints.calibration.conversion import CalibratedConversion

    conversion = CalibratedConversion(
      source, os.fspath(calibration), convert_options, work, progress
    )
  if staged is None:
    return _convert(conversion, work, planned)
  try:
    report = _convert_staged(conversion, work, staged, planned)
    if report.finished and os.path.isdir(staged.local):
      staged.upload(conversion.output.header, conversion.workers, progress)
  except OSError as e:
    raise CheckpointError(
      f"can't write to {e.filename}: {e.strerror}; finished work is kept in {staged.root}: run "
      'the same command again to continue'
    ) from e
  return dataclasses.replace(report, output=staged.path)


def _with_vocabulary(
  source: Checkpoint, vocabulary: str | None, options: ConvertOptions
) -> Checkpoint:
  """Return the source checkpoint with the vocabulary to write into the serving checkpoint."""
  if options.format != 'serving':
    if vocabulary is not None:
      raise UserError(
        f"vocabulary={vocabulary} is for serving checkpoints: T5X's format holds no vocabulary"
      )
    return source
  text = choose_settings(vocabulary, source.text, source.config.vocab_size, needed=False)
  return dataclasses.replace(source, text=text)


def _convert(conversion: Conversion, work: WorkDirectory, planned: Callable[[str], None]) -> Report:
  """Do the remaining work of a conversion into a local directory."""
  if work.finished_before(conversion.identity):
    planned(f'{work.path} is already complete')
    work.clear()
    return conversion.report(work.path)
  for line in conversion.description():
    planned(line)
  try:
    return conversion.run(work, planned)
  except OSError as e:
    work.check_absent()  # raises if another process has finished meanwhile
    kept = ''
    if os.path.isdir(work.root):
      kept = f'; finished work is kept in {work.root}: run the same command again to continue'
    raise CheckpointError(f"can't write to {work.path}: {e.filename}: {e.strerror}{kept}") from e


def _convert_staged(
  conversion: Conversion, work: WorkDirectory, staged: Staging, planned: Callable[[str], None]
) -> Report:
  """Do the remaining work of a conversion into a staging directory."""
  if staged.adopt(conversion.identity):
    planned(f'{staged.path} is already complete')
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
  """Return the staging directory of an output in a bucket, or None for a local output.

  Raises:
    UserError: The output is in a bucket and no directory is given, or a directory is given for a
      local output.
  """
  remote = storage.is_remote(os.fspath(output))
  if remote and directory is not None:
    return Staging(output, directory)
  if remote:
    raise UserError(
      f'{output} is in a bucket, where nothing can be written in pieces: give --staging=DIR, a '
      'local directory in which the checkpoint is made before it is uploaded'
    )
  if directory is not None:
    raise UserError(f'--staging={directory} is for outputs in a bucket, and {output} is not in one')
  return None
