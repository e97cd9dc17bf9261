"""From the start of Python to an engine that compiles nothing more: programs and seconds.

    python -m benchmarks.ready [--requests=300] [--seed=0]

Run from the root of a checkout. Three processes after each other load a checkpoint and compile all
programs of an engine (Engine.warm_up): without a compilation cache, with an empty one, and with the
one that is filled then. The last also counts what jax compiles, or reads from the cache, while it
serves random requests: any lengths, sampling parameters, ends and grammars.
"""

import time

BEGUN = time.perf_counter()

import argparse  # noqa: E402
import collections  # noqa: E402
import pathlib  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402

from t5x_inference_ext import Engine, Grammar, Request, SamplingParams  # noqa: E402
from t5x_inference_ext.compilation_cache import CacheOptions, use_compilation_cache  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / 'examples' / 'palm_tiny' / 'checkpoint_1000'
COMPILED = '/jax/core/compile/backend_compile_duration'


def work(args: argparse.Namespace) -> None:
  """Load, warm up, and serve, in this process; print seconds and counts."""
  compiled: collections.Counter[str] = collections.Counter()
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **__: compiled.update([event])
  )
  use_compilation_cache(CacheOptions(args.cache), lambda text: None)
  engine = Engine.load(args.checkpoint, mesh='1x1x1', dtype=args.dtype)
  loaded = time.perf_counter() - BEGUN
  sizes = dict(slots=args.slots, max_length=args.max_length, top_log_probs=5)
  programs = engine.warm_up(**sizes)
  ready = time.perf_counter() - BEGUN
  print(
    f'{args.what}: ready after {ready:.1f} s, of which {loaded:.1f} s until the weights are '
    f'loaded and {sum(program.seconds for program in programs):.1f} s for {len(programs)} programs',
    flush=True,
  )
  if not args.requests:
    return
  before, tokens = compiled[COMPILED], 0
  scheduler = engine.core.streams(**sizes).scheduler
  rng = np.random.default_rng(args.seed)
  for _ in range(args.requests):
    scheduler.submit(random_request(rng, args.max_length))
  while not scheduler.idle:
    tokens += sum(len(event.tokens) for event in scheduler.step())
  print(
    f'  {args.requests} random requests, seed {args.seed}: {tokens} tokens, '
    f'{compiled[COMPILED] - before} programs compiled or read'
  )


def random_request(rng: np.random.Generator, longest: int) -> Request:
  """Return a request of up to `longest` tokens with random parameters, for one row or two."""
  limit = int(rng.integers(1, 17))
  prompt = rng.integers(3, 259, int(rng.integers(0, longest - limit))).tolist()
  sampling = SamplingParams(
    temperature=float(rng.choice([0, rng.random() * 2])),
    top_k=int(rng.choice([0, rng.integers(1, 300)])),
    top_p=float(rng.choice([1, rng.random()])),
    repetition_penalty=float(rng.choice([1, 1.3])),
    frequency_penalty=float(rng.choice([0, rng.random()])),
    logit_bias={int(rng.integers(256)): 1.0} if rng.random() < 0.3 else {},
    stop=((int(rng.integers(256)),),) if rng.random() < 0.3 else (),
    min_new_tokens=int(rng.integers(4)),
  )
  return Request(
    (0, *prompt),
    tuple(rng.integers(0, 2**32, 1 + rng.integers(2)).tolist()),
    limit,
    sampling,
    end_ids=tuple(rng.integers(256, size=rng.integers(5)).tolist()),
    top_log_probs=int(rng.integers(6)),
    grammar=Grammar('regex', '[a-z]+( [0-9]{2})?') if rng.random() < 0.2 else None,
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--checkpoint', default=str(CHECKPOINT))
  parser.add_argument('--requests', type=int, default=300)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--slots', type=int, default=32)
  parser.add_argument('--max_length', type=int, default=1024)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--cache', help=argparse.SUPPRESS)  # of a process that this one starts
  parser.add_argument('--what', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.what:
    work(args)
    return
  with tempfile.TemporaryDirectory() as directory:
    for what, cache, requests in (
      ('without a compilation cache', '', 0),
      ('with an empty one', directory, 0),
      ('with a filled one', directory, args.requests),
    ):
      own = f'--cache={cache}', f'--what={what}', f'--requests={requests}'
      flags = [*sys.argv[1:], *own]
      subprocess.run([sys.executable, '-m', 'benchmarks.ready', *flags], check=True, cwd=ROOT)


if __name__ == '__main__':
  main()
