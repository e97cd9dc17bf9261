"""Time to the first token and between tokens, and the host's share of a step.

    python -m benchmarks.latency               # requests that arrive at random: 1, 8, 32 at a time
    python -m benchmarks.latency --case=host   # the scheduler's own time a step, with a stub model
    python -m benchmarks.latency --case=long   # one row of 8192 tokens beside 31 of 100

Run from the root of a checkout. `arrivals` keeps N requests under way: when one ends, another
follows after an exponential pause, so that requests arrive at random. `host` replaces the model by
a stub: a decode program that takes 592 weight arrays, as many as 540B has, on four simulated
devices, and waits until 10 ms are over. Scheduler.step is timed beside that program alone. `long`
compares decode steps of the same model and slots, after all prompts are prefilled.
"""

import argparse
import dataclasses
import os
import statistics
import time

HOST_DEVICES, HOST_LAYERS, HOST_MS = 4, 118, 10.0  # 118 int8 layers have 540B's 592 arrays


def arrivals_case(args) -> None:
  """Print latencies of requests that arrive at random."""
  import numpy as np

  from benchmarks.continuous import make_engine, ragged
  from t5x_inference_ext.engine.scheduler import Scheduler
  from t5x_inference_ext.engine.scheduler_config import config_for

  engine = make_engine(args.layers, args.d_model, args.vocabulary, args.dtype)
  requests = ragged(args.vocabulary, args.requests, args.prompt, args.generate)
  config = config_for(engine.model, requests, slots=32, max_length=args.prompt + args.generate)
  config = dataclasses.replace(config, end_ids=())
  print(f'{engine.model.config}\n{args.requests} requests, {config.slots} slots')
  for together in (1, 8, 32):
    scheduler = Scheduler(engine.model, engine.weights, config)
    scheduler.warm_up()
    rng = np.random.default_rng(together)
    queue = list(requests)
    due = sorted(rng.exponential(0.05, together).tolist())  # when the next requests arrive
    began: dict[int, float] = {}
    last: dict[int, float] = {}
    firsts, gaps = [], []
    start = time.perf_counter()
    tokens = 0
    while queue or began:
      now = time.perf_counter() - start
      while due and due[0] <= now and queue:
        due.pop(0)
        began[scheduler.submit(queue.pop()).index] = time.perf_counter()
      if scheduler.idle:
        time.sleep(0.001)
        continue
      for event in scheduler.step():
        now = time.perf_counter()
        tokens += len(event.tokens)
        if event.tokens:
          if event.request in last:
            gaps.append((now - last[event.request]) / len(event.tokens))
          else:
            firsts.append(now - began[event.request])
          last[event.request] = now
        if event.finish:
          del began[event.request]
          due.append(now - start + rng.exponential(0.05))
          due.sort()
    seconds = time.perf_counter() - start
    print(
      f'{together:2d} at a time: first token after {_ms(firsts)}, then every {_ms(gaps)}; '
      f'{tokens / seconds:.0f} tokens/s',
      flush=True,
    )


def _ms(seconds: list[float]) -> str:
  cut = statistics.quantiles(seconds, n=20)
  return f'{statistics.median(seconds) * 1e3:.1f} ms (p95 {cut[18] * 1e3:.1f})'


