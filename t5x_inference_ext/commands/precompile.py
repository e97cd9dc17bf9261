"""Compiles a model for a TPU slice, here, without one: does it fit, and how long does each step take?

  python -m t5x_inference_ext.precompile --model=palm_540b --weights=int8 --slice=v4:4x4x4 \\
      --phase=decode --batch=64 --context=2048 --layout=ws_2d/batch

The program is the real one at full size: embedding, all layers, logits, greedy choice of the next token, and the KV
cache written in place. Only its weights are missing. The TPU compiler (libtpu: pip install 't5x_inference_ext[tpu]')
runs on any Linux machine; no TPU is looked for. It says what the program takes of a chip's memory and how many cycles
it expects of every operation; the links of the slice say what collectives cost. Without --layout the layouts that
suit the phase are all compiled, and the one with the least estimate is reported. A prefill takes prompts of --prompt
tokens (by default of all the context):

  python -m t5x_inference_ext.precompile --model=palm_62b --weights=bfloat16 --slice=v5e:4x4 \\
      --phase=prefill --batch=16 --context=2048 --prompt=1024 --json=/tmp/prefill.json --hlo=/tmp/prefill.txt

--save=FILE keeps the executable, for the same versions and chips. That of --phase=generate is what infer runs for a
batch; on the slice it starts without compiling:

  python -m t5x_inference_ext.precompile --model=palm_8b --slice=v4:2x2x1 --phase=generate --batch=32 --context=512 \\
      --max_new_tokens=64 --layout=ws_2d/batch --save=/tmp/palm_8b.executable
  python -m t5x_inference_ext.infer --checkpoint=DIR --prompts=FILE.jsonl --output=FILE.jsonl --batch_size=32 \\
      --max_new_tokens=64 --executable=/tmp/palm_8b.executable

What slot refill runs (docs/decoding.md): a chunk of 256 prompt tokens on a cache of 2048, and a step of 64 slots:

  python -m t5x_inference_ext.precompile --model=palm_540b --slice=v4:4x4x4 --phase=extend --batch=64 --prompt=256
  python -m t5x_inference_ext.precompile --model=palm_540b --slice=v4:4x4x4 --phase=slots --batch=64

The same by gin, where models of other shapes are, too:

  python -m t5x_inference_ext.precompile --gin_file=t5x_inference_ext/configs/runs/precompile.gin \\
      --gin_file=t5x_inference_ext/configs/models/palm_8b.gin --gin.SLICE=\\"v4:2x2x1\\" --gin.BATCH=32

The exit code is 0 if it fits, 1 if it does not (the report then says what is missing, and the nearest layout, batch and
slice that would do), 2 for an error. docs/precompile.md explains every line of the report.
"""

import os

from absl import flags as absl_flags

from t5x_inference_ext.commands import cli
from t5x_inference_ext.config import PRESETS, preset
from t5x_inference_ext.errors import UserError

FITS, DOES_NOT_FIT = 0, 1
PRECOMPILE_REQUIRED = ('model', 'slice', 'batch')
# Flag -> the parameter of run.precompile, where they differ.
PRECOMPILE_PARAMETERS = {
  'slice': 'slice_name',
  'json': 'json_file',
  'hlo': 'hlo_file',
  'save': 'save_file',
}
PRECOMPILE_FLAGS = (
  'model',
  'weights',
  'slice',
  'phase',
  'batch',
  'context',
  'prompt',
  'layout',
  'other_layout',
  'mesh',
  'cache',
  'scan_layers',
  'max_new_tokens',
  'json',
  'hlo',
  'save',
)
PHASE_HELP = {
  'decode': 'one token for each row',
  'prefill': 'whole prompts',
  'generate': 'all that infer runs for a static batch, to be saved',
  'extend': 'a chunk of prompts on what is cached of them',
  'slots': 'a decode step of slot refill',
  'admit': "a prompt's way into a slot",
}


