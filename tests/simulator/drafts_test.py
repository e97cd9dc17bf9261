"""Drafts in virtual time: the choice of the compiled steps, latencies by hand, real programs."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.engine.draft_model import DraftModel
from t5x_inference_ext.engine.draft_width import best_width
from t5x_inference_ext.engine.drafting import DraftState, Outlook, note_acceptance
from t5x_inference_ext.engine.executor import DeviceExecutor
from t5x_inference_ext.engine.open_drafter import OpenDrafter
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.step_prices import StepPrices
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.planner.drafts import tokens_of_step
from t5x_inference_ext.simulator.clock import VirtualClock
from t5x_inference_ext.simulator.drafts import SimulatedDrafts
from t5x_inference_ext.simulator.executor import ClockExecutor
from t5x_inference_ext.simulator.prices import PricedProgram, PriceTable
from t5x_inference_ext.simulator.simulate import simulate
from t5x_inference_ext.speculation import Speculation, parse_acceptance
from tests import memory, reference
from tests.simulator.service_test import (
  CHUNK,
  INSERT,
  LARGEST,
  MODEL,
  STEP,
  Watched,
  arrivals,
  config,
  prices,
  watched_run,
)

NGRAM = Speculation('ngram', 4)


def drafted_prices(times: float) -> PriceTable:
  """A step that checks drafts takes `times` plain ones."""
  sizes = {'draft': 4, 'read': LARGEST, 'read_shared': LARGEST}
  return prices(more=[PricedProgram('speculative_steps', sizes, times * STEP)])


def test_numpy_chooses_as_jax():
  rng, seen = np.random.default_rng(0), set()
  for _ in range(40):
    checked = rng.uniform(1, 9, (3, 2, 1))
    counts = np.concatenate([checked * rng.uniform(0, 1, checked.shape), checked], axis=2)
    usual = counts.mean(axis=0)
    state = DraftState(*(x.astype(np.float32) for x in (np.zeros((3, 0)), counts, usual)))
    outlook = Outlook(*(rng.integers(low, 5, 3).astype(np.int32) for low in (0, 4, 0, 0)))
    outlook = outlook._replace(grades=rng.integers(0, 2, 3).astype(np.int32))
    asked = np.float32([1, *rng.uniform(1, 2, 2)]), state, outlook
    live = np.asarray([True, True, rng.random() < 0.5])
    asked = (*asked, rng.integers(1, 30, 3), live, np.bool_(rng.random() < 0.5))
    found, on_devices = int(best_width((0, 2, 4), *asked)), jax.tree.map(jnp.asarray, asked)
    assert found == best_width((0, 2, 4), *on_devices)
    seen.add(found)
    new = outlook.grades, *(rng.integers(0, 3, 3).astype(np.int32) for _ in range(2))
    ours, theirs = (
      note_acceptance(*each) for each in ((state, *new), jax.tree.map(jnp.asarray, (state, *new)))
    )
    np.testing.assert_allclose(ours.seen, theirs.seen, rtol=1e-5)
    np.testing.assert_allclose(ours.usual, theirs.usual, rtol=1e-5)
  assert seen == {0, 1, 2}


def test_a_draft_that_is_always_right_gives_five_tokens_a_step():
  """A token comes with the insertion, 3 with plain steps that are measured, 10 with two drafts."""
  rows = arrivals((0, 16, 14))
  found = simulate(MODEL, config(speculate=NGRAM), drafted_prices(1.2), rows, acceptance=[1.0])
  assert found.seconds == pytest.approx(CHUNK + INSERT + (3 + 2 * 1.2) * STEP)
  drafts = found.drafts
  assert (drafts.row_steps, drafts.generated, drafts.drafted, drafts.accepted) == (5, 13, 8, 8)


def test_tokens_a_step_follow_the_acceptance():
  """Acceptance counts tokens after right ones; nearly all steps check whole drafts."""
  rows = arrivals(*[(0, 16, 64)] * 24)
  sizes = config(8, speculate=NGRAM, max_length=160)
  for acceptance, mean in (((0.7,), tokens_of_step(0.7, 4)), ((1, 0.5), 2 + 0.5 + 0.25 + 0.125)):
    found = simulate(MODEL, sizes, drafted_prices(1.0), rows, acceptance=acceptance)
    assert found.tokens == 24 * 64
    assert found.drafts.tokens_per_step == pytest.approx(mean, rel=0.1)


def test_drafts_that_do_not_pay_are_hardly_checked():
  """The scheduler learns what the steps take, in virtual time, and how often drafts are right."""
  rows = arrivals(*[(0, 16, 96)] * 6)
  sizes = config(2, speculate=NGRAM)
  plain = simulate(MODEL, config(2), prices(), rows)
  for times, acceptance in ((6.0, 1.0), (2.0, 0.3)):
    found = simulate(MODEL, sizes, drafted_prices(times), rows, acceptance=[acceptance])
    assert found.seconds < 1.05 * plain.seconds
    assert found.tokens == plain.tokens
  gaining = simulate(MODEL, sizes, drafted_prices(2.0), rows, acceptance=[0.9])
  assert gaining.seconds < 0.7 * plain.seconds


@pytest.mark.parametrize('acceptance, least', [(0.3, 0.95), (0.5, 0.95), (0.8, 1.3)])
def test_rows_that_end_together_lose_at_most_five_percent(acceptance, least):
  """Eight rows in eight slots, again and again: none waits, and the last one decides."""
  speculate, sizes = Speculation('ngram', 8), {'read': LARGEST, 'read_shared': LARGEST}
  kinds = [
    PricedProgram('speculative_steps', {'draft': draft, **sizes}, times * STEP)
    for draft, times in ((3, 1.5), (8, 2.3))
  ]
  spent = []
  for options in ({}, {'speculate': speculate}):
    rows, clock = config(8, decode_steps=16, **options), VirtualClock()
    executor = ClockExecutor(MODEL, rows, prices(more=kinds), clock, 1, [acceptance])
    scheduler = Scheduler(MODEL, None, rows, executor=executor)
    for _ in range(12):
      for _ in range(8):
        scheduler.submit(Request((5,), limit=32))
      while not scheduler.idle:
        scheduler.step()
    spent.append(clock.now() - 12 * 8 * (CHUNK + INSERT))
  assert spent[0] == pytest.approx(12 * 31 * STEP)
  assert least < spent[0] / spent[1]


def test_steps_are_timed_while_rows_wait():
  """Also those that follow an insertion, but not those that follow a chunk of a prompt."""
  added, programs = [], []
  add, steps = StepPrices.add, ClockExecutor.decode_steps
  with (
    mock.patch.object(StepPrices, 'add', lambda self, *a: (added.append(a), add(self, *a))),
    mock.patch.object(
      ClockExecutor, 'decode_steps', lambda self, *a: (programs.append(a), steps(self, *a))[1]
    ),
  ):
    rows = arrivals(*[(0, 16, 8 + i) for i in range(24)])
    sizes = config(4, speculate=NGRAM, decode_steps=4)
    simulate(MODEL, sizes, drafted_prices(1.5), rows, acceptance=[0.8])
  assert len(added) > 0.8 * len(programs) > 10
  for seconds, passes in added:  # exactly: no other program's time is counted
    assert seconds == pytest.approx(STEP * (passes @ [1, 1.5, 1.5]))


def test_an_acceptance_is_asked_for():
  with pytest.raises(RequestError, match=r'how often drafts \(ngram:4\) are right: give --accept'):
    simulate(MODEL, config(speculate=NGRAM), prices(), arrivals((0, 16, 4)))
  assert parse_acceptance('0.4,0.8') == (0.4, 0.8)
  for text in ('', 'x', '1.1', '0.5,-1', 'nan'):
    with pytest.raises(RequestError, match='acceptance must be probabilities from 0 to 1'):
      parse_acceptance(text)


def test_a_plain_step_shows_whether_an_ngram_would_be_right():
  """And not whether a draft model's token would be: nothing drafts it."""
  never = np.asarray([1, 1e6, 1e6], np.float32)
  for kind, learned in (('ngram', 0.95), ('draft', 0.475)):
    drafts = SimulatedDrafts(Speculation(kind, 4), (0.95, 0.0), 1)
    drafts._state = dataclasses.replace(drafts._state, usual=np.float32([[1.9, 4.0]]))
    drafts.enter(0)
    for _ in range(100):
      assert drafts.step(never, np.asarray([50]), True).drafted == 0
    right, checked = drafts._state.seen[0, 0]
    assert right / checked == pytest.approx(learned, abs=0.15)


