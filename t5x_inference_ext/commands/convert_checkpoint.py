r"""Convert a checkpoint into a serving checkpoint of int8 or bfloat16 weights, or into T5X's form.

  python -m t5x_inference_ext.convert_checkpoint \
      --input=examples/palm_tiny/checkpoint_1000 --output=/tmp/palm_tiny_int8 --weights=int8

The same through gin:

  python -m t5x_inference_ext.convert_checkpoint \
      --gin_file=t5x_inference_ext/configs/runs/convert.gin \
      --gin.INPUT_CHECKPOINT=\"examples/palm_tiny/checkpoint_1000\" \
      --gin.OUTPUT_CHECKPOINT=\"/tmp/palm_tiny_int8\"

The input is a directory that T5X wrote (legacy or Orbax, scanned or with one subtree a layer, with
or without optimizer state, float or already quantized as qkernel and qscale); a public model, which
is a directory of safetensors with config.json or a GGUF file (docs/public_models.md); or a serving
checkpoint. The model's shape is derived from it. Properties that the weights of a T5X checkpoint do
not show, such as the activations, come from the config.gin of the training run beside it, from
flags such as --mlp and --rescale_logits, or with gin from MODEL_CONFIG; the serving checkpoint
records them. Only for PaLM's fused parallel layers, PaLM's conventions are assumed, and printed
(docs/serving_checkpoint.md).

--format=t5x_int8 writes flaxformer's quantized tree (qkernel, qscale) in T5X's legacy format,
--format=t5x_float a float32 tree. Both also take a serving checkpoint as input.

--output names the directory to make. It must not exist, and appears when it is complete and has
been read back. If a run is killed, or fails because the disk is full or the source unreadable,
OUTPUT.unfinished remains. No command accepts it as a checkpoint; the same conversion command
continues from it. The required memory and disk space are printed first. Several processes, also on
hosts that share a file system, can divide the work: start each with the same flags except
--shard_id.

  python -m t5x_inference_ext.convert_checkpoint ... --num_shards=8 --shard_id=0

Inputs and outputs may be in a bucket. An output in a bucket is made in a local directory first, and
then uploaded:

  python -m t5x_inference_ext.convert_checkpoint --input=gs://BUCKET/checkpoint_1000 \
      --output=gs://BUCKET/int8 --staging=/scratch --weights=int8

--verify re-reads a finished checkpoint and compares it with its manifest, and with --input also
with its source:

  python -m t5x_inference_ext.convert_checkpoint --verify --output=/tmp/palm_tiny_int8 \
      --input=CHECKPOINT

--calibration rounds by GPTQ, for the activations of a text. Rounded layers are kept in
OUTPUT.unfinished, so that a killed run loses one layer at most:

  python -m t5x_inference_ext.convert_checkpoint --input=CHECKPOINT --output=/tmp/palm_tiny_int4 \
      --weights=int4 --calibration=TOKENS.npy

--report writes the effect of rounding as a table and a plot, during the conversion or later for a
finished output. Given tokens, the report has the losses of both models on them:

  python -m t5x_inference_ext.convert_checkpoint --input=CHECKPOINT --output=/tmp/palm_tiny_int8 \
      --weights=int8 --report=/tmp/report --report_tokens=TOKENS.npy
"""

import contextlib
import dataclasses
import functools
import os
import time
from typing import Any

from absl import flags as absl_flags

from t5x_inference_ext.checkpoints import convert
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint, is_finished
from t5x_inference_ext.checkpoints.conventions import CONVENTION_NAMES, Conventions
from t5x_inference_ext.checkpoints.conversion.options import COMMON, ConvertOptions
from t5x_inference_ext.checkpoints.conversion.verify import verify
from t5x_inference_ext.commands import cli, option_flags
from t5x_inference_ext.compilation_cache import CacheOptions, use_compilation_cache
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.options import check_options, option
from t5x_inference_ext.progress_bar import PassProgress, print_line
from t5x_inference_ext.quantization.formats import SERVED_WEIGHTS
from t5x_inference_ext.rendezvous import ProcessOptions
from t5x_inference_ext.text_files import check_plots

