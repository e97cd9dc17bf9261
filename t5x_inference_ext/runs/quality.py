"""Quality report of a conversion: rounding errors and losses, as a table and a plot."""

from collections.abc import Iterator
import json
import os
from typing import Any

import numpy as np

from t5x_inference_ext.checkpoints import serving, storage
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint, open_checkpoint
from t5x_inference_ext.checkpoints.conversion.verify import read_manifest
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.quantization.formats import weight_format
from t5x_inference_ext.runs.rounded_tensors import rounded_alone
from t5x_inference_ext.text.vocabulary import check_in_vocabulary
from t5x_inference_ext.text_files import check_plots

BATCH_ROWS = 8
# From a seqio task: number of examples to take, and number of tokens of each.
TASK_ROWS, TASK_LENGTH = 256, 512


def report(
  source: str,
  output: str,
  directory: str,
  *,
  config: ModelConfig | None = None,
  tokens: str | None = None,
  task: str | None = None,
  task_module: str | None = None,
  task_split: str = 'validation',
  **conventions: Any,
) -> list[str]:
  """Write report.txt, report.json and report.png.

  Args:
    source: Path of the checkpoint that was converted.
    output: Path of the checkpoint that the conversion made.
    directory: Directory to write to; made if needed.
    config: Argument of open_checkpoint for the source.
    tokens: Path of a .npy file of token ids [rows, length] to compute losses on; 0 is padding.
    task: Name of a seqio task with a feature `targets` to compute losses on, instead of `tokens`.
    task_module: Module that registers the task.
    task_split: Split of the task.
    **conventions: Arguments of open_checkpoint for the source.

  Returns:
    The table, line by line.

  Raises:
    UserError: A file is missing or invalid, or matplotlib is not installed.
  """
  pyplot = _pyplot()
  errors = read_manifest(storage.normalize(output))[1].get('errors')
  if not errors:
    raise UserError(
      f'{output} records no errors: it was converted by an older version; convert again'
    )
  original = open_checkpoint(source, config=config, **conventions)
  # A serving checkpoint records its model. For other formats, pass the source's.
  is_serving = storage.read_file(storage.normalize(output), serving.CONFIG) is not None
  rounded = open_checkpoint(output, config=None if is_serving else original.config)
  targets = None
  if tokens is not None:
    targets = read_tokens(tokens, original.config.vocab_size)
  elif task is not None:
    targets = task_tokens(task, task_module, task_split, original.config.vocab_size)
  losses: dict[str, float] = {}
  alone: dict[str, float] = {}
  count = 0
  if targets is not None:
    count = int(np.count_nonzero(targets))
    for label, checkpoint, dtype, cache in (
      (f'source, {original.weights}', original, 'float32', None),
      ('source in bfloat16', original, 'bfloat16', None),
      (f'output, {rounded.weights}', rounded, 'float32', None),
      (f'output, {rounded.weights}, int8 cache', rounded, 'float32', 'int8'),
      ('the same in bfloat16', rounded, 'bfloat16', 'int8'),
    ):
      losses[label] = loss(checkpoint, targets, dtype, cache)
    before, after = (weight_format(c.weights).scaled for c in (original, rounded))
    if after and not before:
      alone = {name: loss(c, targets) for name, c in rounded_alone(original, rounded)}
  lines = [*_table(errors, losses, count), *_table_of_tensors(losses, alone, rounded.weights)]
  os.makedirs(directory, exist_ok=True)
  with open(os.path.join(directory, 'report.txt'), 'w', encoding='utf-8') as f:
    f.write('\n'.join([f'{source} -> {output}', *lines]) + '\n')
  with open(os.path.join(directory, 'report.json'), 'w', encoding='utf-8') as f:
    json.dump(
      {
        'source': str(source),
        'output': str(output),
        'errors': errors,
        'losses': losses,
        'losses_of_tensors': alone,
      },
      f,
      indent=2,
    )
  _plot(pyplot, errors, losses, os.path.join(directory, 'report.png'))
  return [*lines, f'wrote {directory}/report.txt, report.json and report.png']


def loss(
  checkpoint: Checkpoint, targets: np.ndarray, dtype: str = 'float32', cache: str | None = None
) -> float:
  """Return the mean loss in nats per token, predicting each target from those before it.

  The first target of a row is predicted from BOS. In a model without BOS it is not predicted.

  Args:
    checkpoint: The model.
    targets: [rows, length]. Token ids to predict; 0 is padding.
    dtype: Dtype of activations and float weights. With float32, only int8 weights cause rounding
      errors.
    cache: Dtype of the KV cache, as in Engine.load. Keys and values are rounded to it, as in
      decoding.
  """
  engine = Engine.load(checkpoint, mesh='1x1x1', dtype=dtype, cache=cache)
  total, bos_id, first = 0.0, checkpoint.bos_id, int(checkpoint.bos_id is None)
  for begin in range(0, len(targets), BATCH_ROWS):
    rows = targets[begin : begin + BATCH_ROWS]
    missing = BATCH_ROWS - len(rows)
    rows = np.pad(rows, ((0, missing), (0, 0)))  # one shape, so one compilation
    inputs = np.pad(rows, ((0, 0), (1, 0)), constant_values=bos_id or 0)[:, :-1]
    total -= float(engine.score(inputs[:, first:], rows[:, first:]).sum())
  return total / int(np.count_nonzero(targets[:, first:]))


