"""The host's control of the slots on the devices: starts their programs and reads results."""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import itertools
from typing import NamedTuple

import jax
import numpy as np

from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine import slots as device
from t5x_inference_ext.engine.grammars import masks_of
from t5x_inference_ext.engine.prefilling import Prompt, ReadyRow
from t5x_inference_ext.engine.prompts import PrefillState
from t5x_inference_ext.engine.request import Handle, Request, TopLogProbs
from t5x_inference_ext.engine.rows import Row
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.slot_params import slot_row
from t5x_inference_ext.engine.slot_table import SlotTable
from t5x_inference_ext.engine.state import ChosenTokens
from t5x_inference_ext.engine.token_choice import TokenMasks
from t5x_inference_ext.engine.warm_up import CompiledProgram, timed_run
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights


class NewTokens(NamedTuple):
  """Tokens that a program chose for a row.

  Attributes:
    slot: The slot that the row was in.
    row: The row.
    tokens: New token ids.
    log_probs: Log-probability of each.
    top: For each token the most likely tokens, as many as the row's request asks for.
    failed: Whether the row ended because its logits were not finite.
  """

  slot: int
  row: Row
  tokens: list[int]
  log_probs: list[float]
  top: list[TopLogProbs]
  failed: bool


@dataclasses.dataclass(frozen=True)
class _Started:
  """A started program: the row in each slot, and the output arrays to come."""

  rows: dict[int, Row]
  output: device.StepsOutput
  steps: int


