"""The host side of decode steps while some row has a grammar.

The host makes masks of the tokens that the rows' grammars allow. It needs each row's last token for
that, so a step is begun before the host reads tokens, and ended when it has read them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.draft_width import best_width, verify_widths
from t5x_inference_ext.engine.drafting import DraftState, Outlook
from t5x_inference_ext.engine.executor import DeviceExecutor, Executor
from t5x_inference_ext.engine.grammars import mask_words, masks_of
from t5x_inference_ext.engine.masked_drafts import MadeDrafts
from t5x_inference_ext.engine.rows import Row
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.slot_table import SlotTable
from t5x_inference_ext.engine.slots import StepsOutput
from t5x_inference_ext.engine.step_prices import StepPrices
from t5x_inference_ext.engine.token_choice import TokenMasks
from t5x_inference_ext.engine.warm_up import CompiledProgram, timed_run


class BegunStep(NamedTuple):
  """A step that has begun: when, whether a row waits for a slot, and what its programs gave."""

  time: float
  waited: bool
  output: Any


def row_masks(rows: Sequence[Row | None], vocab_size: int) -> TokenMasks:
  """Return the masks of the tokens that may come next in each row."""
  matchers = [(row.matcher, row.end_ids) if row and row.matcher else None for row in rows]
  return masks_of(matchers, vocab_size)


class MaskedSteps:
  """Steps without drafts: the model runs while the host reads tokens and makes masks.

  Args:
    executor: Holds the slots.
    config: Sizes that the programs are compiled for.
    vocab_size: V.

  Attributes:
    most: Maximum number of tokens that a row gets in a step.
    prices: Prices of steps by the number of draft tokens that they check; None: there are none.
  """

  most = 1
  prices: StepPrices | None = None

  def __init__(self, executor: DeviceExecutor, config: SchedulerConfig, vocab_size: int) -> None:
    self._executor, self._config, self._vocab_size = executor, config, vocab_size
    self._sizes = config.logits_reads(executor.shards)

  def reads(self, table: SlotTable) -> tuple[int, int]:
    """Return the numbers of own pages and of shared pages that the next step must read."""
    return next(size for size in self._sizes if size[0] >= table.pool.highest)

  def begin(self, table: SlotTable, waited: bool) -> BegunStep:
    """Begin a step for all slots.

    Args:
      table: Table of the slots, in which every row must have the pages that it needs.
      waited: Whether a row waits for a slot.
    """
    time = self._executor.now()
    return BegunStep(time, waited, self._logits(table, *self.reads(table)))

  def choose(self, table: SlotTable, begun: BegunStep, read: int, read_shared: int) -> StepsOutput:
    """Start the choice of each row's next tokens; return the output.

    Args:
      table: Table of the slots. All tokens of rows with grammars must have been read.
      begun: From `begin`.
      read, read_shared: From `reads`.
    """
    del read, read_shared
    alive, masks = table.alive.copy(), row_masks(table.rows, self._vocab_size)
    return self._executor.on_slots(programs.choose_masked, begun.output, alive, masks)

  def warm_up(self, table: SlotTable, done: list[CompiledProgram]) -> set[tuple[int, int]]:
    """Compile all programs, append them to `done`, and return the sizes of `reads`."""
    wait, begun = self._executor.wait, None
    for read, shared in self._sizes:
      begun = timed_run(
        done,
        'decode_logits',
        lambda: self._logits(table, read, shared),  # noqa: B023  # runs at once
        wait,
        read=read,
        read_shared=shared,
      )
    step = BegunStep(0.0, False, begun)
    timed_run(done, 'choose_masked', lambda: self.choose(table, step, 0, 0), wait)
    return set(self._sizes)

  def _logits(self, table: SlotTable, read: int, read_shared: int) -> Any:
    weights = self._executor.weights_for(table.adapters.copy())
    rows = table.pages(), table.alive.copy()
    sizes = dict(read=read, read_shared=read_shared)
    return self._executor.on_slots(programs.decode_logits, weights, *rows, **sizes)


class DraftedMaskedSteps(MaskedSteps):
  """Steps that check drafts. See masked_drafts, whose programs they run."""

  def __init__(self, executor: DeviceExecutor, config: SchedulerConfig, vocab_size: int) -> None:
    super().__init__(executor, config, vocab_size)
    assert config.speculate is not None
    self._drafted = config.speculate.most
    self.most = 1 + self._drafted
    self._widths = (0, *verify_widths(self._drafted))
    self.prices: StepPrices = StepPrices(self._widths)

  def begin(self, table: SlotTable, waited: bool) -> BegunStep:
    """Begin a step for all slots: start to make the rows' drafts. See MaskedSteps.begin."""
    time, prices = self._executor.now(), self.prices.next()
    return BegunStep(time, waited, (prices, self._make(table, waited, prices)))

  def choose(self, table: SlotTable, begun: BegunStep, read: int, read_shared: int) -> StepsOutput:
    """Start to run the model over the drafts, and to choose. See MaskedSteps.choose."""
    prices, made = begun.output
    made = self._followed(table, self._executor.fetch(made))
    drafting = DraftState(made.tokens, made.seen, made.seen[0])  # only `seen` is read
    outlook = Outlook(made.counts, made.grades, made.grades, made.tokens[:, 0])
    left, waited = np.maximum(made.left, 1), np.bool_(begun.waited)
    index = int(best_width(self._widths, prices, drafting, outlook, left, table.alive, waited))
    self._verify(table, made, index, read, read_shared)
    return self._choose(table, made, index)

  def warm_up(self, table: SlotTable, done: list[CompiledProgram]) -> set[tuple[int, int]]:
    """Compile all programs. See MaskedSteps.warm_up."""
    wait = self._executor.wait
    made = timed_run(
      done, 'make_drafts', lambda: self._make(table, False, self.prices.prices), wait
    )
    made = self._executor.fetch(made)  # as in `choose`: arrays of devices have other programs
    for read, shared in self._sizes:
      timed_run(
        done,
        'verify_drafts',
        lambda: self._verify(table, made, 0, read, shared),  # noqa: B023  # runs at once
        wait,
        read=read,
        read_shared=shared,
      )
    timed_run(done, 'choose_drafted', lambda: self._choose(table, made, 0), wait)
    return set(self._sizes)

  def _make(self, table: SlotTable, waited: bool, prices: np.ndarray) -> MadeDrafts:
    executor = self._executor
    return executor.on_slots(
      programs.make_drafts,
      table.alive.copy(),
      np.bool_(waited),
      prices,
      executor.draft_weights,
      drafter=executor.drafter,
    )

  def _followed(self, table: SlotTable, made: MadeDrafts) -> MadeDrafts:
    """Return the drafts as the rows' grammars allow or force them, without unknown tokens."""
    tokens, counts, grades = made.tokens.copy(), made.counts.copy(), made.grades.copy()
    for slot, row in enumerate(table.rows):
      known = tokens[slot, : counts[slot]].tolist()
      known = known[: known.index(-1)] if -1 in known else known
      if row is not None and row.matcher is not None:
        most = max(0, min(self._drafted, int(made.left[slot]) - 1))
        known, forced = row.matcher.draft(known, most)
        if forced:
          grades[slot] = made.seen.shape[1] - 1
      tokens[slot], counts[slot] = -1, len(known)
      tokens[slot, : len(known)] = known
    return made._replace(tokens=tokens, counts=counts, grades=grades)

  def _verify(
    self, table: SlotTable, made: MadeDrafts, index: int, read: int, read_shared: int
  ) -> None:
    self._executor.on_slots(
      programs.verify_drafts,
      self._executor.weights_for(table.adapters.copy()),
      table.pages(),
      table.alive.copy(),
      np.maximum(made.tokens, 0),
      made.counts,
      np.int32(index),
      read=read,
      read_shared=read_shared,
    )

  def _choose(self, table: SlotTable, made: MadeDrafts, index: int) -> StepsOutput:
    """Make the masks after the tokens that are checked, and start to choose."""
    shape = self._drafted + 1, len(table.rows), mask_words(self._vocab_size)
    masks, counts = np.zeros(shape, np.uint32), made.counts.copy()
    constrained = np.zeros(len(table.rows), bool)
    for slot, row in enumerate(table.rows):
      if row is not None and row.matcher is not None:
        constrained[slot] = True
        draft = made.tokens[slot, : min(counts[slot], max(1, self._widths[index]))].tolist()
        known = row.matcher.fill_draft(masks, slot, row.end_ids, draft)
        if known < len(draft):
          counts[slot] = known
    executor = self._executor
    return executor.on_slots(
      programs.choose_drafted,
      table.alive.copy(),
      made.tokens,
      counts,
      made.grades,
      np.int32(index),
      TokenMasks(masks, constrained),
      executor.draft_weights,
      drafter=executor.drafter,
    )


def masked_steps(executor: Executor, config: SchedulerConfig, vocab_size: int) -> MaskedSteps:
  """Return the steps of rows with grammars: those that check drafts, if the config has drafts."""
  assert isinstance(executor, DeviceExecutor), 'simulated rows have no grammars'
  kind = MaskedSteps if config.speculate is None else DraftedMaskedSteps
  return kind(executor, config, vocab_size)
