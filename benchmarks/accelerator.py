"""Decode and prefill on this machine's accelerator, beside its measured rates and transformers.

    python -m benchmarks.accelerator
    python -m benchmarks.accelerator --shape=palm_8b,falcon_7b --weights=bfloat16,int8 --batch=1,8
    python -m benchmarks.accelerator --shape=tiny  # on a CPU, in seconds: figures of no interest

Run from the root of a checkout, on one device, with random weights; nothing but jax is needed.
Activations are bfloat16.

- decode: a loop of steps on the device, each with embedding, logits and greedy choice. The bound is
  the time to read all weights once at the memory bandwidth, measured in this run by a large copy
  (bytes read plus bytes written).
- prefill: whole prompts. FLOPs are those of the layers' matrices, of the visible half of attention,
  and of the last token's logits. The matrix rate is measured in this run by a large bfloat16
  product of random numbers.
- generate: prompts and new tokens in one program, as the infer command runs them.
- transformers: `generate` with torch.compile and a static cache, in bfloat16, with the same batch
  and lengths, for a Falcon shape (Falcon-7B's multiquery attention and parallel block), if torch
  and transformers can be imported. Repeats alternate between both sides. The ratio is of tokens/s.
"""

import argparse
from collections.abc import Iterator, Sequence
import dataclasses
import statistics

import jax
import numpy as np

from benchmarks.machine import copy_bandwidth, matmul_rate, median_seconds, seconds
from benchmarks.random_model import RandomModel
from t5x_inference_ext.config import ModelConfig, preset

DECODE_TARGET, PREFILL_TARGET = 0.80, 0.65
WEIGHTS = ('bfloat16', 'int8')
_FALCON = dict(
  num_kv_heads=1, block='parallel', mlp='gelu', norm='layer', norm_scale='one', norm_epsilon=1e-5
)
# Name -> the model, the tokens of a prompt, and the number of new tokens.
SHAPES = {
  'palm_8b': (preset('palm_8b'), 1024, 64),
  'falcon_7b': (
    ModelConfig(
      num_layers=32, d_model=4544, d_ff=18176, num_heads=71, d_head=64, vocab_size=65024, **_FALCON
    ),
    1024,
    64,
  ),
  'tiny': (
    ModelConfig(
      num_layers=2, d_model=128, d_ff=512, num_heads=4, d_head=32, vocab_size=512, **_FALCON
    ),
    32,
    8,
  ),
}
LARGE, SMALL = ('palm_8b', 'falcon_7b'), ('tiny',)
BATCHES = (1, 8, 64)


@dataclasses.dataclass(frozen=True)
class Machine:
  """Measured rates of this run: bytes/s of a copy, and bfloat16 FLOP/s of a product."""

  bandwidth: float
  flops: float

  @classmethod
  def measure(cls) -> 'Machine':
    if jax.devices()[0].platform == 'cpu':
      return cls(copy_bandwidth(2**28), matmul_rate('bfloat16', 1024))
    return cls(copy_bandwidth(2**31), matmul_rate('bfloat16', 8192))

  def __str__(self) -> str:
    return (
      f'{jax.devices()[0].device_kind}, jax {jax.__version__}: copies at '
      f'{self.bandwidth / 1e9:.0f} GB/s, bfloat16 products at {self.flops / 1e12:.2f} TFLOP/s'
    )


@dataclasses.dataclass(frozen=True)
class Cell:
  """Seconds for one batch size: a decode step, a prefill, a generation, transformers' one."""

  batch: int
  decode: float
  prefill: float
  generate: float
  transformers: float | None = None


def prefill_flops(config: ModelConfig, batch: int, prompt: int) -> float:
  """Return the FLOPs that a prefill of [batch, prompt] tokens needs."""
  c = config
  matrices = c.num_layers * (
    2 * c.d_model * c.d_head * (c.num_heads + c.num_kv_heads)
    + (len(c.mlp_inputs) + 1) * c.d_model * c.d_ff
  )
  # A token sees (prompt + 1) / 2 on average: a product with keys, and one with values.
  attention = 2 * c.num_layers * c.num_heads * c.d_head * (prompt + 1) / 2
  return 2 * batch * (prompt * (matrices + attention) + c.vocab_size * c.d_model)


