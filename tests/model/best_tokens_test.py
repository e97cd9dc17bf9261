"""The most likely tokens found on shards of the vocabulary are those of whole rows of logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.advance import advance, advance_greedily
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.sampling_arrays import end_id_array, stack_params
from t5x_inference_ext.engine.state import RowParams, initial_state
from t5x_inference_ext.model.best_tokens import best_tokens
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.sharding.mesh import make_mesh
from tests import memory
from tests.model import layouts_test
from tests.model.layouts_test import Case

greedy_step = memory.quick_jit(Model.decode_greedily, static_argnames='self')


def found_on(mesh, logits, vocabulary, rows):
  return jax.jit(
    jax.shard_map(
      lambda x: best_tokens(x, vocabulary, rows),
      mesh=make_mesh(mesh),
      in_specs=P(rows, vocabulary),
      out_specs=P(),
      check_vma=False,
    )
  )(logits)


@pytest.mark.parametrize(
  'mesh, vocabulary, rows',
  [((2, 2, 2), ('z', 'y'), ('x',)), ((1, 4, 2), ('x', 'z', 'y'), ()), ((1, 1, 1), ('z', 'y'), ())],
)
def test_ties_padding_and_rows_that_are_not_finite(mesh, vocabulary, rows):
  logits = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
  logits[:, 50:] = -np.inf  # padding, on two of eight shards alone
  logits[0, [13, 17, 40]] = 9  # ties within a shard and between shards
  logits[1] = np.where(np.arange(64) < 50, -2.5, -np.inf)
  logits[2, 30] = np.nan
  logits[3] = -np.inf
  logits[4, 49] = np.inf
  found = found_on(mesh, logits, vocabulary, rows)
  finite = [0, 1, 5, 6, 7]
  np.testing.assert_array_equal(
    found.ids[jnp.asarray([*finite, 4])], np.argmax(logits, 1)[[*finite, 4]]
  )
  np.testing.assert_array_equal(found.logits[jnp.asarray(finite)], logits.max(1)[finite])
  wanted = jax.nn.logsumexp(logits, axis=1)[jnp.asarray(finite)]
  np.testing.assert_allclose(found.normalizers[jnp.asarray(finite)], wanted, rtol=1e-6)
  assert found.ids[2] == 0
  assert not np.isfinite(found.normalizers[jnp.asarray([2, 3, 4])]).any()


@pytest.mark.parametrize(
  'case, change',
  [
    (Case('multiquery-parallel', 'ws_2d/batch', 'ws_2d/batch', 8, stacked=False), {}),
    (Case('multihead-serial', 'ws_1d/heads', 'ws_1d/batch', 3), {'logit_soft_cap': 2.0}),
  ],
  ids=str,
)
def test_a_greedy_step_takes_the_largest_logit_of_a_step(case, change):
  engine = layouts_test.load(case)
  model = dataclasses.replace(
    engine.model, config=dataclasses.replace(engine.model.config, **change)
  )
  tokens = memory.tokens(model.config, case.rows, 5)
  lengths = np.full(case.rows, 5, np.int32)
  placed = programs.put(model, tokens, lengths)
  _, cache = memory.prefill(model, engine.weights, *placed, size=8)
  last = programs.put(model, tokens[:, 2])
  logits, after = memory.decode_step(model, engine.weights, cache, *last)
  best, greedy_after = greedy_step(model, engine.weights, cache, *last)
  np.testing.assert_array_equal(best.ids, np.argmax(logits, axis=-1))
  np.testing.assert_allclose(best.logits, np.max(logits, axis=-1), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(best.normalizers, jax.nn.logsumexp(logits, axis=-1), rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, after, greedy_after)


def test_greedy_rows_advance_as_by_their_logits():
  model, count = Model(memory.ODD, make_mesh((1, 1, 1))), 4
  arrays = stack_params([SamplingParams(stop=((5, 7),))] * count, 101)
  rows = RowParams(
    arrays,
    np.arange(count, dtype=np.uint32),
    np.full(count, 3, np.int32),
    end_id_array(9, count),
    np.zeros(count, np.int32),
  )
  inputs = memory.tokens(memory.ODD, count, 2)
  state = initial_state(rows, jnp.asarray(inputs), jnp.full(count, 2), 101)
  greedy, by_logits, by_best = (
    state,
    memory.quick_jit(advance, static_argnums=4),
    memory.quick_jit(advance_greedily, static_argnums=3),
  )
  for wanted in ([5, 9, 1, 3], [7, 1, 2, 4], [1, 1, 2, 5]):
    logits = 3 * jax.nn.one_hot(jnp.asarray(wanted), 101)
    logits = logits.at[3, 0].set(jnp.nan if wanted[3] == 4 else 0)
    best = found_on((1, 1, 1), logits, ('z', 'y'), ())
    state, chosen = by_logits(rows, state, logits, jnp.full(count, 3), model)
    greedy, greedily = by_best(rows, greedy, best, model)
    jax.tree.map(np.testing.assert_array_equal, (state, chosen.tokens), (greedy, greedily.tokens))
    np.testing.assert_allclose(chosen.log_probs, greedily.log_probs, atol=1e-6)
  np.testing.assert_array_equal(state.ended, True)