def read_tokens(path: str, vocab_size: int) -> np.ndarray:
  """Read token ids [rows, length] from a .npy file; raise UserError if it is invalid."""
  try:
    tokens = np.load(path, allow_pickle=False)
  except (OSError, ValueError) as e:
    raise UserError(f'{path}: not a .npy file of tokens: {str(e).splitlines()[0]}') from e
  return _checked(tokens, path, vocab_size)


def task_tokens(name: str, module: str | None, split: str, vocab_size: int) -> np.ndarray:
  """Return a seqio task's first TASK_ROWS targets, trimmed and padded; may raise UserError."""
  from t5x_inference_ext.runs import tasks  # imports TensorFlow

  tasks.import_tasks(module)
  source = tasks.Source(name, {'targets': TASK_LENGTH}, split)
  found = tasks.find_tasks(source)
  tasks.check_source(source, 'score', found)
  tasks.check_vocabularies(source, found, vocab_size)
  rows = []
  for task in found:
    for example in tasks.examples(task, source):
      rows.append(example.model['decoder_target_tokens'])
      if len(rows) == TASK_ROWS:
        break
  if not rows:
    raise UserError(f'task {name} has no examples in split {split}')
  return _checked(np.stack(rows[:TASK_ROWS]), f'task {name}', vocab_size)


def _checked(tokens: np.ndarray, where: str, vocab_size: int) -> np.ndarray:
  if tokens.ndim != 2 or tokens.dtype.kind not in 'iu' or not tokens.any():
    raise UserError(
      f'{where}: tokens are whole numbers [rows, length], not all 0, got {tokens.dtype} '
      f'{list(tokens.shape)}'
    )
  check_in_vocabulary(tokens, where, vocab_size)
  return tokens.astype(np.int32)


def _table(
  errors: dict[str, dict[str, float]], losses: dict[str, float], tokens: int
) -> Iterator[str]:
  """Yield the report's lines. `tokens`: number of tokens that the losses are averaged over."""
  yield f'{"tensor":26}{"max":>12}{"Frobenius":>12}   of max|w|, of ||w||'
  for name, error in errors.items():
    yield f'{name:26}{error["largest"]:12.4%}{error["relative"]:12.4%}'
  if losses:
    yield f'{"loss":26}{"nats":>12}{"bits":>12}   a token, of {tokens}'
    first = next(iter(losses.values()))
    for name, value in losses.items():
      yield f'{name:26}{value:12.5f}{value / np.log(2):12.5f}   {value / first - 1:+.3%}'


def _table_of_tensors(
  losses: dict[str, float], alone: dict[str, float], weights: str
) -> Iterator[str]:
  """Yield lines with the loss of the source when only one matrix is rounded, by its name."""
  if not alone:
    return
  yield f'{"rounded alone":26}{"nats":>12}{"bits":>12}   a token, in float32'
  before = next(iter(losses.values()))
  for name, value in alone.items():
    dtype = weight_format(weights).dtype(name).name
    label = f'{name}, {dtype}'
    yield f'{label:26}{value:12.5f}{value / np.log(2):12.5f}   {value / before - 1:+.3%}'


def _plot(
  pyplot: Any, errors: dict[str, dict[str, float]], losses: dict[str, float], path: str
) -> None:
  size = (12 if losses else 7, 4.5)
  figure, axes = pyplot.subplots(1, 2 if losses else 1, figsize=size, squeeze=False)
  errors_axes = axes[0, 0]
  names = list(errors)
  places = np.arange(len(names))
  for offset, (field, label) in enumerate((('relative', 'Frobenius norm'), ('largest', 'largest'))):
    errors_axes.barh(
      places + (offset - 0.5) * 0.4,
      [100 * errors[n][field] for n in names],
      height=0.4,
      label=label,
    )
  errors_axes.set_yticks(places, names)
  errors_axes.invert_yaxis()
  errors_axes.set_xlabel('rounding error, % of the tensor')
  errors_axes.legend()
  if losses:
    first = next(iter(losses.values()))
    labels = [f'{name}\n{value / np.log(2):.5f} bits a token' for name, value in losses.items()]
    axes[0, 1].barh(labels, [100 * (value / first - 1) for value in losses.values()], height=0.5)
    axes[0, 1].invert_yaxis()
    axes[0, 1].axvline(0, color='black', linewidth=0.8)
    axes[0, 1].set_xlabel('loss, % above the first')
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


def _pyplot() -> Any:
  check_plots()
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  return pyplot
