"""The speed of generation of this checkout beside another one's, in alternating calls.

    python -m benchmarks.beside ../other_checkout [--batch=1,8,32] [--slots=new] [--processes=3]

Run from the root of a checkout. Each checkout has processes of its own, which load the same T5X
checkpoint and compile. The calls then alternate, so that changes of the machine's speed affect
both alike; but a process can be faster than another one of the same code for as long as it runs, by
a tenth: so use several. For each batch size, the benchmark prints the best and the median time of
both checkouts, and the median and the quartiles of the ratio within each pair of calls, by wall
time and by processor time.
"""

import argparse
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / 'examples' / 'palm_tiny' / 'checkpoint_1000'


def work(checkpoint: str, batches: list[int], prompt: int, generate: int, slots: str) -> None:
  """Load and compile, then time a call for each batch size that is read from standard input."""
  import numpy as np

  try:
    from t5x_inference_ext import Engine
  except ImportError:  # checkouts from before the public API
    from t5x_inference_ext.engine import Engine

  engine = Engine.load(checkpoint, mesh='1x1x1', dtype='float32')
  rng = np.random.default_rng(0)
  drawn = lambda rows: rng.integers(3, 259, (rows, prompt)).tolist()
  prompts = {rows: drawn(rows) for rows in batches}

  def call(rows: int) -> None:
    options = dict(max_new_tokens=generate, eos_id=-1)
    if slots:
      for _ in engine.stream(drawn(rows) if slots == 'new' else prompts[rows], **options):
        pass
    else:
      engine.generate(prompts[rows], **options)

  for rows in batches * 2:  # the same prompts again run other programs: they are cached
    call(rows)
  print('ready', flush=True)
  for line in sys.stdin:
    wall, processor = time.perf_counter(), time.process_time()
    call(int(line))
    print(time.perf_counter() - wall, time.process_time() - processor, flush=True)


class Worker:
  """A process that runs `work` with the package of a checkout."""

  def __init__(self, checkout: pathlib.Path, arguments: list[str]) -> None:
    self._process = subprocess.Popen(
      [sys.executable, __file__, '--work', *arguments],
      cwd=checkout,
      env={**os.environ, 'PYTHONPATH': str(checkout)},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def read(self) -> list[str]:
    """Wait for a line, and return its words. A worker that ended has printed the reason."""
    assert self._process.stdout is not None
    return self._process.stdout.readline().split() or sys.exit('a checkout failed, see above')

  def call(self, rows: int) -> tuple[float, float]:
    """Time one call: seconds of wall time and of processor time."""
    assert self._process.stdin is not None
    self._process.stdin.write(f'{rows}\n')
    self._process.stdin.flush()
    wall, processor = map(float, self.read())
    return wall, processor


def ratios(this: list[float], other: list[float]) -> str:
  """Return the text of how much faster this checkout is, pair by pair."""
  low, middle, high = statistics.quantiles([b / a for a, b in zip(this, other)], n=4)
  return f'{middle:.3f} ({low:.3f} to {high:.3f})'


def milliseconds(seconds: list[float]) -> str:
  """Return the text of the best time and the median."""
  return f'{min(seconds) * 1e3:.1f}, {statistics.median(seconds) * 1e3:.1f}'


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('other', type=pathlib.Path, help='the root of the other checkout')
  parser.add_argument('--checkpoint', default=CHECKPOINT, help='a checkpoint, or a public model')
  parser.add_argument('--batch', default='1,8,32', help='batch sizes, comma separated')
  parser.add_argument('--prompt', type=int, default=128, help='tokens of each prompt')
  parser.add_argument('--generate', type=int, default=64, help='new tokens of each row')
  parser.add_argument('--repeats', type=int, default=40, help='pairs of calls')
  parser.add_argument(
    '--slots',
    default='',
    choices=['new', 'cached'],
    help='stream from slots, not a static batch: new prompts in each call, or always the same ones',
  )
  parser.add_argument('--processes', type=int, default=1, help='processes of each checkout')
  parser.add_argument('--work', action='store_true', help=argparse.SUPPRESS)
  args = parser.parse_args()
  batches = [int(rows) for rows in args.batch.split(',')]
  if args.work:
    work(str(args.checkpoint), batches, args.prompt, args.generate, args.slots)
    return
  arguments = ['.', f'--checkpoint={os.path.abspath(args.checkpoint)}', f'--batch={args.batch}']
  arguments += [f'--prompt={args.prompt}', f'--generate={args.generate}']
  arguments += [f'--slots={args.slots}'] if args.slots else []
  pairs = [
    [Worker(checkout.resolve(), arguments) for checkout in (ROOT, args.other)]
    for _ in range(args.processes)
  ]
  for worker in itertools.chain(*pairs):
    worker.read()
  print('batch | this: best, median ms | other: best, median ms | faster, wall | processor')
  for rows in batches:
    calls: tuple[list, list] = [], []
    for i in range(args.repeats):
      for side in (0, 1) if i // args.processes % 2 else (1, 0):
        calls[side].append(pairs[i % args.processes][side].call(rows))
    (this, this_cpu), (other, other_cpu) = ([list(x) for x in zip(*side)] for side in calls)
    print(
      f'{rows:5} | {milliseconds(this):>21} | {milliseconds(other):>22} | {ratios(this, other)} | '
      f'{ratios(this_cpu, other_cpu)}',
      flush=True,
    )


if __name__ == '__main__':
  main()
