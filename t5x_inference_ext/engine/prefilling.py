"""Prefill of prompts that wait for a slot: in groups, chunk by chunk, after the cached prefix."""

import collections
from collections.abc import Hashable, Sequence
import dataclasses
import functools
import itertools

import jax
import numpy as np

from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.prefix_cache import PrefixCache
from t5x_inference_ext.engine.prefix_tree import Node
from t5x_inference_ext.engine.prompts import prompt_room
from t5x_inference_ext.engine.rows import Row
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig, next_chunk
from t5x_inference_ext.engine.warm_up import CompiledProgram, timed_run
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights


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
    return self.rows[0].handle.request.salt

  @property
  def finished(self) -> bool:
    """Whether no row needs the prompt any more."""
    return all(row.finished for row in self.rows)


@dataclasses.dataclass(frozen=True)
class ReadyRow:
  """A row whose prompt is prefilled.

  Attributes:
    place: Index of the row of the prefill state that holds the prompt.
    prompt: The prompt.
    row: The row.
  """

  place: int
  prompt: Prompt
  row: Row


class Prefiller:
  """Prefills prompts in groups of `prefill_rows`, one chunk of each prompt a pass.

  Args:
    model: Decides mesh and layouts.
    weights: Weights on that mesh.
    config: Sizes that the programs are compiled for.
    prefixes: Cache of the prefixes of earlier prompts, or None.

  Attributes:
    state: The prompts' cache and logits, on the devices.
    ready: Rows that wait for a slot, in order. Their prompts stay in `state` until the next group
      begins, so all of them must be inserted before that.
    positions: Positions that prefill passes have processed so far, padding included.
    tokens: Number of prompt tokens among these positions.
  """

  def __init__(
    self, model: Model, weights: Weights, config: SchedulerConfig, prefixes: PrefixCache | None
  ) -> None:
    self._model, self._weights, self._config, self._prefixes = model, weights, config, prefixes
    self._sizes, self._reads = config.chunk_sizes, config.prefill_reads
    room = prompt_room(model, config.prefill_rows, max(config.max_length, self._sizes[-1]))
    self.state = programs.empty_prefill(model, weights, config.prefill_rows, room)
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
      self.state = self._prefixes.start(self.state, [prompt.path for prompt in group])
    else:
      self.state = programs.start_prefill(self._model, self.state, self._weights)
    self._starts = starts[: len(group)].tolist()
    self._done = 0
    self._left = max(len(p.tokens) - start for p, start in zip(group, self._starts))

  def chunk(self) -> int:
    """Prefill the next chunk of each prompt of the group; return how many positions were run."""
    size = next_chunk(self._sizes, self._left)
    tokens = np.zeros((self._config.prefill_rows, size), np.int32)
    counts = np.zeros(self._config.prefill_rows, np.int32)
    cached = 0
    for place, (prompt, start) in enumerate(zip(self._group, self._starts)):
      first = start + self._done
      chunk = prompt.tokens[first : first + size]
      tokens[place, : len(chunk)], counts[place] = chunk, len(chunk)
      cached = max(cached, min(first, len(prompt.tokens)))
    read = next(n for n in self._reads if n >= cached)
    self.state = programs.prefill_chunk(
      self._model, self.state, self._weights, tokens, counts, read=read
    )
    self._done += size
    self._left -= size
    self.positions += tokens.size
    self.tokens += int(counts.sum())
    if self._left <= 0:
      self._finish()
    return tokens.size

  def wait(self) -> None:
    """Wait until the devices have run all programs that were started."""
    jax.block_until_ready(self.state)
    if self._prefixes is not None:
      self._prefixes.wait()

  def drop(self) -> None:
    """End the group if no row needs its prompts any more."""
    if self.active and all(prompt.finished for prompt in self._group):
      self._left = 0

  def warm_up(self, done: list[CompiledProgram]) -> None:
    """Compile all programs by running them on zero tokens. No group may be active."""
    assert not self.active and not self.ready
    counts = np.zeros(self._config.prefill_rows, np.int32)
    for size, read in itertools.product(self._sizes, self._reads):
      tokens = np.zeros((self._config.prefill_rows, size), np.int32)
      arguments = self._model, self.state, self._weights, tokens, counts
      self.state = timed_run(
        done,
        'prefill_chunk',
        lambda: programs.prefill_chunk(*arguments, read=read),  # noqa: B023  # runs at once
        tokens=size,
        read=read,
      )
    if self._prefixes is not None:
      self.state = self._prefixes.warm_up(self.state, done)
    else:
      start = functools.partial(programs.start_prefill, self._model, self.state, self._weights)
      self.state = timed_run(done, 'start_prefill', start)

  def _finish(self) -> None:
    """Save the prompts' blocks in the prefix cache, and mark their rows as ready."""
    if self._prefixes is not None:
      self._prefixes.save(self.state, [(p.tokens, p.salt) for p in self._group])
      for prompt in self._group:
        if len(prompt.rows) > 1:  # several samples share the pages of the whole prompt
          prompt.path = self._prefixes.tree.find(prompt.tokens, prompt.salt)
    for place, prompt in enumerate(self._group):
      self.ready.extend(ReadyRow(place, prompt, row) for row in prompt.rows)
