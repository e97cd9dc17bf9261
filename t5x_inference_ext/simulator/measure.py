"""Measure the times of a scheduler's programs on this machine's devices."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import itertools
import statistics
import time

import numpy as np

from t5x_inference_ext.engine.chunk_sizes import next_chunk
from t5x_inference_ext.engine.draft_width import verify_widths
from t5x_inference_ext.engine.executor import DeviceExecutor
from t5x_inference_ext.engine.prefix_store import block_copies
from t5x_inference_ext.engine.request import Handle, Request
from t5x_inference_ext.engine.rows import Row
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.slot_params import slot_row
from t5x_inference_ext.engine.slot_table import SlotTable
from t5x_inference_ext.engine.slots import StepsOutput
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.simulator.clock import VirtualClock
from t5x_inference_ext.simulator.executor import ClockExecutor
from t5x_inference_ext.simulator.prices import NoTime, PricedProgram, PricedService
from t5x_inference_ext.simulator.service import WaitingLimits, serve_arrivals
from t5x_inference_ext.simulator.trace import RandomTrace

_CALLS = 8  # in a row: starting a call overlaps with running others, as in a busy scheduler
_PROMPT = 32  # number of tokens of the rows whose decode steps are timed
_HOST_REQUESTS = 200
_IDLE = 0.1  # seconds after which cores sleep, and others have used their caches


def measure_service(
  model: Model, weights: Weights, config: SchedulerConfig, repeats: int = 5
) -> PricedService:
  """Return the mean times of a scheduler's programs, over `repeats` runs of _CALLS calls.

  Means, not medians: occasional delays of a machine slow a service on it too. Programs whose output
  the host reads are timed as the scheduler runs them: each starts before the previous output is
  read.

  All programs that a service needs are run, so this takes longer than Scheduler.warm_up.
  """
  timer = _Timer(model, weights, config, repeats)
  rows = [*timer.prefill(), *timer.insertions(), *timer.steps(), *timer.copies()]
  rows += [timer.start(), PricedProgram('host', {}, host_seconds(model, config))]
  shared = timer.shared
  del timer  # its cache, before that of another scheduler
  rows += [PricedProgram('wake', {}, wake_seconds(model, weights, config, repeats))]
  layouts = model.prefill_layout, model.decode_layout
  x, y, z = model.mesh.shape.values()
  return PricedService(config, (x, y, z), layouts, tuple(rows), shared)


def wake_seconds(
  model: Model, weights: Weights, config: SchedulerConfig, repeats: int = 5
) -> float:
  """Measure how much longer a first token takes if nothing ran for _IDLE seconds before."""
  scheduler, rng = Scheduler(model, weights, config), np.random.default_rng(0)
  length = max(1, config.max_length // 4)

  def first_token_after(pause: float) -> float:
    tokens = rng.integers(0, model.config.vocab_size, length).tolist()
    time.sleep(pause)
    begin = time.perf_counter()
    scheduler.submit(Request(tuple(tokens), limit=1))
    while not scheduler.idle:
      scheduler.step()
    return time.perf_counter() - begin

  longer = []
  for _ in range(_CALLS * repeats):
    first_token_after(0.0)  # it may be slow itself: the one before it came after a pause
    busy = first_token_after(0.0)
    longer.append(first_token_after(_IDLE) - busy)
  return max(0.0, statistics.fmean(longer))


def host_seconds(model: Model, config: SchedulerConfig) -> float:
  """Measure the host's own seconds in a step of a scheduler whose slots are full."""
  config = dataclasses.replace(config, speculate=None)  # a simulation of drafts is not host work
  length = max(1, config.max_length // 4)
  trace = RandomTrace(_HOST_REQUESTS, length, length)
  executor = ClockExecutor(model, config, NoTime(), clock := VirtualClock(), 2**20)
  scheduler = Scheduler(model, None, config, executor=executor)
  turns = itertools.count()
  begin = time.perf_counter()
  arrivals = trace.arrivals(1e9, model.config.vocab_size)
  serve_arrivals(scheduler, arrivals, clock, WaitingLimits(_HOST_REQUESTS), lambda: next(turns))
  return (time.perf_counter() - begin) / max(1, next(turns))


class _Timer:
  """Times the programs of a scheduler that has no requests."""

  def __init__(self, model: Model, weights: Weights, config: SchedulerConfig, repeats: int) -> None:
    self._config, self._repeats = config, repeats
    self._executor = DeviceExecutor(model, weights, config)
    self._vocab_size = model.config.vocab_size
    self.shared = model.mesh.devices.flat[0].platform == 'cpu'
    self._table = SlotTable(config, self._executor.shards)
    drafts = config.speculate
    self._widths = (0,) if drafts is None else (0, *verify_widths(drafts.most))
    tokens = 1 + self._widths[-1]  # at most, of a row in a step
    self._calls = max(1, min(_CALLS, (config.max_length - _PROMPT) // tokens))
    for slot in range(config.slots):
      row = Row(Handle(slot, Request((0,))), 0, (), None)
      self._table.enter(slot, row, min(_PROMPT + self._calls * tokens, config.max_length), [])

  def _time(
    self, run: Callable[[], StepsOutput | None], prepare: Callable[[], object] | None = None
  ) -> float:
    """Return the mean time of a call, of several in a row after `prepare`."""
    found = []
    for _ in range(self._repeats + 1):  # the first run compiles
      if prepare is not None:
        prepare()
      self._executor.wait()
      begin = time.perf_counter()
      before = None
      for _ in range(self._calls):
        output = run()
        if before is not None:
          self._executor.fetch(before)
        before = output
      self._executor.wait()
      found.append((time.perf_counter() - begin) / self._calls)
    return statistics.fmean(found[1:])

  def _start(self, saves: int, loads: int) -> None:
    """Copy the first blocks of a prompt into the store, and of the store into the next prompt."""
    most, copies = self._config.block_copies, None
    if self._executor.blocks:
      saved, loaded = (
        block_copies([(0, i, i) for i in range(count)], most) for count in (saves, loads)
      )
      copies = saved, loaded
    self._executor.start_prefill(copies)

  def _reset(self) -> None:
    self._start(0, 0)

  def _chunk(self, size: int, read: int, count: int) -> None:
    """Run a chunk of which the first `count` tokens are valid."""
    rows = self._config.prefill_rows
    tokens = np.full((rows, size), 3, np.int32)
    counts = np.full(rows, count, np.int32)
    self._executor.prefill_chunk(tokens, counts, read, np.zeros(rows, np.int32))

  def _prefill(self, length: int) -> None:
    """Run as many tokens as a prompt of this length has."""
    left, sizes = length, self._config.first_chunks
    while left > 0:
      size = next_chunk(sizes, self._config.later_chunks, left)
      read = 0 if left == length else self._config.prefill_reads[-1]
      self._chunk(size, read, min(size, left))
      left, sizes = left - size, self._config.later_chunks

  def prefill(self) -> Iterator[PricedProgram]:
    """Yield the times of chunks."""
    for size, read in self._config.chunk_programs:
      seconds = self._time(lambda: self._chunk(size, read, size), self._reset)  # noqa: B023  # runs at once
      yield PricedProgram('prefill_chunk', {'tokens': size, 'read': read}, seconds)

  def _insert(
    self, slot: int, length: int, sampling: SamplingParams = SamplingParams()
  ) -> StepsOutput:
    params = slot_row(
      sampling, self._vocab_size, seed=0, limit=2**30, top_width=self._config.top_log_probs
    )
    tokens = np.zeros((1, self._config.max_length), np.int32)
    pages = self._table.pages_to_write(slot, [])
    return self._executor.insert(0, slot, pages, params, tokens, length, 0, None)

  def _fill(self, sampling: SamplingParams = SamplingParams()) -> None:
    """Put a short row that never ends into each slot."""
    self._reset()
    self._prefill(min(_PROMPT, self._config.max_length))
    for slot in range(self._config.slots):
      self._insert(slot, _PROMPT, sampling)

  def insertions(self) -> Iterator[PricedProgram]:
    """Yield the times of inserting a short row and a long row."""
    for length in (self._config.first_chunks[0], self._config.max_length):

      def prepare() -> None:
        self._reset()
        self._prefill(length)  # noqa: B023  # runs at once

      seconds = self._time(lambda: self._insert(0, length), prepare)  # noqa: B023  # runs at once
      yield PricedProgram('insert', {'positions': length}, seconds)

  def _step(self, read: int, shared: int, kind: int = 0) -> StepsOutput:
    """Start a step that checks the number of draft tokens with this index in _widths."""
    table, prices = self._table, None
    if len(self._widths) > 1:
      prices = np.full(len(self._widths), 1e6, np.float32)
      prices[kind] = 1.0
    pages, alive, adapters = table.pages(), table.alive.copy(), table.adapters.copy()
    return self._executor.decode_steps(pages, alive, 1, False, read, shared, prices, adapters)

  def steps(self) -> Iterator[PricedProgram]:
    """Yield the times of decode steps of all slots, also of those that check whole drafts."""
    reads = self._config.step_reads(self._executor.shards)
    for (read, shared), (kind, width) in itertools.product(reads, enumerate(self._widths)):
      # If one token always follows, every row always has an n-gram draft.
      sampling = SamplingParams(logit_bias=((0, 1e6),)) if width else SamplingParams()
      fill = functools.partial(self._fill, sampling)
      seconds = self._time(lambda: self._step(read, shared, kind), fill)  # noqa: B023  # runs at once
      sizes = {'read': read, 'read_shared': shared}
      if width:
        yield PricedProgram('speculative_steps', {'draft': width, **sizes}, seconds)
      else:
        yield PricedProgram('decode_steps', sizes, seconds)

  def copies(self) -> Iterator[PricedProgram]:
    """Yield the times of starting a group with blocks to load, and what saving blocks adds."""
    most = min(self._config.max_length // self._config.block_size, self._executor.blocks)
    empty = self._time(self._reset)
    yield PricedProgram('start_prefill', {'blocks': 0}, empty)
    if most:
      load = functools.partial(self._start, 0, most)
      yield PricedProgram('start_prefill', {'blocks': most}, self._time(load))
    for count in (1, most) if most else ():
      save = functools.partial(self._start, count, 0)
      yield PricedProgram('save_blocks', {'blocks': count}, max(0.0, self._time(save) - empty))

  def start(self) -> PricedProgram:
    """Return the host's time to start a program and to read an output that is ready.

    If the host's cores are the devices, the programs' times already include this time.
    """
    if self.shared:
      return PricedProgram('start', {}, 0.0)
    read, shared = self._config.step_reads(self._executor.shards)[0]
    self._fill()
    found = []
    for _ in range(_CALLS * self._repeats):
      self._executor.wait()
      begin = time.perf_counter()
      output = self._step(read, shared)
      started = time.perf_counter()
      self._executor.wait()
      waited = time.perf_counter()
      self._executor.fetch(output)
      found.append(started - begin + time.perf_counter() - waited)
    return PricedProgram('start', {}, statistics.median(found))
