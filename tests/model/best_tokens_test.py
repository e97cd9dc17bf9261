"""The most likely tokens found on shards of the vocabulary are those of whole rows of logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.advance import advance, advance_on_shard
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.slot_params import slot_row
from t5x_inference_ext.engine.state import initial_state
from t5x_inference_ext.engine.state_rows import state_specs
from t5x_inference_ext.model.best_tokens import best_tokens
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.sharding.mesh import make_mesh
from tests import memory
from tests.model import layouts_test
from tests.model.layouts_test import Case

by_logits = memory.quick_jit(advance)
start = memory.quick_jit(initial_state, static_argnames='vocab_size')
greedy_step = memory.quick_jit(Model.decode_greedily, static_argnames='self')


def found_on(mesh, logits, vocabulary, rows):
  return jax.jit(
    jax.shard_map(
      lambda x: best_tokens(x, rows, vocabulary),
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


@pytest.mark.parametrize('mesh', [(2, 2, 2), (1, 4, 2), (2, 1, 1)], ids=str)
@pytest.mark.parametrize('whole', [False, True])
def test_rows_advance_as_by_whole_rows_of_logits(mesh, whole):
  """Greedy rows and rows with a temperature; with `whole`, one more that needs whole rows."""
  model, count, vocab_size = Model(memory.ODD, make_mesh(mesh)), 8, memory.ODD.vocab_size
  params = [SamplingParams(temperature=t) for t in (0.0, 0.7, 0.0, 1.3, 0.0, 1e-6, 2.0)]
  params.append(SamplingParams(0.9, top_p=0.8) if whole else SamplingParams())
  one = [
    slot_row(p, vocab_size, seed=i, limit=9, end_ids=[9], top_width=2) for i, p in enumerate(params)
  ]
  rows = jax.tree.map(lambda *x: np.concatenate(x), *one)
  inputs = memory.tokens(memory.ODD, count, 2)
  state = start(rows, jnp.asarray(inputs), jnp.full(count, 2), vocab_size=vocab_size)
  row_axes, vocabulary = model.local_logits_axes(count)
  width = -(-vocab_size // 8) * 8
  split = NamedSharding(model.mesh, P(row_axes, vocabulary))
  specs = state_specs(model, state)
  by_shards = memory.quick_jit(
    jax.shard_map(
      functools.partial(advance_on_shard, model=model),
      mesh=model.mesh,
      in_specs=(P(), specs, split.spec, P()),
      out_specs=(specs, P()),
      check_vma=False,
    )
  )
  local, random = state, np.random.default_rng(0)
  for step in range(3):
    logits = random.normal(size=(count, vocab_size)).astype(np.float32) * 2
    logits[0, [3, 50, 100]] = 9  # a tie
    logits[2, 30] = np.nan if step == 2 else 0
    padded = np.pad(logits, ((0, 0), (0, width - vocab_size)), constant_values=-np.inf)
    positions = jnp.full(count, 3 + step)
    state, chosen = by_logits(rows, state, jnp.asarray(logits), positions)
    local, found = by_shards(rows, local, jax.device_put(padded, split), positions)
    jax.tree.map(np.testing.assert_array_equal, (state, chosen.tokens), (local, found.tokens))
    np.testing.assert_allclose(chosen.log_probs, found.log_probs, rtol=1e-6, atol=1e-6)
  assert state.failed.tolist() == [False, False, True] + [False] * 5