class Decoder:
  """Starts programs that change the slots, and reads their results in order.

  Args:
    model: Decides mesh and layouts.
    weights: Weights on that mesh.
    config: Sizes that the programs are compiled for.
    shards: Number of shards that split the rows of the cache.
    grammars: Whether rows may have grammars.

  Attributes:
    decoded: Number of decode steps times number of slots, so far.
    generated: Number of tokens that decode steps added to rows, so far.
  """

  def __init__(
    self,
    model: Model,
    weights: Weights,
    config: SchedulerConfig,
    shards: int,
    *,
    grammars: bool = False,
  ) -> None:
    self._model, self._weights, self._config = model, weights, config
    self._shards, self._grammars = shards, grammars
    any_row = slot_row(
      SamplingParams(), model.config.vocab_size, seed=0, limit=1, top_width=config.top_log_probs
    )
    self._slots = programs.empty_slots(model, weights, any_row, config=config, shards=shards)
    self._started: collections.deque[_Started] = collections.deque()
    self.decoded = self.generated = 0

  @property
  def under_way(self) -> int:
    """Number of programs whose tokens have not been read."""
    return len(self._started)

  def wait(self) -> None:
    """Wait until the devices have run all programs that were started."""
    jax.block_until_ready(self._slots)

  def insert(
    self,
    ready: ReadyRow,
    slot: int,
    table: SlotTable,
    unwritten: Sequence[int],
    state: PrefillState,
  ) -> device.StepsOutput:
    """Start the insertion of a prefilled row, which also chooses its next token; return its output.

    Args:
      ready: The row, and the position of its prompt in the prefill state.
      slot: The row's slot; the table already records it.
      table: Table of the slots. unwritten: Indices of the row's shared pages that must be written.
      state: The prefill state that holds the prompt.
    """
    row, request = ready.row, ready.row.handle.request
    vocab_size = self._model.config.vocab_size
    params = slot_row(
      request.sampling,
      vocab_size,
      seed=request.seeds[row.sample],
      limit=row.limit,
      end_ids=row.end_ids,
      top=request.top_log_probs,
      top_width=self._config.top_log_probs,
    )
    # The prompt's tokens are copied only because penalties read them.
    tokens = np.zeros((1, self._config.max_length), np.int32)
    if request.sampling.penalizes:
      tokens[0, : len(ready.prompt.tokens)] = ready.prompt.tokens
    self._slots, output = programs.insert(
      self._model,
      self._slots,
      self._weights,
      state,
      np.int32(ready.place),
      np.int32(slot),
      table.pages_to_write(slot, unwritten),
      params,
      tokens,
      np.int32(len(ready.prompt.tokens)),
      np.int32(len(row.tokens)),
      self._masks([row]) if self._grammars else None,
    )
    row.dispatched = len(row.tokens) + 1
    self._start({slot: row}, output, 0)
    return output

  def decode(self, table: SlotTable, steps: int, until_free: bool) -> None:
    """Start decode steps for all slots.

    Args:
      table: Table of the slots, in which every row has the pages that it needs.
      steps: Maximum number of steps.
      until_free: Whether to stop as soon as a row ends.
    """
    output = self._decode(table, steps, until_free, *self._reads(table))
    self._start_steps(table, output, steps)

  def decode_logits(self, table: SlotTable) -> jax.Array:
    """Start a decode step for all slots, up to its logits [B, V]; return the logits.

    Args:
      table: Table of the slots, in which every row has the page that it needs.
    """
    sizes = self._config.logits_reads(self._shards)
    return self._decode_logits(table, *next(x for x in sizes if x[0] >= table.pool.highest))

  def choose_masked(self, table: SlotTable, logits: jax.Array) -> None:
    """Start the choice of each row's next token, as the rows' grammars allow.

    Args:
      table: Table of the slots. All tokens of rows with grammars must have been read.
      logits: From `decode_logits`.
    """
    self._start_steps(table, self._choose(table, logits), 1)

  def _choose(self, table: SlotTable, logits: jax.Array) -> device.StepsOutput:
    self._slots, output = programs.choose_masked(
      self._model, self._slots, logits, table.alive.copy(), self._masks(table.rows)
    )
    return output

  def _masks(self, rows: Sequence[Row | None]) -> TokenMasks:
    matchers = [(row.matcher, row.end_ids) if row and row.matcher else None for row in rows]
    return masks_of(matchers, self._model.config.vocab_size)

  def _reads(self, table: SlotTable) -> tuple[int, int]:
    """Return how many own pages and how many shared pages the next step must read."""
    return (
      _least(self._config.reads_of_pages(self._shards), table.pool.highest),
      _least(self._config.shared_reads, table.shared.highest),
    )

  def _start_steps(self, table: SlotTable, output: device.StepsOutput, steps: int) -> None:
    rows = {slot: row for slot, row in enumerate(table.rows) if row is not None}
    for row in rows.values():
      row.dispatched = min(row.dispatched + steps, row.limit)
    self._start(rows, output, steps)

  def _decode_logits(self, table: SlotTable, read: int, read_shared: int) -> jax.Array:
    self._slots, logits = programs.decode_logits(
      self._model,
      self._slots,
      self._weights,
      table.pages(),
      table.alive.copy(),
      read=read,
      read_shared=read_shared,
    )
    return logits

  def _decode(
    self, table: SlotTable, steps: int, until_free: bool, read: int, read_shared: int
  ) -> device.StepsOutput:
    self._slots, output = programs.decode_steps(
      self._model,
      self._slots,
      self._weights,
      table.pages(),
      table.alive.copy(),
      np.int32(steps),
      np.bool_(until_free),
      most=self._config.decode_steps,
      read=read,
      read_shared=read_shared,
    )
    return output

  def warm_up(self, table: SlotTable, state: PrefillState, done: list[CompiledProgram]) -> None:
    """Compile all programs by running them with 0 steps. There must be no rows.

    Args:
      table: Table of the slots.
      state: Any prefill state.
      done: List to which the programs are appended.
    """
    assert not table.busy and not self._started
    ready = ReadyRow(0, Prompt((0,), []), Row(Handle(0, Request((0,))), 0, (), None))
    timed_run(done, 'insert', lambda: self.insert(ready, 0, table, [], state))
    reads = self._config.reads_of_pages(self._shards), self._config.shared_reads
    for read, shared in itertools.product(*reads):
      timed_run(
        done,
        'decode_steps',
        lambda: self._decode(table, 0, False, read, shared),  # noqa: B023  # runs at once
        read=read,
        read_shared=shared,
      )
    if self._grammars:
      for read, shared in self._config.logits_reads(self._shards):
        logits = timed_run(
          done,
          'decode_logits',
          lambda: self._decode_logits(table, read, shared),  # noqa: B023  # runs at once
          read=read,
          read_shared=shared,
        )
      timed_run(done, 'choose_masked', lambda: self._choose(table, logits))
    self._started.clear()

  def _start(self, rows: dict[int, Row], output: device.StepsOutput, steps: int) -> None:
    for array in jax.tree.leaves(output):
      if isinstance(array, jax.Array):
        array.copy_to_host_async()
    self._started.append(_Started(rows, output, steps))

  def read(self, *, leave: int = 0) -> Iterator[NewTokens]:
    """Wait for started programs, and yield the tokens of each row that got some or ended.

    Args:
      leave: Number of latest programs not to wait for.
    """
    while len(self._started) > leave:
      started = self._started.popleft()
      output = jax.device_get(started.output)
      if started.steps:
        self.decoded += int(output.counts.max()) * self._config.slots
        self.generated += int(output.counts.sum())
      # Convert to lists once for all rows: indexing arrays row by row is slow.
      tokens, log_probs = (x.T.tolist() for x in output.chosen[:2])
      counts, failed = output.counts.tolist(), output.failed.tolist()
      for slot, row in started.rows.items():
        at = slot if started.steps else 0
        count, asked = counts[at], row.handle.request.top_log_probs
        top = _most_likely(output.chosen, at, count, asked) if asked else [[]] * count
        yield NewTokens(slot, row, tokens[at][:count], log_probs[at][:count], top, failed[at])


def _least(sizes: Sequence[int], needed: int) -> int:
  return next(size for size in sizes if size >= needed)


def _most_likely(chosen: ChosenTokens, row: int, count: int, top: int) -> list[TopLogProbs]:
  """Return pairs (id, log-probability) of the `top` most likely tokens at a row's `count` steps."""
  ids = chosen.top_tokens[:count, row, :top].tolist()
  log_probs = chosen.top_log_probs[:count, row, :top].tolist()
  return [list(zip(*step)) for step in zip(ids, log_probs)]
