"""A decode step with one long row beside short ones, compiled for a TPU slice. No TPU.

    python -m benchmarks.long_row_compile --model=palm_540b --slice=v4:4x4x4 --rows 32 64

The step of slots (`python -m t5x_inference_ext.precompile --phase=slots`) is compiled twice: with
the pages that a shard of rows reads if all its rows are short, and if one of them is long. All
shards run one program, so each reads as many pages as the shard with the long row. The time of all
layers is extrapolated from programs of few unrolled layers. Needs libtpu.
"""

import dataclasses
import itertools

from benchmarks.few_layers import Times, all_layers, case_parser
from t5x_inference_ext.compiler_options import compiler_options
from t5x_inference_ext.config import ModelConfig, preset
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.model.chunks import page_shards
from t5x_inference_ext.precompile.case import CompileCase
from t5x_inference_ext.precompile.estimate import estimate
from t5x_inference_ext.precompile.kernel_schedule import kernel_schedules
from t5x_inference_ext.precompile.program import abstract_weights
from t5x_inference_ext.precompile.slices import slice_mesh
from t5x_inference_ext.precompile.slot_programs import slot_program
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.torus import TpuSlice, parse_slice

PAGE = SchedulerConfig.page_size
POOL = 32  # positions of the cache, in those of the long row
TITLES = 'slots', 'cache', 'attention', 'pages read', 'ms serial', 'ms overlapped', 'times'


def step_times(case: CompileCase, slice_: TpuSlice, read: int) -> Times:
  """Return the times of a step with all layers.

  Args:
    case: The program, but for the number of pages that it reads.
    slice_: The slice.
    read: Pages that each shard of rows reads.
  """
  mesh = slice_mesh(slice_, case.config)
  schedules = kernel_schedules(case, slice_, mesh.devices.shape)

  def times_of(config: ModelConfig) -> Times:
    few = dataclasses.replace(case, config=config)
    model = few.model(mesh)
    weights = abstract_weights(model, few.weights, few.stacked)
    function, arguments = slot_program(
      'slots', model, weights, few.batch, few.context, 1, few.sampling, read=read
    )
    options = compiler_options(mesh.devices.flat[0])
    text = function.lower(*arguments).compile(compiler_options=options).as_text()
    return Times.of(estimate(text, slice_, mesh.shape, schedules=schedules))

  return all_layers(case.config, times_of)


def print_rows(case: CompileCase, slice_: TpuSlice, longest: int) -> None:
  """Print the times of a step of short rows, and of one with a row of `longest` positions."""
  model = case.model(slice_mesh(slice_, case.config))
  slots = model.padded_batch(case.batch)
  rows = slots // page_shards(model, slots)  # of a shard
  # A cache that is larger than what is read, so that few layers of it do not fit into on-chip
  # memory: the caches of all layers do not.
  case = dataclasses.replace(case, batch=slots, context=POOL * longest)
  alone = 0.0
  for read in (1 + rows, rows + -(-longest // PAGE)):
    found = step_times(case, slice_, read)
    alone = alone or found.serial
    milliseconds = (f'{seconds * 1e3:.2f}' for seconds in (found.serial, found.overlapped))
    cells = slots, case.cache, case.attention, read, *milliseconds, f'{found.serial / alone:.3f}'
    print('| ' + ' | '.join(map(str, cells)) + ' |', flush=True)


def main() -> None:
  parser = case_parser(__doc__, 'palm_540b', 'v4:4x4x4')
  parser.add_argument('--rows', nargs='+', type=int, default=[32])
  parser.add_argument('--long', type=int, default=8192, help='positions of the long row')
  parser.add_argument('--cache', nargs='+', default=['bfloat16'], choices=('bfloat16', 'int8'))
  parser.add_argument('--attention', nargs='+', default=['xla', 'kernel'])
  args = parser.parse_args()
  print(f'{args.model} {args.weights} {args.slice} {args.layout}; short rows have {PAGE} positions')
  print('| ' + ' | '.join(TITLES) + ' |\n' + '|---' * len(TITLES) + '|', flush=True)
  try:
    for rows, cache, attention in itertools.product(args.rows, args.cache, args.attention):
      case = CompileCase(
        preset(args.model),
        args.weights,
        'slots',
        rows,
        PAGE,
        Layout.parse(args.layout),
        cache=cache,
        attention=attention,
        scan_layers=False,
      )
      print_rows(case, parse_slice(args.slice), args.long)
  except UserError as error:
    raise SystemExit(f'error: {error}') from error


if __name__ == '__main__':
  main()
