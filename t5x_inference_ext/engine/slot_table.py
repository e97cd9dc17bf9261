"""Allocation of slots, on the host: which row is in which slot, and which cache pages it has."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from t5x_inference_ext.engine.page_pool import PagePool
from t5x_inference_ext.engine.rows import Row
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.shared_pages import SharedPageBook
from t5x_inference_ext.engine.slots import RowPages, SlotPages


class SlotTable:
  """Rows in slots, with their pages.

  Args:
    config: Number of slots, and sizes of the cache.
    shards: Number of shards that split the rows of the cache.

  Attributes:
    pool: Allocation of the pages that belong to one row each.
    shared: Allocation of the pages with prefixes that several rows share.
    alive: [B] bool. Whether the slot has a row.
    adapters: [B] int32. Number of the adapter of each slot's row; 0: none.
  """

  def __init__(self, config: SchedulerConfig, shards: int) -> None:
    pages = config.pages_of_shard(shards)
    self.pool = PagePool(config.slots, shards, pages, config.page_size, config.pages_of_row)
    self.shared = SharedPageBook(config.slots, config.shared_pages, config.page_size)
    self.alive = np.zeros(config.slots, bool)
    self.adapters = np.zeros(config.slots, np.int32)
    self.rows: list[Row | None] = [None] * config.slots
    self._shared_of: list[list[int]] = [[] for _ in range(config.slots)]
    self._blocks_of_page = config.page_size // config.block_size

  @property
  def busy(self) -> bool:
    """Whether any slot has a row."""
    return bool(self.alive.any())

  @property
  def free(self) -> int:
    """Number of slots without a row."""
    return self.alive.size - int(self.alive.sum())

  def row_in(self, slot: int) -> Row:
    """Return the row in a slot that holds one."""
    row = self.rows[slot]
    assert row is not None
    return row

  def fits(self, length: int) -> bool:
    """Return whether a row of this many cached positions fits into an empty cache."""
    return self.pool.pages_of(length) < self.pool.pages

  def page_names(self, path: Sequence[Hashable]) -> Sequence[Hashable]:
    """Return the names of the pages that a prefix fills, given the nodes of its blocks."""
    return path[self._blocks_of_page - 1 :: self._blocks_of_page]

  def find_slot(self, length: int) -> int | None:
    """Return a free slot whose shard has the most free pages; None if none has enough.

    Args:
      length: Positions that the row needs when it enters.
    """
    slots = np.flatnonzero(~self.alive)
    if not slots.size:
      return None
    slot = min(map(int, slots), key=lambda s: (-self.pool.free_pages(self.pool.shard(s)), s))
    shard = self.pool.shard(slot)
    # Unless no page can be lacking, keep one free page in reserve for every two other rows of the
    # shard, so that the new row does not soon cause a preemption. A row alone needs no reserve.
    others = sum(self.rows[row] is not None for row in self.pool.rows(shard))
    needed = self.pool.pages_of(length)
    if others and not self.pool.ample:
      needed = max(needed, min(needed + others // 2, self.pool.pages - 1))
    return slot if needed <= self.pool.free_pages(shard) else None

  def enter(self, slot: int, row: Row, length: int, names: Sequence[Hashable]) -> list[int]:
    """Put a row into a slot; return the indices of its shared pages that must be written.

    Args:
      slot: From find_slot.
      row: The row.
      length: Positions that the row needs when it enters.
      names: Names of the pages of the prefix that the row shares with other rows.
    """
    found, unwritten = self.shared.take(slot, names)
    self.pool.begin(slot, len(found))
    grown = self.pool.grow(slot, length)
    assert grown, 'find_slot found too few pages'
    self._shared_of[slot] = found
    self.rows[slot], self.alive[slot], self.adapters[slot] = row, True, row.adapter
    return unwritten

  def pages_to_write(self, slot: int, unwritten: Sequence[int]) -> RowPages:
    """Return the pages of a row that enters its slot.

    Args:
      slot: The row's slot.
      unwritten: Indices of the row's shared pages that must be written.
    """
    width = self.pool.table.shape[1]
    shared = np.zeros(width, np.int32)
    found = self._shared_of[slot]
    shared[: len(found)] = found
    begin, end = (min(unwritten), max(unwritten) + 1) if unwritten else (0, 0)
    return RowPages(
      self.pool.table[slot].copy(),
      np.int32(self.pool.first(slot)),
      shared,
      np.int32(begin),
      np.int32(end),
    )

  def pages(self) -> SlotPages:
    """Return the page tables of all rows, in the form that decode programs take."""
    pool = self.pool
    arrays = pool.table, pool.owners, pool.starts, self.shared.visible, self.shared.starts
    return SlotPages(*(array.copy() for array in arrays))

  def leave(self, slot: int) -> None:
    """Free a slot and its pages."""
    self.rows[slot], self.alive[slot] = None, False
    self.pool.release(slot)
    self.shared.release(slot)

  def leave_all(self, done: Callable[[Row], bool]) -> None:
    """Free the slots of all rows that are done."""
    for slot, row in enumerate(self.rows):
      if row is not None and done(row):
        self.leave(slot)

  def grow(self, tokens: int) -> int | None:
    """Allocate the pages for every row's next decode steps.

    Args:
      tokens: Maximum number of tokens that the next program gives a row.

    Returns:
      None, or the slot of the youngest row of a shard that has too few pages left.
    """
    for slot, row in enumerate(self.rows):
      if row is None:
        continue
      length = row.cached(min(row.most + tokens, row.limit))
      if not self.pool.grow(slot, length):
        rivals = [s for s in self.pool.rows(self.pool.shard(slot)) if self.rows[s] is not None]
        return max(rivals, key=self._age)
    return None

  def _age(self, slot: int) -> tuple[int, int]:
    row = self.row_in(slot)
    return row.handle.index, row.sample

  def check(self) -> list[str]:
    """Return one sentence for each inconsistency in the records; [] if there is none."""
    wrong = self.pool.check() + self.shared.check()
    if [row is not None for row in self.rows] != self.alive.tolist():
      wrong.append('slots with rows and slots that are alive differ')
    if not self.busy and self.pool.held:
      wrong.append(f'no slot has a row, and {self.pool.held} pages are not free')
    if self.shared.visible[~self.alive].any():
      wrong.append('a free slot sees shared pages')
    return wrong
