"""Broken rows: other rows are as without them, bit for bit, and the broken rows say so."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.engine import programs
from t5x_inference_ext.model import chunks, long_scoring
from t5x_inference_ext.model.transformer import Model
from tests import memory, reference
from tests.model import layouts_test

BROKEN, ROWS, LENGTH = 50, 8, 6

log_probs = memory.quick_jit(Model.log_probs, static_argnames='self')
logits = memory.quick_jit(Model.logits, static_argnames='self')
score_chunks = memory.quick_jit(long_scoring.score_chunks, static_argnames=('model', 'size'))
in_chunks = memory.quick_jit(chunks.prefill_in_chunks, static_argnames=('model', 'size', 'chunk'))


@functools.cache
def tensors(model):
  """All finite. Only one token has feature 0, and the MLP makes infinities of it."""
  made = dict(reference.random_tensors(layouts_test.MODELS[model]))
  others = np.arange(len(made['embedding'])) != BROKEN
  made['embedding'][others, 0] = 0
  made['embedding'][BROKEN, 0] = 10
  made['linear'][:, 0] = 3e38
  for name in ('attention_output', 'mlp_output'):
    made[name][..., 0] = 0
  return made


def load(layout, model, cache=None):
  return memory.engine(
    layouts_test.MODELS[model],
    tensors(model),
    '2x2x2',
    stacked=model.endswith('serial'),
    prefill=layout,
    decode=layout,
    cache=cache,
  )


def prompts(broken):
  """Return prompts with the token that breaks in row 1 or not, in its middle; and row lengths."""
  ids = memory.tokens(layouts_test.MODELS[RMS[0]], ROWS, LENGTH)
  ids[ids == BROKEN] = 3
  if broken:
    ids[1, 2] = BROKEN
  lengths = np.asarray([6, 5, 3, 1, 2, 6, 4, 5], np.int32)
  return ids, lengths


# Those with an RMS norm: a layer norm would give every token feature 0.
RMS = [name for name, config in layouts_test.MODELS.items() if config.norm == 'rms']
CASES = [
  *((layout, RMS[i % len(RMS)], None) for i, layout in enumerate(layouts_test.LAYOUTS)),
  ('ws_2d/batch', 'multiquery-parallel', 'int8'),
  ('wg_xyz/batch', 'grouped-serial', 'int8'),
]


@pytest.mark.parametrize('layout, model, cache', CASES)
def test_other_rows_do_not_change(layout, model, cache):
  """In a prefill, in chunks, and in decode steps, also of a row that is put where one broke."""
  engine = load(layout, model, cache=cache)
  run = engine.model, engine.weights
  found = []
  for broken in (False, True):
    ids, lengths = prompts(broken)
    inputs = programs.put(engine.model, ids, lengths)
    one, kv = memory.prefill(*run, *inputs, size=LENGTH + 2)
    two, _ = in_chunks(*run, *inputs, size=LENGTH + 2, chunk=4)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(kv))
    steps = [one, two]
    for step in range(2):
      (token,) = programs.put(engine.model, ids[:, step])
      out, kv = memory.decode_step(*run, kv, token)
      steps.append(out)
    # Other rows begin where these were.
    fresh = jax.device_put(np.zeros(ROWS, np.int32), kv.lengths.sharding)
    (token,) = programs.put(engine.model, ids[:, 0])
    last, _ = memory.decode_step(*run, dataclasses.replace(kv, lengths=fresh), token)
    found.append((np.stack(steps), np.asarray(last)))
  (sound, fresh_sound), (broken, fresh_broken) = found
  assert np.isfinite(sound).all()
  others = np.arange(ROWS) != 1
  np.testing.assert_array_equal(broken[:, others], sound[:, others])
  np.testing.assert_array_equal(fresh_broken, fresh_sound)
  assert np.isnan(broken[:2, 1]).all()


@pytest.mark.parametrize('layout, model, cache', CASES[2::4])
def test_a_sequence_is_marked_from_its_broken_position_on(layout, model, cache):
  engine = load(layout, model, cache)
  run = engine.model, engine.weights
  found = []
  for broken in (False, True):
    ids, _ = prompts(broken)
    (inputs,) = programs.put(engine.model, ids[:2])
    found.append(np.asarray(logits(*run, inputs)))
    (targets,) = programs.put(engine.model, ids[:2] * 0 + 5)
    # Later chunks read finite values in the place of broken ones.
    for scores in (
      log_probs(*run, inputs, targets),
      score_chunks(*run, inputs, targets, LENGTH // 2, size=2),
    ):
      np.testing.assert_array_equal(np.isnan(scores), np.isnan(found[-1]).any(-1))
  sound, broken = found
  assert np.isfinite(sound).all() and np.isnan(broken[1, 2:]).all()
  np.testing.assert_array_equal(broken[0], sound[0])
  np.testing.assert_array_equal(broken[1, :2], sound[1, :2])


def test_a_decode_step_of_the_breaking_token_is_marked():
  engine = load('ws_2d/batch', 'multiquery-parallel')
  run = engine.model, engine.weights
  ids, lengths = prompts(False)
  _, kv = memory.prefill(*run, *programs.put(engine.model, ids, lengths), size=LENGTH + 2)
  token = np.where(np.arange(ROWS) == 1, BROKEN, 5).astype(np.int32)
  out, kv = memory.decode_step(*run, kv, *programs.put(engine.model, token))
  np.testing.assert_array_equal(np.isnan(out).all(-1), np.arange(ROWS) == 1)
  assert np.isfinite(np.delete(np.asarray(out), 1, axis=0)).all()
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(kv))