def define_flags(flags: absl_flags.FlagValues) -> None:

  sampling_flags = _sampling_flags()

  def define(kind, name, default, text, *arguments):
    getattr(absl_flags, f'DEFINE_{kind}')(name, default, *arguments, text, flag_values=flags)

  define('enum', 'model', None, f'The model: {", ".join(sorted(PRESETS))}.', sorted(PRESETS))
  define('enum', 'weights', 'int8', 'int8 or bfloat16.', ('int8', 'bfloat16'))
  define('string', 'slice', None, 'The slice: v4:4x4x4, v5p:2x2x4, v5e:4x8, v6e:2x2, ...')
  define(
    'enum',
    'phase',
    'decode',
    '; '.join(f'{name}: {what}' for name, what in PHASE_HELP.items()) + '.',
    tuple(PHASE_HELP),
  )
  define('integer', 'batch', None, 'Rows.')
  define('integer', 'context', 2048, 'Positions of the KV cache for each row.')
  define(
    'integer',
    'prompt',
    None,
    'Tokens of each row that a prefill takes: by default all of the context. Of a '
    'generation, what the new tokens leave of it; of extend, a chunk of 256.',
  )
  define(
    'string',
    'layout',
    None,
    'feedforward/attention[/collectives] of the phase, such as ws_2d/batch '
    '(docs/layouts.md). By default the best of those that suit the phase.',
  )
  define(
    'string',
    'other_layout',
    None,
    'Of the other phase, which shares the weights and the cache. By default '
    'ws_2d/batch, or ws_1d/batch beside ws_1d.',
  )
  define('string', 'mesh', None, 'XxYxZ over the whole slice. By default along its torus.')
  define(
    'enum',
    'cache',
    None,
    'What the KV cache holds: int8, with a scale for each position and head, or bfloat16, the '
    'default.',
    ('int8', 'bfloat16'),
  )
  define(
    'boolean',
    'scan_layers',
    None,
    'One loop over all layers, which compiles in seconds; by default they are written '
    "out, as in infer on a TPU, which prefetches each layer's weights and takes a minute or two for 100 layers.",
  )
  define('integer', 'max_new_tokens', 64, 'Of a generation: the limit for each row.')
  sampling_flags.define_sampling(flags, 'Of a generation, slots and admit: ')
  define('string', 'json', None, 'Write the report into this file, as JSON.')
  define('string', 'hlo', None, 'Write the compiled program into this file, as text.')
  define('string', 'save', None, 'Write the executable into this file.')


def _sampling_flags():
  """The module, which brings jax: the command computes nothing, and must not take the accelerators of this machine."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  from t5x_inference_ext.commands import sampling_flags  # pylint: disable=g-import-not-at-top

  return sampling_flags


def main(flags: absl_flags.FlagValues) -> bool:
  """Returns whether it fits."""
  sampling_flags = _sampling_flags()
  from t5x_inference_ext.precompile import run as runner

  if cli.uses_gin(flags):
    cli.check_unmixed(
      flags, (*PRECOMPILE_FLAGS, *sampling_flags.NAMES), 'BATCH=64', 'configs/runs/precompile.gin'
    )
    cli.parse_gin(flags)
    return cli.configure(runner.precompile)()
  missing = [f'--{name}' for name in PRECOMPILE_REQUIRED if flags[name].value is None]
  if missing:
    raise UserError(f'{", ".join(missing)} not given; --help shows examples')
  arguments = {
    PRECOMPILE_PARAMETERS.get(name, name): flags[name].value for name in PRECOMPILE_FLAGS
  }
  return runner.precompile(
    **{**arguments, 'model': preset(flags.model)}, sampling=sampling_flags.read_sampling(flags)
  )


def run(argv: list[str] | None = None) -> int:
  """The entry point; returns the exit code."""
  with cli.Session(__doc__, define_flags, argv) as session:
    session.code = FITS if main(session.parse()) else DOES_NOT_FIT
  return session.code
