"""A service in virtual time: latencies by hand, and the programs that the devices would run."""

from collections.abc import Sequence
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh
import pytest

from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.executor import DeviceExecutor
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.sharding.mesh import AXES
from t5x_inference_ext.simulator.clock import VirtualClock
from t5x_inference_ext.simulator.executor import ClockExecutor
from t5x_inference_ext.simulator.prices import NoTime, PricedProgram, PriceTable
from t5x_inference_ext.simulator.service import WaitingLimits
from t5x_inference_ext.simulator.simulate import simulate
from t5x_inference_ext.simulator.trace import Arrival, RandomTrace
from tests import memory, reference

MODEL = Model(memory.ODD, AbstractMesh((1, 1, 1), AXES))
CHUNK, INSERT, STEP, HOST = 0.1, 0.01, 0.02, 0.001
LARGEST = 10**6  # more than any size of a program


def prices(host: float = 0.0, more: Sequence[PricedProgram] = ()) -> PriceTable:
  return PriceTable(
    [
      *more,
      PricedProgram('prefill_chunk', {'tokens': LARGEST, 'read': LARGEST}, CHUNK),
      PricedProgram('insert', {'positions': 1}, INSERT),
      PricedProgram('decode_steps', {'read': LARGEST, 'read_shared': LARGEST}, STEP),
      *(PricedProgram(name, {'blocks': 1}, 0.0) for name in ('start_prefill', 'save_blocks')),
      PricedProgram('start', {}, 0.0),
      PricedProgram('host', {}, host),
    ]
  )


def config(slots: int = 2, **sizes) -> SchedulerConfig:
  return SchedulerConfig(**{'slots': slots, 'max_length': 128, 'end_ids': (), **sizes})


def arrivals(*rows: tuple[float, int, int]) -> list[Arrival]:
  return [Arrival(at, (i + 1,) * length, new) for i, (at, length, new) in enumerate(rows)]


def test_a_request_alone_takes_its_chunk_its_insertion_and_a_step_a_token():
  found = simulate(MODEL, config(), prices(), arrivals((1.5, 16, 4)))
  assert found.first.p50 == pytest.approx(CHUNK + INSERT)
  assert found.between.p50 == pytest.approx(STEP)
  # The last two tokens come together: nothing is left to run while the host reads the first.
  assert (found.gaps.p50, found.gaps.p99) == pytest.approx((STEP, 2 * STEP), rel=0.02)
  assert (found.tokens, found.refused) == (4, 0)
  assert found.seconds == pytest.approx(1.5 + CHUNK + INSERT + 3 * STEP)


def test_who_comes_after_a_pause_waits_until_the_devices_are_awake():
  table = prices(more=[PricedProgram('wake', {}, 0.03)])
  found = simulate(MODEL, config(), table, arrivals((1.5, 16, 4)))
  assert found.first.p50 == pytest.approx(CHUNK + INSERT + 0.03)
  assert found.seconds == pytest.approx(1.5 + CHUNK + INSERT + 3 * STEP + 0.03)
  # At the start nobody waited; the second request finds the devices at work.
  found = simulate(MODEL, config(), table, arrivals((0, 16, 20), (0.2, 16, 1)))
  assert (
    found.first.p50
    == simulate(MODEL, config(), prices(), arrivals((0, 16, 20), (0.2, 16, 1))).first.p50
  )


def test_a_long_prompt_takes_a_chunk_after_the_other():
  found = simulate(MODEL, config(prefill_chunk=16), prices(), arrivals((0, 64, 1)))
  assert found.first.p50 == pytest.approx(4 * CHUNK + INSERT)
  assert math.isnan(found.between.p50)  # one token has none after it


def test_who_finds_no_slot_waits_for_one():
  found = simulate(MODEL, config(slots=1), prices(), arrivals((0, 16, 11), (0.05, 16, 1)))
  # The second request's chunk begins once the first row's last step has been started; its first
  # token is there a chunk and an insertion after that step.
  first_done = CHUNK + INSERT + 10 * STEP
  assert found.first.p99 == pytest.approx(first_done + CHUNK + INSERT - 0.05, rel=0.01)


