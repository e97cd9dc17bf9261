"""Prompts that wait for a slot: prefilled in groups, chunk by chunk."""

import collections
import dataclasses

import numpy as np

from t5x_inference_ext.engine import programs, shared_prefix
from t5x_inference_ext.engine import slots as device
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig, chunk_sizes
from t5x_inference_ext.model.cache import Shared
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights


@dataclasses.dataclass(frozen=True)
class ReadySample:
  """A sample whose prompt is prefilled.

  Attributes:
    row: Row of the prefill state that holds the prompt.
    index: Index of the request.
    request: The request.
    sample: Index of the sample within the request.
  """

  row: int
  index: int
  request: Request
  sample: int


class Prefiller:
  """Prefills prompts in groups of `prefill_rows`, one chunk of each prompt a pass.

  Args:
    model: Decides mesh and layouts.
    weights: Weights on that mesh.
    config: Sizes that the programs are compiled for.
    shared: Tokens of the shared prefix, BOS included, or () for none.

  Attributes:
    state: The prompts' cache and logits, on the devices.
    ready: Samples that wait for a slot, in order. Their prompts stay in `state` until the next
      group begins, so all of them must be inserted before that.
    positions: Positions that prefill passes have processed so far, padding included.
    tokens: Number of prompt tokens among these positions.
  """

  def __init__(
    self, model: Model, weights: Weights, config: SchedulerConfig, shared: tuple[int, ...]
  ) -> None:
    self._model, self._weights, self._config, self._shared = model, weights, config, shared
    self._chunks = chunk_sizes(config)
    self.room = device.prompt_room(
      model, config.prefill_rows, max(config.rest_size, self._chunks[-1])
    )
    self.ready: collections.deque[ReadySample] = collections.deque()
    self.positions = self.tokens = 0
    self._left = 0

  def allocate(self, shared_cache: Shared | None) -> None:
    """Make the empty prefill state. `shared_cache` is the shared prefix in the prefill layout."""
    self.state = programs.empty_prefill(
      self._model, self._weights, self._config.prefill_rows, self.room, shared_cache
    )

  @property
  def active(self) -> bool:
    """Whether the group has positions left to prefill."""
    return self._left > 0

  def clear(self) -> None:
    """Drop the group and the ready samples."""
    self.ready.clear()
    self._left = 0

  def begin(self, members: list[tuple[int, Request]]) -> None:
    """Begin the next group of 1 to `prefill_rows` prompts, given as pairs (index, request)."""
    starts = [shared_prefix.common_length(self._shared, r.tokens) for _, r in members]
    self._members = [(*member, start) for member, start in zip(members, starts)]
    self._done = 0
    self._left = max(len(r.tokens) - start for (_, r), start in zip(members, starts))
    lengths = np.zeros(self._config.prefill_rows, np.int32)
    lengths[: len(starts)] = starts
    self.state = programs.start_prefill(
      self._model, self.state, self._weights, *programs.put(self._model, lengths)
    )

  def chunk(self) -> int:
    """Prefill the next chunk of each prompt of the group; return how many positions were run."""
    size = next((c for c in self._chunks if c >= self._left), self._chunks[-1])
    tokens = np.zeros((self._config.prefill_rows, size), np.int32)
    counts = np.zeros(self._config.prefill_rows, np.int32)
    for row, (_, request, start) in enumerate(self._members):
      first = start + self._done
      chunk = request.tokens[first : first + size]
      tokens[row, : len(chunk)], counts[row] = chunk, len(chunk)
    self.state = programs.prefill_chunk(
      self._model, self.state, self._weights, *programs.put(self._model, tokens, counts)
    )
    self._done += size
    self._left -= size
    self.positions += tokens.size
    self.tokens += int(counts.sum())
    if self._left <= 0:
      for row, (index, request, _) in enumerate(self._members):
        samples = range(len(request.seeds))
        self.ready.extend(ReadySample(row, index, request, sample) for sample in samples)
    return tokens.size