def host_case(args) -> None:
  """Print the time between steps of the whole scheduler, with a model whose step takes 10 ms."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import PartitionSpec as P
  import numpy as np

  from benchmarks.continuous import make_engine
  from t5x_inference_ext.engine.request import Request
  from t5x_inference_ext.engine.scheduler import Scheduler
  from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
  from t5x_inference_ext.model.transformer import Model

  seconds = 0.0  # how long a step waits

  def wait(x: np.ndarray) -> np.ndarray:
    time.sleep(seconds)
    return np.asarray(x)

  class WaitingModel(Model):
    """A model whose decode step reads a number of each weight, waits, and chooses token 0."""

    def decode_step(self, weights, cache, tokens):
      def on_device(weights):
        touched = sum(x.ravel()[0].astype(jnp.float32) for x in jax.tree.leaves(weights))
        first = sum(jax.lax.axis_index(axis) for axis in self.mesh.axis_names) == 0
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        touched = jax.lax.cond(
          first, lambda x: jax.pure_callback(wait, shape, x), lambda x: x, touched
        )
        touched = jax.lax.psum(touched, self.mesh.axis_names)  # all devices wait for the first
        return jnp.zeros((len(tokens), self.config.vocab_size)) + 0 * touched

      run = jax.shard_map(
        on_device, mesh=self.mesh, in_specs=(specs,), out_specs=P(), check_vma=False
      )
      return run(weights), dataclasses.replace(cache, lengths=cache.lengths + 1)

  engine = make_engine(
    HOST_LAYERS, 64, 256, 'float32', mesh=(1, 2, 2), stacked=False, weights='int8'
  )
  specs = jax.tree.map(lambda x: x.sharding.spec, engine.weights)
  leaves = len(jax.tree.leaves(engine.weights))
  model = WaitingModel(**{f.name: getattr(engine.model, f.name) for f in dataclasses.fields(Model)})
  config = SchedulerConfig(32, 1024, end_ids=(), prefix_bytes=2**20, shared_pages=4)
  # Two schedulers in equal states: `core` is stepped; for `bare`, only the decode program runs.
  core, bare = (Scheduler(model, engine.weights, config) for _ in range(2))
  for scheduler in (core, bare):
    for i in range(32):
      scheduler.submit(Request((0, i + 1), limit=1000))
    while not all(row is not None and row.tokens for row in scheduler.rows):
      scheduler.step()
  decoder, table = bare._decoder, bare._table

  def step() -> None:
    decoder.decode(table, 1, until_free=False)
    jax.block_until_ready(decoder._started.popleft().output)

  for _ in range(10):
    seconds = max(0.0, seconds + HOST_MS / 1e3 - statistics.median(_seconds(step, 10)))
  times = [], []
  for _ in range(args.steps // 20):  # in turns: the machine's speed changes
    for found, run in zip(times, (step, core.step)):
      found.extend(_seconds(run, 20))
  (alone, _), (whole, late) = (
    (statistics.median(t) * 1e3, statistics.quantiles(t, n=20)[18] * 1e3) for t in times
  )
  print(
    f'{leaves} weight arrays on {jax.device_count()} devices, 32 rows: the program alone takes '
    f'{alone:.2f} ms a step, the whole core {whole:.2f} ms (p95 {late:.2f}), {whole / alone:.3f} '
    'times'
  )


def _seconds(run, count: int) -> list[float]:
  times = []
  for _ in range(count):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return times


def long_case(args) -> None:
  """Print the time of a step with one long row beside one with short rows alone."""
  import numpy as np

  from benchmarks.continuous import make_engine
  from t5x_inference_ext.engine.request import Request
  from t5x_inference_ext.engine.scheduler import Scheduler
  from t5x_inference_ext.engine.scheduler_config import SchedulerConfig

  engine = make_engine(args.layers, args.d_model, args.vocabulary, args.dtype)
  rng = np.random.default_rng(0)
  new = 20
  config = SchedulerConfig(
    32, 8192, pages=64 + 31 + 16, end_ids=(), prefill_budget=10**6, decode_steps=1
  )
  schedulers = []
  for longest in (100, 8192):
    scheduler = Scheduler(engine.model, engine.weights, config)
    for i in range(32):
      length = longest - new if i == 0 else 100 - new
      tokens = tuple(rng.integers(3, args.vocabulary, length).tolist())
      scheduler.submit(Request(tokens, limit=new))
    while not all(row is not None and row.tokens for row in scheduler.rows):
      scheduler.step()
    schedulers.append(scheduler)
  times: list[list[float]] = [[], []]
  for _ in range(new - 6):
    for scheduler, found in zip(schedulers, times):
      start = time.perf_counter()
      scheduler.step()
      found.append(time.perf_counter() - start)
  short, long = (statistics.median(found) for found in times)
  held = 8192 + 31 * 128
  print(
    f'{engine.model.config}\n32 rows of 100 tokens: {short * 1e3:.2f} ms a step; one of 8192 '
    f'beside 31: {long * 1e3:.2f} ms, {long / short:.2f} times; the cache has '
    f'{config.pages_of_shard(1) * config.page_size / held:.2f} times the positions that rows hold, '
    'rounded up to pages'
  )


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--case', default='arrivals', choices=('arrivals', 'host', 'long'))
  parser.add_argument('--requests', type=int, default=128)
  parser.add_argument('--prompt', type=int, default=512, help='the longest prompt')
  parser.add_argument('--generate', type=int, default=128, help='the longest output')
  parser.add_argument('--layers', type=int, default=6)
  parser.add_argument('--d_model', type=int, default=384, help='a multiple of 64')
  parser.add_argument('--vocabulary', type=int, default=8192)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--steps', type=int, default=300)
  args = parser.parse_args()
  if args.case == 'host':
    flag = f'--xla_force_host_platform_device_count={HOST_DEVICES}'
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flag}'
  dict(arrivals=arrivals_case, host=host_case, long=long_case)[args.case](args)


if __name__ == '__main__':
  main()
