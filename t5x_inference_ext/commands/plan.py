r"""Predict the cost of each slice, mesh, batch and pair of layouts, and choose the best.

  python -m t5x_inference_ext.plan --model=palm_540b --slice=v4:4x4x4 --batch=64 \
      --input_length=1920 --output_length=64

prints all pairs of layouts for prefill and decode, fastest first, with predicted time, MFU, memory
and limiting resource. Then it prints the parts of the best pair's time, and why that pair is the
best. The predictions come from the paper's analytical model: nothing is compiled, and no device is
used. Without --slice all usual slices of --chip are considered, without --batch powers of two up to
1024:

  python -m t5x_inference_ext.plan --model=palm_62b --chip=v4,v5e --batch=8 --latency_target_ms=1500
  python -m t5x_inference_ext.plan --model=palm_8b --slice=v5e:2x4 --objective=throughput \
      --weights=bfloat16

The latency target covers a whole request: the prefill of its prompts and --output_length decode
steps. The cheapest plan that meets it, in chip-seconds per token, is chosen. --gin_output writes
gin bindings that infer, the T5X adapter and precompile read after their own files. --json writes
every number. --check compiles the plan with the TPU compiler and prints predicted and compiled
numbers side by side:

  python -m t5x_inference_ext.plan --model=palm_8b --slice=v4:2x2x1 --batch=32 \
      --gin_output=plan.gin --check
  python -m t5x_inference_ext.precompile --gin_file=t5x_inference_ext/configs/runs/precompile.gin \
      --gin_file=plan.gin

--sweep writes latency against cost for all slices and batches, as pareto.csv and pareto.svg in
--output_dir. --figures draws into it the bytes that layouts move, the longest contexts and the
parts of the time. Both need pip install 't5x_inference_ext[plots]'.

--rate or --trace simulates a service instead: the scheduler of serve runs in virtual time, with
predicted or given times of its programs, on each slice. Times to the first token and between
tokens, tokens per second and chip-hours are printed, and the cheapest slice that keeps to --ttft_ms
and --tpot_ms is named:

  python -m t5x_inference_ext.plan --model=palm_62b --slice=v4:2x2x2,v4:2x2x4 --rate=1,4 \
      --input_length=1024 --output_length=128 --ttft_ms=2000 --tpot_ms=50
  python -m t5x_inference_ext.plan --model=palm_62b --slice=v4:2x2x4 --trace=requests.jsonl

gin has the same options, and takes models of other shapes:

  python -m t5x_inference_ext.plan --gin_file=t5x_inference_ext/configs/runs/plan.gin \
      --gin_file=t5x_inference_ext/configs/models/palm_62b.gin \
      --gin.SLICE=\"v4:2x2x4\" --gin.BATCH=32

docs/planner.md explains the model. The exit code is 0, or 2 for an error. "Nothing fits" is an
error that says what would fit.
"""

import os
from typing import Any

from absl import flags as absl_flags

from t5x_inference_ext.commands import cli, option_flags
from t5x_inference_ext.config import PRESETS, preset
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.planner.service_options import ServiceOptions