def test_rows_that_decode_wait_for_the_chunk_of_a_prompt():
  found = simulate(MODEL, config(), prices(), arrivals((0, 16, 20), (0.2, 16, 2)))
  assert found.gaps.p99 > 0.8 * (CHUNK + INSERT + STEP) > 5 * found.gaps.p50


def test_a_host_that_is_slower_than_the_devices_sets_the_pace():
  slow, quick = (
    simulate(MODEL, config(), prices(host), arrivals((0, 16, 64))) for host in (2 * STEP, STEP / 10)
  )
  assert slow.between.p50 == pytest.approx(2 * STEP, rel=0.03)
  assert quick.between.p50 == pytest.approx(STEP, rel=0.03)  # hidden behind the devices' work


def test_cores_that_are_the_devices_too_do_one_thing_at_a_time():
  rows = arrivals((0, 16, 64))
  apart, shared = (
    simulate(MODEL, config(), prices(STEP / 2), rows, shared=shared) for shared in (False, True)
  )
  assert apart.between.p50 == pytest.approx(STEP, rel=0.03)
  assert shared.between.p50 == pytest.approx(1.5 * STEP, rel=0.03)


def test_several_steps_in_one_call_end_where_a_row_does():
  # Nobody waits: calls of 4, 4 and 1 steps. Their tokens come together.
  found = simulate(MODEL, config(decode_steps=4), prices(), arrivals((0, 16, 10)))
  assert found.seconds == pytest.approx(CHUNK + INSERT + 9 * STEP)
  assert found.gaps.p50 == 0 and found.tokens == 10
  # One waits for the only slot: the call ends with the first row, and no later.
  rows = arrivals((0, 16, 3), (0, 16, 3))
  found = simulate(MODEL, config(slots=1, decode_steps=4), prices(), rows)
  assert found.seconds == pytest.approx(2 * (CHUNK + INSERT + 2 * STEP))


def test_more_than_may_wait_is_refused():
  rows = [(0.0, 16, 4)] * 8
  assert simulate(MODEL, config(), prices(), arrivals(*rows)).refused == 0
  assert (
    simulate(MODEL, config(), prices(), arrivals(*rows), WaitingLimits(requests=5)).refused == 3
  )
  tokens = WaitingLimits(tokens=40)  # of two prompts
  found = simulate(MODEL, config(), prices(), arrivals(*rows), tokens)
  assert (found.refused, found.tokens) == (6, 8)


def test_what_prompts_share_is_not_prefilled_again():
  sizes = dict(max_length=256, prefill_chunk=16, prefix_bytes=2**20)
  trace = RandomTrace(6, 128, 3, shared_length=96)
  found, without = (
    simulate(
      MODEL, config(**{**sizes, **more}), prices(), trace.arrivals(0.01, 101), block_bytes=2**12
    )
    for more in ({}, {'prefix_bytes': 0})
  )
  assert without.hit_share == 0 and found.hit_share == pytest.approx(5 * 96 / (6 * 128))
  assert without.first.p50 == pytest.approx(8 * CHUNK + INSERT)
  assert found.first.p50 == pytest.approx(2 * CHUNK + INSERT)


def test_rows_are_preempted_where_pages_run_out():
  rows = arrivals(*[(0.0, 40, 80)] * 4)
  sizes = dict(slots=4, page_size=32)
  assert simulate(MODEL, config(**sizes), prices(), rows).preempted == 0
  found = simulate(MODEL, config(**sizes, pages=9), prices(), rows)
  assert found.preempted > 0 and found.tokens == 4 * 80


