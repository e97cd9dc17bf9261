"""Says what a checkpoint directory holds, which model it looks like, and what converting it to serve would take.

  python -m t5x_inference_ext.inspect_checkpoint examples/palm_tiny/checkpoint_1000

Any format: T5X's legacy one, Orbax, scanned or not, float or quantized; serving checkpoints; and trees of models that
can't be served, with the reason. Values are not read, but for the norms, and for one block of the largest array, whose
decoding and rounding are timed: the time given is that of all blocks at this rate on all cores, and a disk that is
slower makes it longer.
"""

from collections.abc import Iterator
import os
import sys
import time

from absl import flags as absl_flags
import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import serving, storage
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint, open_checkpoint, read_tree
from t5x_inference_ext.checkpoints.conversion.conversion import Conversion
from t5x_inference_ext.checkpoints.conversion.options import ConvertOptions
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.commands import cli
from t5x_inference_ext.config import PRESETS, ModelConfig, preset
from t5x_inference_ext.errors import CheckpointError, UserError
from t5x_inference_ext.quantization import rounding

# Of a model, what makes it one of a known shape; its vocabulary may be padded.
SHAPE = (
  'num_layers',
  'd_model',
  'd_ff',
  'num_heads',
  'd_head',
  'num_kv_heads',
  'block',
  'mlp',
  'norm',
)


def define_flags(flags: absl_flags.FlagValues) -> None:
  absl_flags.DEFINE_string(
    'path', None, 'The checkpoint directory; or as an argument.', flag_values=flags
  )


def main(flags: absl_flags.FlagValues) -> None:
  if flags.path is None:
    raise UserError('which checkpoint? inspect_checkpoint PATH')
  for line in describe_checkpoint(flags.path):
    cli.print_line(line)


def describe_checkpoint(path: str) -> Iterator[str]:
  """What `path` holds, in lines. Raises CheckpointError where it is no checkpoint, or a damaged one."""
  path = storage.normalize(path)
  try:
    checkpoint = open_checkpoint(path)
  except CheckpointError as e:
    found = read_tree(path)
    if found is None:
      raise
    yield (
      found[1].description
      + f' at {path}'
      + ('' if found[1].step is None else f', step {found[1].step}')
    )
    yield from tensor_lines(found[1].leaves)
    yield f"this can't be served as it is: {e}"
    return
  yield from checkpoint.notes
  if checkpoint.format == 'serving':
    yield from tensor_lines(checkpoint.tensors)
  else:
    yield from tensor_lines(read_tree(checkpoint.path)[1].leaves)
  yield looks_like(checkpoint.config)
  yield from costs(checkpoint)


def tensor_lines(tensors: dict[str, Tensor]) -> Iterator[str]:
  """A line for each tensor, and their sum."""
  width = max(map(len, tensors), default=0)
  for name, tensor in tensors.items():
    chunk = '' if tensor.chunk == tensor.shape else f' in chunks of {list(tensor.chunk)}'
    yield f'  {name:{width}}  {tensor.dtype.name:9}{list(tensor.shape)}{chunk}'
  elements = sum(t.nbytes // t.dtype.itemsize for t in tensors.values())
  yield f'{len(tensors)} tensors, {elements:,} values, {bytes_text(sum(t.nbytes for t in tensors.values()))} uncompressed'


def looks_like(config: ModelConfig) -> str:
  """The known model that is most like this one."""

  def different(name):
    other = preset(name)
    return [field for field in SHAPE if getattr(other, field) != getattr(config, field)]

  nearest = min(
    PRESETS,
    key=lambda name: (len(different(name)), abs(preset(name).num_params - config.num_params)),
  )
  differing = different(nearest)
  if len(differing) > len(SHAPE) // 2:
    return f'it is like none of the known models ({", ".join(PRESETS)}): {config.num_params:,} parameters'
  if not differing and preset(nearest).vocab_size != config.vocab_size:
    differing = ['vocab_size']
  but = ', '.join(
    f'{f} {getattr(config, f)} instead of {getattr(preset(nearest), f)}' for f in differing
  )
  return (
    f'it looks like {nearest}'
    + (f', but with {but}' if but else '')
    + f': {config.num_params:,} parameters'
  )


def costs(checkpoint: Checkpoint) -> Iterator[str]:
  """What conversions to serve would take, and serving itself."""
  for weights in serving.SERVING_WEIGHTS:
    conversion = Conversion(
      checkpoint, ConvertOptions(weights=weights), os.devnull, lambda *_: None
    )
    disk = sum(array.nbytes for array in conversion.output.arrays)
    seconds = (
      sum(t.nbytes for t in checkpoint.tensors.values()) / rate(conversion) / conversion.workers
    )
    yield (
      f'as a serving checkpoint with {weights} weights: {bytes_text(disk)} of disk and of device memory; converting '
      f'takes about {bytes_text(conversion.peak_bytes)} of memory and, with {conversion.workers} workers, '
      f'{duration(seconds)}'
    )


def rate(conversion: Conversion) -> float:
  """Bytes a second that one worker decodes and rounds, of one block of the largest array."""
  plan = conversion.plan
  largest = max(plan.slices, key=plan.nbytes)
  block = plan.blocks(largest)[0]
  start = time.perf_counter()
  array = plan.arrays[block.array]
  values = array.read(block.bounds)
  kinds = params.parameters(conversion.source.config)
  with np.errstate(all='ignore'):  # NaN is for conversions to find
    for part, _, w in array.rectangles(values, block.bounds):
      if (
        conversion.output.weights == 'int8'
        and w.dtype.kind != 'i'
        and kinds[part.name].kind == 'matrix'
      ):
        rounding.quantize_layers(w, rounding.scales_of(rounding.largest(w)))
      else:
        w.astype(conversion.output.dtype(part.name))
  return values.nbytes / max(time.perf_counter() - start, 1e-6)


def bytes_text(count: float) -> str:
  for unit in ('B', 'kB', 'MB', 'GB', 'TB'):
    if count < 1000 or unit == 'TB':
      return f'{count:.1f} {unit}' if unit != 'B' else f'{count:.0f} B'
    count /= 1000


def duration(seconds: float) -> str:
  if seconds < 60:
    return f'{max(1, round(seconds))} s'
  return f'{seconds / 60:.0f} min' if seconds < 3600 else f'{seconds / 3600:.1f} h'


def run(argv: list[str] | None = None) -> int:
  """The entry point; returns the exit code."""
  argv = list(sys.argv if argv is None else argv)
  if len(argv) == 2 and not argv[1].startswith('-'):
    argv[1] = f'--path={argv[1]}'
  with cli.Session(__doc__, define_flags, argv) as session:
    main(session.parse())
  return session.code
