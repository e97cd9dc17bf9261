"""Continuous batching: finished rows leave, waiting prompts enter, and prefill takes turns with decode steps."""

import collections
from collections.abc import Iterable, Iterator
import dataclasses
import itertools
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t5x_inference_ext.engine import shared_prefix
from t5x_inference_ext.engine import slots as device
from t5x_inference_ext.engine.sampling import SamplingParams, stack_params
from t5x_inference_ext.engine.state import RowParams
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights

SMALLEST_CHUNK = 16  # a prompt's last chunk is padded to this, or to a power of two above


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt to continue.

  Attributes:
    tokens: model inputs: BOS, then the prompt.
    seeds: one for each sample asked for; they share the prompt's prefill.
    limit: new tokens of each, at most.
    sampler: how they are chosen, and what ends them.
  """

  tokens: tuple[int, ...]
  seeds: tuple[int, ...] = (0,)
  limit: int = 64
  sampling: SamplingParams = SamplingParams()


class Event(NamedTuple):
  """New tokens of one sample.

  Attributes:
    request: its place among the requests.
    sample: its place among the request's samples.
    tokens, log_probs: the new ones.
    top: for each the most likely, as pairs (id, log-probability), where asked for.
    ended: whether these are the last.
  """

  request: int
  sample: int
  tokens: list[int]
  log_probs: list[float]
  top: list[list[tuple[int, float]]]
  ended: bool


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
  """The sizes that a run compiles for.

  Attributes:
    slots: B, rows decoded together: what the mesh takes (Model.padded_batch).
    size: S, positions of each slot: a prompt's rest, beside what is shared, and its new tokens but the last.
    prompt: the longest prompt, BOS included.
    rest: the longest rest of a prompt, beside what is shared.
    like: samplers that compiled choices have to do for.
    eos_id: ends a row; -1 never does.
    chunk: positions of each prompt that one prefill pass takes, at most.
    prompts: R, prompts prefilled together.
    budget: prompt tokens prefilled between decode steps while rows wait, at most, but always a chunk.
    steps: decode steps between looks at what came out.
    top: how many of the most likely tokens are told with each.

  Raises:
    RequestError: a number that is too small.
  """

  slots: int
  size: int
  prompt: int
  rest: int
  like: tuple[SamplingParams, ...] = (SamplingParams(),)
  eos_id: int = 1
  chunk: int = 256
  prompts: int = 1
  budget: int = 2048
  steps: int = 16
  top: int = 0

  def __post_init__(self):
    for name in ('slots', 'size', 'prompt', 'rest', 'chunk', 'prompts', 'budget', 'steps'):
      if getattr(self, name) < 1:
        raise RequestError(f'{name} must be at least 1, got {getattr(self, name)}')


@dataclasses.dataclass
class _Group:
  """Prompts that are prefilled together, one a row."""

  members: list[tuple[int, Request]]
  starts: list[int]  # what each has in common with what is shared
  done: int = 0  # positions behind that, of all

  @property
  def left(self) -> int:
    return max(len(r.tokens) - s for (_, r), s in zip(self.members, self.starts)) - self.done


@dataclasses.dataclass
class SchedulerStats:
  """What a run did.

  Attributes:
    prefilled: positions that prefill passes took, padding included.
    prompt_tokens: of these, prompts' own.
    decoded: slots times decode steps.
    generated: of these, rows' tokens (the first of each comes from its prefill, and does not count).
  """

  prefilled: int = 0
  prompt_tokens: int = 0
  decoded: int = 0
  generated: int = 0


class Scheduler:
  """Runs requests through the slots of a model.

  Args:
    model: decides mesh and layouts.
    weights: on that mesh.
    plan: the sizes.
    shared: tokens that prompts begin with, BOS included, prefilled once here; () shares nothing.

  A row's tokens are those it has alone, whatever else is in the slots: neither noise nor attention looks at other rows.
  """

  def __init__(
    self, model: Model, weights: Weights, plan: SchedulerConfig, shared: tuple[int, ...] = ()
  ):
    self.model, self.weights, self.plan, self.tally = model, weights, plan, SchedulerStats()
    chunk = min(plan.chunk, 1 << (plan.rest - 1).bit_length())
    self._chunks = [c for c in _powers(SMALLEST_CHUNK) if c < chunk] + [chunk]
    room = device.prompt_room(model, plan.prompts, max(plan.rest, chunk))
    self._shared, stored = shared, (None, None)
    if shared:
      stored = shared_prefix.store_prefix(
        model, weights, shared, (plan.slots, plan.prompts), plan.chunk, self._put
      )
    asks = self._asks(Request((0,), sampling=plan.like[0]), 0)
    self._slots = device.empty_slots(
      model, weights, asks, plan.slots, max(plan.size, room), stored[0]
    )
    self._prompts = device.empty_prefill(model, weights, plan.prompts, room, stored[1])
    self._in_use = False

  def run(self, requests: Iterable[Request]) -> Iterator[Event]:
    """Serves requests as slots become free, in order. They are taken from the iterable as they are needed.

    A run that is left before its end gives its slots to the next; two can't go on at once.

    Raises:
      RequestError: a request that does not fit the plan.
    """
    if self._in_use:
      self._slots = device.free_slots(self.model, self._slots)
    self._in_use = True
    waiting = _Waiting(enumerate(requests))
    ready: collections.deque[tuple[int, int, int]] = collections.deque()  # (row, request, sample)
    rows: list[tuple[int, int] | None] = [None] * self.plan.slots  # of each slot, (request, sample)
    group, told = None, []
    while True:
      budget = self.plan.budget
      while None in rows:
        while ready and None in rows:
          row, index, sample = ready.popleft()
          told.append((rows.index(None), self._admit(group, row, rows.index(None), sample)))
          rows[rows.index(None)] = index, sample
        if ready or (budget <= 0 and any(rows)):
          break
        if group is None or group.left <= 0:
          group = self._group(waiting)
          if group is None:
            break
        budget -= self._prefill(group)
        if group.left <= 0:
          ready.extend(
            (row, index, sample)
            for row, (index, request) in enumerate(group.members)
            for sample in range(len(request.seeds))
          )
      if not any(rows):
        self._in_use = False
        return
      more = bool(ready) or (group is not None and group.left > 0) or waiting.any()
      steps = 1 if None in rows and more else self.plan.steps
      self._slots, result = device.decode_steps(
        self.model,
        self._slots,
        self.weights,
        *self._put(np.int32(min(steps, self.plan.steps)), np.asarray(more)),
        most=self.plan.steps,
      )
      firsts, result = jax.device_get(([chosen for _, chosen in told], result))
      counts = result.counts
      self.tally.decoded += int(counts.max()) * self.plan.slots
      self.tally.generated += int(counts.sum())
      firsts = {slot: first for (slot, _), first in zip(told, firsts)}
      told = []
      for slot, owner in enumerate(rows):
        if owner is None:
          continue
        parts = [jax.tree.map(lambda x: x[: counts[slot], slot], result.chosen)]
        if slot in firsts:
          parts.insert(0, firsts[slot])
        yield _event(owner, parts, bool(result.ended[slot]))
        if result.ended[slot]:
          rows[slot] = None

  def _group(self, waiting: '_Waiting') -> _Group | None:
    members = waiting.take(self.plan.prompts)
    if not members:
      return None
    starts = [self._checked(index, request) for index, request in members]
    shared = np.zeros(self.plan.prompts, np.int32)
    shared[: len(starts)] = starts
    self._prompts = device.start_prefill(
      self.model, self._prompts, self.weights, *self._put(shared)
    )
    return _Group(members, starts)

  def _checked(self, index: int, request: Request) -> int:
    """How many positions of a request are shared. Raises RequestError for one that does not fit."""
    start = shared_prefix.common_length(self._shared, request.tokens)
    length, rest, plan = len(request.tokens), len(request.tokens) - start, self.plan
    if request.limit < 1 or not request.seeds:
      raise RequestError(
        f'request {index} asks for {request.limit} new tokens of {len(request.seeds)} samples: at least '
        'one of each'
      )
    if length > plan.prompt or rest > plan.rest or rest + request.limit - 1 > plan.size:
      raise RequestError(
        f'request {index} has {length} tokens, BOS included, and {request.limit} new ones, {start} shared: there is '
        f'room for {plan.prompt}, {plan.rest} of them not shared, or {plan.size} with the new ones but the last'
      )
    return start

  def _prefill(self, group: _Group) -> int:
    """One chunk of each prompt of a group; returns the positions that it took."""
    size = next((c for c in self._chunks if c >= group.left), self._chunks[-1])
    tokens = np.zeros((self.plan.prompts, size), np.int32)
    counts = np.zeros(self.plan.prompts, np.int32)
    for row, ((_, request), start) in enumerate(zip(group.members, group.starts)):
      new = request.tokens[start + group.done : start + group.done + size]
      tokens[row, : len(new)], counts[row] = new, len(new)
    self._prompts = device.prefill_chunk(
      self.model, self._prompts, self.weights, *self._put(tokens, counts)
    )
    group.done += size
    self.tally.prefilled += tokens.size
    self.tally.prompt_tokens += int(counts.sum())
    return tokens.size

  def _admit(self, group: _Group, row: int, slot: int, sample: int):
    _, request = group.members[row]
    prompt = np.zeros((1, self.plan.prompt if self._penalizes else 1), np.int32)
    length = np.asarray([len(request.tokens)], np.int32)
    if self._penalizes:
      prompt[0, : length[0]] = request.tokens
    self._slots, chosen = device.insert(
      self.model,
      self._slots,
      self.weights,
      self._prompts,
      *self._put(np.int32(row), np.int32(slot), self._asks(request, sample), prompt, length),
    )
    return chosen

  @property
  def _penalizes(self) -> bool:
    return any(s.penalizes for s in self.plan.like)

  def _asks(self, request: Request, sample: int) -> RowParams:
    if request.sampling not in self.plan.like:
      raise RequestError(
        f'{request.sampling} is not among the sampling parameters that the run was compiled for'
      )
    return RowParams(
      stack_params([request.sampling], self.model.config.vocab_size, self.plan.like),
      np.asarray([request.seeds[sample]], np.uint32),
      np.asarray([request.limit], np.int32),
      self.plan.eos_id,
      self.plan.top,
    )

  def _put(self, *arrays):
    return jax.device_put(arrays, NamedSharding(self.model.mesh, P()))


class _Waiting:
  """Items of an iterator, looked at no earlier than needed."""

  def __init__(self, items: Iterator):
    self._items = items

  def take(self, count: int) -> list:
    return list(itertools.islice(self._items, count))

  def any(self) -> bool:
    first = self.take(1)
    self._items = itertools.chain(first, self._items)
    return bool(first)


def _event(owner: tuple[int, int], parts: list, ended: bool) -> Event:
  """What a row was told: parts of Chosen, [n] each and [n, top]."""
  tokens, log_probs, top_ids, top = (np.concatenate(x) for x in zip(*parts))
  pairs = [list(zip(ids.tolist(), values.tolist())) for ids, values in zip(top_ids, top)]
  return Event(*owner, tokens.tolist(), log_probs.tolist(), pairs, ended)


def _powers(first: int) -> Iterator[int]:
  return itertools.takewhile(lambda n: n < 2**30, (first << i for i in itertools.count()))
