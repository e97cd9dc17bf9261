"""Continuous batching: finished rows leave their slots, waiting prompts enter them.

    scheduler = Scheduler(model, weights, config)
    scheduler.submit(Request(tokens))
    while not scheduler.idle:
      for event in scheduler.step():
        ...

One `step` prefills prompts that wait, inserts them into free slots, decodes, and returns the new
tokens. docs/life_of_a_request.md follows one request through the scheduler.
"""

import collections
from collections.abc import Iterable, Iterator
import dataclasses
from typing import Any

import jax
import numpy as np

from t5x_inference_ext.engine import programs, shared_prefix
from t5x_inference_ext.engine import slots as device
from t5x_inference_ext.engine.prefilling import Prefiller
from t5x_inference_ext.engine.request import Event, Request
from t5x_inference_ext.engine.sampling_arrays import end_id_array, stack_params
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.state import ChosenTokens, RowParams
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights


@dataclasses.dataclass(frozen=True)
class SchedulerStats:
  """Counters of a scheduler's work.

  Attributes:
    prefilled: Positions that prefill passes processed, padding included.
    prompt_tokens: Prompt tokens among the prefilled positions.
    decoded: Decode steps times slots.
    generated: Tokens that decode steps added to rows. A row's first token comes from its prefill
      and is not counted.
  """

  prefilled: int = 0
  prompt_tokens: int = 0
  decoded: int = 0
  generated: int = 0


