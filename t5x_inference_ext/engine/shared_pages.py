"""The host's books of shared pages: beginnings that several rows of the slots have.

Attention reads a shared page once for all rows. A page is named by its node in the prefix tree, the
node of the last block on it: one node stands for one beginning.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


class SharedPageBook:
  """Gives out shared pages to beginnings, and counts the rows that use each.

  A page that no row uses keeps its beginning until the page is needed for another one.

  Args:
    rows: B, the number of slots.
    pages: NS, the number of shared pages.
    page_size: S, positions of a page.

  Attributes:
    visible: [B, NS] bool. Whether a row's beginning is on the page.
    starts: [NS] int32. Position of the page's first position in its beginning.
  """

  def __init__(self, rows: int, pages: int, page_size: int) -> None:
    self.visible = np.zeros((rows, pages), bool)
    self.starts = np.zeros(pages, np.int32)
    self._page_size = page_size
    self._names: list[Any] = [None] * pages
    self._pages: dict[Any, int] = {}
    self._last_used = [0] * pages
    self._clock = 0

  def take(self, row: int, names: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Give a row the pages of its beginning, as many as there are.

    Args:
      row: The row.
      names: Names of the pages of the beginning, in order.

    Returns:
      Pages that the row now uses, in order (possibly fewer than names), and the indices among them
      of pages that must be written first.
    """
    found: list[int] = []
    unwritten: list[int] = []
    self._clock += 1
    for name in names:
      page = self._pages.get(name)
      if page is None:
        page = self._unused()
        if page is None:
          break
        self._pages.pop(self._names[page], None)
        self._names[page], self._pages[name] = name, page
        self.starts[page] = len(found) * self._page_size
        unwritten.append(len(found))
      self.visible[row, page] = True
      self._last_used[page] = self._clock
      found.append(page)
    return found, unwritten

  def release(self, row: int) -> None:
    """Take all pages from a row."""
    self.visible[row] = False

  @property
  def highest(self) -> int:
    """The number of first pages that hold everything that rows use."""
    used = np.flatnonzero(self.visible.any(axis=0))
    return int(used[-1]) + 1 if used.size else 0

  def check(self) -> list[str]:
    """Return a sentence for each thing in the books that does not add up."""
    named = {name: page for page, name in enumerate(self._names) if name is not None}
    if named != self._pages:
      return [f'{len(named)} shared pages have a name, and {len(self._pages)} names have a page']
    return []

  def _unused(self) -> int | None:
    """Return a page that no row uses: a nameless one, else the least recently used one."""
    unused = np.flatnonzero(~self.visible.any(axis=0))
    if not unused.size:
      return None
    return min(map(int, unused), key=lambda page: (self._last_used[page], page))
