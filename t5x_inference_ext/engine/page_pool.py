"""Page allocation of the paged cache, on the host: free pages, and the pages of each row.

model/pages.py holds the device functions that read and write the pages. Rows are split over shards;
a row's pages are on its own shard and are numbered within it. Page 0 of each shard belongs to no
row: free slots write there.
"""

import heapq

import numpy as np

from t5x_inference_ext.model.pages import UNUSED


class PagePool:
  """Allocates pages to rows, lowest numbers first, so that programs need read only the first pages.

  Args:
    rows: B, the number of slots. A multiple of `shards`.
    shards: Number of shards that split the rows.
    pages: Pages of each shard, page 0 included.
    page_size: S, positions of a page.
    width: M, maximum number of pages of a row.

  Attributes:
    table: [B, M] int32. For each row, the page that holds positions [m * S, (m + 1) * S).
    owners: [shards * pages] int32. The row, numbered within its shard, that holds the page.
    starts: [shards * pages] int32. Position in the row at which the page begins.
  """

  def __init__(self, rows: int, shards: int, pages: int, page_size: int, width: int) -> None:
    self.page_size, self.pages, self.shards = page_size, pages, shards
    self._rows_of_shard = rows // shards
    self.table = np.zeros((rows, width), np.int32)
    self.owners = np.zeros(shards * pages, np.int32)
    self.starts = np.full(shards * pages, UNUSED, np.int32)
    self._free = [list(range(1, pages)) for _ in range(shards)]  # a heap for each shard
    self._first = [0] * rows  # index of the row's first own page; those before it are shared
    self._ends = [0] * rows  # the page index after a row's last page

  @property
  def ample(self) -> bool:
    """Whether there are pages for rows of the maximum length in all slots: none can be lacking."""
    return self.pages > self._rows_of_shard * self.table.shape[1]

  def shard(self, row: int) -> int:
    """Return the shard that a row is on."""
    return row // self._rows_of_shard

  def rows(self, shard: int) -> range:
    """Return the rows of a shard."""
    return range(shard * self._rows_of_shard, (shard + 1) * self._rows_of_shard)

  def free_pages(self, shard: int) -> int:
    """Return how many pages of a shard are free."""
    return len(self._free[shard])

  def pages_of(self, length: int) -> int:
    """Return how many pages hold `length` positions."""
    return -(-length // self.page_size)

  def begin(self, row: int, shared: int) -> None:
    """Prepare a row to get pages. Its first `shared` pages are shared ones, not allocated here."""
    assert not self._ends[row], f'row {row} already has pages'
    self._first[row] = self._ends[row] = shared

  def first(self, row: int) -> int:
    """Return the index of a row's first own page; the pages before it are shared."""
    return self._first[row]

  def grow(self, row: int, length: int) -> bool:
    """Allocate pages to a row until they hold `length` positions; return whether enough were free.

    If too few are free, the row gets none.
    """
    shard, wanted = self.shard(row), self.pages_of(length)
    free = self._free[shard]
    if wanted - self._ends[row] > len(free):
      return False
    for index in range(self._ends[row], wanted):
      page = heapq.heappop(free)
      self.table[row, index] = page
      self.owners[shard * self.pages + page] = row - shard * self._rows_of_shard
      self.starts[shard * self.pages + page] = index * self.page_size
      self._ends[row] = index + 1
    return True

  def release(self, row: int) -> None:
    """Take all pages from a row. Its table points to page 0 again."""
    shard = self.shard(row)
    for index in range(self._first[row], self._ends[row]):
      page = int(self.table[row, index])
      heapq.heappush(self._free[shard], page)
      self.starts[shard * self.pages + page] = UNUSED
      self.owners[shard * self.pages + page] = 0
    self.table[row] = 0
    self._first[row] = self._ends[row] = 0

  @property
  def highest(self) -> int:
    """Number of pages, from page 0 on, that a program must read on each shard to see all in use."""
    used = np.flatnonzero(self.starts.reshape(self.shards, self.pages).min(axis=0) < UNUSED)
    return int(used[-1]) + 1 if used.size else 1

  @property
  def held(self) -> int:
    """Number of pages that rows have, over all shards."""
    return self.total - sum(map(len, self._free))

  @property
  def total(self) -> int:
    """Number of pages that rows can have, over all shards."""
    return self.shards * (self.pages - 1)

  def check(self) -> list[str]:
    """Return one sentence for each inconsistency in the page records; [] if there is none."""
    wrong = []
    for shard in range(self.shards):
      owned = [
        int(page)
        for row in self.rows(shard)
        for page in self.table[row, self._first[row] : self._ends[row]]
      ]
      if sorted(owned + self._free[shard]) != list(range(1, self.pages)):
        wrong.append(
          f'shard {shard} has {self.pages - 1} pages, of which rows hold {len(owned)} and '
          f'{len(self._free[shard])} are free: a page is lost or given out twice'
        )
      used = set(np.flatnonzero(self.starts[shard * self.pages :][: self.pages] < UNUSED))
      if used != set(owned):
        wrong.append(f'shard {shard} marks {len(used)} pages as used and rows hold {len(owned)}')
    return wrong
