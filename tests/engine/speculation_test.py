"""Drafts: where they come from, when they are checked, and that no token differs with them."""

import dataclasses
import functools
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.engine import drafting, open_drafter
from t5x_inference_ext.engine.draft_model import CATCH_UP_TOKENS, DraftModel, load_draft_model
from t5x_inference_ext.engine.draft_width import best_width, verify_widths
from t5x_inference_ext.engine.drafting import Outlook
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.executor import DeviceExecutor
from t5x_inference_ext.engine.ngram_drafts import NgramDrafter
from t5x_inference_ext.engine.open_drafter import OpenDrafter
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.serve import serve
from t5x_inference_ext.engine.step_prices import AGREE_EVERY, PLAIN_EVERY, TOO_MUCH, StepPrices
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.speculation import Speculation, parse_speculation
from t5x_inference_ext.text.grammar import Grammar
from tests import memory, reference
from tests.engine.scheduler_test import sizes_of_programs
from tests.text.vocabularies import Characters

pytestmark = pytest.mark.usefixtures('quick_programs')
CONFIG = memory.ODD
TENSORS = reference.random_tensors(CONFIG, seed=1)
MOST = 4
SIZES = dict(slots=3, max_length=96, page_size=32, page_reads=1, prefill_chunk=16)
# Few tokens, so that what came before comes again also at temperature 1.
FEW = {5: 30.0, 9: 30.0, 77: 30.0}
NGRAM = NgramDrafter(MOST)
SAMPLINGS = (
  SamplingParams(),
  SamplingParams(1.0, logit_bias=FEW),
  SamplingParams(0.7, top_k=5),
  SamplingParams(1.5, top_p=0.9, logit_bias=FEW),
  SamplingParams(
    0.5, logit_bias=FEW, repetition_penalty=1.3, frequency_penalty=0.5, min_new_tokens=9
  ),
  SamplingParams(1.0, logit_bias={**FEW, 1: 28.0}, presence_penalty=0.3, stop=((9, 77), (5, 5, 5))),
)


@dataclasses.dataclass(frozen=True)
class Worst(NgramDrafter):
  """Drafts tokens that are wrong, or outside the vocabulary, after one that may be right."""

  def draft(self, inputs, outlook, width):
    _, draft = super().draft(inputs, outlook, width)
    return None, jnp.where(jnp.arange(width)[None, :] % 3 == 1, 1000, draft)


@functools.cache
def engine(mesh='1x1x1', cache=None):
  return memory.engine(CONFIG, TENSORS, mesh, stacked=True, cache=cache)


def scheduler(
  prices=None, drafter=NGRAM, mesh='1x1x1', cache=None, vocabulary=None, weights=None, **sizes
):
  """A scheduler whose steps have these prices, whatever is measured; None: without drafts."""
  found = engine(mesh, cache)
  sizes = {**SIZES, **sizes}
  speculate = prices and Speculation('ngram', MOST)
  config = SchedulerConfig(**{'end_ids': (1,), 'speculate': speculate, **sizes})
  opened = OpenDrafter(drafter, weights) if prices else None
  runs = DeviceExecutor(found.model, found.weights, config, opened)
  core = Scheduler(found.model, found.weights, config, vocabulary=vocabulary, executor=runs)
  if prices is not None:
    core._decoder._prices = fixed(prices)
  return core


def fixed(prices):
  """Prices that stay."""
  assert len(prices) == 1 + len(verify_widths(MOST))
  return mock.Mock(tries_plain=False, next=lambda: np.asarray(prices, np.float32))


def requests(samplings=SAMPLINGS, **options):
  rng = np.random.default_rng(0)
  return [
    Request(
      (0, *rng.choice([5, 9, 77], int(rng.integers(1, 40))).tolist()),
      (i, i + 100)[: 1 + i % 2],
      int(rng.integers(1, 50)),
      sampling,
      **options,
    )
    for i, sampling in enumerate(samplings)
  ]


