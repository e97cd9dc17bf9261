"""Choosing tokens: which may be chosen, how often, and that nothing but logits, seed and position decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.decoding.sampling import Sampler


def choose(sampler, logits, seeds=None, positions=None):
  rows = len(logits)
  seeds = np.zeros(rows, np.uint32) if seeds is None else seeds
  positions = np.arange(rows, dtype=np.int32) if positions is None else positions
  return np.asarray(jax.jit(sampler)(jnp.asarray(logits, jnp.float32), jnp.asarray(seeds, jnp.uint32),
                                     jnp.asarray(positions, jnp.int32)))


def random_logits(rows, vocabulary, seed=0, size=2.0):
  return (np.random.default_rng(seed).normal(size=(rows, vocabulary)) * size).astype(np.float32)


def kept(logits, top_k, top_p):
  """[V] -> the ids that may be chosen, and their probabilities [V]: first top_k, then top_p of what is left of them."""
  order = np.argsort(-logits, kind='stable')[:top_k or len(logits)]
  p = np.exp(logits[order].astype(np.float64) - logits.max())
  p /= p.sum()
  count = int(np.searchsorted(np.cumsum(p), top_p)) + 1 if top_p < 1 else len(order)
  probabilities = np.zeros(len(logits))
  probabilities[order[:count]] = p[:count] / p[:count].sum()
  return probabilities


def test_greedy_ties_go_to_the_lowest_id():
  logits = np.array([[0, 3, 1, 3], [2, 2, 2, 2], [-5, -7, -5, -9]], np.float32)
  assert choose(Sampler(), logits).tolist() == [1, 0, 0]


def test_ties_at_the_edge_of_top_k_go_to_the_lowest_ids():
  logits = np.tile(np.array([[1, 3, 1, 1, 3]], np.float32), (500, 1))
  assert set(choose(Sampler(1.0, top_k=3), logits)) == {0, 1, 4}


@pytest.mark.parametrize('sampler', [
    Sampler(1.0, top_k=1), Sampler(1.0, top_p=1e-6), Sampler(1e-4), Sampler(1e-30), Sampler(1e-38), Sampler(1e-40),
], ids=str)
def test_what_leaves_one_token_is_greedy(sampler):
  logits = random_logits(50, 40, size=10.)
  np.testing.assert_array_equal(choose(sampler, logits), choose(Sampler(), logits))


@pytest.mark.parametrize('temperature, top_k, top_p', [
    (1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.8), (1.0, 6, 0.8), (1.5, 12, 0.5), (1.0, 99, 0.9)])
def test_distribution(temperature, top_k, top_p):
  """Exactly the tokens that the numpy oracle keeps, as often as it says: 4000 positions, chi-squared at 1 in 1000."""
  n, vocabulary = 4000, 12
  logits = random_logits(1, vocabulary, seed=3, size=0.4)
  chosen = choose(Sampler(temperature, top_k, top_p), np.tile(logits, (n, 1)))
  probabilities = kept(logits[0] / np.float32(temperature), top_k, top_p)
  count = np.bincount(chosen, minlength=vocabulary)
  support = probabilities > 0
  # Each expected often enough to be seen, so that 'never seen' means 'dropped'.
  assert probabilities[support].min() * n > 15
  np.testing.assert_array_equal(count > 0, support)
  wanted = probabilities[support] * n
  chi_squared = np.sum((count[support] - wanted) ** 2 / wanted)
  critical = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3, 8: 26.1, 9: 27.9, 10: 29.6, 11: 31.3}
  assert chi_squared < critical[support.sum() - 1]


@pytest.mark.parametrize('top_k, top_p', [(0, 0.1), (0, 0.9), (7, 1.0), (7, 0.3), (20, 0.95), (200, 0.5)])
def test_keeps_exactly_the_right_sets(top_k, top_p):
  """Over many rows: what is dropped is -inf, what is kept is unchanged."""
  logits = random_logits(64, 50)
  filtered = np.asarray(Sampler(1.0, top_k, top_p)._filter(jnp.asarray(logits)))
  keep = np.array([kept(row, top_k, top_p) > 0 for row in logits])
  np.testing.assert_array_equal(filtered, np.where(keep, logits, -np.inf))
  assert keep.any(axis=1).all() and not keep.all(axis=1).any()


def test_both_together_are_not_either_alone():
  """top_p counts the probabilities of what top_k kept: k=2 makes 0.57 and 0.43 of 0.4 and 0.3, and then p=0.5 leaves
  one token, where alone it leaves two."""
  logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
  survivors = lambda *args: np.flatnonzero(np.isfinite(Sampler(1.0, *args)._filter(logits)[0])).tolist()
  assert survivors(2, 1.0) == [0, 1]
  assert survivors(0, 0.5) == [0, 1]
  assert survivors(2, 0.5) == [0]


def test_a_row_depends_on_its_own_logits_seed_and_position_alone():
  sampler = Sampler(1.0, top_k=30, top_p=0.95)
  logits, seeds = random_logits(16, 40), np.arange(100, 116)
  positions = np.arange(16) * 3
  together = choose(sampler, logits, seeds, positions)
  order = np.random.default_rng(1).permutation(16)
  np.testing.assert_array_equal(choose(sampler, logits[order], seeds[order], positions[order]), together[order])
  for i in (0, 7, 15):
    assert choose(sampler, logits[i:i + 1], seeds[i:i + 1], positions[i:i + 1]) == together[i]


@pytest.mark.parametrize('differ', ['seeds', 'positions'])
def test_seeds_and_positions_make_a_difference(differ):
  """400 draws from 100 equal tokens repeat themselves no more than chance has it."""
  noise = {'seeds': np.full(400, 7), 'positions': np.full(400, 7), differ: np.arange(400)}
  chosen = choose(Sampler(1.0), np.zeros((400, 100), np.float32), **noise)
  assert len(set(chosen)) > 90
  neighbours = np.mean(chosen[1:] == chosen[:-1])
  assert neighbours < 0.05
  assert len(set(choose(Sampler(1.0), np.zeros((9, 100), np.float32), np.full(9, 7), np.full(9, 7)))) == 1


def test_the_largest_seed():
  assert choose(Sampler(1.0), np.zeros((1, 9), np.float32), [2**32 - 1]).shape == (1,)
