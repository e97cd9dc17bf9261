"""Tokens per second of generation, beside stock T5X where it can be imported, in one run.

    python -m benchmarks.generate
    python -m benchmarks.generate --batch=1,8,32 --prompt=128 --generate=64 --repeats=7

Run from the root of a checkout, on one device. Both sides serve the same T5X checkpoint, prompts
and lengths, greedy, never stopping early; each figure is the median of the repeats, which alternate
between the two sides. The share of the machine's matmul rate counts 2 FLOPs a parameter and token,
prompt included, against a large product measured here, in the same dtype. Stock T5X is T5X's
DecoderOnlyModel with temperature_sample over flaxformer's layers, jitted whole.

Where jax has an accelerator, a PaLM 8B and a Falcon-7B of random weights follow: python -m
benchmarks.accelerator.
"""

import argparse
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import accelerator
from benchmarks.machine import matmul_rate, seconds
from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.model.shardings import COMPUTE_DTYPES


def own_run(engine: Engine, prompts: np.ndarray, new_tokens: int):
  """Return a function that generates for prompts [B, T]: numpy tokens [B, new_tokens]."""
  rows = prompts.tolist()
  return lambda: np.asarray(
    [c.tokens for c in engine.generate(rows, max_new_tokens=new_tokens, eos_id=-1)], np.int32
  )


def stock_run(checkpoint: str, config, prompts: np.ndarray, new_tokens: int):
  """Return such a function of stock T5X; raise ImportError if T5X or flaxformer is absent."""
  from t5x import decoding

  from tests.t5x_adapter import palm_flaxformer

  decode_fn = functools.partial(decoding.temperature_sample, temperature=0.0)
  model = palm_flaxformer.stock_model(config, decode_fn=decode_fn)
  params = stock_params(checkpoint)
  rows, length = prompts.shape
  inputs = np.zeros((rows, length + new_tokens), np.int32)
  inputs[:, 1 : length + 1] = prompts
  causal = np.zeros_like(inputs)
  causal[:, : length + 1] = 1
  batch = {
    'decoder_input_tokens': jnp.asarray(inputs),
    'decoder_causal_attention': jnp.asarray(causal),
  }
  # eos_id -1: no row ends early, as on the other side.
  step = jax.jit(
    lambda params, batch: model.predict_batch_with_aux(
      params, batch, decoder_params={'eos_id': -1, 'decode_rng': jax.random.PRNGKey(0)}
    )[0]
  )
  return lambda: np.asarray(step(params, batch))[:, :new_tokens]


def stock_params(checkpoint: str):
  """Return the parameters of a legacy checkpoint, as T5X reads them."""
  from t5x import checkpoints

  return jax.tree.map(jnp.asarray, checkpoints.load_t5x_checkpoint(checkpoint)['target'])


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--checkpoint', default='examples/palm_tiny/checkpoint_1000', help='a legacy T5X checkpoint'
  )
  parser.add_argument('--batch', default='1,8,32', help='batch sizes, comma separated')
  parser.add_argument('--prompt', type=int, default=128, help='tokens of each prompt')
  parser.add_argument('--generate', type=int, default=64, help='new tokens of each row')
  parser.add_argument(
    '--dtype', default='float32', choices=COMPUTE_DTYPES, help='of this package; stock: float32'
  )
  parser.add_argument('--repeats', type=int, default=5)
  args = parser.parse_args()

  config = open_checkpoint(args.checkpoint).config
  engine = Engine.load(args.checkpoint, mesh='1x1x1', dtype=args.dtype)
  rate = matmul_rate(args.dtype)
  print(
    f'{config}\n{jax.devices()[0].device_kind}, {args.dtype}: matmul rate {rate / 1e9:.0f} '
    'GFLOP/s; '
    f'prompt {args.prompt}, generate {args.generate}, median of {args.repeats}'
  )
  print('batch | this package: tokens/s | share of matmul rate | stock T5X: tokens/s | ratio')
  for rows in map(int, args.batch.split(',')):
    prompts = np.random.default_rng(0).integers(3, 259, (rows, args.prompt)).astype(np.int32)
    sides = {'own': own_run(engine, prompts, args.generate)}
    try:
      sides['stock'] = stock_run(args.checkpoint, config, prompts, args.generate)
    except ImportError as e:
      missing = f'not importable ({e.name or e})'
    tokens = {name: run() for name, run in sides.items()}  # the first run compiles
    times = {name: [] for name in sides}
    for _ in range(args.repeats):
      for name, run in sides.items():
        times[name].append(seconds(run))
    speed = {name: rows * args.generate / statistics.median(t) for name, t in times.items()}
    flops = 2 * config.num_params * (args.prompt + args.generate) / args.generate * speed['own']
    line = f'{rows:5} | {speed["own"]:22.0f} | {flops / rate:20.1%} | '
    if 'stock' not in sides:
      print(line + missing)
      continue
    same = (tokens['own'] == tokens['stock']).all(axis=1).sum()
    print(
      line
      + f'{speed["stock"]:19.0f} | {speed["own"] / speed["stock"]:.2f}x  ({same} of {rows} rows '
      'equal)'
    )
  if jax.devices()[0].platform != 'cpu':
    del engine, sides
    accelerator.report(accelerator.LARGE, repeats=args.repeats)


if __name__ == '__main__':
  main()
