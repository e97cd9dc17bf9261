"""Simulation of a trace: the real scheduler in virtual time."""

from collections.abc import Sequence

from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.simulator.clock import VirtualClock
from t5x_inference_ext.simulator.executor import ClockExecutor
from t5x_inference_ext.simulator.prices import Prices
from t5x_inference_ext.simulator.service import (
  DEFAULT_LIMITS,
  ServedTrace,
  WaitingLimits,
  serve_arrivals,
)
from t5x_inference_ext.simulator.trace import Arrival


def simulate(
  model: Model,
  config: SchedulerConfig,
  prices: Prices,
  arrivals: Sequence[Arrival],
  bounds: WaitingLimits = DEFAULT_LIMITS,
  block_bytes: int = 2**20,
  shared: bool = False,
  acceptance: Sequence[float] = (),
) -> ServedTrace:
  """Predict the latencies and tokens of a service's clients, without running a program.

  Args:
    model: The model. Its mesh may be abstract.
    config: Sizes of the scheduler.
    prices: Times of the programs and of the host's own work.
    arrivals: The requests, by arrival.
    bounds: Limits on waiting requests.
    block_bytes: Bytes of a block of the prefix store on each device.
    shared: Whether the devices are the host's own cores; see VirtualClock.
    acceptance: Acceptance of drafts; see SimulatedDrafts. Needed if the config has drafts.

  Raises:
    RequestError: A request does not fit, the prices lack a program, or there is no acceptance.
  """
  clock = VirtualClock(shared, prices.seconds('wake'))
  executor = ClockExecutor(model, config, prices, clock, block_bytes, acceptance)
  scheduler = Scheduler(model, None, config, executor=executor)
  host = prices.seconds('host')
  return serve_arrivals(scheduler, arrivals, clock, bounds, lambda: clock.spend(host))
