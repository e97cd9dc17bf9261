"""Choosing tokens: which may be chosen, how often, and that nothing but logits, seed and position
decides.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.engine import selection
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.sampling_arrays import stack_params
from t5x_inference_ext.engine.token_choice import Restrictions, choose_tokens
from t5x_inference_ext.errors import RequestError


def sample(logits, rows, seeds, positions):
  restrictions = Restrictions(None, jnp.full((len(logits), 1), -1))
  top = jnp.max(logits, axis=-1, keepdims=True)
  return choose_tokens(logits, top, rows, rows.features, restrictions, seeds, positions)[0]


def choose(sampling, logits, seeds=None, positions=None):
  rows = len(logits)
  seeds = np.zeros(rows, np.uint32) if seeds is None else seeds
  positions = np.arange(rows, dtype=np.int32) if positions is None else positions
  return np.asarray(
    jax.jit(sample)(
      jnp.asarray(logits, jnp.float32),
      stack_params([sampling] * rows, logits.shape[1]),
      jnp.asarray(seeds, jnp.uint32),
      jnp.asarray(positions, jnp.int32),
    )
  )


def random_logits(rows, vocabulary, seed=0, size=2.0):
  return (np.random.default_rng(seed).normal(size=(rows, vocabulary)) * size).astype(np.float32)


def kept(logits, top_k, top_p):
  """[V] -> the ids that may be chosen, and their probabilities [V]: first top_k, then top_p of what
  is left of them.
  """
  order = np.argsort(-logits, kind='stable')[: top_k or len(logits)]
  p = np.exp(logits[order].astype(np.float64) - logits.max())
  p /= p.sum()
  count = int(np.searchsorted(np.cumsum(p), top_p)) + 1 if top_p < 1 else len(order)
  probabilities = np.zeros(len(logits))
  probabilities[order[:count]] = p[:count] / p[:count].sum()
  return probabilities


def test_greedy_ties_go_to_the_lowest_id():
  logits = np.array([[0, 3, 1, 3], [2, 2, 2, 2], [-5, -7, -5, -9]], np.float32)
  assert choose(SamplingParams(), logits).tolist() == [1, 0, 0]


def test_ties_at_the_edge_of_top_k_go_to_the_lowest_ids():
  logits = np.tile(np.array([[1, 3, 1, 1, 3]], np.float32), (500, 1))
  assert set(choose(SamplingParams(1.0, top_k=3), logits)) == {0, 1, 4}


@pytest.mark.parametrize(
  'sampling',
  [
    SamplingParams(1.0, top_k=1),
    SamplingParams(1.0, top_p=1e-6),
    SamplingParams(1.0, top_p=1e-40),
    SamplingParams(1.0, top_p=1e-50),
    SamplingParams(1e-4),
    SamplingParams(1e-30),
    SamplingParams(1e-38),
    SamplingParams(1e-40),
  ],
  ids=str,
)
def test_what_leaves_one_token_is_greedy(sampling):
  logits = random_logits(50, 40, size=10.0)
  np.testing.assert_array_equal(choose(sampling, logits), choose(SamplingParams(), logits))


# Chi-squared at 1 in 1000, by degrees of freedom.
CRITICAL = (
  0,
  10.8,
  13.8,
  16.3,
  18.5,
  20.5,
  22.5,
  24.3,
  26.1,
  27.9,
  29.6,
  31.3,
  32.9,
  34.5,
  36.1,
  37.7,
  39.3,
  40.8,
  42.3,
  43.8,
  45.3,
)


def check_distribution(chosen, probabilities):
  """Exactly the tokens with a probability, as often as it says."""
  n, support = len(chosen), probabilities > 0
  count = np.bincount(chosen, minlength=len(probabilities))
  # Each expected often enough to be seen, so that 'never seen' means 'dropped'.
  assert probabilities[support].min() * n > 12
  np.testing.assert_array_equal(count > 0, support)
  wanted = probabilities[support] * n
  assert np.sum((count[support] - wanted) ** 2 / wanted) <= CRITICAL[support.sum() - 1]


@pytest.mark.parametrize(
  'temperature, top_k, top_p',
  [
    (0.0, 0, 1.0),
    (1.0, 0, 1.0),
    (0.7, 0, 1.0),
    (1.0, 5, 1.0),
    (1.0, 0, 0.8),
    (1.0, 6, 0.8),
    (1.5, 12, 0.5),
    (1.0, 99, 0.9),
  ],
)
def test_distribution(temperature, top_k, top_p):
  n, vocabulary = 4000, 12
  logits = random_logits(1, vocabulary, seed=3, size=0.4)
  chosen = choose(SamplingParams(temperature, top_k, top_p), np.tile(logits, (n, 1)))
  divided = logits[0] / np.float32(temperature) if temperature else logits[0]
  check_distribution(chosen, kept(divided, top_k if temperature else 1, top_p))


FEW = [
  SamplingParams(1.0, top_k=5),
  SamplingParams(0.5, top_k=8, top_p=0.7),
  SamplingParams(),
  SamplingParams(2.0, top_k=2),
  SamplingParams(1.0, 7, 0.9),
]
MANY = [
  *FEW,
  SamplingParams(1.0, top_p=0.6),
  SamplingParams(0.8),
  SamplingParams(0.7, top_k=300, top_p=0.5),
  SamplingParams(1.0, top_k=9),
]


@pytest.mark.parametrize('mix', [FEW, MANY], ids=['few candidates', 'all tokens'])
def test_each_row_of_a_mix_has_its_own_distribution(mix):
  """A vocabulary of many blocks, of which the most likely tokens are spread over some; rows of both
  kinds of draw.
  """
  n, vocabulary = 1500, 2200
  logits = np.full(vocabulary, -30, np.float32)
  likely = np.random.default_rng(1).choice(vocabulary, 12, replace=False)
  logits[likely] = random_logits(1, 12, seed=5, size=0.4)[0]
  rows = stack_params(mix * n, vocabulary)
  assert (len(rows.features.few) > 0) == (mix is FEW)
  chosen = draw(np.tile(logits, (n * len(mix), 1)), rows)
  for i, s in enumerate(mix):
    divided = logits / np.float32(s.temperature) if s.temperature else logits
    probabilities = kept(divided, s.top_k if s.temperature else 1, s.top_p)
    check_distribution(chosen[i :: len(mix)], np.where(probabilities > 1e-6, probabilities, 0))
  if mix is MANY:  # and the same tokens, whichever way they are drawn
    few = draw(
      np.tile(logits, (n * len(FEW), 1)),
      stack_params(FEW * n, vocabulary),
      np.arange(len(chosen)).reshape(n, -1)[:, : len(FEW)].ravel(),
    )
    np.testing.assert_array_equal(chosen.reshape(n, -1)[:, : len(FEW)].ravel(), few)


def draw(logits, rows, positions=None):
  positions = np.arange(len(logits)) if positions is None else positions
  return np.asarray(
    jax.jit(sample)(
      jnp.asarray(logits), rows, jnp.zeros(len(logits), jnp.uint32), jnp.asarray(positions)
    )
  )


@pytest.mark.parametrize(
  'top_k, top_p', [(0, 0.1), (0, 0.9), (7, 1.0), (7, 0.3), (20, 0.95), (300, 0.5)]
)
def test_keeps_exactly_the_right_sets(top_k, top_p):
  """Noise that favours one token makes it the draw if it is kept, and only then: over rows, every
  token in turn.
  """
  logits = random_logits(16, 400, size=3)
  keep = np.array([kept(row, top_k, top_p) > 0 for row in logits])
  k, p = jnp.full(16, top_k or 400, jnp.int32), jnp.full(16, top_p, jnp.float32)
  ways = [lambda noise: selection.draw_from_all(jnp.asarray(logits), noise, k, p, both=True)]
  if 0 < top_k < 256:
    top, ids = selection.most_likely(jnp.asarray(logits), 32)
    ways.append(
      lambda noise: selection.draw_from_few(top, ids, jnp.take_along_axis(noise, ids, axis=1), k, p)
    )
  for way in ways:
    favoured = jax.vmap(lambda i: jnp.zeros((16, 400)).at[:, i].set(1000.0))(jnp.arange(400))
    chosen = np.asarray(
      jax.jit(lambda noise, way=way: jax.lax.map(way, noise))(favoured)
    )  # [400, 16]
    np.testing.assert_array_equal((chosen == np.arange(400)[:, None]).T, keep)
  assert keep.any(axis=1).all() and not keep.all(axis=1).any()


def test_both_together_are_not_either_alone():
  """top_p counts the probabilities of what top_k kept: k=2 makes 0.57 and 0.43 of 0.4 and 0.3, and
  then p=0.5 leaves one token, where alone it leaves two.
  """
  logits = np.tile(np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32)), (300, 1))
  survivors = lambda *args: sorted(set(choose(SamplingParams(1.0, *args), logits).tolist()))
  assert survivors(2, 1.0) == [0, 1]
  assert survivors(0, 0.5) == [0, 1]
  assert survivors(2, 0.5) == [0]


@pytest.mark.parametrize(
  'vocabulary, count', [(3000, 8), (3000, 40), (3001, 1), (256, 5), (50, 50)]
)
def test_most_likely_is_a_sort(vocabulary, count):
  """Ties, within blocks and over them, in order of id."""
  logits = np.random.default_rng(2).integers(0, 40, (9, vocabulary)).astype(np.float32)
  values, ids = selection.most_likely(jnp.asarray(logits), count)
  order = np.argsort(-logits, axis=1, kind='stable')[:, :count]
  np.testing.assert_array_equal(ids, order)
  np.testing.assert_array_equal(values, np.take_along_axis(logits, order, axis=1))


def test_noise_of_some_is_that_of_all():
  """And it is Gumbel's: mean 0.5772, variance pi^2 / 6, of neighbours uncorrelated."""
  seeds, positions = jnp.arange(50, dtype=jnp.uint32), jnp.arange(50) * 7
  every = np.asarray(selection.gumbel_of_all(seeds, positions, 2001))
  ids = np.random.default_rng(0).integers(0, 2001, (50, 30)).astype(np.int32)
  np.testing.assert_array_equal(
    selection.gumbel(seeds, positions, jnp.asarray(ids), 2001),
    np.take_along_axis(every, ids, axis=1),
  )
  assert abs(every.mean() - 0.5772) < 0.02 and abs(every.var() - np.pi**2 / 6) < 0.04
  for a, b in (
    (every[1:], every[:-1]),
    (every[:, 1:], every[:, :-1]),
    (every[:, :1000], every[:, 1001:]),
  ):
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


