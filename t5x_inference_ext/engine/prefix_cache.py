"""The beginnings of earlier prompts, kept for later ones: a tree on the host, blocks on devices."""

from collections.abc import Hashable, Sequence

import numpy as np

from t5x_inference_ext.engine.executor import Executor
from t5x_inference_ext.engine.prefix_store import BlockCopies, block_copies
from t5x_inference_ext.engine.prefix_tree import Node, PrefixTree
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.stats import PrefixStats
from t5x_inference_ext.engine.warm_up import CompiledProgram, timed_run


class PrefixCache:
  """Keeps whole blocks of prompts, and copies them into prompts that begin alike.

  Args:
    executor: Holds the blocks, and the prompts.
    config: Has the size of a block.
  """

  def __init__(self, executor: Executor, config: SchedulerConfig) -> None:
    self._executor = executor
    rows, size = config.prefill_rows, config.block_size
    self.tree = PrefixTree(executor.blocks, size)
    self._most = max(1, rows * (config.max_length // size))  # copies in one call

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
    """Return the nodes of the cached beginning of a prompt; load it before the next `save`."""
    return self.tree.match(tokens, salt)

  def load(self, paths: Sequence[Sequence[Node]]) -> None:
    """Copy cached beginnings into the prompts of the group.

    Args:
      paths: For each prompt, in order, the nodes from `match`.
    """
    copies = [(row, n.depth, n.block) for row, path in enumerate(paths) for n in path]
    for each in block_copies(copies, self._most):
      self._executor.load_blocks(each)

  def save(self, prompts: Sequence[tuple[Sequence[int], Hashable]]) -> None:
    """Keep the whole blocks of prefilled prompts that are not kept yet, as many as find room.

    Args:
      prompts: For each prompt of the group, in order, its tokens and their salt.
    """
    copies = [
      (row, node.depth, node.block)
      for row, prompt in enumerate(prompts)
      for node in self.tree.extend(*prompt)
    ]
    for each in block_copies(copies, self._most):
      self._executor.save_blocks(each)

  def warm_up(self, done: list[CompiledProgram]) -> None:
    """Compile the programs by copying nothing."""
    rows, indices, blocks = np.zeros((3, self._most), np.int32)
    nothing = BlockCopies(rows, indices, blocks, np.int32(0))
    executor = self._executor
    timed_run(done, 'load_blocks', lambda: executor.load_blocks(nothing), executor.wait)
    timed_run(done, 'save_blocks', lambda: executor.save_blocks(nothing), executor.wait)
