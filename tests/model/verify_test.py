"""Several tokens of each row in one pass, beside as many decode steps, in every kind of layout."""

import dataclasses

import jax
import numpy as np
import pytest

from t5x_inference_ext.engine import programs
from t5x_inference_ext.model import chunks
from t5x_inference_ext.model.transformer import Model
from tests import memory
from tests.model import pages_test

TOKENS = 3
verify = memory.quick_jit(Model.verify, static_argnames='self')
empty_cache = memory.quick_jit(chunks.empty_cache, static_argnames=('model', 'rows', 'size'))
# Cases of pages_test: attention by rows and by heads, gathered weights, rules by position, int8.
CASES = [1, 2, 5, 7, 10, 13, 14]


def rolled_back(cache, lengths):
  """The cache with other lengths, which keep their sharding."""
  return dataclasses.replace(cache, lengths=jax.device_put(lengths, cache.lengths.sharding))


@pytest.mark.parametrize(
  'case', CASES, ids=lambda i: ':'.join(map(str, pages_test.CASES[i])).replace('/', '_')
)
def test_verify_equals_decode_steps(case):
  """Drafts of 0 to 2 tokens, some rejected; then decode steps over what was rejected."""
  model, layout, rows, mesh, stacked, holds = pages_test.CASES[case]
  engine = pages_test.load(model, layout, mesh, stacked, holds)
  pool = pages_test.Pool(engine, rows, seed=case, shared_pages=case % 3)
  run, everyone = (engine.model, engine.weights), np.arange(rows)
  tolerance = 2e-5 if holds is None else 2e-3
  tokens = memory.tokens(engine.model.config, rows, 2 * TOKENS)
  counts = (1 + everyone % TOKENS).astype(np.int32)
  counts[-1] = 0  # a free slot
  wanted, stepped = [], [pool.paged]
  for step in range(2 * TOKENS):
    logits, cache = memory.decode_step(*run, stepped[-1], *programs.put(run[0], tokens[:, step]))
    wanted.append(np.asarray(logits))
    stepped.append(cache)
  draft = np.where(np.arange(TOKENS)[None, :] < counts[:, None], tokens[:, :TOKENS], 77)
  draft = np.where(np.arange(TOKENS)[None, :] == 2, 50, draft).astype(np.int32)  # a wrong one
  found, cache = verify(*run, pool.paged, *programs.put(run[0], draft, counts))
  np.testing.assert_array_equal(cache.lengths, pool.lengths + counts)
  kept = np.minimum(counts, 2)
  for row in range(rows):
    for step in range(kept[row]):
      np.testing.assert_allclose(found[row, step], wanted[step][row], rtol=0, atol=tolerance)
  # What was rejected is written over, and read by nobody.
  cache = rolled_back(cache, (pool.lengths + kept).astype(np.int32))
  for step in range(2):
    (token,) = programs.put(run[0], tokens[everyone, kept + step])
    logits, cache = memory.decode_step(*run, cache, token)
    same = np.stack([wanted[kept[row] + step][row] for row in range(rows)])
    np.testing.assert_allclose(logits, same, rtol=0, atol=tolerance)


def test_logits_are_not_finite_from_the_first_broken_token_on():
  engine = pages_test.load(*pages_test.CASES[0][:2], '1x1x1', True, None)
  pool = pages_test.Pool(engine, 4, seed=0)
  embedding = engine.weights.embedding.at[50].set(np.inf)
  weights = dataclasses.replace(engine.weights, embedding=embedding)
  tokens = np.asarray([[3, 4, 5], [3, 50, 5], [50, 4, 5], [3, 4, 50]], np.int32)
  found, cache = verify(
    engine.model,
    weights,
    pool.paged,
    *programs.put(engine.model, tokens, np.asarray([3, 3, 3, 2], np.int32)),
  )
  broken = np.isnan(np.delete(found, 50, axis=-1)).all(axis=-1)
  first = np.asarray([3, 1, 0, 2])
  np.testing.assert_array_equal(broken, np.arange(3)[None, :] >= first[:, None])
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((cache.keys, cache.values)))


def test_a_dense_cache_takes_drafts_too():
  engine = pages_test.load('grouped-serial', 'ws_2d/batch', '1x1x1', True, None)
  run, tokens = (engine.model, engine.weights), memory.tokens(engine.model.config, 2, 3)
  cache = empty_cache(*run, 2, 8)
  counts = np.asarray([3, 1], np.int32)
  found, written = verify(*run, cache, *programs.put(run[0], tokens, counts))
  np.testing.assert_array_equal(written.lengths, counts)
  for step in range(3):
    logits, cache = memory.decode_step(*run, cache, *programs.put(run[0], tokens[:, step]))
    for row in range(2):
      if step < counts[row]:
        np.testing.assert_allclose(found[row, step], logits[row], rtol=0, atol=2e-5)