def test_logit_bias():
  logits = random_logits(1, 12, seed=3, size=0.4)
  bias = ((2, 1.5), (7, -np.inf), (0, -0.5))
  chosen = choose(SamplingParams(1.0, logit_bias=bias), np.tile(logits, (4000, 1)))
  biased = logits[0].copy()
  for token, value in bias:
    biased[token] += value
  check_distribution(chosen, kept(biased, 0, 1.0))
  assert choose(SamplingParams(logit_bias=((5, 100.0),)), logits).tolist() == [5]
  with pytest.raises(
    RequestError, match='logit_bias or stop holds token 12, outside the vocabulary of 12'
  ):
    choose(SamplingParams(logit_bias=((12, 1.0),)), logits)


@pytest.mark.parametrize(
  'sampling',
  [
    SamplingParams(1.0, top_p=0.9),
    SamplingParams(1.0, top_k=300, top_p=0.9),
    SamplingParams(1.0, top_k=9),
    SamplingParams(1.0),
    SamplingParams(),
  ],
  ids=str,
)
def test_a_choice_ends_where_nothing_can_be_chosen(sampling):
  """Logits that are no numbers, or all -inf: any token, but no endless search."""
  for logits in (np.full((3, 400), -np.inf), np.full((3, 400), np.nan)):
    chosen = choose(sampling, logits)
    assert np.all((chosen >= 0) & (chosen < 400))


