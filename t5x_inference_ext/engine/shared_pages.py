"""Allocation of shared pages, on the host: pages with prefixes that several rows share.

Attention reads a shared page once for all rows. A page is named by the prefix tree's node for the
last block on it; such a node identifies the whole prefix up to the page's end.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


class SharedPageBook:
  """Allocates shared pages to prefixes, and counts the rows that use each page.

  A page that no row uses keeps its prefix until the page is needed for another prefix.

  Args:
    rows: B, the number of slots.
    pages: NS, the number of shared pages.
    page_size: S, positions of a page.

  Attributes:
    visible: [B, NS] bool. Whether the page holds a part of the row's prefix.
    starts: [NS] int32. Position in the prefix at which the page begins.
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
    """Give a row shared pages for its prefix, as many as are available.

    Args:
      row: The row.
      names: Names of the pages of the prefix, in order.

    Returns:
      Pages that the row now uses, in order (possibly fewer than names), and the indices in that
      list of pages that must be written before they are read.
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
    """Number of shared pages, from the first on, that a program must read to see all in use."""
    used = np.flatnonzero(self.visible.any(axis=0))
    return int(used[-1]) + 1 if used.size else 0

  def check(self) -> list[str]:
    """Return one sentence for each inconsistency in the records; [] if there is none."""
    named = {name: page for page, name in enumerate(self._names) if name is not None}
    if named != self._pages:
      return [f'{len(named)} shared pages have a name, and {len(self._pages)} names have a page']
    return []

  def _unused(self) -> int | None:
    """Return a page that no row uses: one without a name, else the least recently used; or None."""
    unused = np.flatnonzero(~self.visible.any(axis=0))
    if not unused.size:
      return None
    return min(map(int, unused), key=lambda page: (self._last_used[page], page))