@pytest.mark.usefixtures('quick_programs')
def test_the_devices_would_check_the_same_drafts():
  """A model that drafts for itself is always right: the same steps, whether they run or not."""
  engine = memory.engine(memory.ODD, reference.random_tensors(memory.ODD), '1x1x1', stacked=True)
  sizes = SchedulerConfig(
    3,
    96,
    page_size=32,
    prefill_chunk=16,
    end_ids=(),
    page_reads=1,
    decode_steps=3,
    speculate=Speculation('draft', 4, 'itself'),
  )
  requests = [Request((1, 2, 3) * n, seeds=(n,), limit=9 * n) for n in (3, 5, 2, 4, 1)]
  drafter = OpenDrafter(DraftModel(engine.model, 4), engine.weights)
  device = DeviceExecutor(engine.model, engine.weights, sizes, drafter)
  clock = ClockExecutor(engine.model, sizes, drafted_prices(1.2), VirtualClock(), 1, [1.0])
  constant, runs = np.asarray([1, 1.2, 1.3], np.float32), []
  for executor in (device, clock):
    scheduler = Scheduler(engine.model, None, sizes, executor=Watched(executor))
    scheduler._decoder._prices = mock.Mock(tries_plain=False, next=lambda: constant)
    runs.append(watched_run(scheduler, requests))
    assert sum(runs[-1][1].values()) == sum(request.limit for request in requests)
  assert runs[0] == runs[1]
  assert runs[0][2].drafts.tokens_per_step > 3