@pytest.mark.parametrize('length, pages, most', [(64, None, 4), (96, 5, 3)])
def test_rows_fill_all_slots_if_no_page_can_be_lacking(monkeypatch, length, pages, most):
  """With fewer pages than rows could need, some are kept in reserve for those that decode."""
  alive, steps = [], ClockExecutor.decode_steps

  def decode_steps(self, pages, mask, *rest):
    alive.append(int(mask.sum()))
    return steps(self, pages, mask, *rest)

  monkeypatch.setattr(ClockExecutor, 'decode_steps', decode_steps)
  rows = arrivals(*[(0.0, 40, 20)] * 8)
  sizes = config(slots=4, max_length=length, page_size=64, pages=pages)
  simulate(MODEL, sizes, prices(), rows)
  assert max(alive) == most


def test_a_request_that_does_not_fit_is_refused_with_its_sizes():
  with pytest.raises(RequestError, match='200 tokens, BOS included, and 4 new ones do not fit'):
    simulate(MODEL, config(), prices(), arrivals((0, 200, 4)))


def test_load_makes_nothing_faster():
  trace, seen = RandomTrace(60, 40, 12, 0.5), []
  for rate in (0.5, 2, 8, 32):
    found = simulate(MODEL, config(max_length=512), prices(HOST), trace.arrivals(rate, 101))
    seen.append((found.first.p95, found.between.p95))
  assert [first for first, _ in seen] == sorted(first for first, _ in seen)
  assert seen[0][1] < seen[-1][1]


def test_no_program_runs_and_no_device_holds_anything(monkeypatch):
  def run(program, *arguments, **options):
    raise AssertionError('a program runs')

  monkeypatch.setattr(programs.Program, '__call__', run)
  before = len(jax.live_arrays())
  simulate(MODEL, config(prefix_bytes=2**20), prices(), arrivals((0, 16, 4), (0, 16, 4)))
  assert len(jax.live_arrays()) == before


def test_the_devices_would_run_the_same_programs():
  """The real scheduler starts the same programs, of the same sizes, whether they run or not."""
  engine = memory.engine(memory.ODD, reference.random_tensors(memory.ODD), '1x1x1', stacked=True)
  sizes = SchedulerConfig(
    2,
    128,
    page_size=32,
    pages=6,
    shared_pages=2,
    prefix_bytes=2**16,
    prefill_chunk=16,
    end_ids=(),
    page_reads=1,
  )
  requests = [
    Request((1, 2, 3) * length, seeds=seeds, limit=limit)
    for length, limit, seeds in ((3, 5, (0,)), (25, 50, (0, 1)), (24, 56, (0,)), (1, 1, (0,)))
  ]
  requests += [Request((i,) * 40, limit=80) for i in (7, 8)]  # together more than all pages
  device = DeviceExecutor(engine.model, engine.weights, sizes)
  clock = ClockExecutor(engine.model, sizes, NoTime(), VirtualClock(), device.block_bytes)
  assert (clock.shards, clock.blocks) == (device.shards, device.blocks)
  runs = [
    watched_run(Scheduler(engine.model, None, sizes, executor=Watched(executor)), requests)
    for executor in (device, clock)
  ]
  assert runs[0] == runs[1]
  assert runs[0][2].preempted and runs[0][2].prefixes.hits


def watched_run(scheduler: Scheduler, requests: Sequence[Request]) -> tuple[Any, ...]:
  """Serve requests; what a Watched executor was asked for, tokens of each row, and the stats."""
  for request in requests:
    scheduler.submit(request)
  counts: dict[tuple[int, int], int] = {}
  while not scheduler.idle:
    for event in scheduler.step():
      key = event.request, event.sample
      counts[key] = counts.get(key, 0) + len(event.tokens)
  assert not scheduler.check_books()
  return scheduler.executor.calls, counts, scheduler.stats


class Watched:
  """An executor that remembers what it was asked for."""

  def __init__(self, executor):
    self._executor, self.calls = executor, []

  def __getattr__(self, name):
    found = getattr(self._executor, name)
    if not callable(found) or name in ('fetch', 'wait', 'settle', 'now'):
      return found

    def call(*arguments):
      self.calls.append((name, *(x for x in arguments if isinstance(x, int))))
      return found(*arguments)

    return call
