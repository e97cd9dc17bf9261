"""The bound of the benchmark of drafts."""

import pytest

from benchmarks.draft_sides import TimedExecutor, least_time, right_shares, right_tokens
from t5x_inference_ext.engine.ngram_drafts import NgramDrafter
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.simulator.clock import VirtualClock
from t5x_inference_ext.simulator.executor import ClockExecutor
from tests.simulator.service_test import CHUNK, INSERT, MODEL, STEP, config, prices


def test_right_tokens_follow_the_longest_match():
  """After 7 8 came 9 5; later 9 6. Each answer continues a match, or no token of it."""
  prompt, answer = [1, 7, 8, 9, 5, 3], [7, 8, 9, 6, 4]
  # After 7: 8 9 of the draft 8 9 5. After 7 8: 9. After 9: not 5. After 6, no match.
  assert right_tokens(NgramDrafter(3), prompt, answer) == [2, 1, 0, 0]


def test_shares_are_of_tokens_after_right_ones():
  assert right_shares([0, 1, 3, 3], 3) == [3 / 4, 2 / 3, 1]
  assert right_shares([0, 0], 2) == [0, 0]


def test_a_row_that_knows_its_answer_takes_the_cheapest_steps():
  """Four tokens are left, of which a draft has two right: one step of them and two plain ones."""
  assert least_time([2, 1, 0, 0], (0, 3), (1.0, 1.5)) == 2.5
  assert least_time([2, 1, 0, 0], (0, 3), (1.0, 9.0)) == 4
  assert least_time([3, 0, 0, 0], (0, 1, 3), (1.0, 1.1, 1.2)) == 1.2
  assert least_time([], (0, 3), (1.0, 1.5)) == 0


def test_only_decode_steps_are_timed():
  """In virtual time, with requests that wait: neither chunks nor insertions count."""
  runs = TimedExecutor(ClockExecutor(MODEL, sizes := config(2), prices(), VirtualClock(), 2**20))
  scheduler = Scheduler(MODEL, None, sizes, executor=runs)
  for new in (5, 9, 4):
    scheduler.submit(Request((1,) * 16, limit=new))
  while not scheduler.idle:
    scheduler.step()
  assert runs.now() > runs.seconds + 3 * (CHUNK + INSERT) - 0.01
  # The third row takes the slot of the first after four steps.
  assert runs.seconds == pytest.approx(8 * STEP)