class Scheduler:
  """Runs requests through the slots of a model.

  A row gets the tokens that it would get alone: neither the sampling noise nor attention depends on
  the other rows.

  Args:
    model: Decides mesh and layouts.
    weights: Weights on that mesh.
    config: Sizes that the programs are compiled for.
    shared: Prefix of all prompts, BOS included, prefilled once in the constructor; () for none.

  Attributes:
    stats: Counters of the work done so far.
  """

  def __init__(
    self, model: Model, weights: Weights, config: SchedulerConfig, shared: tuple[int, ...] = ()
  ) -> None:
    self.model, self.weights, self.config = model, weights, config
    self._shared = shared
    self._prefiller = Prefiller(model, weights, config, shared)
    stored: tuple[Any, Any] = None, None
    if shared:
      rows = config.slots, config.prefill_rows
      stored = shared_prefix.store_prefix(model, weights, shared, rows, config.prefill_chunk)
    example = self._row_params(Request((0,), sampling=config.sampling_choices[0]), 0)
    cache_size = max(config.cache_size, self._prefiller.room)
    self._slots = programs.empty_slots(model, weights, example, config.slots, cache_size, stored[0])
    self._prefiller.allocate(stored[1])
    self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
    # The (request, sample) in each slot, or None.
    self._owners: list[tuple[int, int] | None] = [None] * config.slots
    self._submitted = 0
    self._decoded = self._generated = 0

  @property
  def stats(self) -> SchedulerStats:
    """Counters of the work done so far."""
    return SchedulerStats(
      self._prefiller.positions, self._prefiller.tokens, self._decoded, self._generated
    )

  @property
  def idle(self) -> bool:
    """Whether no request is waiting, being prefilled or being decoded."""
    return not (self._waiting or self._prefiller.ready or self._prefiller.active or self._decoding)

  @property
  def wanted(self) -> int:
    """How many more requests the next step could start."""
    free = self._owners.count(None)
    return max(0, free + self.config.prefill_rows - len(self._waiting))

  def submit(self, request: Request) -> int:
    """Queue a request and return its index, which its events carry.

    Raises:
      RequestError: The request does not fit the config.
    """
    index = self._submitted
    self._check(index, request)
    self._submitted += 1
    self._waiting.append((index, request))
    return index

  def step(self) -> list[Event]:
    """Prefill, insert and decode once; return the new tokens of every row that got any.

    While rows wait, prefill runs at most `prefill_budget` positions, but always one chunk if no row
    decodes. Then one decode step follows, or `decode_steps` of them when nothing waits.
    """
    firsts: dict[int, ChosenTokens] = {}  # by slot
    budget = self.config.prefill_budget
    while None in self._owners:
      if self._prefiller.ready:
        slot = self._owners.index(None)
        firsts[slot] = self._insert(slot)
      elif (budget <= 0 and self._decoding) or not self._has_group():
        break
      else:
        budget -= self._prefiller.chunk()
    if not self._decoding:
      return []
    self._slots, output = programs.decode_steps(
      self.model,
      self._slots,
      self.weights,
      *programs.put(self.model, *self._step_counts()),
      most=self.config.decode_steps,
    )
    return self._emit(firsts, output)

  def run(self, requests: Iterable[Request]) -> Iterator[Event]:
    """Serve requests in order and yield their events. Requests are numbered from 0.

    Requests are taken from the iterable shortly before they are needed. If the caller stops early,
    the next run drops the unfinished requests and reuses their slots.

    Raises:
      RequestError: A request that does not fit the config.
    """
    if not self.idle:
      self._clear()
    first, waiting = self._submitted, iter(requests)
    while True:
      self.submit_from(waiting)
      if self.idle:
        return
      for event in self.step():
        yield event._replace(request=event.request - first)

  def submit_from(self, requests: Iterator[Request]) -> None:
    """Take requests from the iterator and submit them: as many as the next step could start."""
    for _ in range(self.wanted):
      request = next(requests, None)
      if request is None:
        return
      self.submit(request)

  @property
  def _decoding(self) -> bool:
    return any(self._owners)

  def _clear(self) -> None:
    """Drop every request."""
    self._slots = programs.free_slots(self.model, self._slots)
    self._prefiller.clear()
    self._waiting.clear()
    self._owners = [None] * self.config.slots

  def _check(self, index: int, request: Request) -> None:
    start = shared_prefix.common_length(self._shared, request.tokens)
    length, rest, config = len(request.tokens), len(request.tokens) - start, self.config
    if request.limit < 1 or not request.seeds:
      raise RequestError(
        f'request {index} has limit {request.limit} and {len(request.seeds)} seeds: at '
        'least 1 new token and one seed are needed'
      )
    if (
      length > config.prompt_size
      or rest > config.rest_size
      or rest + request.limit - 1 > config.cache_size
    ):
      raise RequestError(
        f'request {index} has {length} tokens, BOS included, a limit of {request.limit} new '
        f'tokens, and {start} shared tokens: there is room for {config.prompt_size} prompt tokens, '
        f'{config.rest_size} of them not shared, and for {config.cache_size} unshared '
        'and new ones, not counting the last new one'
      )
    if request.sampling not in config.sampling_choices:
      raise RequestError(
        f'{request.sampling} is not among the sampling parameters that the run was compiled for'
      )

  def _has_group(self) -> bool:
    """Start a group of waiting prompts unless there is a group; return whether there is one now."""
    if not self._prefiller.active and self._waiting:
      count = min(self.config.prefill_rows, len(self._waiting))
      self._prefiller.begin([self._waiting.popleft() for _ in range(count)])
    return self._prefiller.active

  def _insert(self, slot: int) -> ChosenTokens:
    """Insert the next prefilled sample into a free slot; return its first token, on the devices."""
    ready = self._prefiller.ready.popleft()
    tokens = ready.request.tokens
    # Only penalties read the prompt's tokens.
    penalizes = any(s.penalizes for s in self.config.sampling_choices)
    prompt = np.zeros((1, self.config.prompt_size if penalizes else 1), np.int32)
    if penalizes:
      prompt[0, : len(tokens)] = tokens
    arguments = programs.put(
      self.model,
      np.int32(ready.row),
      np.int32(slot),
      self._row_params(ready.request, ready.sample),
      prompt,
      np.asarray([len(tokens)], np.int32),
    )
    self._slots, first = programs.insert(
      self.model, self._slots, self.weights, self._prefiller.state, *arguments
    )
    self._owners[slot] = ready.index, ready.sample
    return first

  def _step_counts(self) -> tuple[np.ndarray, np.ndarray]:
    """Return how many decode steps to run, and whether to stop when a slot becomes free."""
    queued = bool(self._prefiller.ready or self._waiting or self._prefiller.active)
    steps = 1 if None in self._owners and queued else self.config.decode_steps
    return np.asarray(steps, np.int32), np.asarray(queued)

  def _emit(self, firsts: dict[int, ChosenTokens], output: device.StepsOutput) -> list[Event]:
    """Copy the chosen tokens to the host, make events of them, and free the slots of ended rows."""
    firsts, output = jax.device_get((firsts, output))
    self._decoded += int(output.counts.max()) * self.config.slots
    self._generated += int(output.counts.sum())
    events = []
    for slot, owner in enumerate(self._owners):
      if owner is None:
        continue
      chosen = [ChosenTokens(*(x[: output.counts[slot], slot] for x in output.chosen))]
      if slot in firsts:
        chosen.insert(0, firsts[slot])
      ended = bool(output.ended[slot])
      events.append(_event(owner, chosen, ended))
      if ended:
        self._owners[slot] = None
    return events

  def _row_params(self, request: Request, sample: int) -> RowParams:
    vocab_size, config = self.model.config.vocab_size, self.config
    return RowParams(
      stack_params([request.sampling], vocab_size, config.sampling_choices),
      np.asarray([request.seeds[sample]], np.uint32),
      np.asarray([request.limit], np.int32),
      end_id_array(config.eos_id, 1),
      np.full(1, config.top_log_probs, np.int32),
      config.top_log_probs,
    )


def _event(owner: tuple[int, int], chosen: list[ChosenTokens], ended: bool) -> Event:
  """Make an event from a row's chosen tokens; their fields are [n] and [n, top]."""
  tokens, log_probs, top_ids, top = (np.concatenate(parts) for parts in zip(*chosen))
  pairs = [
    list(zip(ids.tolist(), values.tolist(), strict=True)) for ids, values in zip(top_ids, top)
  ]
  return Event(*owner, tokens.tolist(), log_probs.tolist(), pairs, ended)
