"""The benchmark of the simulator follows a machine whose speed changes."""

import itertools

import numpy as np
import pytest

from benchmarks.simulator import PERIOD, PricesInTime, RealRun, simulate_in_time
from t5x_inference_ext.simulator.clock import VirtualClock
from t5x_inference_ext.simulator.executor import ClockExecutor
from t5x_inference_ext.simulator.simulate import simulate
from tests.simulator.service_test import MODEL, arrivals, config, prices

# In each period: of decode steps, of prompts.
SLOWNESS = [(1.0, 1.0), (2.0, 3.0), (1.5, 1.0), (1.0, 1.5), (3.0, 3.0), (1.0, 1.0)]


def test_the_speed_is_known_from_the_steps_and_repeats_the_latencies():
  """A machine in virtual time that is slow in some periods, in which requests wait."""
  sizes, clock = config(), VirtualClock()
  # A tenth of the prices, so that periods have many steps.
  table = PricesInTime(prices(), [(0.1, 0.1)], VirtualClock())
  executor = ClockExecutor(MODEL, sizes, PricesInTime(table, SLOWNESS, clock), clock, 2**20)
  rows = arrivals(*[(0.05 * i, 16, 8 + i % 5) for i in range(56)])
  real = RealRun(MODEL, sizes, executor, rows, clock)
  found = real.slowness(table)
  assert len(found) == 1 + int(real.served.seconds / PERIOD) > 5
  # A step that begins in one period may end in the next.
  assert np.asarray(found[:5]) == pytest.approx(np.asarray(SLOWNESS[:5]), rel=0.05)
  in_time = simulate_in_time(MODEL, sizes, table, found, rows, shared=False)
  constant = simulate(MODEL, sizes, table, rows)
  for name, at in itertools.product(('first', 'between'), ('p50', 'p95')):
    took, same, other = (
      getattr(getattr(each, name), at) for each in (real.served, in_time, constant)
    )
    assert same == pytest.approx(took, rel=0.05)
    assert other < 0.85 * took