def rows_of(core, asked):
  """(tokens, log-probabilities, finish reason) by request and sample."""
  rows = {}
  for event in serve(core, asked):
    row = rows.setdefault((event.request, event.sample), ([], [], [], []))
    for kept, new in zip(row, (event.tokens, event.log_probs, event.top)):
      kept.extend(new)
    row[3].append(event.finish)
  assert core.check_books() == []
  assert all(ends[:-1] == [None] * (len(ends) - 1) and ends[-1] for *_, ends in rows.values())
  return {key: (*row[:3], row[3][-1]) for key, row in rows.items()}


def assert_same(found, wanted):
  assert found.keys() == wanted.keys() and wanted
  for key, (tokens, log_probs, top, finish) in wanted.items():
    assert (found[key][0], found[key][3]) == (tokens, finish), key
    np.testing.assert_allclose(found[key][1], log_probs, atol=1e-4)
    assert [[i for i, _ in each] for each in found[key][2]] == [[i for i, _ in e] for e in top]


@functools.cache
def plain(mesh='1x1x1', cache=None):
  return rows_of(scheduler(mesh=mesh, cache=cache, top_log_probs=2), asked())


def asked():
  return requests(top_log_probs=2)


# Prices at which drafts are always checked, at most two tokens of each or all of them, or never.
TWO, ALL, NEVER = (1e6, 1.0, 1e6), (1e6, 1e6, 1.0), (1.0, 1e6, 1e6)


@pytest.mark.parametrize(
  'prices, drafter, sizes',
  [
    (ALL, NGRAM, {}),
    (TWO, NGRAM, {'decode_steps': 5}),
    (NEVER, NGRAM, {'decode_steps': 5}),
    (ALL, Worst(MOST), {'decode_steps': 2, 'pages': 6}),  # rows are preempted
  ],
  ids=['all', 'two', 'never', 'wrong'],
)
def test_tokens_are_those_without_drafts(prices, drafter, sizes):
  """With temperatures, bias, penalties, ends, stops, limits, samples and most likely tokens."""
  core = scheduler(prices, drafter, top_log_probs=2, **sizes)
  assert_same(rows_of(core, asked()), plain())
  stats = core.stats
  assert stats.drafts.generated == stats.generated
  if prices is NEVER:
    assert stats.drafts.drafted == stats.drafts.accepted == 0
    assert stats.drafts.tokens_per_step == 1
  else:
    assert 0 < stats.drafts.accepted < stats.drafts.drafted
    assert stats.drafts.row_steps + stats.drafts.accepted >= stats.generated
    assert stats.drafts.tokens_per_step > 1.2
  assert (stats.preempted > 0) == ('pages' in sizes)


def test_tokens_are_those_without_drafts_on_a_mesh_with_an_int8_cache():
  core = scheduler(ALL, mesh='2x2x1', cache='int8', slots=4, top_log_probs=2)
  assert_same(rows_of(core, asked()), plain(cache='int8'))
  assert core.stats.drafts.accepted > 20


def test_rows_with_a_grammar_have_drafts_as_others_have():
  """And all programs are those of warm_up."""
  asked = [
    Request((0, 5, 6), (1,), 30, grammar=Grammar('regex', '[a-z]{3,8}(-[0-9]{1,4})*')),
    *requests(SAMPLINGS[:2]),
  ]
  core = scheduler(ALL, vocabulary=Characters())
  done = core.warm_up()
  assert core.config.programs_text(1, grammars=True).startswith(f'{len(done)}: ')
  compiled = sizes_of_programs()
  core._decoder._masked.prices = fixed(ALL)
  found = rows_of(core, asked)
  assert sizes_of_programs() == compiled
  assert core.stats.drafts.accepted > 0
  assert_same(found, rows_of(scheduler(vocabulary=Characters()), asked))


def test_a_step_gives_tokens_up_to_the_limit_and_one_that_is_cancelled_none():
  core = scheduler(ALL)
  handles = [core.submit(Request((0, *[5] * 20), (0,), 30, SAMPLINGS[1])) for _ in range(2)]
  tokens = {h.index: [] for h in handles}
  for step in range(100):
    if step == 4:
      core.cancel(handles[1])
    for event in core.step():
      tokens[event.request] += event.tokens
    if core.idle:
      break
  assert core.check_books() == []
  assert len(tokens[0]) == 30 and len(tokens[1]) < 30
  assert tokens[0][: len(tokens[1])] == tokens[1]


