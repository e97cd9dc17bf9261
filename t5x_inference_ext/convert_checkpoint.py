"""Converts a T5X checkpoint into a serving checkpoint with int8 or bfloat16 weights.

  python -m t5x_inference_ext.convert_checkpoint \\
      --input=examples/palm_tiny/checkpoint_1000 --output=/tmp/palm_tiny_int8 --weights=int8

The same through gin:

  python -m t5x_inference_ext.convert_checkpoint --gin_file=t5x_inference_ext/configs/runs/convert.gin \\
      --gin.INPUT_CHECKPOINT=\\"examples/palm_tiny/checkpoint_1000\\" --gin.OUTPUT_CHECKPOINT=\\"/tmp/palm_tiny_int8\\"

The input is a directory that T5X wrote, legacy or Orbax, scanned or with one subtree a layer, with or without optimizer
state, float or already quantized (qkernel and qscale); or a serving checkpoint. The model's shape is found from it.
T5X does not record whether norm scales are stored around zero (PaLM; flaxformer's center_scale_at_zero) or around one:
--norm_scale says so, and the serving checkpoint records it. Multihead kernels [E, H Q] do not say how many heads they
have: with gin, MODEL_CONFIG says which model they are of, usually by a second file from configs/models/; and
RESCALE_LOGITS=False says that the trained attention did not divide its logits by sqrt(Q).

--output is exactly the directory made. It must not exist, and appears when it is complete and has been read back; a run
that is killed leaves OUTPUT.unfinished, which the next run replaces. Host memory stays at a few slices of one layer.
"""

import sys
import time

from absl import flags as absl_flags
import tqdm

from t5x_inference_ext import command
from t5x_inference_ext.checkpoints import convert as conversion
from t5x_inference_ext.checkpoints import serving
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.config import NORM_SCALES
from t5x_inference_ext.errors import UserError

# Without a terminal, a line at most this often.
LOG_SECONDS = 10


def define_flags(flags: absl_flags.FlagValues) -> None:
  absl_flags.DEFINE_string('input', None, 'The checkpoint directory to read.', flag_values=flags)
  absl_flags.DEFINE_string('output', None, 'The directory to make.', flag_values=flags)
  absl_flags.DEFINE_enum('weights', None, serving.WEIGHTS, 'What the matrices become.', flag_values=flags)
  absl_flags.DEFINE_enum('norm_scale', None, NORM_SCALES, 'How norm scales are stored: the value applied is 1 + scale '
                         '(zero) or scale (one). By default what the checkpoint records, else zero for fused parallel '
                         'layers, one for others.', flag_values=flags)


def main(flags: absl_flags.FlagValues) -> None:
  plain = {name: flags[name].value for name in ('input', 'output', 'weights', 'norm_scale')}
  given = [name for name, value in plain.items() if value is not None]
  if command.uses_gin(flags):
    if given:
      raise UserError(f'--{given[0]} and gin flags say the same in two ways: with gin, bind INPUT_CHECKPOINT, '
                      'OUTPUT_CHECKPOINT, WEIGHTS and NORM_SCALE')
    command.parse_gin(flags)
    arguments = {}
  else:
    missing = [f'--{name}' for name in ('input', 'output', 'weights') if plain[name] is None]
    if missing:
      raise UserError(f'{" and ".join(missing)} not given; --help shows examples')
    arguments = dict(input_checkpoint=flags.input, output_checkpoint=flags.output, weights=flags.weights,
                     norm_scale=flags.norm_scale)
  with Progress() as progress:
    report = command.configure(conversion.convert, found=print_source, progress=progress, **arguments)()
  print_report(report, progress.seconds)


def print_source(checkpoint: Checkpoint) -> None:
  for note in checkpoint.notes:
    print(note, flush=True)


def print_report(report: conversion.Report, seconds: float) -> None:
  """Sizes, errors, and where it is."""
  print(f'{"tensor":20}{"max error":>12}{"rms error":>12}   of max|w| and rms w, after rounding to {report.weights}')
  for name, error in report.errors.items():
    print(f'{name:20}{error.worst:12.3%}{error.relative:12.3%}')
  worst = max(report.errors, key=lambda name: report.errors[name].relative)
  print(f'worst tensor: {worst}, {report.errors[worst].relative:.3%} rms')
  print(f'parameters: {size(report.source_bytes)} before ({report.source.weights}), {size(report.output_bytes)} on '
        f'disk after: {report.output_bytes / report.source_bytes:.3f} of it')
  print(f'layer weights: {size(report.layer_bytes)} on disk, {report.layer_bytes / report.layer_float32_bytes:.3f} of '
        f'{size(report.layer_float32_bytes)} as float32')
  print(f'wrote and verified {report.output} in {seconds:.1f} s')


def size(count: int) -> str:
  for unit in ('B', 'kB', 'MB', 'GB'):
    if count < 1000 or unit == 'GB':
      return f'{count:.1f} {unit}' if unit != 'B' else f'{count} B'
    count /= 1000


class Progress:
  """A bar for each pass over the data on a terminal, log lines elsewhere; all on stderr."""

  def __init__(self):
    self._start = self._logged = time.monotonic()
    self._bar, self._pass, self._done = None, None, 0

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *exc) -> None:
    if self._bar is not None:
      self._bar.close()

  @property
  def seconds(self) -> float:
    return time.monotonic() - self._start

  def __call__(self, what: str, done: int, total: int) -> None:
    kind = 'verify' if what.startswith('verify') else 'convert'
    if kind != self._pass:
      self._pass, self._done = kind, 0
      if self._bar is not None:
        self._bar.close()
      if sys.stderr.isatty():
        self._bar = tqdm.tqdm(total=total, unit='B', unit_scale=True, desc=kind, file=sys.stderr)
    self._done += done
    if self._bar is not None:
      self._bar.update(done)
    elif time.monotonic() - self._logged > LOG_SECONDS or self._done == total:
      self._logged = time.monotonic()
      print(f'{kind}: {size(self._done)} of {size(total)}, {self.seconds:.0f} s', file=sys.stderr, flush=True)


def run(argv: list[str] | None = None) -> int:
  """The entry point; returns the exit code."""
  return command.run(main, __doc__, define_flags, argv)


if __name__ == '__main__':
  sys.exit(run())
