"""Prefix cache: keys and values of earlier prompts and replies.

The tree is on the host, the blocks are on the devices.
"""

from collections.abc import Hashable, Sequence
import functools

from t5x_inference_ext.engine.adapters import salt_of
from t5x_inference_ext.engine.executor import Executor
from t5x_inference_ext.engine.page_pool import PagePool
from t5x_inference_ext.engine.prefix_store import block_copies
from t5x_inference_ext.engine.prefix_tree import Node, PrefixTree
from t5x_inference_ext.engine.reply_blocks import REPLY_BLOCKS
from t5x_inference_ext.engine.rows import Row
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.stats import PrefixStats
from t5x_inference_ext.engine.warm_up import CompiledProgram, timed_run


class PrefixCache:
  """Keeps whole blocks of prompts and replies; copies them into later prompts with an equal prefix.

  Args:
    executor: Holds the blocks, and the prompts.
    config: Has the size of a block.
  """

  def __init__(self, executor: Executor, config: SchedulerConfig) -> None:
    self._executor = executor
    self.tree = PrefixTree(executor.blocks, config.block_size)
    self._most = config.block_copies
    # (row of the prompts, node) of blocks that the next `start` saves first.
    self._unsaved: list[tuple[int, Node]] = []

  @property
  def stats(self) -> PrefixStats:
    """Counters of the cache's use so far."""
    tree = self.tree
    return PrefixStats(
      tree.queries,
      tree.hits,
      tree.query_tokens,
      tree.hit_tokens,
      tree.used * self._executor.block_bytes,
    )

  def match(self, tokens: Sequence[int], salt: Hashable) -> list[Node]:
    """Return the nodes of a prompt's cached prefix. Pass them to `start` before the next `save`."""
    return self.tree.match(tokens, salt)

  def start(self, paths: Sequence[Sequence[Node]]) -> None:
    """Save the blocks of the group so far; reset the prompts for a new one, with cached prefixes.

    Args:
      paths: For each prompt, in order, the nodes from `match`.
    """
    loads = [(row, n.depth, n.block) for row, path in enumerate(paths) for n in path]
    # A reply that was saved meanwhile may have evicted some nodes.
    saves = [(row, n.depth, n.block) for row, n in self._unsaved if n.block >= 0]
    copies = block_copies(saves, self._most), block_copies(loads, self._most)
    self._executor.start_prefill(copies)
    self._unsaved = []

  def save(self, prompts: Sequence[tuple[Sequence[int], Hashable]]) -> None:
    """Add the whole blocks of prefilled prompts that are not stored yet, as many as fit.

    The next `start` copies them into the store: no prompt before it can need them.

    Args:
      prompts: For each prompt of the group, in order, its tokens and its salt.
    """
    self._unsaved = [
      (row, node) for row, prompt in enumerate(prompts) for node in self.tree.extend(*prompt)
    ]

  def save_reply(self, row: Row, slot: int, pool: PagePool) -> None:
    """Add the whole blocks of a row's prompt and reply that are not stored yet, as many as fit.

    Nothing is added for a row that has failed, or if the blocks of pages that it shares with other
    rows were evicted.

    Args:
      row: The row.
      slot: Its slot.
      pool: Has the row's pages.
    """
    blocks = pool.page_size // self.tree.block_size  # of a page
    prompt = row.cached_tokens, salt_of(row.handle.request)
    if row.finish == 'error' or len(self.tree.find(*prompt)) < pool.first(slot) * blocks:
      return
    pages = pool.table[slot].tolist()
    copies = [
      (pages[node.depth // blocks], node.depth % blocks, node.block)
      for node in self.tree.extend(*prompt)
    ]
    for i in range(0, len(copies), REPLY_BLOCKS):
      self._executor.save_reply(slot, block_copies(copies[i : i + REPLY_BLOCKS], REPLY_BLOCKS))

  def warm_up(self, done: list[CompiledProgram]) -> None:
    """Compile the programs by running them with zero copies."""
    timed_run(done, 'start_with_blocks', lambda: self.start([]), self._executor.wait)
    save = functools.partial(self._executor.save_reply, 0, block_copies([], REPLY_BLOCKS))
    timed_run(done, 'save_reply', save, self._executor.wait)
