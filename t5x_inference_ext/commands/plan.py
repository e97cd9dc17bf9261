"""Which slice, mesh, batch and layouts? What each would take, by the paper's analytical model, and which is best.

  python -m t5x_inference_ext.plan --model=palm_540b --slice=v4:4x4x4 --batch=64 --input_length=1920 --output_length=64

prints every pair of layouts for prefill and decode, the fastest first, with its predicted time, MFU, memory and what
limits it, where the time of the best goes, and why it is the best. Nothing is compiled and no device is asked for.
Without --slice the usual slices of --chip are all considered, without --batch powers of two up to 1024:

  python -m t5x_inference_ext.plan --model=palm_62b --chip=v4,v5e --batch=8 --latency_target_ms=1500
  python -m t5x_inference_ext.plan --model=palm_8b --slice=v5e:2x4 --objective=throughput --weights=bfloat16

The target is for all of a request: its prompts' prefill and --output_length decode steps. Of what meets it the cheapest
is taken, in chip-seconds a token. --gin_output writes gin that infer, the T5X adapter and precompile take after their
own files, --json every number, --check compiles the plan with the TPU compiler and prints predicted beside compiled:

  python -m t5x_inference_ext.plan --model=palm_8b --slice=v4:2x2x1 --batch=32 --gin_output=plan.gin --check
  python -m t5x_inference_ext.precompile --gin_file=t5x_inference_ext/configs/runs/precompile.gin --gin_file=plan.gin

--sweep gives latency against cost of all slices and batches, as pareto.csv and pareto.svg in --output_dir; --figures
draws the bytes of layouts, the longest contexts and the parts of the time there: pip install
't5x_inference_ext[plots]'.

The same by gin, where models of other shapes are, too:

  python -m t5x_inference_ext.plan --gin_file=t5x_inference_ext/configs/runs/plan.gin \\
      --gin_file=t5x_inference_ext/configs/models/palm_62b.gin --gin.SLICE=\\"v4:2x2x4\\" --gin.BATCH=32

docs/planner.md explains the model. The exit code is 0, or 2 for an error: nothing fits, and what would, is one.
"""

import os

from absl import flags as absl_flags

from t5x_inference_ext.commands import cli
from t5x_inference_ext.config import PRESETS, preset
from t5x_inference_ext.errors import UserError

# Flag -> the parameter of planner.run.plan, where they differ.
PLAN_PARAMETERS = {'slice': 'slice_name', 'json': 'json_file', 'figures': 'figure'}
PLAN_FLAGS = (
  'model',
  'slice',
  'chip',
  'batch',
  'input_length',
  'output_length',
  'weights',
  'cache',
  'objective',
  'latency_target_ms',
  'convention',
  'mesh',
  'phase',
  'check',
  'sweep',
  'figures',
  'output_dir',
  'gin_output',
  'json',
)


def define_flags(flags: absl_flags.FlagValues) -> None:

  def define(kind, name, default, text, *arguments):
    getattr(absl_flags, f'DEFINE_{kind}')(name, default, *arguments, text, flag_values=flags)

  define('enum', 'model', None, f'The model: {", ".join(sorted(PRESETS))}.', sorted(PRESETS))
  define(
    'string',
    'slice',
    None,
    'The slice: v4:4x4x4, v5p:2x2x4, v5e:4x8, v6e:2x2, ...; or GPUs: A100:16, H100:8, '
    'H200:8. By default the usual ones of --chip are considered.',
  )
  define(
    'string',
    'chip',
    'v4',
    'Where there is no --slice: v4, v5e, v5p, v6e, A100, H100, H200, or several, with commas.',
  )
  define(
    'integer', 'batch', None, 'Rows at a time. By default powers of two up to 1024 are considered.'
  )
  define('integer', 'input_length', 1920, 'Tokens of each prompt.')
  define('integer', 'output_length', 64, 'Tokens to be made of each prompt, a decode step each.')
  define('enum', 'weights', 'int8', 'int8 or bfloat16.', ('int8', 'bfloat16'))
  define('enum', 'cache', 'bfloat16', 'Keys and values: int8 or bfloat16.', ('int8', 'bfloat16'))
  define(
    'enum',
    'objective',
    'latency',
    'Of several slices or batches: latency, the fastest; throughput, most tokens '
    'a second; cost, the fewest chip-seconds a token. Of one, all mean the fastest layouts.',
    ('latency', 'throughput', 'cost'),
  )
  define(
    'float',
    'latency_target_ms',
    None,
    'The cheapest that takes no more, from prompts to the last token.',
  )
  define(
    'enum',
    'convention',
    'torus',
    'Of the network: torus, each collective has the links of its own axes, and '
    'hops; paper, all links for every collective, and no hops.',
    ('torus', 'paper'),
  )
  define('string', 'mesh', None, 'XxYxZ over the whole slice. By default the best.')
  define(
    'enum',
    'phase',
    'both',
    'both, or prefill or decode, where the other phase runs on another slice: only that '
    'is priced, and has to fit.',
    ('both', 'prefill', 'decode'),
  )
  define(
    'boolean',
    'check',
    False,
    'Compile the plan for its slice, and print predicted beside compiled.',
  )
  define(
    'boolean',
    'sweep',
    False,
    'Latency against cost, in int8 and bfloat16, instead of one plan: a CSV and a figure.',
  )
  define('boolean', 'figures', False, 'Draw the figures of the plan.')
  define('string', 'output_dir', '.', 'Takes the files of --sweep and --figures.')
  define(
    'string',
    'gin_output',
    None,
    'Write the plan into this file, as gin for infer, the T5X adapter and precompile.',
  )
  define('string', 'json', None, 'Write every number into this file, as JSON.')


def main(flags: absl_flags.FlagValues) -> None:
  # Before jax is imported: the command runs on none of this machine's accelerators, and must not take them.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  from t5x_inference_ext.planner import run as runner

  if cli.uses_gin(flags):
    cli.check_unmixed(flags, PLAN_FLAGS, 'BATCH=64', 'configs/runs/plan.gin')
    cli.parse_gin(flags)
    return cli.configure(runner.plan)()
  if flags.model is None:
    raise UserError('--model not given; --help shows examples')
  arguments = {PLAN_PARAMETERS.get(name, name): flags[name].value for name in PLAN_FLAGS}
  return runner.plan(**{**arguments, 'model': preset(flags.model)})


def run(argv: list[str] | None = None) -> int:
  """The entry point; returns the exit code."""
  with cli.Session(__doc__, define_flags, argv) as session:
    main(session.parse())
  return session.code
