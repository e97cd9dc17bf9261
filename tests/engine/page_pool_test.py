"""The host's books of pages: every page belongs to one row or is free, low pages first."""

import numpy as np
import pytest

from t5x_inference_ext.engine.page_pool import PagePool
from t5x_inference_ext.engine.shared_pages import SharedPageBook
from t5x_inference_ext.model.pages import UNUSED


def test_pages_are_given_out_low_ones_first_and_come_back():
  pool = PagePool(rows=2, shards=1, pages=6, page_size=32, width=4)
  pool.begin(0, 0)
  assert pool.grow(0, 33) and pool.table[0].tolist() == [1, 2, 0, 0]
  pool.begin(1, 1)  # its first page is shared
  assert pool.grow(1, 64) and pool.table[1].tolist() == [0, 3, 0, 0]
  assert pool.starts.tolist() == [UNUSED, 0, 32, 32, UNUSED, UNUSED]
  assert pool.owners[:4].tolist() == [0, 0, 0, 1]
  assert (pool.highest, pool.held, pool.first(1)) == (4, 3, 1)
  assert pool.grow(0, 64) and pool.held == 3  # it has them already
  assert not pool.grow(0, 160) and pool.held == 3  # too few are free: it gets none
  pool.release(0)
  assert (pool.highest, pool.free_pages(0), pool.table[0].tolist()) == (4, 4, [0, 0, 0, 0])
  pool.begin(0, 0)
  assert pool.grow(0, 1) and pool.table[0, 0] == 1
  assert pool.check() == []


def test_each_shard_has_pages_of_its_own():
  pool = PagePool(rows=4, shards=2, pages=3, page_size=32, width=2)
  for row in range(4):
    pool.begin(row, 0)
    assert pool.grow(row, 1)
  assert pool.table[:, 0].tolist() == [1, 2, 1, 2]
  assert pool.owners.tolist() == [0, 0, 1, 0, 0, 1]
  assert not pool.grow(3, 33)
  pool.release(2)
  assert pool.grow(3, 33) and pool.table[3].tolist() == [2, 1]


@pytest.mark.parametrize('seed', range(20))
def test_random_use_keeps_the_books(seed):
  rng = np.random.default_rng(seed)
  pool = PagePool(rows=6, shards=2, pages=8, page_size=32, width=5)
  held: dict[int, int] = {}
  grown = refused = 0
  for _ in range(300):
    row = int(rng.integers(6))
    if row in held and rng.random() < 0.3:
      pool.release(row)
      del held[row]
    else:
      if row not in held:
        pool.begin(row, int(rng.integers(2)))
        held[row] = 0
      length = int(rng.integers(1, 161))
      before = pool.held
      if pool.grow(row, length):
        grown += 1
        assert np.all(pool.table[row, pool.first(row) : pool.pages_of(length)] > 0)
      else:
        refused += 1
        assert pool.held == before
    assert pool.check() == []
  assert grown and refused
  for row in held:
    pool.release(row)
  assert pool.held == 0 and pool.highest == 1 and not pool.table.any()


def test_broken_books_are_noticed():
  pool = PagePool(rows=2, shards=1, pages=4, page_size=32, width=2)
  pool.begin(0, 0)
  pool.grow(0, 32)
  pool.table[0, 0] = 2
  assert 'a page is lost or given out twice' in pool.check()[0]


def test_shared_pages_are_written_once_and_reused_when_nobody_sees_them():
  shared = SharedPageBook(rows=3, pages=2, page_size=32)
  assert shared.take(0, ['a', 'b']) == ([0, 1], [0, 1])
  assert shared.take(1, ['a', 'c']) == ([0], [])  # no page for c: both are in use
  assert shared.visible.tolist() == [[True, True], [True, False], [False, False]]
  assert shared.starts.tolist() == [0, 32]
  shared.release(0)
  assert shared.highest == 1
  assert shared.take(2, ['b']) == ([1], [])  # still there
  shared.release(2)
  assert shared.take(2, ['c']) == ([1], [0])  # in the place of b, which nobody sees
  assert shared.check() == []
  assert shared.take(0, ['b']) == ([], [])
  for row in range(3):
    shared.release(row)
  assert shared.highest == 0 and shared.check() == []
