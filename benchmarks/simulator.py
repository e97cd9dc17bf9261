"""The simulator of a service beside the engine itself, on the devices that are here.

    python -m benchmarks.simulator [--load=0.3,0.5,0.7] [--prices=prices.json]

Run from the root of a checkout. A small random model serves random requests with the real engine,
in real time; then the simulator serves equal requests in virtual time. Its prices are a measured
table of the time that each program takes. The benchmark prints the latencies of both, and the
relative differences, at several loads. A load is a share of the highest rate of requests that can
be served, according to the simulator. The table is the average of measurements before and after
each real run; nothing is fitted to latencies. --prices writes the last table, for `plan --prices`.
With --speculate only this table is measured and written: a random model's text says nothing about
drafts.

Where other programs run, the machine's speed changes within seconds, and the queues of slow seconds
make most of the long latencies. So the simulator runs twice: at the prices of the table, and at
prices that follow the machine's speed. This speed is known from the real run: the time that the
engine's steps took in each half second, divided by the price of their programs; one for decode
steps, and one for the programs of prompts, which use the cores and caches in another way.
"""

import argparse
import collections
from collections.abc import Sequence
import os
import statistics
from typing import Any

import jax
import numpy as np

from benchmarks.continuous import make_engine
from t5x_inference_ext.engine.executor import DeviceExecutor, Executor
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig, config_for
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.simulator.clock import ServiceClock, VirtualClock, WallClock
from t5x_inference_ext.simulator.executor import ClockExecutor
from t5x_inference_ext.simulator.measure import measure_service
from t5x_inference_ext.simulator.prices import (
  NoTime,
  PricedProgram,
  PricedService,
  Prices,
  PriceTable,
)
from t5x_inference_ext.simulator.service import ServedTrace, WaitingLimits, serve_arrivals
from t5x_inference_ext.simulator.simulate import simulate
from t5x_inference_ext.simulator.trace import Arrival, RandomTrace

NO_LIMITS = WaitingLimits(10**9, 10**12)
PERIOD = 0.5  # seconds in which the machine's speed counts as constant
STEPS = 'decode_steps', 'host', 'start'  # programs of decode steps; the others are those of prompts

# In each PERIOD, how many times their prices the programs took: of decode steps, of prompts.
Slowness = Sequence[tuple[float, float]]


def mean_of(before: PricedService, after: PricedService) -> list[PricedProgram]:
  """Return the mean of two tables with equal rows."""
  return [
    a._replace(seconds=(a.seconds + b.seconds) / 2) for a, b in zip(before.programs, after.programs)
  ]


class BusyClock:
  """A clock that also tells how much of its time was slept.

  Args:
    clock: The clock.

  Attributes:
    slept: Seconds slept so far.
  """

  def __init__(self, clock: ServiceClock) -> None:
    self._clock, self.slept = clock, 0.0
    self.now = clock.now

  def sleep_until(self, moment: float) -> None:
    """Wait until this time, in seconds."""
    begin = self.now()
    if moment > begin:
      self._clock.sleep_until(moment)
      self.slept += self.now() - begin


class ProgramLog(NoTime):
  """Prices that take note of the programs whose prices are asked.

  Attributes:
    programs: The programs and their sizes.
  """

  def __init__(self) -> None:
    self.programs: list[tuple[str, dict[str, int]]] = []

  def seconds(self, program: str, **sizes: int) -> float:
    """Return 0."""
    self.programs.append((program, sizes))
    return 0.0


class LoggedExecutor:
  """An executor that also lets a simulated one run, which logs the programs.

  Args:
    executor: Runs the programs.
    simulated: Asks the prices of the programs.
  """

  def __init__(self, executor: Executor, simulated: ClockExecutor) -> None:
    self._executor, self._simulated = executor, simulated

  def __getattr__(self, name: str) -> Any:
    run = getattr(self._executor, name)
    if name not in ('start_prefill', 'prefill_chunk', 'insert', 'decode_steps'):
      return run
    log = getattr(self._simulated, name)
    return lambda *inputs: (log(*inputs), run(*inputs))[1]


