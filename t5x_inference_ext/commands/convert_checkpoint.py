"""Converts a checkpoint: T5X's into a serving checkpoint with int8 or bfloat16 weights, or back into T5X's formats.

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

--format=t5x_int8 writes flaxformer's quantized tree (qkernel, qscale) in T5X's legacy format, --format=t5x_float one in
float32: from a serving checkpoint, too.

--output is exactly the directory made. It must not exist, and appears when it is complete and has been read back. A run
that is killed, or finds the disk full or the source unreadable, leaves OUTPUT.unfinished, which no command takes for a
checkpoint: the same command goes on from there. Memory and disk that it will take are printed first. Several processes,
also on hosts that share a file system, divide the work: start each with the same flags but for its --shard_id.

  python -m t5x_inference_ext.convert_checkpoint ... --num_shards=8 --shard_id=0

Inputs and outputs may be in a bucket. An output there is made in a directory of a local disk first, and uploaded:

  python -m t5x_inference_ext.convert_checkpoint --input=gs://BUCKET/checkpoint_1000 --output=gs://BUCKET/int8 \\
      --staging=/scratch --weights=int8

A finished checkpoint, re-read and compared with its manifest, and with --input also with its source:

  python -m t5x_inference_ext.convert_checkpoint --verify --output=/tmp/palm_tiny_int8 --input=CHECKPOINT

What the rounding does, as a table and a plot in --report (made by the conversion, or later of a finished output); with
tokens, also the losses of both models on them:

  python -m t5x_inference_ext.convert_checkpoint --input=CHECKPOINT --output=/tmp/palm_tiny_int8 --weights=int8 \\
      --report=/tmp/report --report_tokens=TOKENS.npy
"""

from collections.abc import Iterator
import contextlib
import os
import sys
import time

from absl import flags as absl_flags
import tqdm

from t5x_inference_ext.checkpoints import convert, serving
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint, is_finished
from t5x_inference_ext.checkpoints.conversion import options, outputs
from t5x_inference_ext.checkpoints.conversion.verify import verify
from t5x_inference_ext.commands import cli
from t5x_inference_ext.config import NORM_SCALES
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.text_files import check_plots
from t5x_inference_ext.text_format import decimal_bytes

# Without a terminal, a line at most this often.
LOG_SECONDS = 10
CONVERT_REQUIRED = ('input', 'output')
# Flags that say what gin's bindings of convert.convert say, too.
CONVERT = (
  'weights',
  'format',
  'norm_scale',
  'scale_search',
  'embedding',
  'staging',
  'hold_bytes',
  'slice_bytes',
)
HERE = ('workers', 'num_shards', 'shard_id')
SHARD_FLAGS = ('coordinator_address', 'num_processes', 'process_id')


def define_flags(flags: absl_flags.FlagValues) -> None:
  def define(kind, name, default, text, *arguments):
    getattr(absl_flags, f'DEFINE_{kind}')(name, default, *arguments, text, flag_values=flags)

  define('string', 'input', None, 'The checkpoint directory to read.')
  define('string', 'output', None, 'The directory to make.')
  define(
    'enum',
    'format',
    None,
    "What to make: a serving checkpoint (the default), or T5X's legacy format.",
    outputs.OUTPUT_FORMATS,
  )
  define(
    'enum',
    'weights',
    None,
    'What the matrices of a serving checkpoint become.',
    serving.SERVING_WEIGHTS,
  )
  define(
    'enum',
    'norm_scale',
    None,
    'How norm scales are stored: the value applied is 1 + scale (zero) or scale (one).'
    ' By default what the checkpoint records, else zero for fused parallel layers, one for others.',
    NORM_SCALES,
  )
  define(
    'enum',
    'scale_search',
    None,
    "An int8 channel's scale: max|w| / 127 (absmax, the default), or the multiple "
    'of it with the least squared error (mse: some 20 times the arithmetic).',
    options.SCALE_SEARCHES,
  )
  define(
    'enum',
    'embedding',
    None,
    "What the embedding of a serving checkpoint becomes. int8 is refused: it can't be served.",
    ('bfloat16', 'int8'),
  )
  define(
    'string',
    'staging',
    None,
    'For an output in a bucket, the local directory in which it is made before.',
  )
  define(
    'string',
    'hold_bytes',
    None,
    'How much of the source to hold until its scales are known, as 512MiB (the '
    'default): what is more is read again.',
  )
  define(
    'string',
    'slice_bytes',
    None,
    'How much of the source is recorded as finished at a time, as 256MiB (the '
    'default), if its chunks allow it.',
  )
  define('integer', 'workers', None, 'Threads. By default one a core.')
  define('integer', 'num_shards', 1, 'How many processes divide the work.')
  define('integer', 'shard_id', 0, 'Which of them this is, from 0.')
  define(
    'string',
    'coordinator_address',
    None,
    'HOST:PORT of process 0, or auto: the shards are the processes of jax.distributed.',
  )
  define('integer', 'num_processes', None, 'With --coordinator_address, how many there are.')
  define('integer', 'process_id', None, 'With --coordinator_address, which this is.')
  define('boolean', 'verify', False, 'Convert nothing: re-read the finished checkpoint --output.')
  define(
    'string',
    'report',
    None,
    'A directory for the quality report: report.txt, report.json, report.png.',
  )
  define('string', 'report_tokens', None, 'For the report, tokens [rows, length]: a .npy file.')
  define('string', 'report_task', None, 'For the report, a seqio task with the feature `targets`.')
  define('string', 'report_task_module', None, 'The module that registers it.')


