"""Prefill of prompts that wait for a slot: in groups, chunk by chunk, after the cached prefix."""

import collections
from collections.abc import Hashable, Sequence
import dataclasses
import functools

import numpy as np

from t5x_inference_ext.engine.adapters import salt_of
from t5x_inference_ext.engine.chunk_sizes import next_chunk
from t5x_inference_ext.engine.executor import Executor
from t5x_inference_ext.engine.prefix_cache import PrefixCache
from t5x_inference_ext.engine.prefix_tree import Node
from t5x_inference_ext.engine.rows import Row
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.warm_up import CompiledProgram, timed_run


@dataclasses.dataclass(eq=False)
class Prompt:
  """A prompt to prefill, and the rows that continue it.

  Attributes:
    tokens: Model inputs. For a preempted row they include the tokens that it generated.
    rows: The samples of the request; for a preempted row, only the row itself.
    path: Nodes of the prefix tree for the prefix that the prompt shares with other rows.
  """

  tokens: tuple[int, ...]
  rows: Sequence[Row]
  path: list[Node] = dataclasses.field(default_factory=list)

  @property
  def salt(self) -> Hashable:
    """Anything besides the tokens that keys and values depend on."""
    return salt_of(self.rows[0].handle.request)

  @property
  def finished(self) -> bool:
    """Whether no row needs the prompt any more."""
    return all(row.finished for row in self.rows)


@dataclasses.dataclass(frozen=True)
class ReadyRow:
  """A row whose prompt is prefilled.

  Attributes:
    place: Index of the prompt in its group.
    prompt: The prompt.
    row: The row.
  """

  place: int
  prompt: Prompt
  row: Row


class Prefiller:
  """Prefills prompts in groups of `prefill_rows`, one chunk of each prompt a pass.

  Args:
    executor: Holds the prompts' cache and logits.
    config: Sizes that the programs are compiled for.
    prefixes: Cache of the prefixes of earlier prompts, or None.

  Attributes:
    ready: Rows that wait for a slot, in order. The executor holds their prompts until the next
      group begins, so all of them must be inserted before that.
    positions: Positions that prefill passes have processed so far, padding included.
    tokens: Number of prompt tokens among these positions.
  """

  def __init__(
    self, executor: Executor, config: SchedulerConfig, prefixes: PrefixCache | None
  ) -> None:
    self._executor, self._config, self._prefixes = executor, config, prefixes
    self.ready: collections.deque[ReadyRow] = collections.deque()
    self.positions = self.tokens = 0
    self._group: list[Prompt] = []
    self._starts: list[int] = []
    self._done = self._left = 0

  @property
  def active(self) -> bool:
    """Whether the group has positions left to prefill."""
    return self._left > 0

  def begin(self, group: list[Prompt]) -> None:
    """Begin the next group of 1 to `prefill_rows` prompts; load their cached prefixes."""
    self._group = group
    starts = np.zeros(self._config.prefill_rows, np.int32)
    if self._prefixes is not None:
      for place, prompt in enumerate(group):
        prompt.path = self._prefixes.match(prompt.tokens, prompt.salt)
        starts[place] = len(prompt.path) * self._config.block_size
    if self._prefixes is not None:
      self._prefixes.start([prompt.path for prompt in group])
    else:
      self._executor.start_prefill(None)
    self._starts = starts[: len(group)].tolist()
    self._done = 0
    self._left = max(len(p.tokens) - start for p, start in zip(group, self._starts))

  def chunk(self) -> int:
    """Prefill the next chunk of each prompt of the group; return how many positions were run."""
    cached = max(
      min(start + self._done, len(prompt.tokens))
      for prompt, start in zip(self._group, self._starts)
    )
    later = self._config.later_chunks
    size = next_chunk(later if cached else self._config.first_chunks, later, self._left)
    tokens = np.zeros((self._config.prefill_rows, size), np.int32)
    counts, adapters = (np.zeros(self._config.prefill_rows, np.int32) for _ in range(2))
    for place, (prompt, start) in enumerate(zip(self._group, self._starts)):
      first = start + self._done
      chunk = prompt.tokens[first : first + size]
      tokens[place, : len(chunk)], counts[place] = chunk, len(chunk)
      adapters[place] = prompt.rows[0].adapter
    read = next(n for n in self._config.prefill_reads if n >= cached)
    self._executor.prefill_chunk(tokens, counts, read, adapters)
    self._done += size
    self._left -= size
    self.positions += tokens.size
    self.tokens += int(counts.sum())
    if self._left <= 0:
      self._finish()
    return tokens.size

  def drop(self) -> None:
    """End the group if no row needs its prompts any more."""
    if self.active and all(prompt.finished for prompt in self._group):
      self._left = 0

  def warm_up(self, done: list[CompiledProgram]) -> None:
    """Compile all programs by running them on zero tokens. No group may be active."""
    assert not self.active and not self.ready
    counts = np.zeros(self._config.prefill_rows, np.int32)  # and no row has an adapter
    for size, read in self._config.chunk_programs:
      tokens = np.zeros((self._config.prefill_rows, size), np.int32)
      timed_run(
        done,
        'prefill_chunk',
        lambda: self._executor.prefill_chunk(tokens, counts, read, counts),  # noqa: B023  # runs at once
        self._executor.wait,
        tokens=size,
        read=read,
      )
    if self._prefixes is not None:
      self._prefixes.warm_up(done)
    else:
      start = functools.partial(self._executor.start_prefill, None)
      timed_run(done, 'start_prefill', start, self._executor.wait)

  def _finish(self) -> None:
    """Save the prompts' blocks in the prefix cache, and mark their rows as ready."""
    if self._prefixes is not None:
      self._prefixes.save([(p.tokens, p.salt) for p in self._group])
      for prompt in self._group:
        if len(prompt.rows) > 1:  # several samples share the pages of the whole prompt
          prompt.path = self._prefixes.tree.find(prompt.tokens, prompt.salt)
    for place, prompt in enumerate(self._group):
      self.ready.extend(ReadyRow(place, prompt, row) for row in prompt.rows)