_DTYPES = ('int8', 'bfloat16')
# (kind, name, default, help text, choices)
_FLAGS: tuple[tuple[Any, ...], ...] = (
  ('enum', 'model', None, 'The model.', sorted(PRESETS)),
  (
    'string',
    'slice',
    None,
    'The slice: v4:4x4x4, v5p:2x2x4, v5e:4x8, v6e:2x2, ...; or as the cloud names it, v4-128, '
    'v5litepod-16; or GPUs: A100:16, H100:8, H200:8; or several, with commas. '
    'Default: all usual slices of --chip are considered.',
  ),
  (
    'string',
    'chip',
    'v4',
    'The chip, if --slice is not given: v4, v5e, v5p, v6e, A100, H100, H200, or several, with '
    'commas.',
  ),
  (
    'integer',
    'batch',
    None,
    'Rows run together; slots of a simulated service. Default: powers of two up to 1024; 8, 32 and '
    '128 slots.',
  ),
  ('integer', 'input_length', 1920, 'Tokens of each prompt.'),
  ('integer', 'output_length', 64, 'Tokens to generate for each prompt, one decode step each.'),
  (
    'string',
    'weights',
    'int8',
    'Dtype of the weights: int8, int4 or bfloat16, or the whole format of a checkpoint with other '
    'bits for some tensors, such as int4,mlp_output:8 or int8,embedding:8.',
  ),
  ('enum', 'cache', 'bfloat16', 'Dtype of keys and values.', _DTYPES),
  (
    'enum',
    'objective',
    'latency',
    'How to choose among slices and batches: latency: the fastest; throughput: most tokens per '
    'second; cost, fewest chip-seconds a token. With one slice and one batch all mean the fastest '
    'layouts.',
    ('latency', 'throughput', 'cost'),
  ),
  (
    'float',
    'latency_target_ms',
    None,
    'Milliseconds from the prompts to the last token. The cheapest plan within this time is '
    'chosen.',
  ),
  (
    'enum',
    'convention',
    'torus',
    'Network model. torus: as in the program that was measured, each collective uses the links of '
    "one axis after the other. compiled: as precompile estimates this package's program, at full "
    'rate. paper: every collective uses all links, and hops take no time.',
    ('torus', 'compiled', 'paper'),
  ),
  ('string', 'mesh', None, 'XxYxZ over the whole slice. Default: the best.'),
  (
    'string',
    'layout',
    None,
    'The only layouts to consider, for prefill and for decode: wg_xyz/batch,ws_2d/batch, or one '
    'for '
    'both (docs/layouts.md). Default: all.',
  ),
  (
    'enum',
    'phase',
    'both',
    'Phases that run on the slice: both; or prefill or decode, if the other phase runs on another '
    'slice. Only these phases have to fit, and only their time counts.',
    ('both', 'prefill', 'decode'),
  ),
  (
    'string',
    'speculate',
    None,
    'Most tokens of a draft, 1 to 16, or ngram:8: also print the time of steps that check drafts, '
    'and from which acceptance on they pay (docs/decoding.md). With --rate or --trace: the drafts '
    'that steps check, such as ngram:8, or draft:palm_8b:4 with a draft model; --acceptance says '
    'how often they are right.',
  ),
  (
    'boolean',
    'check',
    False,
    'Compile the plan for its slice, and print predicted and compiled numbers side by side.',
  ),
  (
    'boolean',
    'sweep',
    False,
    'Write latency against cost, for int8 and bfloat16, as CSV and figure, instead of a plan.',
  ),
  ('boolean', 'figures', False, 'Draw the figures of the plan.'),
  ('string', 'output_dir', '.', 'Directory for the files of --sweep and --figures.'),
  (
    'string',
    'gin_output',
    None,
    'File for the plan, as gin bindings for infer, the T5X adapter and precompile.',
  ),
  ('string', 'json', None, 'File for every number, as JSON.'),
)
_NAMES = tuple(flag[1] for flag in _FLAGS)
# Flag -> the parameter of planner.run.plan, if its name differs.
_PARAMETERS = {'slice': 'slice_name', 'json': 'json_file', 'figures': 'figure'}


def define_flags(flags: absl_flags.FlagValues) -> None:
  """Define the command's own flags."""
  for kind, name, default, text, *choices in _FLAGS:
    define = getattr(absl_flags, f'DEFINE_{kind}')
    define(name, default, *choices, text, flag_values=flags)
  option_flags.define_options(flags, ServiceOptions)


def _main(flags: absl_flags.FlagValues) -> None:
  """Plan with the options from flags or from gin."""
  # Set before jax is imported, so that the command does not occupy this machine's accelerators.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  from t5x_inference_ext.planner import run as runner

  if cli.uses_gin(flags):
    names = (*_NAMES, *option_flags.option_names(ServiceOptions))
    cli.check_unmixed(flags, names, 'BATCH=64', 'configs/runs/plan.gin')
    cli.parse_gin(flags)
    cli.configure(runner.plan)()
    return
  if flags.model is None:
    raise UserError('--model not given; --help shows examples')
  arguments: dict[str, Any] = {
    _PARAMETERS.get(name, name): flags[name].value
    for name in (*_NAMES, *option_flags.option_names(ServiceOptions))
  }
  runner.plan(**{**arguments, 'model': preset(flags.model)})


def run(argv: list[str] | None = None) -> int:
  """Run the command and return its exit code."""
  with cli.Session(__doc__, define_flags, argv) as session:
    _main(session.parse())
  return session.code
