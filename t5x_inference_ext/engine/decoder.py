"""The host side of decoding: starts the programs that change the slots, and reads their results."""

import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from t5x_inference_ext.engine.draft_width import verify_widths
from t5x_inference_ext.engine.executor import Executor
from t5x_inference_ext.engine.masked_steps import BegunStep, masked_steps, row_masks
from t5x_inference_ext.engine.prefilling import Prompt, ReadyRow
from t5x_inference_ext.engine.request import Handle, Request, TopLogProbs
from t5x_inference_ext.engine.rows import Row
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.slot_params import slot_row
from t5x_inference_ext.engine.slot_table import SlotTable
from t5x_inference_ext.engine.slots import StepsOutput
from t5x_inference_ext.engine.state import ChosenTokens
from t5x_inference_ext.engine.stats import DraftStats
from t5x_inference_ext.engine.step_prices import TRIAL_STEPS, StepPrices
from t5x_inference_ext.engine.warm_up import CompiledProgram, timed_run


class NewTokens(NamedTuple):
  """Tokens that a program chose for a row.

  Attributes:
    slot: The slot that the row was in.
    row: The row.
    tokens: New token ids.
    log_probs: Log-probability of each token.
    top: For each token, the most likely tokens at its step: as many as the request asks for.
    failed: Whether the row ended because its logits were not finite.
  """

  slot: int
  row: Row
  tokens: list[int]
  log_probs: list[float]
  top: list[TopLogProbs]
  failed: bool


class _Started(NamedTuple):
  """A started program: the row in each slot, its output arrays, and whether it runs decode steps.

  `begun` is the start time of decode steps whose duration will be measured, for `prices`; None for
  others.
  """

  rows: dict[int, Row]
  output: StepsOutput
  steps: bool
  begun: float | None = None
  prices: StepPrices | None = None


