"""Prefix cache: keys and values of earlier prompts; a tree on the host, blocks on the devices."""

from collections.abc import Hashable, Sequence

from t5x_inference_ext.engine.executor import Executor
from t5x_inference_ext.engine.prefix_store import block_copies
from t5x_inference_ext.engine.prefix_tree import Node, PrefixTree
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.stats import PrefixStats
from t5x_inference_ext.engine.warm_up import CompiledProgram, timed_run


class PrefixCache:
  """Keeps whole blocks of prompts, and copies them into later prompts with an equal prefix.

  Args:
    executor: Holds the blocks, and the prompts.
    config: Has the size of a block.
  """

  def __init__(self, executor: Executor, config: SchedulerConfig) -> None:
    self._executor = executor
    self.tree = PrefixTree(executor.blocks, config.block_size)
    self._most = config.block_copies
    self._unsaved: list[tuple[int, int, int]] = []  # copies that the next `start` makes first

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
    copies = block_copies(self._unsaved, self._most), block_copies(loads, self._most)
    self._executor.start_prefill(copies)
    self._unsaved = []

  def save(self, prompts: Sequence[tuple[Sequence[int], Hashable]]) -> None:
    """Add the whole blocks of prefilled prompts that are not stored yet, as many as fit.

    The next `start` copies them into the store: no prompt before it can need them.

    Args:
      prompts: For each prompt of the group, in order, its tokens and its salt.
    """
    self._unsaved = [
      (row, node.depth, node.block)
      for row, prompt in enumerate(prompts)
      for node in self.tree.extend(*prompt)
    ]

  def warm_up(self, done: list[CompiledProgram]) -> None:
    """Compile the program by running it with zero copies."""
    timed_run(done, 'start_with_blocks', lambda: self.start([]), self._executor.wait)
