"""An executor that runs no program: it counts the time that programs would take."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_inference_ext.engine.prefix_store import BlockCopies
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.slots import RowPages, SlotPages, StepsOutput, StepsWork
from t5x_inference_ext.engine.state import ChosenTokens, RowParams
from t5x_inference_ext.engine.token_choice import TokenMasks
from t5x_inference_ext.model.chunks import page_shards
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.simulator.clock import VirtualClock
from t5x_inference_ext.simulator.drafts import SimulatedDrafts
from t5x_inference_ext.simulator.prices import Prices
from t5x_inference_ext.speculation import check_acceptance

_TOKEN = 5  # the token that every row gets in every step


class _Pending(NamedTuple):
  """A program's output, and the time at which it will be ready."""

  output: StepsOutput
  done: float


class ClockExecutor:
  """Advances a clock by the time of each program; rows get a fixed token until their limit.

  See engine.executor.Executor. Rows end only at their limits of new tokens.

  Args:
    model: The model. Its mesh may be abstract: no device is used.
    config: Sizes of the scheduler.
    prices: Times of the programs.
    clock: The clock to advance.
    block_bytes: Bytes of a block of the prefix store on each device.
    acceptance: Acceptance of drafts; see SimulatedDrafts. Needed if the config has drafts.

  Raises:
    RequestError: The config has drafts, and no acceptance is given.
  """

  def __init__(
    self,
    model: Model,
    config: SchedulerConfig,
    prices: Prices,
    clock: VirtualClock,
    block_bytes: int,
    acceptance: Sequence[float] = (),
  ) -> None:
    self._drafts: SimulatedDrafts | None = None
    if config.speculate is not None:
      check_acceptance(config.speculate, tuple(acceptance))
      self._drafts = SimulatedDrafts(config.speculate, acceptance, config.slots)
    self._config, self._prices, self._clock = config, prices, clock
    self.shards = page_shards(model, config.slots)
    self.block_bytes = block_bytes
    self.blocks = config.prefix_bytes // block_bytes
    self._left = np.zeros(config.slots, np.int64)  # tokens until the limit of each slot's row

  def start_prefill(self, copies: tuple[BlockCopies, BlockCopies] | None) -> None:
    """Advance the clock by copies into the prefix store and the start of a group: one program."""
    saves, loads = (int(each.count) for each in copies) if copies else (0, 0)
    seconds = self._prices.seconds('start_prefill', blocks=loads)
    if saves:
      seconds += self._prices.seconds('save_blocks', blocks=saves)
    self._begin(seconds)

  def prefill_chunk(
    self, tokens: np.ndarray, counts: np.ndarray, read: int, adapters: np.ndarray
  ) -> None:
    """Advance the clock by a chunk."""
    del counts, adapters
    self._start('prefill_chunk', tokens=tokens.shape[1], read=read)

  def insert(
    self,
    place: int,
    slot: int,
    pages: RowPages,
    params: RowParams,
    tokens: np.ndarray,
    length: int,
    generated: int,
    masks: TokenMasks | None,
  ) -> Any:
    """Advance the clock by an insertion; the row gets its next token."""
    del place, pages, tokens, masks
    self._left[slot] = int(params.limits[0]) - generated - 1
    if self._drafts is not None:
      self._drafts.enter(slot)
    one = np.ones(1, np.int32)
    return self._output(
      self._start('insert', positions=length), 1, one, self._left[slot : slot + 1]
    )

  def decode_steps(
    self,
    pages: SlotPages,
    alive: np.ndarray,
    steps: int,
    until_free: bool,
    read: int,
    read_shared: int,
    prices: np.ndarray | None,
    adapters: np.ndarray,
  ) -> Any:
    """Take the time of decode steps; each row gets a token a step, or more, until its limit."""
    del pages, adapters
    if self._drafts is not None and prices is not None:
      return self._drafted_steps(self._drafts, alive, steps, until_free, read, read_shared, prices)
    return self._steps(alive, steps, until_free, read, read_shared)

  def _steps(
    self, alive: np.ndarray, steps: int, until_free: bool, read: int, read_shared: int
  ) -> _Pending:
    going = alive & (self._left > 0)
    left = self._left[going]
    run = min(steps, int(left.min() if until_free else left.max())) if left.size else 0
    counts = np.where(going, np.minimum(self._left, run), 0).astype(np.int32)
    self._left -= counts
    each = self._prices.seconds('decode_steps', read=read, read_shared=read_shared)
    done = self._begin(run * each)
    return self._output(done, self._config.decode_steps, counts, self._left)

  def _drafted_steps(
    self,
    drafts: SimulatedDrafts,
    alive: np.ndarray,
    steps: int,
    until_free: bool,
    read: int,
    read_shared: int,
    prices: np.ndarray,
  ) -> _Pending:
    """Take the time of steps that may check drafts. See speculative_steps.speculative_steps."""
    sizes = dict(read=read, read_shared=read_shared)
    going = alive & (self._left > 0)
    counts, passes = np.zeros(len(alive), np.int32), np.zeros(len(drafts.widths), np.int32)
    seconds, rows, drafted, accepted = 0.0, 0, 0, 0
    while counts.max() < steps and (live := going & (self._left > 0)).any():
      if until_free and (going & ~live).any():
        break
      step = drafts.step(prices, np.where(live, self._left, 0), until_free)
      counts += step.made
      self._left -= step.made
      passes[step.kind] += 1
      rows, drafted = rows + int(live.sum()), drafted + step.drafted
      accepted += step.accepted
      if step.width:
        seconds += self._prices.seconds('speculative_steps', draft=step.width, **sizes)
      else:
        seconds += self._prices.seconds('decode_steps', **sizes)
    work = StepsWork(passes, *(np.int32(x) for x in (rows, drafted, accepted)))  # type: ignore[arg-type]  # numpy's
    pending = self._output(self._begin(seconds), self._config.most_tokens, counts, self._left)
    return pending._replace(output=pending.output._replace(work=work))

  def save_reply(self, slot: int, copies: BlockCopies) -> None:
    """Advance the clock by copies into the prefix store, at the price of a prompt's."""
    del slot
    self._start('save_blocks', blocks=int(copies.count))

  def fetch(self, output: Any) -> StepsOutput:
    """Wait for a program's output, and return it."""
    self._clock.read(output.done)
    return output.output

  def wait(self) -> None:
    """Wait until all work that was started is done."""
    self._clock.drain()

  def settle(self) -> None:
    """Do nothing: the devices run all programs in order."""

  def now(self) -> float:
    """Return the clock's time in seconds."""
    return self._clock.now()

  def _start(self, program: str, **sizes: int) -> float:
    return self._begin(self._prices.seconds(program, **sizes))

  def _begin(self, seconds: float) -> float:
    self._clock.spend(self._prices.seconds('start'))
    return self._clock.start(seconds)

  def _output(self, done: float, steps: int, counts: np.ndarray, left: np.ndarray) -> _Pending:
    """Return tokens for rows that get `counts` of them in up to `steps` steps."""
    rows = len(counts)
    none = np.zeros((steps, rows, 0))
    tokens = np.full((steps, rows), _TOKEN, np.int32)
    chosen: tuple[Any, ...] = tokens, np.zeros((steps, rows), np.float32), none.astype(int), none
    output: tuple[Any, ...] = ChosenTokens(*chosen), counts, left <= 0, np.zeros(rows, bool)
    return _Pending(StepsOutput(*output), done)
