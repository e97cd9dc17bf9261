"""The simulator of a service beside the engine itself, on the devices that are here.

    python -m benchmarks.simulator --case=prices --prices=prices.json
    python -m benchmarks.simulator --case=rates --rate=4,8,12 --prices=prices.json

Run from the root of a checkout. `prices` measures what each program of a scheduler takes, and the
host's own work, on a small random model, and writes the table that `plan --prices` takes too.
`rates` serves random requests with the real engine in real time, then in virtual time with the
prices of the table, at one rate after the other, and prints the latencies of both, and the relative
differences. Prices are measured before any request is served, and nothing is fitted to latencies.
"""

import argparse

import jax

from benchmarks.continuous import make_engine
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import config_for
from t5x_inference_ext.simulator.clock import WallClock
from t5x_inference_ext.simulator.measure import measure_service
from t5x_inference_ext.simulator.prices import PricedService, PriceTable
from t5x_inference_ext.simulator.service import ServedTrace, serve_arrivals
from t5x_inference_ext.simulator.simulate import simulate
from t5x_inference_ext.simulator.trace import RandomTrace


def prices_case(engine, args) -> None:
  """Measure the prices, and write them."""
  trace = RandomTrace(args.requests, args.prompt, args.generate, args.spread)
  longest = max(len(a.tokens) + a.limit for a in trace.arrivals(1, args.vocabulary))
  config = config_for(engine.model, (), slots=args.slots, max_length=longest, end_ids=())
  priced = measure_service(engine.model, engine.weights, config, args.repeats)
  with open(args.prices, 'w', encoding='utf-8') as file:
    file.write(priced.text())
  for row in priced.programs:
    sizes = ', '.join(f'{name}={size}' for name, size in row.sizes.items())
    print(f'{row.program}({sizes}): {row.seconds * 1e3:.3f} ms')


def rates_case(engine, args) -> None:
  """Serve requests for real, and in virtual time."""
  priced = PricedService.read(args.prices)
  trace = RandomTrace(args.requests, args.prompt, args.generate, args.spread)
  table = PriceTable(priced.programs, args.prices)
  for rate in map(float, args.rate.split(',')):
    arrivals = trace.arrivals(rate, args.vocabulary)
    scheduler = Scheduler(engine.model, engine.weights, priced.config)
    scheduler.warm_up()
    real = serve_arrivals(scheduler, arrivals, WallClock())
    virtual = simulate(engine.model, priced.config, table, arrivals)
    kind = jax.devices()[0].device_kind
    print(f'{args.requests} requests at {rate:g} a second, {priced.config.slots} slots, {kind}:')
    _print_beside(real, virtual)


def _print_beside(real: ServedTrace, virtual: ServedTrace) -> None:
  for name, latencies in _latencies(real).items():
    guesses = _latencies(virtual)[name]
    print(
      f'  {name}: '
      + ', '.join(
        f'{which} {ours * 1e3:.2f} ms, simulated {guess * 1e3:.2f} ms ({guess / ours - 1:+.1%})'
        for which, ours, guess in zip(('p50', 'p95', 'p99'), latencies, guesses)
      )
    )
  print(
    f'  tokens/s: {real.tokens_per_second:.1f}, simulated {virtual.tokens_per_second:.1f}',
    flush=True,
  )


def _latencies(service: ServedTrace):
  return {
    'first token': service.first,
    'between tokens, mean of a request': service.between,
    'between tokens, each': service.gaps,
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--case', required=True, choices=('prices', 'rates'))
  parser.add_argument('--prices', required=True, help='the table of prices, written or read')
  parser.add_argument('--rate', default='4,8,12', help='requests a second, with commas')
  parser.add_argument('--requests', type=int, default=500)
  parser.add_argument('--prompt', type=int, default=128, help='mean tokens of a prompt')
  parser.add_argument('--generate', type=int, default=32, help='mean new tokens of a request')
  parser.add_argument('--spread', type=float, default=0.5, help='see plan --length_spread')
  parser.add_argument('--slots', type=int, default=8)
  parser.add_argument('--layers', type=int, default=6)
  parser.add_argument('--d_model', type=int, default=384, help='a multiple of 64')
  parser.add_argument('--vocabulary', type=int, default=8192)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--repeats', type=int, default=5)
  args = parser.parse_args()
  engine = make_engine(args.layers, args.d_model, args.vocabulary, args.dtype)
  dict(prices=prices_case, rates=rates_case)[args.case](engine, args)


if __name__ == '__main__':
  main()