def main(flags: absl_flags.FlagValues) -> None:
  given = {
    name: flags[name].value
    for name in (*CONVERT_REQUIRED, *CONVERT)
    if flags[name].value is not None
  }
  if flags.verify:
    verify_only(flags)
    return
  if cli.uses_gin(flags):
    if given:
      raise UserError(
        f'--{next(iter(given))} and gin flags say the same in two ways: with gin, bind INPUT_CHECKPOINT, '
        'OUTPUT_CHECKPOINT, FORMAT, WEIGHTS, NORM_SCALE, SCALE_SEARCH, EMBEDDING, STAGING, HOLD_BYTES '
        'and SLICE_BYTES'
      )
    cli.parse_gin(flags)
    arguments = {}
  else:
    needed = (
      CONVERT_REQUIRED
      if given.get('format', 'serving') != 'serving'
      else (*CONVERT_REQUIRED, 'weights')
    )
    missing = [f'--{name}' for name in needed if name not in given]
    if missing:
      raise UserError(f'{" and ".join(missing)} not given; --help shows examples')
    arguments = {
      'input_checkpoint': given.pop('input'),
      'output_checkpoint': given.pop('output'),
      **given,
    }
  check_report(flags)
  arguments.update({name: flags[name].value for name in HERE})
  arguments.update(shards_of_processes(flags))
  with ProgressLines() as progress:
    configured = cli.configure(
      convert.convert, found=print_source, planned=cli.print_line, progress=progress, **arguments
    )
    if flags.report is not None and is_finished(configured.keywords['output_checkpoint']):
      cli.print_line(f'{configured.keywords["output_checkpoint"]} exists: only the report is made')
    else:
      report = configured()
      if not report.finished:
        cli.print_line(f'this is done: the shard that finishes last completes {report.output}')
        return
      for line in conversion_summary(report, progress.seconds):
        cli.print_line(line)
  if flags.report is not None:
    write_report(flags, configured.keywords)


def check_report(flags: absl_flags.FlagValues) -> None:
  """Raises UserError for a report that can't be made: before the conversion, which may take hours, not after."""
  if not (flags.report_tokens is None or flags.report_task is None):
    raise UserError('--report_tokens and --report_task say the same in two ways')
  if flags.report is None:
    given = [
      f'--{name}'
      for name in ('report_tokens', 'report_task', 'report_task_module')
      if flags[name].value
    ]
    if given:
      raise UserError(f'{given[0]} is for the quality report: --report=DIR says where to write it')
    return
  check_plots()
  if os.path.exists(flags.report) and not os.path.isdir(flags.report):
    raise UserError(f'--report={flags.report} is a file: name a directory')
  if flags.report_tokens is not None and not os.path.isfile(flags.report_tokens):
    raise UserError(f'no file at --report_tokens={flags.report_tokens}')