def test_a_row_depends_on_its_own_logits_seed_and_position_alone():
  sampling = SamplingParams(1.0, top_k=30, top_p=0.95)
  logits, seeds = random_logits(16, 40), np.arange(100, 116)
  positions = np.arange(16) * 3
  together = choose(sampling, logits, seeds, positions)
  order = np.random.default_rng(1).permutation(16)
  np.testing.assert_array_equal(
    choose(sampling, logits[order], seeds[order], positions[order]), together[order]
  )
  for i in (0, 7, 15):
    assert (
      choose(sampling, logits[i : i + 1], seeds[i : i + 1], positions[i : i + 1]) == together[i]
    )


@pytest.mark.parametrize('differ', ['seeds', 'positions'])
def test_seeds_and_positions_make_a_difference(differ):
  """400 draws from 100 equal tokens repeat themselves no more than chance has it."""
  noise = {'seeds': np.full(400, 7), 'positions': np.full(400, 7), differ: np.arange(400)}
  chosen = choose(SamplingParams(1.0), np.zeros((400, 100), np.float32), **noise)
  assert len(set(chosen)) > 90
  neighbours = np.mean(chosen[1:] == chosen[:-1])
  assert neighbours < 0.05
  assert (
    len(
      set(choose(SamplingParams(1.0), np.zeros((9, 100), np.float32), np.full(9, 7), np.full(9, 7)))
    )
    == 1
  )


def test_the_largest_seed():
  assert choose(SamplingParams(1.0), np.zeros((1, 9), np.float32), [2**32 - 1]).shape == (1,)


HUGE, NOTHING, HUGE_IDS, HUGE_ID = 10**6000, {}, [[1, 10**400]], [[10**6000]]
WRONG = [
  '1', None, True, [1], NOTHING, b'ab', float('nan'), float('inf'), -HUGE, HUGE, 1j, np.array(1.0),
  np.array(5), object(), [b'ab'], [['a', 1]], [[1, 'a']], [[1, True]], [[True, 1]], [[1, [2]]],
  HUGE_IDS, HUGE_ID, [np.array(5)], {1: None}, {None: 1}, 'x' * 10_000,
]  # fmt: skip
VALID = {  # of these
  'top_k': [HUGE],
  'min_new_tokens': [HUGE],
  'logit_bias': [NOTHING],
  'stop': [HUGE_IDS, HUGE_ID],
}


@pytest.mark.parametrize('name', [f.name for f in dataclasses.fields(SamplingParams)])
def test_a_value_of_any_wrong_type_is_refused_in_one_sentence(name):
  refused = 0
  for value in WRONG:
    if any(value is valid for valid in VALID.get(name, [])):
      SamplingParams(**{name: value})
      continue
    with pytest.raises(RequestError) as error:
      SamplingParams(**{name: value})
    message = str(error.value)
    assert message.startswith(name) and '\n' not in message and len(message) < 300
    refused += 1
  assert refused >= len(WRONG) - 2