def row(
  cell: Cell,
  kind: str,
  config: ModelConfig,
  weight_bytes: int,
  machine: Machine,
  prompt: int,
  new: int,
) -> str:
  """Return a line of the table; without the columns of OTHER_TITLES if transformers did not run."""
  bound = weight_bytes / machine.bandwidth
  flops = prefill_flops(config, cell.batch, prompt) / cell.prefill
  speed = cell.batch * new / cell.generate
  cells = [
    kind,
    cell.batch,
    f'{cell.decode * 1e3:.3f}',
    f'{bound * 1e3:.3f}',
    f'{bound / cell.decode:.1%}',
    f'{cell.prefill * 1e3:.2f}',
    f'{flops / 1e12:.2f}',
    f'{flops / machine.flops:.1%}',
    f'{speed:.0f}',
  ]
  if cell.transformers:
    cells += [
      f'{cell.batch * new / cell.transformers:.0f}',
      f'{cell.transformers / cell.generate:.2f}x',
    ]
  return f'| {" | ".join(map(str, cells))} |'


TITLES = (
  'weights',
  'batch',
  'decode, ms',
  'bound, ms',
  f'of the bound (batch 1: {DECODE_TARGET:.0%})',
  'prefill, ms',
  'TFLOP/s',
  f'of the matrix rate ({PREFILL_TARGET:.0%})',
  'generate, tokens/s',
)
OTHER_TITLES = ('transformers, tokens/s', 'ratio (above 1)')


def measure(own: RandomModel, batch: int, prompt: int, new: int, repeats: int, other=None) -> Cell:
  """Time one batch size.

  Args:
    own: RandomModel. This package's side.
    batch: int. Rows.
    prompt: int. Tokens of each prompt.
    new: int. Tokens to generate.
    repeats: int. Number of measurements; their median is taken.
    other: falcon.Falcon or None. The model in transformers.
  """
  programs = own.programs(batch, prompt, new)
  decode = median_seconds(programs.decode, repeats) / programs.steps
  prefill = median_seconds(programs.prefill, repeats)
  sides = [programs.generate]
  if other:
    tokens = np.random.default_rng(0).integers(2, own.model.config.vocab_size, (batch, prompt))
    sides.append(other.generate(tokens, new))
  for side in sides:  # first runs compile; transformers' second call still records CUDA graphs
    seconds(side)
    seconds(side)
  times = [[seconds(side) for side in sides] for _ in range(repeats)]
  return Cell(batch, decode, prefill, *map(statistics.median, zip(*times)))


def is_falcon(config: ModelConfig) -> bool:
  """Return whether transformers' Falcon can have this shape, with the features of Falcon-7B.

  These are the parallel block, multiquery attention, GELU and layer norm.
  """
  return (config.block, config.mlp, config.norm, config.num_kv_heads) == (
    'parallel',
    'gelu',
    'layer',
    1,
  ) and (config.num_heads * config.d_head == config.d_model)


def other_side(config: ModelConfig, context: int):
  """Return (a falcon.Falcon, a remark on it), or (None, the reason why there is none)."""
  if not is_falcon(config):
    return None, 'transformers has no model of this shape (it has that of --shape=falcon_7b)'
  try:
    from benchmarks import falcon
  except ImportError as e:
    return (
      None,
      f'transformers is left out: {e.name or e} is not importable (pip install torch transformers)',
    )
  made = falcon.Falcon(config, context)
  if made.num_params != config.num_params:
    raise AssertionError(
      f'{made.num_params:,} parameters in transformers, {config.num_params:,} here'
    )
  return made, f'beside {made}, bfloat16'