def shards_of_processes(flags: absl_flags.FlagValues) -> dict[str, int]:
  """num_shards and shard_id of jax.distributed's processes, where flags ask for it."""
  processes = {name: flags[name].value for name in SHARD_FLAGS}
  if all(value is None for value in processes.values()):
    return {}
  if flags.num_shards != 1 or flags.shard_id != 0:
    raise UserError('--num_shards and --coordinator_address say the same in two ways')
  from t5x_inference_ext import (
    distributed,
    rendezvous,
  )  # with jax: slow to import, and not needed otherwise

  distributed.initialize(rendezvous.ProcessOptions(**processes))
  import jax

  return {'num_shards': jax.process_count(), 'shard_id': jax.process_index()}


def verify_only(flags: absl_flags.FlagValues) -> None:
  if cli.uses_gin(flags) or flags.report is not None:
    raise UserError('--verify takes --output, --input and --workers: no gin flags, no --report')
  if flags.output is None:
    raise UserError(
      '--output not given: with --verify it is the finished checkpoint; --input may be its source'
    )
  with ProgressLines() as progress:
    for line in verify(flags.output, flags.input, workers=flags.workers, progress=progress):
      cli.print_line(line)


def write_report(flags: absl_flags.FlagValues, arguments: dict) -> None:
  from t5x_inference_ext.runs import quality  # with jax and matplotlib

  for line in quality.report(
    arguments['input_checkpoint'],
    arguments['output_checkpoint'],
    flags.report,
    tokens=flags.report_tokens,
    task=flags.report_task,
    task_module=flags.report_task_module,
    **{name: arguments.get(name) for name in ('norm_scale', 'config', 'rescale_logits')},
  ):
    cli.print_line(line)


def print_source(checkpoint: Checkpoint) -> None:
  for note in checkpoint.notes:
    cli.print_line(note)


def conversion_summary(report: options.Report, seconds: float) -> Iterator[str]:
  """Sizes, errors, and where it is, in lines."""
  if not report.errors:
    return
  yield f'{"tensor":20}{"max error":>12}{"rms error":>12}   of max|w| and rms w, after rounding to {report.weights}'
  for name, error in report.errors.items():
    yield f'{name:20}{error.worst:12.3%}{error.relative:12.3%}'
  worst = max(report.errors, key=lambda name: report.errors[name].relative)
  yield f'worst tensor: {worst}, {report.errors[worst].relative:.3%} rms'
  yield (
    f'parameters: {decimal_bytes(report.source_bytes)} before ({report.source.weights}), {decimal_bytes(report.output_bytes)} on '
    f'disk after: {report.output_bytes / report.source_bytes:.3f} of it'
  )
  yield (
    f'layer weights: {decimal_bytes(report.layer_bytes)} on disk, {report.layer_bytes / report.layer_float32_bytes:.3f} of '
    f'{decimal_bytes(report.layer_float32_bytes)} as float32'
  )
  yield f'wrote and verified {report.output} in {seconds:.1f} s'


class ProgressLines:
  """A bar for each pass over the data on a terminal, log lines elsewhere; all on stderr."""

  def __init__(self):
    self._start = self._logged = time.monotonic()
    self._bar, self._pass, self._done = None, None, 0

  def __enter__(self) -> 'ProgressLines':
    return self

  def __exit__(self, *exc) -> None:
    if self._bar is not None:
      self._bar.close()

  @property
  def seconds(self) -> float:
    return time.monotonic() - self._start

  def __call__(self, what: str, done: int, total: int) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone ends no conversion
      self._tell(what, done, total)

  def _tell(self, what: str, done: int, total: int) -> None:
    kind = next((k for k in ('verify', 'upload') if what.startswith(f'{k} ')), 'convert')
    if kind != self._pass:
      self._pass, self._done = kind, 0
      if self._bar is not None:
        self._bar.close()
      if sys.stderr is not None and sys.stderr.isatty():
        self._bar = tqdm.tqdm(total=total, unit='B', unit_scale=True, desc=kind, file=sys.stderr)
    self._done += done
    if self._bar is not None:
      self._bar.update(done)
    elif sys.stderr is not None and (
      time.monotonic() - self._logged > LOG_SECONDS or self._done == total
    ):
      self._logged = time.monotonic()
      print(
        f'{kind}: {decimal_bytes(self._done)} of {decimal_bytes(total)}, {self.seconds:.0f} s',
        file=sys.stderr,
        flush=True,
      )


def run(argv: list[str] | None = None) -> int:
  """The entry point; returns the exit code."""
  with cli.Session(__doc__, define_flags, argv) as session:
    main(session.parse())
  return session.code
