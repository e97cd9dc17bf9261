"""Print a checkpoint's contents, the known model nearest to it, and the cost of converting it.

  python -m t5x_inference_ext.inspect_checkpoint examples/palm_tiny/checkpoint_1000

Any format is accepted: T5X's legacy format and Orbax, scanned or not, float or quantized; public
models as safetensors or GGUF; serving checkpoints; and trees of models that can't be served, with
the reason. Only the norms are read, and one block of the largest array, to measure the rate of
decoding and rounding. The printed time assumes this rate for all blocks on all cores; a slower disk
makes it longer.
"""

from collections.abc import Iterator, Mapping
import os
import sys
import time

from absl import flags as absl_flags
import numpy as np

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint, open_checkpoint, read_tree
from t5x_inference_ext.checkpoints.conversion.conversion import Conversion
from t5x_inference_ext.checkpoints.conversion.options import ConvertOptions
from t5x_inference_ext.checkpoints.conversion.outputs import narrowed
from t5x_inference_ext.checkpoints.conversion.rounding_error import RoundingError
from t5x_inference_ext.checkpoints.public import read_public
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.commands import cli
from t5x_inference_ext.config import PRESETS, ModelConfig, preset
from t5x_inference_ext.errors import CheckpointError, UserError, printable
from t5x_inference_ext.progress_bar import print_line
from t5x_inference_ext.quantization import rounding
from t5x_inference_ext.quantization.formats import SERVED_WEIGHTS, is_quantized
from t5x_inference_ext.text_format import decimal_bytes, rough_duration

# Fields that distinguish known models. The vocabulary size does not: it may be padded.
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
    'path', None, 'The checkpoint directory. Can also be given as an argument.', flag_values=flags
  )


def print_description(flags: absl_flags.FlagValues) -> None:
  """Print a description of the checkpoint at --path."""
  if flags.path is None:
    raise UserError('no checkpoint given: inspect_checkpoint PATH')
  for line in describe_checkpoint(flags.path):
    print_line(line)


def describe_checkpoint(path: str) -> Iterator[str]:
  """Yield lines that describe the checkpoint at `path`.

  Raises:
    CheckpointError: `path` is not a checkpoint, or is damaged.
  """
  path = storage.normalize(path)
  try:
    checkpoint = open_checkpoint(path)
  except CheckpointError as e:
    found = read_tree(path)
    if found is None:
      raise
    _, tree = found
    yield f'{tree.description} at {path}' + ('' if tree.step is None else f', step {tree.step}')
    yield from tensor_lines(tree.leaves)
    yield f"this can't be served as it is: {e}"
    return
  yield from checkpoint.notes
  yield f'vocabulary: {checkpoint.text}'
  is_chunked = checkpoint.index_crc32 is None
  yield from tensor_lines(stored_tensors(checkpoint), is_chunked)
  yield looks_like(checkpoint.config)
  yield from costs(checkpoint)


def stored_tensors(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
  """Return a checkpoint's tensors as they are stored, by stored name."""
  if checkpoint.format == 'serving':
    return checkpoint.tensors
  is_public, scale = checkpoint.index_crc32 is not None, checkpoint.config.norm_scale
  model = read_public(checkpoint.path, scale) if is_public else None
  if model is not None:
    return model.stored
  found = read_tree(checkpoint.path)
  return found[1].leaves if found else checkpoint.tensors


def tensor_lines(tensors: Mapping[str, Tensor], is_chunked: bool = True) -> Iterator[str]:
  """Yield a line for each tensor, and one line of totals.

  Args:
    tensors: The tensors, by name.
    is_chunked: Whether the tensors are stored in chunks. If not, any range of bytes can be read.
  """
  names = {printable(name): tensor for name, tensor in tensors.items()}
  width = max(map(len, names), default=0)
  for name, tensor in names.items():
    chunk = (
      ''
      if not is_chunked or tensor.chunk == tensor.shape
      else f' in chunks of {list(tensor.chunk)}'
    )
    yield f'  {name:{width}}  {tensor.dtype.name:9}{list(tensor.shape)}{chunk}'
  elements = sum(t.nbytes // t.dtype.itemsize for t in tensors.values())
  size = decimal_bytes(sum(t.nbytes for t in tensors.values()))
  yield f'{len(tensors)} tensors, {elements:,} values, {size} uncompressed'


def looks_like(config: ModelConfig) -> str:
  """Return a line that names the known model nearest to `config`, and the differences."""

  def different(name: str) -> list[str]:
    other = preset(name)
    return [field for field in SHAPE if getattr(other, field) != getattr(config, field)]

  nearest = min(
    PRESETS,
    key=lambda name: (len(different(name)), abs(preset(name).num_params - config.num_params)),
  )
  differing = different(nearest)
  if len(differing) > len(SHAPE) // 2:
    return (
      f'it is not like any of the known models ({", ".join(PRESETS)}): {config.num_params:,} '
      'parameters'
    )
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
  """Yield a line for each kind of weights, with the cost of converting the checkpoint to it."""
  for weights in SERVED_WEIGHTS:
    if narrowed(checkpoint, weights) is not None:  # conversions round only once
      continue
    conversion = Conversion(
      checkpoint, ConvertOptions(weights=weights), os.devnull, lambda *_: None
    )
    disk = decimal_bytes(sum(array.nbytes for array in conversion.output.arrays))
    memory = decimal_bytes(conversion.peak_bytes)
    source_bytes = sum(t.nbytes for t in checkpoint.tensors.values())
    seconds = source_bytes / rate(conversion) / conversion.workers
    yield (
      f'as a serving checkpoint with {weights} weights: {disk} of disk and of device memory; '
      f'converting takes about {memory} of memory and, with {conversion.workers} workers, '
      f'{rough_duration(seconds)}'
    )


def rate(conversion: Conversion) -> float:
  """Return how many bytes per second one worker decodes and rounds, measured on one block."""
  plan = conversion.plan
  largest = max(plan.slices, key=plan.nbytes)
  block = plan.blocks(largest)[0]
  start = time.perf_counter()
  array = plan.arrays[block.array]
  values = array.read(block.bounds)
  with np.errstate(all='ignore'):  # conversions report NaN
    for part, _, w in array.rectangles(values, block.bounds):
      dtype = conversion.output.dtype(part.name)
      scale = None
      if is_quantized(dtype) or is_quantized(w.dtype):
        scale = rounding.scales_of(rounding.largest(w))
      RoundingError().round(w, scale, dtype, 0.0)
  return values.nbytes / max(time.perf_counter() - start, 1e-6)


def run(argv: list[str] | None = None) -> int:
  """Run the command; return the exit code."""
  argv = list(sys.argv if argv is None else argv)
  if len(argv) == 2 and not argv[1].startswith('-'):
    argv[1] = f'--path={argv[1]}'
  with cli.Session(__doc__, define_flags, argv) as session:
    print_description(session.parse())
  return session.code
