"""The simulator of a service beside the engine itself, on the devices that are here.

    python -m benchmarks.simulator [--load=0.3,0.5,0.7] [--prices=prices.json]

Run from the root of a checkout. A small random model serves random requests with the real engine,
in real time; then the simulator serves equal requests in virtual time. Its prices are a measured
table of the time that each program takes. The benchmark prints the latencies of both, and the
relative differences, at several loads. A load is a share of the highest rate of requests that can
be served, according to the simulator. Load 1e9 lets all requests arrive at once.

The machine's speed drifts, by tens of percent where other programs run. So the engine's clock is
stopped every --every seconds, and all programs are timed once; nothing is fitted to latencies. The
table has the means of these times. --prices writes the last table, for `plan --prices`. With
--speculate only a table is measured and written: a random model's text says nothing about drafts.
"""

import argparse
from collections.abc import Sequence
import os

import jax

from benchmarks.continuous import make_engine
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import config_for
from t5x_inference_ext.simulator.clock import WallClock
from t5x_inference_ext.simulator.measure import ServiceTimer, mean_of
from t5x_inference_ext.simulator.prices import PricedService, PriceTable
from t5x_inference_ext.simulator.service import ServedTrace, WaitingLimits, serve_arrivals
from t5x_inference_ext.simulator.simulate import simulate
from t5x_inference_ext.simulator.trace import Arrival, RandomTrace

NO_LIMITS = WaitingLimits(10**9, 10**12)


def serve_and_measure(
  scheduler: Scheduler, arrivals: Sequence[Arrival], timer: ServiceTimer, every: float
) -> tuple[ServedTrace, PricedService]:
  """Serve requests in real time; return the latencies, and the mean times of programs meanwhile.

  Args:
    scheduler: An idle scheduler.
    arrivals: The requests, by arrival.
    timer: Times the programs.
    every: Seconds of serving between two measurements of all programs.
  """
  tables = [timer.measure()]

  def measure() -> None:
    if clock.now() > every * len(tables):
      scheduler.executor.wait()
      with clock.stopped():
        tables.append(timer.measure())

  clock = WallClock()
  served = serve_arrivals(scheduler, arrivals, clock, NO_LIMITS, measure)
  return served, timer.service(mean_of(tables))


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
  parser.add_argument('--repeats', type=int, default=5, help='first measurements of programs')
  parser.add_argument('--every', type=float, default=1.0, help='seconds between measurements')
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
  timer = ServiceTimer(model, weights, config)
  timer.measure()  # compiles
  priced = timer.service(mean_of([timer.measure() for _ in range(args.repeats)]))
  for load in map(float, args.load.split(',') if args.speculate is None else ()):
    at_once = trace.arrivals(1e9, args.vocabulary)
    table = PriceTable(priced.programs)
    full = simulate(model, config, table, at_once, NO_LIMITS, shared=priced.shared)
    rate = load * args.requests / full.seconds
    arrivals = trace.arrivals(rate, args.vocabulary)
    scheduler = Scheduler(model, weights, config)
    scheduler.warm_up()
    real, priced = serve_and_measure(scheduler, arrivals, timer, args.every)
    table = PriceTable(priced.programs)
    virtual = simulate(model, config, table, arrivals, NO_LIMITS, shared=priced.shared)
    print(f'{args.requests} requests, {rate:.1f} a second, load {load:g}:')
    print_beside(real, virtual)
  for row in priced.programs:
    sizes = ', '.join(f'{name}={size}' for name, size in row.sizes.items())
    print(f'{row.program}({sizes}): {row.seconds * 1e3:.3f} ms')
  if args.prices:
    with open(args.prices, 'w', encoding='utf-8') as file:
      file.write(priced.text())


if __name__ == '__main__':
  main()