# Flags that may be combined with gin flags.
HERE = ('workers', 'num_shards', 'shard_id')
# Flag -> parameter of convert.convert, if the names differ.
PARAMETERS = {'input': 'input_checkpoint', 'output': 'output_checkpoint'}
_REQUIRED, _REPORT = 'Required', 'Quality report'


@dataclasses.dataclass(frozen=True)
class SourceOptions:
  """Options of a conversion besides ConvertOptions; with gin, parameters of convert.convert."""

  input: str | None = option(
    None, help='Checkpoint directory to read, a GGUF file, or hf:OWNER/NAME.', group=_REQUIRED
  )
  output: str | None = option(None, help='Checkpoint directory to make.', group=_REQUIRED)
  weights: str | None = option(
    None,
    help="Dtype of a serving checkpoint's matrices. Not needed for T5X's formats.",
    group=_REQUIRED,
    choices=SERVED_WEIGHTS,
  )
  vocabulary: str | None = option(
    None,
    help='Vocabulary to put into a serving checkpoint: bytes, a SentencePiece .model file, or a '
    "tokenizer.json with the files beside it. By default the source's own, else bytes for a model "
    'of 384 rows.',
    group=COMMON,
  )
  adapter: str | None = option(
    None,
    help='LoRA or (IA)^3 to fold into the weights: a directory that PEFT saved, for --input.',
    group=COMMON,
  )
  calibration: str | None = option(
    None,
    help='Round int8 or int4 weights by GPTQ, for the activations of this file: token ids [rows, '
    'length] (.npy), or a UTF-8 text.',
    group=COMMON,
  )
  staging: str | None = option(
    None,
    help='For an output in a bucket: local directory in which to make it before the upload.',
    group=COMMON,
  )


@dataclasses.dataclass(frozen=True)
class ReportOptions:
  """Options for verifying a checkpoint and for the quality report."""

  verify: bool = option(
    False, help='Do not convert: re-read the finished checkpoint --output.', group=COMMON
  )
  report: str | None = option(
    None,
    help='Directory to write the quality report to: report.txt, report.json, report.png.',
    group=_REPORT,
  )
  report_tokens: str | None = option(
    None,
    help='For the report: .npy file of token ids [rows, length], to compute losses on.',
    group=_REPORT,
  )
  report_task: str | None = option(
    None,
    help='For the report: seqio task with a feature `targets`, to compute losses on.',
    group=_REPORT,
  )
  report_task_module: str | None = option(
    None, help='Module that registers the task.', group=_REPORT
  )

  def check(self) -> None:
    """Raise UserError, before hours of conversion, if the report can't be made."""
    check_options(self)
    if not (self.report_tokens is None or self.report_task is None):
      raise UserError('--report_tokens and --report_task exclude each other: give one')
    if self.report is None:
      for name in ('report_tokens', 'report_task', 'report_task_module'):
        if getattr(self, name):
          raise UserError(
            f'--{name} is for the quality report: give its directory too, --report=DIR'
          )
      return
    check_plots()
    if os.path.exists(self.report) and not os.path.isdir(self.report):
      raise UserError(f'--report={self.report} is a file: name a directory')
    if self.report_tokens is not None and not os.path.isfile(self.report_tokens):
      raise UserError(f'no file at --report_tokens={self.report_tokens}')


def define_flags(flags: absl_flags.FlagValues) -> None:
  """Define the command's flags."""
  for options in (SourceOptions, Conventions, ConvertOptions, ReportOptions, ProcessOptions):
    option_flags.define_options(flags, options)
  option_flags.define_options(flags, CacheOptions, group=_REPORT)


