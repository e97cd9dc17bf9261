"""Seconds of compiling every program of an engine for a TPU slice. No TPU.

    python -m benchmarks.ready_compile --model=palm_540b --slice=v4:4x4x4
    python -m benchmarks.ready_compile --unrolled --only insert decode_steps

The programs are those of Engine.warm_up with a prefix cache and grammars, and those that make the
engine's empty state. By default the layers are a loop, which compiles in seconds; an engine on a
TPU unrolls them (--unrolled), which takes a minute or more for each program of 118 layers. --only
compiles some functions of engine/programs.py and not the others, --most=1 one program of each.
Needs libtpu.
"""

from collections.abc import Callable, Sequence
import time
from typing import Any
from unittest import mock

# few_layers comes first: it keeps jax, which reads its settings when it is imported, on the CPU.
from benchmarks.few_layers import case_parser  # isort: split

import jax
import jax.numpy as jnp

from t5x_inference_ext.config import preset
from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.decoder import Decoder
from t5x_inference_ext.engine.executor import DeviceExecutor
from t5x_inference_ext.engine.prefilling import Prefiller
from t5x_inference_ext.engine.prefix_cache import PrefixCache
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig, config_for
from t5x_inference_ext.engine.slot_table import SlotTable
from t5x_inference_ext.engine.warm_up import CompiledProgram
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.precompile.program import abstract_weights
from t5x_inference_ext.precompile.slices import slice_mesh
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.torus import parse_slice

NAMES = {
  program: name for name, program in vars(programs).items() if isinstance(program, programs.Program)
}
WARM_UP = (
  'prefill_chunk',
  'start_with_blocks',
  'save_reply',
  'insert',
  'decode_steps',
  'decode_logits',
  'choose_masked',
)


def compiling(only: Sequence[str], most: int | None, compiled: list[str]) -> Callable[..., Any]:
  """Return a replacement of Program.__call__ that compiles a program in place of running it.

  Arguments may be shapes with shardings, and the results are.

  Args:
    only, most: See compiled_programs.
    compiled: List to which a name is added for each call: that of a program of WARM_UP if it was
      compiled, else ''.
  """

  def call(program: programs.Program, model: Model, *arguments: Any, **options: Any) -> Any:
    name = NAMES[program]
    if name in WARM_UP:
      skipped = (only and name not in only) or compiled.count(name) == most
      compiled.append('' if skipped else name)
      if skipped:
        return _unchanged(name, model, arguments)
    lowered = program.lower(model, *arguments, **options)
    return jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      lowered.out_info,
      lowered.compile().output_shardings,
    )

  return call


def _unchanged(name: str, model: Model, arguments: Sequence[Any]) -> Any:
  """Return a program's results without compiling it: its state has the shapes of its argument."""
  state, *rest = arguments
  if name in ('prefill_chunk', 'save_reply'):
    return state
  if name == 'start_with_blocks':
    return state, rest[0]
  if name != 'decode_logits':  # nobody reads the outputs
    return state, None
  slots = state.cache.lengths.shape[0]
  return state, jax.ShapeDtypeStruct((slots, model.config.vocab_size), jnp.float32)


def compiled_programs(
  model: Model,
  weights: Weights,
  config: SchedulerConfig,
  only: Sequence[str] = (),
  most: int | None = None,
) -> tuple[float, list[CompiledProgram]]:
  """Compile an engine's programs for a mesh whose devices need not exist.

  Args:
    model: The model, on that mesh.
    weights: Shapes with shardings.
    config: Sizes of the programs.
    only: Functions whose programs to compile; empty: all.
    most: Maximum number of programs of each function; None: all.

  Returns:
    Seconds until the programs of the empty state are compiled, and the other programs.
  """
  done: list[CompiledProgram] = []
  compiled: list[str] = []
  with mock.patch.object(programs.Program, '__call__', compiling(only, most, compiled)):
    start = time.perf_counter()
    executor = DeviceExecutor(model, weights, config)
    begun = time.perf_counter() - start
    Prefiller(executor, config, PrefixCache(executor, config)).warm_up(done)
    decoder = Decoder(executor, config, model.config.vocab_size, grammars=True)
    decoder.warm_up(SlotTable(config, executor.shards), done)
  return begun, [program for program, name in zip(done, compiled, strict=True) if name]


def main() -> None:
  parser = case_parser(__doc__, 'palm_540b', 'v4:4x4x4')
  parser.add_argument('--slots', type=int, default=64)
  parser.add_argument('--max_length', type=int, default=2048)
  parser.add_argument(
    '--unrolled', action='store_true', help='layers as an engine on a TPU has them'
  )
  parser.add_argument('--only', nargs='+', default=(), choices=WARM_UP)
  parser.add_argument('--most', type=int, help='programs of each function')
  args = parser.parse_args()
  config, layout = preset(args.model), Layout.parse(args.layout)
  try:
    mesh = slice_mesh(parse_slice(args.slice), config)
    model = Model(config, mesh, layout, layout, 'bfloat16')
    sizes = config_for(model, [], slots=args.slots, max_length=args.max_length)
    weights = abstract_weights(model, args.weights, stacked=not args.unrolled)
    begun, found = compiled_programs(model, weights, sizes, args.only, args.most)
  except UserError as error:
    raise SystemExit(f'error: {error}') from error
  form = 'unrolled' if args.unrolled else 'as a loop'
  print(
    f'{args.model} {args.weights} {args.slice} {args.layout}, {config.num_layers} layers {form}, '
    f'{sizes.slots} slots of {sizes.max_length} positions'
  )
  print(f'empty state: {begun:.2f} s', *found, sep='\n')
  total = begun + sum(program.seconds for program in found)
  print(
    f'{len(found)} programs and the empty state: {total:.1f} s, '
    f'{time.process_time():.1f} s of processor time'
  )


if __name__ == '__main__':
  main()