def table(
  shape: str,
  machine: Machine,
  weights: Sequence[str] = WEIGHTS,
  batches: Sequence[int] = BATCHES,
  repeats: int = 5,
  scan_layers: bool = False,
  prompt: int | None = None,
  new: int | None = None,
) -> Iterator[str]:
  """Yield a shape's table, line by line as it is measured.

  Args:
    shape: str. A name in SHAPES.
    machine: Machine. Measured rates.
    weights: sequence of str, of WEIGHTS.
    batches: sequence of int. Rows.
    repeats: int. Measurements of each figure.
    scan_layers: bool. Whether to loop over all layers; otherwise they are unrolled. In a loop, XLA
      on a GPU copies each layer's weights first, which takes twice as long as using them.
    prompt: int or None. Tokens of each prompt, by default the shape's.
    new: int or None. Tokens to generate, by default the shape's.
  """
  config, default_prompt, default_new = SHAPES[shape]
  prompt, new = prompt or default_prompt, new or default_new
  other, remark = other_side(config, prompt + new)
  yield f'\n{shape}: {config}'
  yield (
    f'prompt {prompt}, generate {new}, {"a loop over" if scan_layers else "unrolled"} layers, '
    f'median of {repeats}; {remark}\n'
  )
  titles = TITLES + (OTHER_TITLES if other else ())
  yield f'| {" | ".join(titles)} |\n|{"---|" * len(titles)}'
  for kind in weights:
    own = RandomModel.make(config, kind, scan_layers)
    for batch in batches:
      try:
        cell = measure(own, batch, prompt, new, repeats, other)
      except jax.errors.JaxRuntimeError as e:
        if 'RESOURCE_EXHAUSTED' not in str(e):
          raise
        yield f'| {kind} | {batch} | out of memory |'
        continue
      yield row(cell, kind, config, own.weight_bytes, machine, prompt, new)
    del own  # before the next model is made


def report(shapes: Sequence[str], **options) -> None:
  """Measure the machine, and print the tables of some shapes; options: see table."""
  machine = Machine.measure()
  print(machine)
  for shape in shapes:
    for line in table(shape, machine, **options):
      print(line, flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--shape',
    help=f'of {", ".join(SHAPES)}, comma separated; by default palm_8b,falcon_7b on an '
    'accelerator and tiny on a CPU',
  )
  parser.add_argument('--weights', default=','.join(WEIGHTS), help='comma separated')
  parser.add_argument(
    '--batch', default=','.join(map(str, BATCHES)), help='batch sizes, comma separated'
  )
  parser.add_argument('--prompt', type=int, help="tokens of each prompt; by default the shape's")
  parser.add_argument(
    '--generate', type=int, help="new tokens of each row, at least 2; by default the shape's"
  )
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument(
    '--scan_layers',
    action=argparse.BooleanOptionalAction,
    default=False,
    help='one loop over all layers, quicker to compile, slower to run on a GPU',
  )
  args = parser.parse_args()
  default = SMALL if jax.devices()[0].platform == 'cpu' else LARGE
  shapes = args.shape.split(',') if args.shape else default
  weights = args.weights.split(',')
  for name, given, known in (('shape', shapes, SHAPES), ('weights', weights, WEIGHTS)):
    if unknown := set(given) - set(known):
      parser.error(
        f'--{name}={",".join(sorted(unknown))} is not known: there are {", ".join(known)}'
      )
  if args.generate is not None and args.generate < 2:
    parser.error(
      f"--generate={args.generate} has to be at least 2: the first new token is the prefill's"
    )
  batches = args.batch.split(',')
  if not all(b.isdecimal() and int(b) for b in batches):
    parser.error(f'--batch={args.batch} has to be whole numbers above 0, comma separated')
  report(
    shapes,
    weights=weights,
    batches=list(map(int, batches)),
    repeats=args.repeats,
    scan_layers=args.scan_layers,
    prompt=args.prompt,
    new=args.generate,
  )


if __name__ == '__main__':
  main()
