"""Rows of any parameters in one program: the tokens of each row are those it gets alone in a static
batch, and what no row uses costs no copy of the logits.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from t5x_inference_ext.config import preset
from t5x_inference_ext.engine.advance import advance
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.sampling_arrays import BIAS_WIDTH, end_id_array, stack_params
from t5x_inference_ext.engine.slot_params import slot_row
from t5x_inference_ext.engine.state import RowParams, initial_state
from t5x_inference_ext.engine.state_rows import state_shardings
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import make_mesh
from tests import memory

VOCABULARY, ROWS, STEPS, LIMIT = 700, 8, 12, 10
TABLE = np.random.default_rng(8).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32) * 1.5
PROMPTS = np.random.default_rng(9).integers(1, VOCABULARY, (ROWS, 6)).astype(np.int32)
LENGTHS = np.array([6, 1, 3, 6, 2, 4, 5, 6], np.int32)


def random_params(random):
  """Any parameters without stop sequences, which slots leave to the host."""
  maybe = lambda value, rest: value if random.random() < 0.4 else rest
  ids = random.choice(VOCABULARY, 5, replace=False).tolist()
  return SamplingParams(
    temperature=maybe(0.0, float(random.uniform(0.2, 1.5))),
    top_k=maybe(int(random.choice([3, 40, 64, 65, 200, 256, 257, 600])), 0),
    top_p=maybe(float(random.uniform(0.3, 0.99)), 1.0),
    repetition_penalty=maybe(float(random.uniform(0.8, 1.5)), 1.0),
    frequency_penalty=maybe(float(random.uniform(-0.5, 0.5)), 0.0),
    presence_penalty=maybe(float(random.uniform(-0.5, 0.5)), 0.0),
    logit_bias=maybe(tuple((i, float(random.choice([-np.inf, 1.0, 3.5, -2.0]))) for i in ids), ()),
    min_new_tokens=maybe(int(random.integers(1, 6)), 0),
  )


@memory.quick_jit
def generate(rows, state, last, lengths, table):
  """Tokens [N, B] of a model whose logits are a row of a table, by the last token."""

  def step(carry, _):
    state, last, at = carry
    logits = table[last]
    state, chosen = advance(rows, state, logits, at)
    return (state, jnp.where(state.ended, last, chosen.tokens), at + 1), chosen

  (state, *_), chosen = jax.lax.scan(step, (state, last, lengths), None, length=STEPS)
  return state, chosen


start = memory.quick_jit(initial_state, static_argnames='vocab_size')
step = memory.quick_jit(advance)


def last_tokens(prompts, lengths):
  return prompts[np.arange(len(prompts)), lengths - 1]


def slots_of(params, ends, **options):
  params = [*params, *[SamplingParams()] * (ROWS - len(params))]  # one shape for all tests
  ends = [*ends, *[[]] * (ROWS - len(ends))]
  rows = [
    slot_row(p, VOCABULARY, seed=i, limit=LIMIT, end_ids=ends[i], top_width=3, **options)
    for i, p in enumerate(params)
  ]
  return jax.tree.map(lambda *x: np.concatenate(x), *rows)


def alone(params, ends, row):
  rows = RowParams(
    stack_params([params], VOCABULARY),
    np.asarray([row], np.uint32),
    np.asarray([LIMIT], np.int32),
    end_id_array(ends, 1),
    np.zeros(1, np.int32),
  )
  prompts, lengths = PROMPTS[row : row + 1], LENGTHS[row : row + 1]
  state = start(rows, prompts, lengths, vocab_size=VOCABULARY)
  state, chosen = generate(rows, state, last_tokens(prompts, lengths), lengths, TABLE)
  return np.asarray(chosen.tokens)[:, 0].tolist(), int(state.counts[0])


@pytest.mark.parametrize('seed', range(2))
def test_a_row_among_others_is_the_row_alone(seed):
  random = np.random.default_rng(seed)
  params = [random_params(random) for _ in range(ROWS)]
  ends = [random.choice(VOCABULARY, random.integers(0, 5)).tolist() for _ in range(ROWS)]
  wanted = [alone(p, e, i) for i, (p, e) in enumerate(zip(params, ends))]
  # All together, and two by two, so that the batch's features are those of few rows.
  groups = [range(ROWS), *(range(i, i + 2) for i in range(0, ROWS, 2))]
  rows = slots_of(params, ends)
  for group in groups:
    state = start(rows, PROMPTS, LENGTHS, vocab_size=VOCABULARY)
    absent = ~np.isin(np.arange(ROWS), group)
    state = dataclasses.replace(state, ended=jnp.asarray(absent))
    state, chosen = generate(rows, state, last_tokens(PROMPTS, LENGTHS), LENGTHS, TABLE)
    for i in group:
      found = np.asarray(chosen.tokens)[:, i].tolist(), int(state.counts[i])
      assert found == wanted[i], (seed, group, i, params[i])
    assert not np.asarray(state.failed).any()


def test_any_parameters_share_a_compilation():
  shapes = {
    str(jax.tree.map(lambda x: (x.shape, x.dtype), slots_of([random_params(random)], [[1, 5]])))
    for random in map(np.random.default_rng, range(20))
  }
  assert len(shapes) == 1
  trees = {
    jax.tree.structure(slots_of([random_params(random)], [[]]))
    for random in map(np.random.default_rng, range(20))
  }
  assert len(trees) == 1


def test_a_row_that_is_recomputed_goes_on_as_if_nothing_had_happened():
  """Penalties, positions, limits and min_new_tokens count the tokens generated before."""
  random = np.random.default_rng(5)
  params = [
    dataclasses.replace(random_params(random), frequency_penalty=0.3, repetition_penalty=1.3)
    for _ in range(ROWS)
  ]
  rows = slots_of(params, [[]] * ROWS)
  state = start(rows, PROMPTS, LENGTHS, vocab_size=VOCABULARY)
  state, chosen = generate(rows, state, last_tokens(PROMPTS, LENGTHS), LENGTHS, TABLE)
  whole, made = np.asarray(chosen.tokens), np.array([1, 3, 9, 2, 4, 5, 7, 6])
  prompts = np.zeros((ROWS, 16), np.int32)
  for i, n in enumerate(made):
    prompts[i, : LENGTHS[i] + n] = [*PROMPTS[i, : LENGTHS[i]], *whole[:n, i]]
  lengths = (LENGTHS + made).astype(np.int32)
  again = start(rows, prompts, lengths, vocab_size=VOCABULARY, generated=made.astype(np.int32))
  again, rest = generate(rows, again, last_tokens(prompts, lengths), lengths, TABLE)
  for i, n in enumerate(made):
    assert np.asarray(rest.tokens)[: LIMIT - n, i].tolist() == whole[n:LIMIT, i].tolist()
  assert again.counts.tolist() == [LIMIT] * ROWS
  np.testing.assert_array_equal(again.history, state.history)


def test_stops_survive_a_recomputation():
  sampling = SamplingParams(stop=((5, 6, 7),))
  rows = RowParams(
    stack_params([sampling] * 3, VOCABULARY),
    np.zeros(3, np.uint32),
    np.full(3, 9, np.int32),
    end_id_array(-1, 3),
    np.zeros(3, np.int32),
  )
  prompts = np.array([[0, 5, 6]] * 3, np.int32)
  state = initial_state(
    rows, jnp.asarray(prompts), jnp.full(3, 3), VOCABULARY, jnp.array([2, 1, 0])
  )
  state, _ = advance(rows, state, jax.nn.one_hot(jnp.full(3, 7), VOCABULARY), jnp.full(3, 3))
  assert state.ended.tolist() == [True, False, False]  # the others' 5 is of the prompt


def test_the_most_likely_tokens_are_told_if_a_row_wants_them():
  rows = slots_of([SamplingParams()] * ROWS, [[]] * ROWS)
  state = start(rows, PROMPTS, LENGTHS, vocab_size=VOCABULARY)
  logits = jnp.asarray(TABLE[:ROWS])
  _, chosen = step(rows, state, logits, jnp.asarray(LENGTHS))
  assert not np.asarray(chosen.top_tokens).any() and not np.asarray(chosen.top_log_probs).any()
  rows = dataclasses.replace(rows, top=np.array([0, 0, 2] + [0] * 5, np.int32))
  _, chosen = step(rows, state, logits, jnp.asarray(LENGTHS))
  order = np.argsort(-TABLE[2], kind='stable')[:3]
  np.testing.assert_array_equal(chosen.top_tokens[2], order)
  own = np.asarray(jax.nn.log_softmax(TABLE[2]))
  np.testing.assert_allclose(chosen.top_log_probs[2], own[order], atol=1e-5)


def test_a_row_with_broken_logits_fails_alone():
  """Not a number anywhere, or every token forbidden while EOS is."""
  params = [SamplingParams(1.0), SamplingParams(), SamplingParams(frequency_penalty=0.1)]
  forbids = dict.fromkeys(range(BIAS_WIDTH), -np.inf)
  params.append(SamplingParams(logit_bias=forbids, min_new_tokens=1))
  rows = slots_of(params, [[], [], [], [BIAS_WIDTH]], top=1)
  state = start(rows, PROMPTS, LENGTHS, vocab_size=VOCABULARY)
  logits = TABLE[:ROWS].copy()
  logits[1] = np.nan
  logits[3, BIAS_WIDTH + 1 :] = -np.inf  # what is left of the vocabulary
  state, chosen = step(rows, state, jnp.asarray(logits), jnp.asarray(LENGTHS))
  assert state.failed.tolist() == state.ended.tolist() == [False, True, False, True] + [False] * 4
  assert state.counts.tolist() == [1, 0, 1, 0] + [1] * 4
  assert chosen.tokens[1] == 0 and chosen.log_probs[1] == 0
  assert np.isfinite(np.asarray(chosen.log_probs)).all()
  assert np.isfinite(np.asarray(chosen.top_log_probs)).all()
  assert chosen.tokens[2] == np.argmax(TABLE[2])


def test_what_has_no_room_in_a_row_is_refused():
  many = SamplingParams(logit_bias=dict.fromkeys(range(BIAS_WIDTH + 1), 1.0))
  make = lambda sampling=SamplingParams(), **options: slot_row(
    sampling, VOCABULARY, seed=0, limit=1, **options
  )
  with pytest.raises(RequestError, match='logit_bias holds 257 tokens: at most 256 of a row'):
    make(many)
  with pytest.raises(RequestError, match='at most 4 token ids can end a row, got 5'):
    make(end_ids=[1, 2, 3, 4, 5])
  with pytest.raises(RequestError, match='at most 5 of the most likely tokens'):
    make(top=6, top_width=5)
  with pytest.raises(RequestError, match='logit_bias forbids all 3 tokens'):
    stack_params([SamplingParams(logit_bias=dict.fromkeys(range(3), -np.inf))], 3)
  assert make(end_ids=[7, -1, 7]).end_ids.tolist() == [[7, -1, -1, -1]]


def test_logits_stay_where_they_are():
  """Over eight devices that split the rows: no collective carries logits or the history, and no
  conditional copies them on the way of a batch that uses nothing.
  """
  mesh = make_mesh((2, 2, 2))
  model = Model(preset('palm_tiny'), mesh, *[Layout.parse('ws_2d/batch')] * 2, 'float32', None)
  whole = NamedSharding(mesh, P())
  rows = jax.device_put(slots_of([SamplingParams()] * ROWS, [[]] * ROWS), whole)
  state = start(rows, PROMPTS, LENGTHS, vocab_size=VOCABULARY)
  shardings = state_shardings(model, state)
  assert len(shardings.history.spec[0]) == 3
  state = jax.device_put(state, shardings)

  def run(rows, state, logits, positions):
    new, chosen = advance(rows, state, logits, positions, model)
    return jax.lax.with_sharding_constraint(new, shardings), chosen

  logits = jax.device_put(TABLE[:ROWS], shardings.history)
  text = (
    jax.jit(run, donate_argnums=1)
    .lower(rows, state, logits, jnp.asarray(LENGTHS))
    .compile()
    .as_text()
  )
  local = rf'\[1,{VOCABULARY}\]'
  sent = re.findall(r' = (.*) (?:all-gather|all-reduce|all-to-all|collective-permute)\(', text)
  assert 1 <= len(sent) <= 4 and not any(str(VOCABULARY) in shape for shape in sent), sent
  copies = [line for line in text.split('\n') if re.search(rf'{local}\S* copy\(', line)]
  # Where a batch has a bias, a penalty or min_new_tokens: greedy batches of none copy nothing.
  assert len(copies) <= 2, copies
  assert not re.search(rf'\[{ROWS},{VOCABULARY}\]', text)


def test_end_ids_and_biases_are_each_row_s_own():
  """Up to four ids end a row; a row may have none. Nothing but the row's own ids ends it."""
  params = [SamplingParams(), SamplingParams(), SamplingParams(min_new_tokens=1)]
  rows = slots_of(params, [[9, 4, 6], [], [6]])
  state = start(rows, PROMPTS, LENGTHS, vocab_size=VOCABULARY)
  logits = jnp.tile(jax.nn.one_hot(6, VOCABULARY) * 9 + jax.nn.one_hot(8, VOCABULARY), (ROWS, 1))
  state, chosen = step(rows, state, logits, jnp.asarray(LENGTHS))
  assert chosen.tokens[:3].tolist() == [6, 6, 8]
  assert state.ended[:3].tolist() == [True, False, False]


@pytest.mark.parametrize('options', [{}, dict(temperature=1e-4), dict(temperature=1e-4, top_k=2)])
def test_huge_biases_keep_their_order(options):
  """Float32 numbers near 1e9 are 64 apart: the exact sums decide, also when both are sampled."""
  logits = np.zeros((ROWS, VOCABULARY), np.float32)
  logits[0, [3, 16, 20]] = 1.0, 1.25, 5.0
  sampling = SamplingParams(logit_bias={3: 1e9, 16: 1e9}, **options)
  rows = slots_of([sampling], [[]])
  state = start(rows, PROMPTS, LENGTHS, vocab_size=VOCABULARY)
  _, chosen = step(rows, state, jnp.asarray(logits), jnp.asarray(LENGTHS))
  assert chosen.tokens[0] == 16