def test_a_draft_model_guesses_the_sample():
  """The model itself, as its own draft model, is right at every temperature, and after refills.

  Prompts are longer than a chunk of the draft model, and preempted rows come back.
  """
  found = engine()
  core = scheduler(
    ALL, DraftModel(found.model, MOST), weights=found.weights, top_log_probs=2, pages=6
  )
  tempered = [s for s in SAMPLINGS if not s.penalizes]
  long = [
    dataclasses.replace(each, tokens=(0, *[5, 9, 77] * (CATCH_UP_TOKENS // 2)), limit=40 + i)
    for i, each in enumerate(requests(tempered, top_log_probs=2))
  ]
  assert_same(rows_of(core, long), rows_of(scheduler(top_log_probs=2), long))
  stats = core.stats
  assert stats.preempted > 0
  # Only a row's end, or a tie that rounding decides, makes a draft's token wrong.
  assert stats.drafts.accepted > 0.9 * stats.drafts.drafted > 100
  assert stats.drafts.tokens_per_step > 3


def test_another_draft_model_changes_no_token():
  """With unrolled layers, on a mesh, and its most likely tokens as drafts."""
  other = memory.engine(
    memory.ODD, reference.random_tensors(memory.ODD, seed=2), '2x2x1', stacked=False
  )
  drafter = DraftModel(other.model, MOST, shared_noise=False)
  sizes = dict(mesh='2x2x1', slots=4, top_log_probs=2, decode_steps=3)
  core = scheduler(ALL, drafter, weights=other.weights, **sizes)
  assert_same(rows_of(core, asked()), plain())
  assert core.stats.drafts.accepted < core.stats.drafts.drafted / 2


def test_a_draft_model_of_another_vocabulary_is_refused(testdata):
  path = str(testdata / 'palm_unscanned' / 'checkpoint_0')
  with pytest.raises(RequestError, match=f'{path} has a vocabulary of 384 tokens, and the model'):
    load_draft_model(path, engine().model)


def test_an_engine_reads_a_draft_model_once(palm_tiny):
  """Also if rows get longer, drafts shorter, or other drafts come between."""
  found, prompt = Engine.load(palm_tiny, mesh='1x1x1', dtype='float32'), [list(b'of the')]
  loaded = mock.Mock(side_effect=load_draft_model)
  tokens, schedulers = set(), []
  with mock.patch.object(open_drafter, 'load_draft_model', loaded):
    for speculate, length in [
      (f'draft:{palm_tiny}:3', 32),
      (f'draft:{palm_tiny}:3', 64),
      ('ngram:2', 64),
      (f'draft:{palm_tiny}:2', 64),
    ]:
      options = dict(slots=1, max_length=length, speculate=speculate)
      (samples,) = found.complete(prompt, max_new_tokens=12, **options)
      tokens.add(tuple(samples[0].tokens))
      schedulers.append(found.core.streams(**options).scheduler)
  assert loaded.call_count == 1 and len(tokens) == 1
  assert len(set(map(id, schedulers))) == 4


def longest_match(tokens, last, longest):
  """(length, place) of the longest match of the tokens up to `last`, and of those the latest."""
  found = 0, 0
  for place in range(last):
    length = 0
    while length < min(longest, place + 1) and tokens[place - length] == tokens[last - length]:
      length += 1
    found = max(found, (length, place))
  return found


def test_a_draft_is_what_followed_the_longest_match():
  rng = np.random.default_rng(0)
  rows, size, drafter = 60, 24, NgramDrafter(5, longest=4)
  tokens = rng.integers(0, 3, (rows, size)).astype(np.int32)
  tokens[0] = np.arange(size)  # no match
  last = rng.integers(0, size, rows).astype(np.int32)
  last[:3] = 10, 0, size - 1
  outlook = drafter.outlook(jnp.asarray(tokens), jnp.asarray(last))
  state = drafting.DraftState(jnp.asarray(tokens), jnp.zeros(0), jnp.zeros(0))
  inputs = drafting.DraftInputs(None, None, None, state, jnp.asarray(last))
  draft = np.asarray(drafter.draft(inputs, outlook, 5)[1])
  matched = 0
  for row in range(rows):
    length, place = longest_match(tokens[row].tolist(), int(last[row]), 4)
    assert outlook.counts[row] == (5 if length else 0)
    if not length:
      assert outlook.first[row] == -1
      continue
    matched += 1
    followed = tokens[row, place + 1 : last[row] + 1].tolist()
    assert draft[row].tolist() == (followed * 5)[:5]
    assert outlook.first[row] == followed[0] and outlook.grades[row] == min(length, 4) - 1
  assert 40 < matched < rows


def test_expected_tokens_follow_what_was_accepted():
  """A row's own latest drafts decide; for a row without any, those of all rows do."""
  drafter = NgramDrafter(3, expected=(0.5, 0.25))
  state = drafting.empty_drafting(drafter, None, 2, 8)
  ints = lambda *values: jnp.asarray(values, jnp.int32)
  both = Outlook(ints(3, 1), ints(0, 1), ints(0, 0), ints(0, 0))
  live, first = jnp.asarray([True, True]), jnp.asarray([True, False])
  expected = lambda state, width, rows: float(
    drafting.expected_tokens(state, both, width)[rows].sum()
  )
  assert expected(state, 0, live) == 2
  assert np.isclose(expected(state, 2, live), (1 + 0.5 + 0.25) + (1 + 0.25))
  assert np.isclose(expected(state, 3, first), 1.875)
  for _ in range(50):  # the first row accepts all, the second had nothing to check
    state = drafting.note_acceptance(state, ints(0, 0), ints(2, 0), ints(2, 0))
  rate = drafting.HIGHEST_RATE
  assert np.isclose(expected(state, 2, first), 1 + rate + rate**2)
  assert np.isclose(expected(state, 2, ~first), 1.25)
  for _ in range(3):
    state = drafting.note_acceptance(state, ints(0, 1), ints(0, 0), ints(4, 4))
  assert expected(state, 1, first) < 1.6 and expected(state, 1, ~first) < 1.1
  usual = (state.usual[:, 0] / state.usual[:, 1]).tolist()
  assert 0.6 < usual[0] < 0.95 and 0.05 < usual[1] < 0.15
  entered = drafting.enter_drafting(
    drafter, state, jnp.int32(0), jnp.asarray([[7, 8, 0]]), jnp.int32(2), ints(9)
  )
  assert entered.tokens.tolist() == [[7, 8, 9, 0, 0, 0, 0, 0], [0] * 8]
  assert np.isclose(expected(entered, 1, first), 1 + usual[0])
  for _ in range(2000):  # nothing is checked any more
    state = drafting.note_acceptance(state, ints(0, 1), ints(0, 0), ints(0, 0))
  assert np.isclose(expected(state, 1, live), 2 + sum(usual[:2]), atol=1e-2)
  assert np.isclose(usual[2], drafting.FORCED_RATE)  # of text that grammars force: none here


def test_the_width_suits_rows_that_wait_or_the_last_row():
  """One row accepts drafts, and another has none: together they gain, and the other would lose."""
  drafter = NgramDrafter(4, expected=(0.9,))
  state = drafting.empty_drafting(drafter, None, 2, 8)
  ints = lambda *values: jnp.asarray(values, jnp.int32)
  live, prices = jnp.asarray([True, True]), jnp.asarray([1.0, 1.2, 1.5])
  for counts, left, waited, wanted in [
    ((4, 0), (20, 20), True, 2),
    ((4, 0), (20, 20), False, 0),
    ((4, 0), (90, 20), False, 2),
    ((4, 4), (20, 20), False, 2),
    ((1, 1), (20, 20), True, 1),
    ((0, 0), (20, 20), True, 0),
  ]:
    outlook = Outlook(ints(*counts), ints(0, 0), ints(0, 0), ints(0, 0))
    index = best_width((0, 2, 4), prices, state, outlook, ints(*left), live, jnp.asarray(waited))
    assert index == wanted, (counts, left, waited)


def test_prices_follow_measured_times():
  """Prices come from programs that mix kinds of steps; outliers and untried kinds are forgotten."""
  rng = np.random.default_rng(0)
  true, prices = np.asarray([0.05, 0.09, 0.3]), StepPrices((0, 3, 8))
  np.testing.assert_allclose(prices.prices, [1, 1.06, 1.16])
  for i in range(120):
    passes = rng.integers(0, 9, 3) if i > 3 else np.asarray([5, 3, 0])
    prices.add(float(passes @ true) * (10 if i == 30 else rng.normal(1, 0.03)), passes)
  np.testing.assert_allclose(prices.prices, true / true[0], rtol=0.1)
  for _ in range(600):
    prices.add(0.05, np.asarray([1, 0, 0]))
  np.testing.assert_allclose(prices.prices, [1, 1.06, 1.16], rtol=0.1)


def test_a_machine_that_slows_down_changes_no_price():
  """One program in five checks drafts in four steps; the machine is slower a third of the time."""
  rng = np.random.default_rng(0)
  true, prices = np.asarray([1, 1.5, 2.3]), StepPrices((0, 3, 8))
  for i in range(400):
    passes = np.asarray([[16, 0, 0], [12, 4, 0], [12, 0, 4]])[rng.choice(3, p=(0.8, 0.1, 0.1))]
    slowness = 1.4 if i // 10 % 3 == 1 else 1.0
    prices.add(0.03 * float(passes @ true) * slowness, passes)
  np.testing.assert_allclose(prices.prices, true, rtol=0.1)


def test_plain_steps_are_measured_first_and_now_and_then():
  """Else the first steps that check drafts would be the only ones, however long they take."""
  prices = StepPrices((0, 3, 8))
  forbidden = [1, TOO_MUCH, TOO_MUCH]
  assert prices.next().tolist() == forbidden
  prices.add(0.3, np.asarray([0, 1, 0]))
  assert prices.next().tolist() == forbidden
  prices.add(0.1, np.asarray([1, 0, 0]))
  found = [prices.next().tolist() == forbidden for _ in range(2 * PLAIN_EVERY)]
  assert found.count(True) == 2
  assert prices.prices[1] > 2


def test_several_processes_take_the_prices_of_the_first():
  main, other, sent = StepPrices((0, 3)), StepPrices((0, 3)), []

  class Sent:
    def next(self, make):
      sent.append(make())
      return sent[-1]

  class Received:
    def next(self, make):
      return sent[-1]

  main._messages, other._messages = Sent(), Received()
  for i in range(3 * AGREE_EVERY):
    main.add(0.1 + 0.01 * (i % 2), np.asarray([1, i % 2]))
    np.testing.assert_array_equal(main.next(), other.next())
  assert len(sent) == 3
  assert main.next()[1] == main.prices[1] != other.prices[1]


def test_options_are_parsed():
  assert parse_speculation('ngram:8') == Speculation('ngram', 8)
  assert parse_speculation('draft:gs://a/b:4') == Speculation('draft', 4, 'gs://a/b')
  for text in ('ngram:8', 'draft:gs://a/b:4'):
    assert str(parse_speculation(text)) == text
  for text in (
    'ngram',
    'ngram:',
    'ngram:x',
    'other:3',
    'ngram:-1',
    'ngram:²',
    'draft:4',
    'ngram:a:4',
  ):
    with pytest.raises(RequestError, match='speculate must be ngram:N or draft:DIR:N, such as'):
      parse_speculation(text)
  for text in ('ngram:0', 'ngram:17'):
    with pytest.raises(RequestError, match=f'a draft has 1 to 16 tokens, got speculate={text}'):
      parse_speculation(text)
