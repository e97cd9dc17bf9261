"""Passes in two halves of their tokens give the logits and caches of passes in one."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.engine import programs
from t5x_inference_ext.model import token_parts
from t5x_inference_ext.model.token_parts import TokenParts
from t5x_inference_ext.sharding.activations import shard_activations
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import make_mesh, parse_mesh
from tests import hlo, memory
from tests.model import layouts_test
from tests.model.layouts_test import Case


@pytest.fixture
def halves_on_cpu(monkeypatch):
  """Cut all passes that can be cut, also on the simulated devices of a CPU."""
  monkeypatch.setattr(token_parts, 'overlaps_collectives', lambda device: True)
  monkeypatch.setattr(token_parts, 'MIN_TOKENS', 1)
  monkeypatch.setattr(token_parts, '_MIN_RUN', 1)
  jax.clear_caches()
  yield
  jax.clear_caches()


def parts_of(case: Case, length: int) -> TokenParts:
  """How a pass of a case in its prefill layout is cut."""
  config, mesh = layouts_test.config_of(case.model), make_mesh(parse_mesh(case.mesh))
  sharding = shard_activations(Layout.parse(case.prefill), config, mesh.shape, case.rows, length)
  return token_parts.token_parts(config, sharding, mesh, case.rows, length)


@pytest.mark.parametrize('dim, shape', [(0, (24, 2, 3)), (1, (2, 24, 3)), (1, (3, 12, 2))])
def test_join_undoes_split(dim, shape):
  x, parts = jnp.arange(np.prod(shape)).reshape(shape), TokenParts(2, dim, 12)
  halves = parts.split(x)
  np.testing.assert_array_equal(parts.join(halves), x)
  first = np.take(x, [i for i in range(shape[dim]) if i % 12 < 6], axis=dim)
  np.testing.assert_array_equal(halves[0], first)
  assert TokenParts().join(TokenParts().split(x)) is x


@pytest.mark.parametrize(
  'case, dim',
  [
    (Case('multiquery-parallel', 'ws_2d/batch', 'ws_2d/batch', 8), 0),
    (Case('multiquery-parallel', 'ws_2d/batch', 'ws_2d/batch', 1, prompt_size=8), 1),
    (Case('grouped-serial', 'ws_2d/batch', 'ws_2d/batch', 16, weights='int8'), 0),
    (Case('multihead-serial', 'ws_2d/batch', 'ws_2d/batch', 1, '4x2x1', 16, stacked=False), 1),
    (Case('multiquery-cut', 'ws_2d/batch', 'ws_2d/batch', 8, '2x4x1', 8, weights='int8'), 0),
    (Case('grouped-parallel', 'ws_1d/batch', 'ws_1d/batch', 16), 0),
  ],
  ids=str,
)
def test_logits_and_greedy_tokens(halves_on_cpu, case, dim):
  prefill = parts_of(case, case.prompt_size)
  assert (prefill.count, prefill.dim) == (2, dim)
  assert parts_of(case, 1).count == 2 - dim  # decode steps of enough rows are cut, too
  wanted = layouts_test.expected(case.model, case.weights).first(case.rows)
  found = memory.decode(layouts_test.load(case), wanted, case.prompt_size)
  np.testing.assert_array_equal(found.chosen, wanted.chosen)
  np.testing.assert_allclose(found.logits, wanted.logits, rtol=0, atol=1e-4)


def compiled_prefill(case: Case) -> str:
  engine = layouts_test.load(case)
  tokens, lengths = np.zeros((case.rows, case.prompt_size), np.int32), np.ones(case.rows, np.int32)
  lowered = memory.prefill.lower(
    engine.model,
    engine.weights,
    *programs.put(engine.model, tokens, lengths),
    size=case.prompt_size,
  )
  return lowered.compile().as_text()


def test_halves_have_collectives_of_their_own_and_one_attention(halves_on_cpu, monkeypatch):
  """Sums over two shards are permutes, which a TPU runs beside the other half's product."""
  case = Case('multiquery-parallel', 'ws_2d/batch', 'ws_2d/batch', 1, prompt_size=8, stacked=False)
  halves = hlo.collectives(compiled_prefill(case))
  monkeypatch.setattr(token_parts, 'MIN_TOKENS', 9)
  jax.clear_caches()
  whole = hlo.collectives(compiled_prefill(case))

  def counts(found: list[hlo.Collective]) -> dict[str, int]:
    return collections.Counter(c.kind for c in found)

  layers = layouts_test.config_of(case.model).num_layers
  assert counts(halves) - counts(whole) == {
    'collective-permute': 2 * layers,  # columns over x, of each half
    'all-gather': 2 * layers,  # into columns and out of them, once more
  }
  assert counts(halves)['all-to-all'] == counts(whole)['all-to-all']
