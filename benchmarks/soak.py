"""A scheduler that runs for long: time and memory over many steps, and over cancelled requests.

    python -m benchmarks.soak --case=turns     # 10^6 turns with programs that do nothing
    python -m benchmarks.soak --case=requests  # 10,000 requests, a fifth of them cancelled

Run from the root of a checkout. `turns` uses an executor that runs no program and takes no time, to
measure only the host's own work. `requests` runs a small random model.
"""

import argparse
import resource
import time
import warnings

import jax
import numpy as np

from t5x_inference_ext.engine.request import Handle, Request
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.simulator.clock import VirtualClock
from t5x_inference_ext.simulator.executor import ClockExecutor
from t5x_inference_ext.simulator.prices import NoTime
from tests import memory, reference

SLOTS = 32
BLOCK_BYTES = 2**13


def make_scheduler(idle: bool = False) -> Scheduler:
  """Return a scheduler of a small random model; if `idle`, it runs no programs."""
  tensors = reference.random_tensors(memory.ODD, seed=1)
  engine = memory.engine(memory.ODD, tensors, '1x1x1', stacked=True)
  config = SchedulerConfig(SLOTS, 512, page_size=32, end_ids=(), prefix_bytes=2**20)
  executor = None
  if idle:
    executor = ClockExecutor(engine.model, config, NoTime(), VirtualClock(), BLOCK_BYTES)
  return Scheduler(engine.model, engine.weights, config, executor=executor)


def resident() -> int:
  """Return the current resident memory, in bytes."""
  with open('/proc/self/statm', encoding='ascii') as file:
    return int(file.read().split()[1]) * resource.getpagesize()


def turns_case(turns: int) -> None:
  """Serve requests of random lengths, and cancel some of them, for `turns` steps."""
  scheduler, rng = make_scheduler(idle=True), np.random.default_rng(0)
  lengths, limits = rng.integers(1, 100, 4096).tolist(), rng.integers(1, 300, 4096).tolist()
  start, taken, first, submitted = time.perf_counter(), time.process_time(), None, 0
  for turn in range(1, turns + 1):
    while scheduler.wanted:
      i = submitted % 4096
      handle = scheduler.submit(Request((i % 97,) * lengths[i], limit=limits[i]))
      submitted += 1
      if i % 5 == 0:
        scheduler.cancel(handle)
    scheduler.step()
    if turn % (turns // 10) == 0:
      now = time.perf_counter()
      first = first or resident()
      print(
        f'{turn} turns: {(now - start) / (turns // 10) * 1e6:.0f} us a turn, of which the process '
        f'took {(time.process_time() - taken) / (turns // 10) * 1e6:.0f}; {submitted} requests, '
        f'{resident() / 2**20:.1f} MiB ({resident() / first:.3f} times the first)',
        flush=True,
      )
      start, taken = now, time.process_time()


def requests_case(count: int) -> None:
  """Serve `count` requests, and cancel a fifth of them at random moments.

  Those that are cancelled ask for more tokens than they can get until then.
  """
  scheduler, rng = make_scheduler(), np.random.default_rng(0)
  scheduler.warm_up()
  begin, submitted, first, cancelled = time.perf_counter(), 0, 0, 0
  leaving: list[tuple[int, Handle]] = []  # (steps until it is cancelled, request)
  while submitted < count or not scheduler.idle:
    while submitted < count and scheduler.wanted:
      tokens = tuple(rng.integers(0, 101, int(rng.integers(1, 60))).tolist())
      leaves = rng.random() < 0.2
      limit = 60 if leaves else int(rng.integers(1, 12))
      handle = scheduler.submit(Request(tokens, (submitted,), limit))
      if leaves:
        leaving.append((int(rng.integers(0, 3)), handle))
      submitted += 1
      if submitted % (count // 10) == 0:
        first = first or resident()
        print(
          f'{submitted} requests: {resident() / 2**20:.1f} MiB ({resident() / first:.3f} times '
          'that after the first tenth)',
          flush=True,
        )
    for steps, handle in leaving:
      if steps == 0:
        scheduler.cancel(handle)
    leaving = [(steps - 1, handle) for steps, handle in leaving if steps]
    cancelled += sum(event.finish == 'cancelled' for event in scheduler.step())
  reasons = scheduler.check_books() or ['the books are in order']
  used = sum(row is not None for row in scheduler.rows)
  print(
    f'{count} requests, {cancelled} of them cancelled, in {time.perf_counter() - begin:.0f} s on '
    f'{jax.devices()[0].device_kind}; {used} slots in use; {"; ".join(reasons)}'
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--case', default='turns', choices=('turns', 'requests'))
  parser.add_argument('--turns', type=int, default=10**6)
  parser.add_argument('--requests', type=int, default=10_000)
  args = parser.parse_args()
  warnings.simplefilter('error')
  turns_case(args.turns) if args.case == 'turns' else requests_case(args.requests)


if __name__ == '__main__':
  main()
