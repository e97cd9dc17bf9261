"""Prefix cache: keys and values of earlier prompts; a tree on the host, blocks on the devices."""

from collections.abc import Hashable, Sequence

import jax

from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.prefix_store import block_copies, blocks_for, bytes_per_block
from t5x_inference_ext.engine.prefix_tree import Node, PrefixTree
from t5x_inference_ext.engine.prompts import PrefillState
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.stats import PrefixStats
from t5x_inference_ext.engine.warm_up import CompiledProgram, timed_run
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights


class PrefixCache:
  """Keeps whole blocks of prompts, and copies them into later prompts with an equal prefix.

  Args:
    model: Decides mesh and layouts.
    weights: Weights on that mesh.
    config: Gives the bytes for the blocks (`prefix_bytes`) and their size (`block_size`).
  """

  def __init__(self, model: Model, weights: Weights, config: SchedulerConfig) -> None:
    self._model, self._weights = model, weights
    rows, size = config.prefill_rows, config.block_size
    blocks = blocks_for(config.prefix_bytes, model, weights, rows, size)
    self.tree = PrefixTree(blocks, size)
    self._store = programs.empty_store(model, weights, rows, blocks, size)
    self._bytes = bytes_per_block(model, weights, rows, size)
    self._most = max(1, rows * (config.max_length // size))  # copies: all blocks of all rows

  @property
  def stats(self) -> PrefixStats:
    """Counters of the cache's use so far."""
    tree = self.tree
    return PrefixStats(
      tree.queries, tree.hits, tree.query_tokens, tree.hit_tokens, tree.used * self._bytes
    )

  def match(self, tokens: Sequence[int], salt: Hashable) -> list[Node]:
    """Return the nodes of the cached beginning of a prompt; `start` before the next `save`."""
    return self.tree.match(tokens, salt)

  def start(self, state: PrefillState, paths: Sequence[Sequence[Node]]) -> PrefillState:
    """Reset the prefill state for new prompts, with their cached beginnings; return the new state.

    Args:
      state: The prefill state. Donated.
      paths: For each row of the state, in order, the nodes from `match`.
    """
    copies = [(row, n.depth, n.block) for row, path in enumerate(paths) for n in path]
    copied = block_copies(copies, self._most)
    return programs.start_with_blocks(self._model, state, self._weights, self._store, copied)

  def save(self, state: PrefillState, prompts: Sequence[tuple[Sequence[int], Hashable]]) -> None:
    """Store the whole blocks of prefilled prompts that are not stored yet, as many as fit.

    Args:
      state: The prefill state.
      prompts: For each row of the state, in order, its tokens and their salt.
    """
    copies = [
      (row, node.depth, node.block)
      for row, prompt in enumerate(prompts)
      for node in self.tree.extend(*prompt)
    ]
    if copies:
      copied = block_copies(copies, self._most)
      self._store = programs.save_blocks(self._model, self._store, self._weights, state, copied)

  def wait(self) -> None:
    """Wait until the devices have run all programs that were started."""
    jax.block_until_ready(self._store)

  def warm_up(self, state: PrefillState, done: list[CompiledProgram]) -> PrefillState:
    """Compile the programs by copying nothing; return the prefill state, which is donated."""
    state = timed_run(done, 'start_with_blocks', lambda: self.start(state, []))
    nothing = block_copies([], self._most)
    self._store = timed_run(
      done,
      'save_blocks',
      lambda: programs.save_blocks(self._model, self._store, self._weights, state, nothing),
    )
    return state
