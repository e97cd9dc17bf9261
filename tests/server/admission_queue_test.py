import pytest

from t5x_inference_ext.server.admission_queue import FairQueue, WaitingBounds
from t5x_inference_ext.server.api_errors import ApiError
from tests.server.rates_test import Clock


def _refused(bounds, sizes):
  with pytest.raises(ApiError) as error:
    bounds.enter(sizes)
  return error.value


class TestBounds:
  def test_of_requests(self):
    bounds = WaitingBounds(3, 1000, Clock())
    bounds.enter([1, 1])
    error = _refused(bounds, [1, 1])
    assert error.status == 429 and error.headers == {'retry-after': '1'}
    assert (bounds.waiting, bounds.tokens) == (2, 2)  # all or none
    bounds.enter([1])
    bounds.leave(1, served=False)
    bounds.enter([1])

  def test_of_tokens(self):
    bounds = WaitingBounds(10, 100, Clock())
    bounds.enter([60])
    assert _refused(bounds, [41]).status == 429
    bounds.enter([40])

  def test_one_prompt_may_always_wait(self):
    bounds = WaitingBounds(10, 100, Clock())
    bounds.enter([500])
    assert _refused(bounds, [1]).status == 429

  def test_what_never_fits_is_told(self):
    error = _refused(WaitingBounds(3, 100, Clock()), [1] * 4)
    assert error.status == 400 and error.param == 'prompt'

  def test_the_wait_follows_from_the_measured_rates(self):
    clock = Clock()
    bounds = WaitingBounds(8, 10_000, clock)
    for _ in range(20):  # one prompt of 50 tokens each 2 s
      bounds.enter([50])
      clock.time += 2
      bounds.leave(50, served=True)
    bounds.enter([50] * 8)
    assert _refused(bounds, [50]).headers['retry-after'] == '2'
    assert _refused(bounds, [50] * 4).headers['retry-after'] == '8'
    tokens = WaitingBounds(1000, 10_000, clock)
    for _ in range(20):
      tokens.enter([50])
      clock.time += 2
      tokens.leave(50, served=True)
    tokens.enter([9_900])
    assert int(_refused(tokens, [600]).headers['retry-after']) in (20, 21)  # 500 at 25 a second

  def test_prompts_that_were_given_up_are_no_rate(self):
    clock = Clock()
    bounds = WaitingBounds(1, 100, clock)
    for _ in range(10):
      bounds.enter([1])
      clock.time += 3
      bounds.leave(1, served=False)
    bounds.enter([1])
    assert _refused(bounds, [1]).headers['retry-after'] == '1'


class TestFairQueue:
  def test_clients_take_turns(self):
    queue = FairQueue()
    for i in range(4):
      queue.add('many', f'm{i}')
    queue.add('few', 'f0')
    queue.add('few', 'f1')
    assert queue
    assert [queue.take() for _ in range(6)] == ['m0', 'f0', 'm1', 'f1', 'm2', 'm3']
    assert not queue

  def test_items_can_be_removed(self):
    queue = FairQueue()
    for item in 'abc':
      queue.add('client', item)
    assert queue.remove('client', 'b') and not queue.remove('client', 'b')
    assert not queue.remove('other', 'a')
    assert [queue.take(), queue.take()] == ['a', 'c']
    queue.add('client', 'd')
    assert queue.remove('client', 'd') and not queue
