"""Any checkpoint into another format, slice by slice, resumable, verified (docs/convert.md).

Blocks of stored chunks are read once, converted and written into uncompressed arrays whose space was reserved before.
For int8, a slice holds all that is summed into its output channels, so their scales come from the same reading; what
does not fit into `hold_bytes` is read a second time (a third, with a search for scales).
"""

import os
from typing import Callable

from t5x_inference_ext.checkpoints.checkpoint import Checkpoint, open_checkpoint
from t5x_inference_ext.checkpoints.conversion import Conversion, Progress
from t5x_inference_ext.checkpoints.conversion_options import Options, Report
from t5x_inference_ext.checkpoints.work_directory import WorkDirectory
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError


def convert(input_checkpoint: str, output_checkpoint: str, weights: str = 'int8', norm_scale: str | None = None, *,
            config: ModelConfig | None = None, rescale_logits: bool | None = None,
            found: Callable[[Checkpoint], None] = lambda checkpoint: None,
            planned: Callable[[str], None] = lambda line: None,
            progress: Progress = lambda what, done, total: None, **options) -> Report:
  """Writes the checkpoint `output_checkpoint`: complete and verified, or not at all.

  What a killed or failed run has finished is in `output_checkpoint`.unfinished, and the same call goes on from there.

  Args:
    input_checkpoint: a checkpoint of any format.
    output_checkpoint: the directory to make, of any name.
    weights: see Options.
    norm_scale, config, rescale_logits: see open_checkpoint.
    found: told what the input is before anything is converted.
    planned: told, in lines of text, what will be done and how much memory it takes.
    progress: told after every block.
    **options: other fields of Options.

  Raises:
    CheckpointError: the input can't be read, or holds NaN or infinite values; the output exists, or can't be written.
    UserError: unknown options.
  """
  options = Options(weights=weights, **options)
  work = WorkDirectory(output_checkpoint)
  if not os.path.isdir(work.root):
    work.check_absent()
  source = open_checkpoint(input_checkpoint, norm_scale=norm_scale, config=config, rescale_logits=rescale_logits)
  found(source)
  conversion = Conversion(source, options, work.payload, progress)
  if work.finished_before(conversion.identity):
    planned(f'{work.path} was finished before')
    work.discard()
    return conversion.report(work.path, [])
  for line in conversion.description():
    planned(line)
  try:
    return conversion.run(work)
  except OSError as e:
    work.check_absent()  # another process has finished it meanwhile
    kept = ''
    if os.path.isdir(work.root):
      kept = f'; what is finished is kept in {work.root}, and the same command goes on from there'
    raise CheckpointError(f'can\'t write to {work.path}: {e.filename}: {e.strerror}{kept}') from e