class Decoder:
  """Starts programs that change the slots, and reads their results in order.

  Args:
    executor: Holds the slots.
    config: Sizes that the programs are compiled for.
    vocab_size: V.
    grammars: Whether rows may have grammars.

  Attributes:
    decoded: Number of decode steps times number of slots, so far.
    generated: Number of tokens that decode steps added to rows, so far.
    drafts: Counters of drafts, so far.
  """

  def __init__(
    self, executor: Executor, config: SchedulerConfig, vocab_size: int, *, grammars: bool = False
  ) -> None:
    self._executor, self._config = executor, config
    self._vocab_size = vocab_size
    self._masked = masked_steps(executor, config, vocab_size) if grammars else None
    self._started: collections.deque[_Started] = collections.deque()
    self.decoded = self.generated = 0
    self.drafts = DraftStats()
    self._prices: StepPrices | None = None
    if config.speculate is not None:
      self._prices = StepPrices((0, *verify_widths(config.speculate.most)))
    # Programs whose first run, a compilation, is over.
    self._timed: set[tuple[int, int]] = set()
    self._timed_masked: set[tuple[int, int]] = set()
    self._read_at = 0.0

  @property
  def under_way(self) -> int:
    """Number of programs whose tokens have not been read."""
    return len(self._started)

  def insert(
    self, ready: ReadyRow, slot: int, table: SlotTable, unwritten: Sequence[int]
  ) -> StepsOutput:
    """Start to insert a prefilled row and choose its next token; return the program's output.

    Args:
      ready: The row, and where its prompt is.
      slot: The row's slot, in which `table` already has the row.
      table: Table of the slots.
      unwritten: Indices of the row's shared pages that must be written.
    """
    row, request = ready.row, ready.row.handle.request
    params = slot_row(
      request.sampling,
      self._vocab_size,
      seed=request.seeds[row.sample],
      limit=row.limit,
      end_ids=row.end_ids,
      top=request.top_log_probs,
      top_width=self._config.top_log_probs,
    )
    # The prompt's tokens are copied only because penalties and drafts read them.
    tokens = np.zeros((1, self._config.max_length), np.int32)
    if request.sampling.penalizes or self._prices is not None:
      tokens[0, : len(ready.prompt.tokens)] = ready.prompt.tokens
    output = self._executor.insert(
      ready.place,
      slot,
      table.pages_to_write(slot, unwritten),
      params,
      tokens,
      len(ready.prompt.tokens),
      len(row.tokens),
      row_masks([row], self._vocab_size) if self._masked is not None else None,
    )
    row.started.append(1)
    self._started.append(_Started({slot: row}, output, False))
    return output

  def decode(
    self, table: SlotTable, steps: int, until_free: bool, after: str | None = 'prefill'
  ) -> None:
    """Start decode steps for all slots.

    Args:
      table: Table of the slots, in which every row must have the pages that it needs.
      steps: Maximum number of steps; with drafts, the steps stop once any row has this many new
        tokens.
      until_free: Whether to stop as soon as a row ends.
      after: Last program since the previous decode steps: 'prefill', 'insert', or None. Steps after
        'prefill' are not measured, because nothing shows when they begin.
    """
    begun, reads = self._executor.now(), self._reads(table)
    compiled = reads in self._timed
    timed = compiled and after != 'prefill'
    if after or not compiled:  # compiling or other work also delays programs started before
      self._started = collections.deque(each._replace(begun=None) for each in self._started)
    if self._prices is not None and self._prices.tries_plain:
      steps = min(steps, TRIAL_STEPS)
    output = self._decode(table, steps, until_free, *reads)
    drafts = self._config.most_tokens - self._config.decode_steps
    begun_at = begun if timed else None
    self._start_steps(table, output, steps + drafts, begun_at, self._prices)
    self._timed.add(reads)

  def begin_masked(self, table: SlotTable, waited: bool) -> BegunStep:
    """Begin a step for all slots, some of which have grammars. See masked_steps.MaskedSteps."""
    assert self._masked is not None
    return self._masked.begin(table, waited)

  def choose_masked(
    self, table: SlotTable, begun: BegunStep, after: str | None = 'prefill'
  ) -> None:
    """End a step that has begun: start to choose tokens as the rows' grammars allow.

    Args:
      table: Table of the slots. All tokens of rows with grammars must have been read.
      begun: From `begin_masked`.
      after: See `decode`.
    """
    assert self._masked is not None
    reads = self._masked.reads(table)
    compiled = reads in self._timed_masked
    if after or not compiled:
      self._started = collections.deque(each._replace(begun=None) for each in self._started)
    output = self._masked.choose(table, begun, *reads)
    timed = compiled and after != 'prefill'
    self._start_steps(
      table, output, self._masked.most, begun.time if timed else None, self._masked.prices
    )
    self._timed_masked.add(reads)

  def _reads(self, table: SlotTable) -> tuple[int, int]:
    """Return the numbers of own pages and of shared pages that the next step must read."""
    own, shared = table.pool.highest, table.shared.highest
    reads = self._config.step_reads(self._executor.shards)
    return next(pair for pair in reads if pair[0] >= own and pair[1] >= shared)

  def _start_steps(
    self,
    table: SlotTable,
    output: StepsOutput,
    tokens: int,
    begun: float | None,
    prices: StepPrices | None,
  ) -> None:
    rows = {slot: row for slot, row in enumerate(table.rows) if row is not None}
    for row in rows.values():
      row.started.append(tokens)
    self._started.append(_Started(rows, output, True, begun, prices))

  def _decode(
    self, table: SlotTable, steps: int, until_free: bool, read: int, read_shared: int
  ) -> StepsOutput:
    prices = None if self._prices is None else self._prices.next()
    return self._executor.decode_steps(
      table.pages(),
      table.alive.copy(),
      steps,
      until_free,
      read,
      read_shared,
      prices,
      table.adapters.copy(),
    )

  def warm_up(self, table: SlotTable, done: list[CompiledProgram]) -> None:
    """Compile all programs by running each with zero steps. No slot may hold a row.

    Args:
      table: Table of the slots.
      done: List to which the programs are appended.
    """
    assert not table.busy and not self._started
    ready = ReadyRow(0, Prompt((0,), []), Row(Handle(0, Request((0,))), 0, (), None))
    wait = self._executor.wait
    timed_run(done, 'insert', lambda: self.insert(ready, 0, table, []), wait)
    for read, shared in self._config.step_reads(self._executor.shards):
      timed_run(
        done,
        'decode_steps',
        lambda: self._decode(table, 0, False, read, shared),  # noqa: B023  # runs at once
        wait,
        read=read,
        read_shared=shared,
      )
      self._timed.add((read, shared))
    if self._masked is not None:
      self._timed_masked |= self._masked.warm_up(table, done)
    self._started.clear()

  def read(self, *, leave: int = 0) -> Iterator[NewTokens]:
    """Wait for started programs, and yield the tokens of each row that got some or ended.

    Args:
      leave: Number of most recently started programs not to wait for.
    """
    while len(self._started) > leave:
      started = self._started.popleft()
      output = self._executor.fetch(started.output)
      if started.steps:
        self._count(started, output)
      elif self._prices is not None:
        self._read_at = self._executor.now()
      # Convert to lists once for all rows: indexing arrays row by row is slow.
      tokens, log_probs = (x.T.tolist() for x in output.chosen[:2])
      counts, failed = output.counts.tolist(), output.failed.tolist()
      for slot, row in started.rows.items():
        at = slot if started.steps else 0
        count, asked = counts[at], row.handle.request.top_log_probs
        row.started.popleft()
        top = _most_likely(output.chosen, at, count, asked) if asked else [[]] * count
        yield NewTokens(slot, row, tokens[at][:count], log_probs[at][:count], top, failed[at])

  def _count(self, started: _Started, output: StepsOutput) -> None:
    """Count the work of decode steps, and update the prices of steps from their duration."""
    generated, steps = int(output.counts.sum()), int(output.counts.max())
    self.generated += generated
    work = output.work
    if work is None:
      self.decoded += steps * self._config.slots
      return
    self.decoded += int(work.passes.sum()) * self._config.slots
    new = DraftStats(int(work.rows), generated, int(work.drafted), int(work.accepted))
    self.drafts = self.drafts.plus(new)
    now = self._executor.now()
    if started.begun is not None and started.prices is not None:
      started.prices.add(now - max(started.begun, self._read_at), np.asarray(work.passes))
    self._read_at = now


def _most_likely(chosen: ChosenTokens, row: int, count: int, top: int) -> list[TopLogProbs]:
  """Return the `top` most likely tokens at each of a row's `count` steps: (id, log-probability)."""
  ids = chosen.top_tokens[:count, row, :top].tolist()
  log_probs = chosen.top_log_probs[:count, row, :top].tolist()
  return [list(zip(*step)) for step in zip(ids, log_probs)]