def convert_or_verify(flags: absl_flags.FlagValues) -> None:
  """Convert, verify or write a report, depending on the flags."""
  options = option_flags.read_options(flags, ReportOptions)
  if options.verify:
    verify_only(flags)
    return
  arguments: dict[str, Any] = {}
  bound = [
    n
    for n in option_flags.option_names(SourceOptions, Conventions, ConvertOptions)
    if n not in HERE
  ]
  if cli.uses_gin(flags):
    cli.check_unmixed(flags, bound, 'OUTPUT_CHECKPOINT=\\"DIR\\"', 'configs/runs/convert.gin')
    cli.parse_gin(flags)
  else:
    is_serving = flags.format == 'serving'
    option_flags.check_given(flags, 'input', 'output', *(['weights'] if is_serving else []))
    arguments = {PARAMETERS.get(n, n): flags[n].value for n in bound if flags[n].present}
  options.check()
  arguments |= {name: flags[name].value for name in HERE} | shards_of_processes(flags)
  progress = PassProgress()
  configured = cli.configure(
    convert.convert, found=print_source, planned=print_line, progress=progress, **arguments
  )
  assert isinstance(configured, functools.partial)
  output = configured.keywords['output_checkpoint']
  if options.report is not None and configured.keywords.get('adapter') is not None:
    raise UserError(
      '--report compares the output with --input, and --adapter changes the weights: report on the '
      'conversion without it'
    )
  if options.report is not None and is_finished(output):
    print_line(f'{output} exists: making only the report')
  else:
    start = time.monotonic()
    with contextlib.closing(progress):
      report = configured()
    if not report.finished:
      print_line(f'this shard is done: the last one to finish completes {report.output}')
      return
    for line in report.summary(time.monotonic() - start):
      print_line(line)
  if options.report is not None:
    cache = option_flags.read_options(flags, CacheOptions)
    use_compilation_cache(cache, print_line)
    write_report(options, options.report, configured.keywords)


def shards_of_processes(flags: absl_flags.FlagValues) -> dict[str, int]:
  """Join the processes given by flags; return num_shards and shard_id, {} without such flags."""
  if not any(flags[name].present for name in option_flags.option_names(ProcessOptions)):
    return {}
  if flags.num_shards != 1 or flags.shard_id != 0:
    raise UserError('--num_shards and --coordinator_address exclude each other: give one')
  processes = option_flags.read_options(flags, ProcessOptions)
  from t5x_inference_ext import distributed  # imports jax, which is slow, and needed only here

  distributed.initialize(processes)
  import jax

  return {'num_shards': jax.process_count(), 'shard_id': jax.process_index()}


def verify_only(flags: absl_flags.FlagValues) -> None:
  """Verify a finished checkpoint."""
  if cli.uses_gin(flags) or flags.report is not None:
    raise UserError('--verify can be combined only with --output, --input and --workers')
  if flags.output is None:
    raise UserError(
      '--verify needs --output, the finished checkpoint, and optionally --input, its source'
    )
  with contextlib.closing(PassProgress()) as progress:
    for line in verify(flags.output, flags.input, workers=flags.workers, progress=progress):
      print_line(line)


def write_report(options: ReportOptions, directory: str, arguments: dict[str, Any]) -> None:
  """Write the quality report of the conversion that `arguments` describe."""
  from t5x_inference_ext.runs import quality  # imports jax and matplotlib

  for line in quality.report(
    arguments['input_checkpoint'],
    arguments['output_checkpoint'],
    directory,
    tokens=options.report_tokens,
    task=options.report_task,
    task_module=options.report_task_module,
    config=arguments.get('config'),
    **{name: arguments[name] for name in CONVENTION_NAMES if name in arguments},
  ):
    print_line(line)


def print_source(checkpoint: Checkpoint) -> None:
  """Print the notes on the source checkpoint."""
  for note in checkpoint.notes:
    print_line(note)
  print_line(f'vocabulary: {checkpoint.text}')


def run(argv: list[str] | None = None) -> int:
  """Run the command with a command line, and return its exit code."""
  with cli.Session(__doc__, define_flags, argv) as session:
    convert_or_verify(session.parse())
  return session.code