class PricesInTime:
  """Prices of a machine whose speed changes.

  Args:
    prices: Prices at the mean speed.
    slowness: Factors on the prices in each period of PERIOD seconds: of decode steps, of prompts.
    clock: Tells the time.
  """

  def __init__(self, prices: Prices, slowness: Slowness, clock: VirtualClock) -> None:
    self._prices, self._slowness, self._clock = prices, slowness, clock

  def seconds(self, program: str, **sizes: int) -> float:
    """Return the seconds of a program that starts now."""
    period = min(int(self._clock.now() / PERIOD), len(self._slowness) - 1)
    steps, prompts = self._slowness[period]
    return (steps if program in STEPS else prompts) * self._prices.seconds(program, **sizes)


class RealRun:
  """Serves requests with an executor.

  Args:
    model: The model.
    config: Sizes of the scheduler.
    executor: Runs the programs, which were compiled before.
    arrivals: The requests, by arrival.
    real_clock: A new clock.

  Attributes:
    served: The latencies.
  """

  def __init__(
    self,
    model: Model,
    config: SchedulerConfig,
    executor: Executor,
    arrivals: Sequence[Arrival],
    real_clock: ServiceClock,
  ) -> None:
    log, clock = ProgramLog(), BusyClock(real_clock)
    simulated = ClockExecutor(model, config, log, VirtualClock(), 2**20)
    scheduler = Scheduler(model, None, config, executor=LoggedExecutor(executor, simulated))
    self._programs = log.programs
    # Before each step: the time, seconds slept so far, number of programs so far.
    self._steps: list[tuple[float, float, int]] = []

    def note() -> None:
      self._steps.append((clock.now(), clock.slept, len(self._programs)))

    self.served = serve_arrivals(scheduler, arrivals, clock, NO_LIMITS, note)
    note()

  def slowness(self, prices: Prices) -> Slowness:
    """Return how many times their prices decode steps, and prompts, took in each PERIOD.

    Where there were none, the mean of the whole run counts.
    """
    host, before, started = prices.seconds('host'), 0.0, 0.0
    # Seconds taken, and their prices, of steps of the scheduler without prompts, and with some.
    decode: dict[int, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
    mixed: dict[int, np.ndarray] = collections.defaultdict(lambda: np.zeros(3))
    for (now, slept, first), (end, slept_after, last) in zip(self._steps, self._steps[1:]):
      # The host waits for a step's prompts in it, but for its decode step in the next one, if any.
      steps, started, prompts = host + started, 0.0, 0.0
      for program, sizes in self._programs[first:last]:
        if program in STEPS:
          started += prices.seconds(program, **sizes)
        else:
          prompts += prices.seconds(program, **sizes)
      if slept > before:
        before, prompts = slept, prompts + prices.seconds('wake')
      if slept_after > slept:
        steps, started = steps + started, 0.0
      period, took = int(now / PERIOD), end - now - (slept_after - slept)
      if prompts:
        mixed[period] += took, steps, prompts
      else:
        decode[period] += took, steps

    def ratio(took: float, priced: float, otherwise: float) -> float:
      return max(0.0, took / priced) if priced else otherwise

    took, priced = sum(decode.values(), np.zeros(2))
    mean = ratio(took, priced, 1.0)
    took, steps, prompts = sum(mixed.values(), np.zeros(3))
    mean_of_prompts = ratio(took - mean * steps, prompts, mean)
    found = []
    for period in range(1 + max(mixed | decode)):
      took, priced = decode[period]
      of_steps = ratio(took, priced, mean)
      took, steps, prompts = mixed[period]
      found.append((of_steps, ratio(took - of_steps * steps, prompts, mean_of_prompts)))
    return found


def simulate_in_time(
  model: Model,
  config: SchedulerConfig,
  prices: Prices,
  slowness: Slowness,
  arrivals: Sequence[Arrival],
  shared: bool,
) -> ServedTrace:
  """Simulate a service on a machine whose speed changes; see PricesInTime and VirtualClock."""
  clock = VirtualClock(shared, prices.seconds('wake'))
  in_time = PricesInTime(prices, slowness, clock)
  executor = ClockExecutor(model, config, in_time, clock, 2**20)
  scheduler = Scheduler(model, None, config, executor=executor)
  spend = lambda: clock.spend(in_time.seconds('host'))
  return serve_arrivals(scheduler, arrivals, clock, NO_LIMITS, spend)


def print_beside(real: ServedTrace, virtual: ServedTrace) -> None:
  """Print the latencies of the engine, those of the simulator, and the differences."""
  for name, served, simulated in (
    ('first token', real.first, virtual.first),
    ('between tokens, mean of a request', real.between, virtual.between),
    ('between tokens, each', real.gaps, virtual.gaps),
  ):
    both = ', '.join(
      f'{which} {a * 1e3:.2f} and {b * 1e3:.2f} ms ({b / a - 1:+.1%})'
      for which, a, b in zip(('p50', 'p95', 'p99'), served, simulated)
    )
    print(f'  {name}: {both}')
  rates = real.tokens_per_second, virtual.tokens_per_second
  print(f'  tokens/s: {rates[0]:.1f} and {rates[1]:.1f}', flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--load', default='0.3,0.5,0.7', help='shares of the most that can be served')
  parser.add_argument('--prices', help='file for the table of prices')
  parser.add_argument('--speculate', help='drafts, such as ngram:8')
  parser.add_argument('--requests', type=int, default=500)
  parser.add_argument('--prompt', type=int, default=128, help='mean tokens of a prompt')
  parser.add_argument('--generate', type=int, default=32, help='mean new tokens of a request')
  parser.add_argument('--spread', type=float, default=0.5, help='see plan --length_spread')
  parser.add_argument('--slots', type=int, default=8)
  parser.add_argument('--layers', type=int, default=4)
  parser.add_argument('--d_model', type=int, default=256, help='a multiple of 64')
  parser.add_argument('--vocabulary', type=int, default=4096)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--repeats', type=int, default=5)
  args = parser.parse_args()
  engine = make_engine(args.layers, args.d_model, args.vocabulary, args.dtype)
  model, weights = engine.model, engine.weights
  trace = RandomTrace(args.requests, args.prompt, args.generate, args.spread)
  longest = max(len(a.tokens) + a.limit for a in trace.arrivals(1, args.vocabulary))
  sizes = dict(slots=args.slots, max_length=longest, end_ids=(), speculate=args.speculate)
  config = config_for(model, (), **sizes)
  Scheduler(model, weights, config).warm_up()
  cores = len(os.sched_getaffinity(0))
  kind = f'{jax.devices()[0].device_kind}, {cores} cores'
  print(f'{model.config}\n{kind}, {config.slots} slots, real and simulated:')
  before = measure_service(model, weights, config, args.repeats)
  for load in map(float, args.load.split(',') if args.speculate is None else ()):
    at_once = trace.arrivals(1e9, args.vocabulary)
    full = simulate(
      model, config, PriceTable(before.programs), at_once, NO_LIMITS, shared=before.shared
    )
    rate = load * args.requests / full.seconds
    arrivals = trace.arrivals(rate, args.vocabulary)
    executor = DeviceExecutor(model, weights, config)
    Scheduler(model, None, config, executor=executor).warm_up()
    real = RealRun(model, config, executor, arrivals, WallClock())
    after = measure_service(model, weights, config, args.repeats)
    prices = PriceTable(mean_of(before, after))
    slowness = real.slowness(prices)
    print(f'{args.requests} requests, {rate:.1f} a second, load {load:g}; constant prices:')
    virtual = simulate(model, config, prices, arrivals, NO_LIMITS, shared=before.shared)
    print_beside(real.served, virtual)
    spreads = [
      '{:.2f} to {:.2f}'.format(*statistics.quantiles(each, n=20)[::18]) for each in zip(*slowness)
    ]
    print(f" at the machine's speed; decode steps took {spreads[0]} times their prices,", end='')
    print(f' prompts {spreads[1]}:')
    in_time = simulate_in_time(model, config, prices, slowness, arrivals, before.shared)
    print_beside(real.served, in_time)
    before = after
  for row in before.programs:
    named = ', '.join(f'{name}={size}' for name, size in row.sizes.items())
    print(f'{row.program}({named}): {row.seconds * 1e3:.3f} ms')
  if args.prices:
    with open(args.prices, 'w', encoding='utf-8') as file:
      file.write(before.text())


if __name__ == '__main__':
  main()
