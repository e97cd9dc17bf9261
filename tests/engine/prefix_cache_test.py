"""The prefix cache's own decisions, on the host: which blocks are copied, and when."""

import pytest

from t5x_inference_ext.engine.page_pool import PagePool
from t5x_inference_ext.engine.prefix_cache import PrefixCache
from t5x_inference_ext.engine.request import Handle, Request
from t5x_inference_ext.engine.rows import Row
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig

CONFIG = SchedulerConfig(slots=2, max_length=1024, page_size=64, block_size=32)


class Recorder:
  """Records the copies of an executor with room for a few blocks."""

  def __init__(self, blocks):
    self.blocks, self.block_bytes = blocks, 1
    self.saves, self.loads, self.replies = [], [], []

  def start_prefill(self, copies):
    self.saves, self.loads = (
      [*zip(c.rows.tolist(), c.indices.tolist(), c.blocks.tolist())][: int(c.count)] for c in copies
    )

  def save_reply(self, slot, copies):
    found = [*zip(copies.rows.tolist(), copies.indices.tolist(), copies.blocks.tolist())]
    self.replies.append((slot, found[: int(copies.count)]))


def row_of(tokens, reply, pool, slot=1, finish='length', shared=0):
  row = Row(Handle(0, Request(tuple(tokens), cache_reply=True)), 0, (), None)
  row.tokens = list(reply)
  if finish:
    row.end(finish)
  pool.begin(slot, shared)
  assert pool.grow(slot, len(tokens) + len(reply))
  return row


@pytest.fixture
def pool():
  return PagePool(2, 1, 40, CONFIG.page_size, CONFIG.pages_of_row)


def test_the_whole_blocks_of_a_reply_are_copied_from_its_pages(pool):
  executor = Recorder(100)
  cache = PrefixCache(executor, CONFIG)
  cache.save([(range(40), None)])
  pool.begin(0, 0)
  pool.grow(0, 64)  # the row's pages do not begin with page 1
  row = row_of(range(40), range(40, 100 + 29), pool)  # 129 tokens, of which the last is not cached
  cache.save_reply(row, 1, pool)
  # Block 0 is a prompt's. Pages of 64 positions hold two blocks; the row's pages are 2, 3 and 4.
  assert executor.replies == [(1, [(2, 1, 1), (3, 0, 2), (3, 1, 3)])]
  assert [n.block for n in cache.match(range(200), None)] == [0, 1, 2, 3]
  cache.save_reply(row, 1, pool)
  assert len(executor.replies) == 1


def test_a_long_reply_takes_several_copies(pool):
  executor = Recorder(100)
  row = row_of([0], range(1, 600), pool)
  PrefixCache(executor, CONFIG).save_reply(row, 1, pool)
  assert [len(copies) for _, copies in executor.replies] == [8, 8, 2]


@pytest.mark.parametrize('finish, tokens', [('eos', 64), ('error', 0), (None, 64)])
def test_only_tokens_in_the_cache_are_kept(pool, finish, tokens):
  """A row that leaves before its last token is read has computed all that are known."""
  executor = Recorder(100)
  row = row_of(range(40), range(40, 65 if finish else 64), pool, finish=finish)
  if not finish:
    row.started.append(1)
  assert len(row.cached_tokens) == 64
  cache = PrefixCache(executor, CONFIG)
  cache.save_reply(row, 1, pool)
  assert len(cache.match(range(200), None)) * 32 == tokens


def test_blocks_in_shared_pages_are_not_copied_from_the_row(pool):
  """The row's first two pages are shared: their blocks are in the store, or nowhere it can read."""
  executor = Recorder(100)
  cache = PrefixCache(executor, CONFIG)
  row = row_of(range(128), range(128, 200), pool, shared=2)
  cache.save_reply(row, 1, pool)
  assert not executor.replies and not cache.tree.used
  cache.save([(range(128), None)])
  cache.save_reply(row, 1, pool)
  assert executor.replies == [(1, [(1, 0, 4), (1, 1, 5)])]


def test_a_block_that_a_reply_has_taken_is_not_written_by_the_prompt_it_was_for(pool):
  executor = Recorder(3)
  cache = PrefixCache(executor, CONFIG)
  cache.save([(range(300, 396), None)])  # all three blocks, which the next start saves
  cache.save_reply(row_of(range(10), range(10, 43), pool), 1, pool)
  ((_, ((_, _, taken),)),) = executor.replies
  assert taken == 2  # of the last block: an eviction takes leaves
  cache.start([cache.match(range(300, 396), None)])
  assert executor.saves == [(0, 0, 0), (0, 1, 1)]
  assert executor.loads == executor.saves
  assert cache.tree.check() == []


def test_replies_of_other_salts_are_not_found(pool):
  cache = PrefixCache(Recorder(9), CONFIG)
  row = row_of(range(40), range(40, 80), pool)
  cache.save_reply(row, 1, pool)
  assert len(cache.match(range(80), None)) == 2 and not cache.match(range(80), 'tenant')
