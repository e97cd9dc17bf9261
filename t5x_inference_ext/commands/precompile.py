r"""Compile a model for a TPU slice without having one: does it fit, and how long is a step?

  python -m t5x_inference_ext.precompile --model=palm_540b --weights=int8 --slice=v4:4x4x4 \
      --phase=decode --batch=64 --context=2048 --layout=ws_2d/batch

The program is the real one, at full size: embedding, all layers, logits, greedy choice of the next
token, and a KV cache that is written in place. Weights are not needed. The TPU compiler (libtpu:
pip install 't5x_inference_ext[tpu]') runs on any Linux machine; no TPU is needed. The compiler
reports the program's memory on a chip, and the expected cycles of every operation. The time of
collectives is computed from the links of the slice. Without --layout all layouts that suit the
phase are compiled, and the one with the smallest estimate is reported. A prefill takes prompts of
--prompt tokens (by default the whole context):

  python -m t5x_inference_ext.precompile --model=palm_62b --weights=bfloat16 --slice=v5e:4x4 \
      --phase=prefill --batch=16 --context=2048 --prompt=1024 \
      --json=/tmp/prefill.json --hlo=/tmp/prefill.txt

--save=FILE writes the executable, which runs only on these versions and chips. With
--phase=generate, `infer` can run the executable for each batch, and starts on the slice without
compiling:

  python -m t5x_inference_ext.precompile --model=palm_8b --slice=v4:2x2x1 --phase=generate \
      --batch=32 --context=512 --max_new_tokens=64 --layout=ws_2d/batch \
      --save=/tmp/palm_8b.executable
  python -m t5x_inference_ext.infer --checkpoint=DIR --prompts=FILE.jsonl --output=FILE.jsonl \
      --batch_size=32 --max_new_tokens=64 --executable=/tmp/palm_8b.executable

Slot refill (docs/decoding.md) runs a chunk of 256 prompt tokens on a cache of 2048 positions, and a
decode step of 64 slots:

  python -m t5x_inference_ext.precompile --model=palm_540b --slice=v4:4x4x4 --phase=extend \
      --batch=64 --prompt=256
  python -m t5x_inference_ext.precompile --model=palm_540b --slice=v4:4x4x4 --phase=slots --batch=64

gin has the same options, and takes models of other shapes:

  python -m t5x_inference_ext.precompile \
      --gin_file=t5x_inference_ext/configs/runs/precompile.gin \
      --gin_file=t5x_inference_ext/configs/models/palm_8b.gin \
      --gin.SLICE=\"v4:2x2x1\" --gin.BATCH=32

The exit code is 0 if the program fits, 1 if it does not (the report then says how much memory is
missing, and names the nearest layout, batch and slice that fit), 2 for an error. docs/precompile.md
explains every line of the report.
"""

import os
from typing import Any

from absl import flags as absl_flags

from t5x_inference_ext.commands import cli, option_flags
from t5x_inference_ext.config import PRESETS, preset

FITS, DOES_NOT_FIT = 0, 1
PRECOMPILE_TARGET = {
  'model': 'The model.',
  'slice': 'The slice: v4:4x4x4, v5p:2x2x4, v5e:4x8, v6e:2x2, ...',
  'mesh': 'XxYxZ over the whole slice. By default along its torus.',
  'layout': 'feedforward/attention[/collectives] of the phase, such as ws_2d/batch '
  '(docs/layouts.md). By default the best layout that suits the phase.',
  'other_layout': 'Layout of the other phase, which uses the same weights and cache. Default: '
  'ws_1d/batch if --layout is a ws_1d layout, else ws_2d/batch.',
}
PRECOMPILE_FILES = {
  'json': 'Write the report into this file, as JSON.',
  'hlo': 'Write the compiled program into this file, as text.',
  'save': 'Write the executable into this file.',
}
# Defaults of the command's options that have none in CompileCase.
_DEFAULTS = {'weights': 'int8', 'phase': 'decode', 'context': 2048}


def define_flags(flags: absl_flags.FlagValues) -> None:
  """Define the command's flags, in the order of --help."""
  # Set before jax is imported, so that the command does not occupy this machine's accelerators.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  from t5x_inference_ext.commands import sampling_flags
  from t5x_inference_ext.precompile.case import CompileCase

  for name, text in PRECOMPILE_TARGET.items():
    choices = sorted(PRESETS) if name == 'model' else ()
    group = 'Model and slice'
    option_flags.define_flag(flags, name, str, None, text, group=group, choices=choices)
  option_flags.define_options(flags, CompileCase)
  for name, default in _DEFAULTS.items():
    flags.set_default(name, default)
  sampling_flags.define_sampling(flags, 'For generate, slots and admit: ')
  for name, text in PRECOMPILE_FILES.items():
    option_flags.define_flag(flags, name, str, None, text, group='Files')


def _main(flags: absl_flags.FlagValues) -> bool:
  """Run the command; return whether the program fits."""
  from t5x_inference_ext.commands import sampling_flags
  from t5x_inference_ext.precompile import run as runner
  from t5x_inference_ext.precompile.case import CompileCase

  options = option_flags.option_names(CompileCase)
  if cli.uses_gin(flags):
    names = (*PRECOMPILE_TARGET, *options, *PRECOMPILE_FILES, *sampling_flags.NAMES)
    cli.check_unmixed(flags, names, 'BATCH=64', 'configs/runs/precompile.gin')
    cli.parse_gin(flags)
    return cli.configure(runner.precompile)()
  option_flags.check_given(flags, 'model', 'slice', 'batch')
  arguments: dict[str, Any] = {name: flags[name].value for name in options}
  return runner.precompile(
    preset(flags.model),
    flags.slice,
    mesh=flags.mesh,
    layout=flags.layout,
    other_layout=flags.other_layout,
    json_file=flags.json,
    hlo_file=flags.hlo,
    save_file=flags.save,
    sampling=sampling_flags.read_sampling(flags),
    **arguments,
  )


def run(argv: list[str] | None = None) -> int:
  """Run the command as a program; return the exit code."""
  with cli.Session(__doc__, define_flags, argv) as session:
    session.code = FITS if _main(session.parse()) else DOES_NOT_FIT
  return session.code
