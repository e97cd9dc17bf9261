"""Public families, read and run: logits and greedy tokens of transformers, on the stored values.

Each family runs under one pair of layouts. The pairs have every layout in both phases, and meshes
of one, four and eight devices.
"""

import itertools

import numpy as np
import pytest

from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.model.transformer import Model
from tests import memory
from tests.checkpoints.public_formats_test import FAMILIES, families

__all__ = ['families']
# (mesh, prefill, decode)
PAIRS = (
  ('1x1x1', 'ws_2d/batch', 'ws_2d/batch'),
  ('2x2x2', 'wg_xyz/batch', 'ws_2d/batch'),
  ('2x2x2', 'ws_2d/heads', 'ws_2d/heads'),
  ('1x2x2', 'ws_1d/heads', 'ws_1d/batch'),
  ('2x2x2', 'wg_x/batch', 'wg_xy/heads'),
  ('2x2x1', 'wg_xy/heads', 'wg_x/batch'),
  ('2x1x2', 'ws_2d/batch', 'wg_xyz/batch'),
  ('2x2x2', 'wg_xy/batch', 'wg_xy/batch'),
  ('8x1x1', 'ws_1d/batch', 'ws_1d/heads'),
  ('1x2x4', 'wg_x/heads', 'wg_x/heads'),
)
CASES = list(zip(FAMILIES, itertools.cycle(PAIRS)))
# Rows that every layout can split.
ROWS = 8
logits_of = memory.quick_jit(Model.logits, static_argnames='self')


def load(directory, pair) -> Engine:
  """Load a model in float32, with one array for all layers: its programs compile quickly."""
  mesh, prefill, decode = pair
  return Engine.load(
    directory,
    mesh=mesh,
    dtype='float32',
    prefill_layout=prefill,
    decode_layout=decode,
    scan_layers=True,
  )


def greedy(engine: Engine, prompt: np.ndarray, steps: int) -> np.ndarray:
  """Return the greedy tokens [steps] behind a prompt; all rows are the same."""
  tokens = np.repeat(prompt[None].astype(np.int32), ROWS, 0)
  lengths = np.full(ROWS, len(prompt), np.int32)
  logits, cache = memory.prefill(
    engine.model,
    engine.weights,
    *programs.put(engine.model, tokens, lengths),
    size=len(prompt) + steps,
  )
  found = []
  for step in range(steps):
    found.append(np.argmax(np.asarray(logits), -1).astype(np.int32))
    if step < steps - 1:
      logits, cache = memory.decode_step(
        engine.model, engine.weights, cache, *programs.put(engine.model, found[-1])
      )
  found = np.stack(found)
  assert (found == found[:, :1]).all()
  return found[:, 0]


@pytest.mark.parametrize('family, pair', CASES, ids=lambda x: x if isinstance(x, str) else x[0])
def test_logits_and_greedy_tokens(families, family, pair):
  """The largest error measured is 7e-6 of the largest logit."""
  golden = np.load(families / family / 'golden.npz')
  engine = load(families / family, pair)
  tokens = np.tile(golden['input_ids'].astype(np.int32), (ROWS // 2, 1))
  found = np.asarray(logits_of(engine.model, engine.weights, *programs.put(engine.model, tokens)))
  wanted = np.tile(golden['logits'], (ROWS // 2, 1, 1))
  error = np.abs(found - wanted).max() / np.abs(wanted).max()
  print(f'{family:20} {"-".join(pair):40} {error:.1e}')
  assert error < 1e-4
  np.testing.assert_array_equal(greedy(engine, golden['prompt'], 24), golden['greedy'])


def test_the_pairs_have_every_layout_in_both_phases():
  layouts = {'ws_1d/heads', 'ws_1d/batch', 'ws_2d/heads', 'ws_2d/batch', 'wg_x/heads', 'wg_x/batch'}
  layouts |= {'wg_xy/heads', 'wg_xy/batch', 'wg_xyz/batch'}
  assert {pair[1] for pair in PAIRS} == {pair[2] for pair in PAIRS} == layouts
