"""The step from logits to the next token: penalties, log-probabilities, and everything that ends a
row.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.engine.advance import advance
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.sampling_arrays import end_id_array, stack_params
from t5x_inference_ext.engine.state import RowParams, initial_state
from t5x_inference_ext.errors import RequestError
from tests.engine.sampling_test import check_distribution

VOCABULARY, EOS = 12, 1
LOGITS = np.random.default_rng(3).normal(size=VOCABULARY).astype(np.float32) * 0.5


def rows_of(options, limit=100, top=0, seeds=None):
  count = len(options)
  seeds = np.zeros(count, np.uint32) if seeds is None else seeds
  return RowParams(
    stack_params(options, VOCABULARY),
    seeds,
    np.full(count, limit, np.int32),
    end_id_array(EOS, count),
    np.full(count, top, np.int32),
    top,
  )


def fed(rows, tokens, prompts=None):
  """Rows that generated `tokens` [B, n], by logits that leave no choice: (progress, [B, n] whether
  they had ended).
  """
  count = len(rows.seeds)
  prompts = np.zeros((count, 1), np.int32) if prompts is None else prompts
  progress = initial_state(
    rows, jnp.asarray(prompts), jnp.full(count, prompts.shape[1]), VOCABULARY
  )
  ended = []
  for step, column in enumerate(np.asarray(tokens).T):
    logits = jax.nn.one_hot(column, VOCABULARY) * 1000
    progress, _ = advance(rows, progress, logits, jnp.full(count, step))
    ended.append(np.asarray(progress.ended))
  return progress, np.stack(ended, axis=1)


def test_penalties_change_the_distribution_as_they_say():
  """4 and 7 in the prompt, 7 and 9 generated, 9 twice. BOS, id 0, is not a token of the prompt."""
  n = 4000
  sampling = SamplingParams(
    1.0, repetition_penalty=1.5, frequency_penalty=0.3, presence_penalty=0.2
  )
  rows = rows_of([sampling] * n)
  prompts = np.tile(np.array([[0, 4, 7, 5]], np.int32), (n, 1))
  progress = initial_state(rows, jnp.asarray(prompts), jnp.full(n, 3), VOCABULARY)  # 5 is padding
  made = np.zeros(VOCABULARY, np.int32)
  made[[7, 9]] = 1, 2
  progress = dataclasses.replace(progress, history=progress.history + 2 * jnp.asarray(made)[None])
  _, chosen = jax.jit(advance)(
    rows, progress, jnp.tile(jnp.asarray(LOGITS)[None], (n, 1)), jnp.arange(n)
  )
  wanted = LOGITS.astype(np.float64)
  for token in (4, 7, 9):
    wanted[token] = wanted[token] / 1.5 if wanted[token] > 0 else wanted[token] * 1.5
  wanted -= 0.3 * made + 0.2 * (made > 0)
  check_distribution(np.asarray(chosen.tokens), np.exp(wanted) / np.exp(wanted).sum())
  # What is told of them is the model's own.
  own = np.asarray(jax.nn.log_softmax(LOGITS))
  np.testing.assert_allclose(chosen.log_probs, own[np.asarray(chosen.tokens)], atol=1e-6)


def test_generated_tokens_are_counted_until_a_row_ends():
  rows = rows_of([SamplingParams(frequency_penalty=0.1), SamplingParams()])
  progress, _ = fed(rows, [[5, 5, 3, 5], [7, EOS, 7, 7]])
  assert (progress.history >> 1)[0].tolist() == [0, 0, 0, 1, 0, 3] + [0] * 6
  assert (progress.history >> 1)[1].tolist() == [0, 1, 0, 0, 0, 0, 0, 1] + [0] * 4


def test_stop_sequences_end_the_rows_that_have_them():
  """Of any length, together in one batch; a sequence counts once it is whole, wherever it began."""
  options = [
    SamplingParams(stop=((3, 4),)),
    SamplingParams(stop=((9,), (4, 3, 4))),
    SamplingParams(),
    SamplingParams(stop=((3, 3, 3),)),
    SamplingParams(stop=((3, 4),), min_new_tokens=3),
  ]
  tokens = [[3, 3, 4, 5, 5], [4, 3, 3, 9, 5], [3, 4, 9, 3, 3], [3, 3, 4, 3, 3], [3, 4, 5, 3, 4]]
  _, ended = fed(rows_of(options), tokens)
  assert [row.tolist().index(True) if row.any() else None for row in ended] == [2, 3, None, None, 4]


def test_limits_eos_and_least():
  options = [
    SamplingParams(),
    SamplingParams(min_new_tokens=2),
    SamplingParams(1.0, min_new_tokens=3),
  ]
  rows = dataclasses.replace(rows_of(options), limits=np.array([3, 9, 4], np.int32))
  progress = initial_state(rows, jnp.zeros((3, 1), jnp.int32), jnp.ones(3, jnp.int32), VOCABULARY)
  logits = jnp.tile(
    jax.nn.one_hot(EOS, VOCABULARY) * 50 + jax.nn.one_hot(6, VOCABULARY) * 25, (3, 1)
  )
  told = []
  for step in range(5):
    progress, chosen = advance(rows, progress, logits, jnp.full(3, step))
    told.append(np.asarray(chosen.tokens))
  assert np.stack(told, axis=1).tolist() == [
    [EOS, 0, 0, 0, 0],
    [6, 6, EOS, 0, 0],
    [6, 6, 6, EOS, 0],
  ]
  assert progress.counts.tolist() == [1, 3, 4]
  _, ended = fed(
    dataclasses.replace(rows_of([SamplingParams()] * 2), limits=np.array([1, 3], np.int32)),
    [[5] * 4, [5] * 4],
  )
  assert ended.tolist() == [[True] * 4, [False, False, True, True]]


def test_log_probabilities_of_the_chosen_and_of_the_most_likely():
  rows = rows_of(
    [SamplingParams(), SamplingParams(5.0), SamplingParams(logit_bias=((2, 99.0),))], top=3
  )
  progress = initial_state(rows, jnp.zeros((3, 1), jnp.int32), jnp.ones(3, jnp.int32), VOCABULARY)
  _, chosen = advance(rows, progress, jnp.tile(jnp.asarray(LOGITS)[None], (3, 1)), jnp.arange(3))
  own = np.asarray(jax.nn.log_softmax(LOGITS))
  order = np.argsort(-LOGITS, kind='stable')[:3]
  assert chosen.tokens[0] == order[0] and chosen.tokens[2] == 2
  np.testing.assert_allclose(chosen.log_probs, own[np.asarray(chosen.tokens)], atol=1e-6)
  np.testing.assert_array_equal(chosen.top_tokens, np.tile(order, (3, 1)))
  np.testing.assert_allclose(chosen.top_log_probs, np.tile(own[order], (3, 1)), atol=1e-6)


def test_arrays_are_as_wide_as_the_widest_row():
  """So that batches of similar options share a compilation."""
  most = SamplingParams(
    1.0, top_k=9, logit_bias=((1, 1.0),), stop=((1, 2), (3,)), presence_penalty=1.0
  )
  one, other = (stack_params(rows, VOCABULARY) for rows in ([SamplingParams(), most], [most, most]))
  assert jax.tree.map(np.shape, one) == jax.tree.map(np.shape, other)
  assert one.features == other.features and one.features.few == ((12, True),)


def test_the_longest_stop_sequence_is_cut_off_after_the_least_tokens():
  sampling = SamplingParams(stop=((5,), (4, 5)), min_new_tokens=2)
  assert sampling.before_stop([3, 4, 5]) == [3]
  assert sampling.before_stop([4, 5]) == [4, 5]
  assert sampling.before_stop([3, 4, 5, 6]) == [3, 4, 5, 6]


@pytest.mark.parametrize(
  'values, says',
  [
    (dict(repetition_penalty=0.0), 'repetition_penalty must be above 0'),
    (dict(repetition_penalty=1e-50), 'repetition_penalty must be above 0'),
    (dict(frequency_penalty=1e300), 'frequency_penalty must be a number in the range of float32'),
    (dict(frequency_penalty=float('nan')), 'frequency_penalty must be a number'),
    (dict(presence_penalty=float('inf')), 'presence_penalty must be a number'),
    (dict(logit_bias=((-1, 2.0),)), 'logit_bias must be pairs'),
    (dict(min_new_tokens=-1), 'min_new_tokens must be a whole number, 0 or more'),
    (dict(logit_bias={5: float('inf')}), 'logit_bias must be pairs'),
    (dict(logit_bias={5.5: 1.0}), 'logit_bias must be pairs'),
    (dict(stop=(5, 6)), 'stop must be a sequence of sequences'),
    (dict(stop=None), 'stop must be a sequence of sequences'),
    (dict(stop=('ab',)), 'stop must be a sequence of sequences'),
    (dict(stop=((),)), 'stop holds an empty sequence'),
  ],
)
def test_bad_options(values, says):
  with pytest.raises(RequestError, match=says):
    SamplingParams(**values)
