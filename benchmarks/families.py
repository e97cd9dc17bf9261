"""The public families of tests/testdata/families beside transformers' logits and greedy tokens.

    python -m benchmarks.families --names=gemma,falcon_7b

Run from the root of a checkout. Prints a row for each family: its features; the largest difference
of a logit from transformers' golden one, in float32, as a share of the largest golden logit, on
1x1x1 and on 2x2x2 simulated devices under three pairs of layouts; whether all greedy tokens are
equal; and, also as a share, the largest difference of the int8 model's logits from those of the
float32 model with equal (dequantized) weights.
"""

import argparse
import dataclasses
import os
import pathlib
import tempfile

os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')

import jax
import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import convert, open_checkpoint
from t5x_inference_ext.checkpoints.tensor import InMemory
from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.model.transformer import Model

PAIRS = (
  ('1x1x1', 'ws_2d/batch', 'ws_2d/batch'),
  ('2x2x2', 'wg_xyz/batch', 'ws_2d/batch'),
  ('2x2x2', 'ws_2d/heads', 'ws_2d/heads'),
  ('2x2x2', 'ws_1d/batch', 'ws_1d/heads'),
)
ROWS, STEPS = 8, 24
FAMILIES = pathlib.Path(__file__).resolve().parent.parent / 'tests' / 'testdata' / 'families'
prefill = jax.jit(Model.prefill, static_argnames=('self', 'size'))
decode_step = jax.jit(Model.decode_step, static_argnames='self')


def load(checkpoint, pair):
  mesh, prefill_layout, decode_layout = pair
  layouts = {'prefill_layout': prefill_layout, 'decode_layout': decode_layout}
  return Engine.load(checkpoint, mesh=mesh, dtype='float32', scan_layers=True, **layouts)


def logits(engine, ids):
  tokens = np.tile(ids.astype(np.int32), (ROWS // len(ids), 1))
  return np.asarray(
    programs.logits(engine.model, engine.weights, *programs.put(engine.model, tokens))
  )


def greedy(engine, prompt):
  """Return the greedy tokens of a prompt, in each of ROWS rows."""
  tokens = np.tile(prompt.astype(np.int32), (ROWS, 1))
  lengths = np.full(ROWS, len(prompt), np.int32)
  size = len(prompt) + STEPS
  found, cache = prefill(
    engine.model, engine.weights, *programs.put(engine.model, tokens, lengths), size=size
  )
  chosen = []
  for _ in range(STEPS):
    chosen.append(np.argmax(np.asarray(found), -1).astype(np.int32))
    found, cache = decode_step(
      engine.model, engine.weights, cache, *programs.put(engine.model, chosen[-1])
    )
  return np.stack(chosen, 1)


def dequantized(checkpoint):
  """Return the float32 model with the dequantized weights of an int8 checkpoint."""
  tensors = {}
  for name, p in params.parameters(checkpoint.config).items():
    values = checkpoint.tensors[name].read().astype(np.float32)
    if p.scale:
      values *= checkpoint.tensors[p.scale].read()[:, None]
    tensors[name] = InMemory(values, checkpoint.path)
  return dataclasses.replace(checkpoint, weights='float32', tensors=tensors)


def share(found, wanted):
  return (
    np.abs(found - np.tile(wanted, (len(found) // len(wanted), 1, 1))).max() / np.abs(wanted).max()
  )


def row(directory):
  golden = np.load(directory / 'golden.npz')
  errors, equal = [], True
  for pair in PAIRS:
    engine = load(directory, pair)
    errors.append(share(logits(engine, golden['input_ids']), golden['logits']))
    equal &= bool((greedy(engine, golden['prompt']) == golden['greedy']).all())
  with tempfile.TemporaryDirectory() as scratch:
    out = os.path.join(scratch, 'int8')
    convert.convert(str(directory), out, weights='int8')
    rounded = open_checkpoint(out)
    whole = logits(load(dequantized(rounded), PAIRS[0]), golden['input_ids'])
    int8 = max(share(logits(load(rounded, p), golden['input_ids']), whole) for p in PAIRS[:2])
  config = rounded.config
  features = {'block': config.block, 'mlp': config.mlp, 'norm': config.norm, **config.features}
  text = ', '.join(f'{n} {v}' for n, v in features.items())
  cells = [
    directory.name,
    *(f'{e:.1e}' for e in errors),
    'all' if equal else 'NO',
    f'{int8:.1e}',
    text,
  ]
  return '| ' + ' | '.join(cells) + ' |'


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--names', default='', help='Families, with commas between; default all.')
  arguments = parser.parse_args()
  jax.config.update('jax_default_matmul_precision', 'highest')
  names = [n for n in arguments.names.split(',') if n] or sorted(os.listdir(FAMILIES))
  print('| family |', ' | '.join('-'.join(p) for p in PAIRS), '| tokens | int8 | features |')
  print('|' + '---|' * (len(PAIRS) + 4))
  for name in names:
    print(row(FAMILIES / name), flush=True)


if __name__ == '__main__':
  main()
