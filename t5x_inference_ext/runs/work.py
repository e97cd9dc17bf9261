"""Three ways to serve the rows of a run: slot refill, static batches, scoring.

Each way is a class whose `step` does part of the work and returns the rows finished by it. A run is
a loop:

    while not work.finished:
      for row, result in work.step():
        ...
"""

from collections.abc import Iterable, Iterator, Sequence
import functools
import itertools
from typing import Any, Protocol

import numpy as np

from t5x_inference_ext.engine import length_buckets, scheduler_config, scoring
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.request import Completion, Request, Sample, SampleCollector
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scoring import ScoringExample
from t5x_inference_ext.model.chunks import page_shards
from t5x_inference_ext.runs import loading
from t5x_inference_ext.runs.batches import BatchShape, pad, row_seed
from t5x_inference_ext.runs.clock import Clock
from t5x_inference_ext.runs.infer_options import InferOptions
from t5x_inference_ext.runs.progress import print_on_main
from t5x_inference_ext.text.vocabulary import Vocabulary


class Work(Protocol):
  """Rows of a run, served step by step."""

  @property
  def finished(self) -> bool:
    """Whether every row is done."""

  def step(self) -> Sequence[tuple[int, Any]]:
    """Do part of the work; return (row, result) for each row that it finished, possibly none."""


class NoWork:
  """The work of a run that has no rows left to serve."""

  finished = True

  def step(self) -> list[tuple[int, Any]]:
    """Return no rows."""
    return []


class RefillWork:
  """Serves rows in slots that are refilled. A row's result is the list of its samples.

  Args:
    scheduler: The scheduler to run on.
    requests: Pairs (row, request), in order, which are taken as slots become free.
    clock: Counts time, rows and tokens.
  """

  def __init__(
    self, scheduler: Scheduler, requests: Iterable[tuple[int, Request]], clock: Clock
  ) -> None:
    self._scheduler = scheduler
    self._requests, self._clock = iter(requests), clock
    self._rows: dict[int, int] = {}  # the scheduler's index of a request -> row
    self._samples = SampleCollector()
    self._drafts = clock.drafts  # of earlier work
    self.finished = False

  def step(self) -> list[tuple[int, list[Sample]]]:
    """Submit as many requests as the scheduler can start, and run one step of it."""
    self._submit()
    with self._clock.running():
      events = self._scheduler.step()
    self._clock.drafts = self._drafts.plus(self._scheduler.stats.drafts)
    done = []
    for event in events:
      self._clock.add(0, len(event.tokens))
      samples = self._samples.add(event)
      if samples is not None:
        self._clock.add(1, 0)
        done.append((self._rows.pop(event.request), samples))
    self._submit()
    self.finished = self._scheduler.idle
    return done

  def _submit(self) -> None:
    for _ in range(self._scheduler.wanted):
      row, request = next(self._requests, (None, None))
      if row is None or request is None:
        return
      index = self._scheduler.submit(request).index
      self._rows[index] = row
      self._samples.expect(index, len(request.seeds))


def refill_work(
  engine: Engine,
  options: InferOptions,
  requests: Iterable[tuple[int, Request]],
  clock: Clock,
  *,
  ahead: int | None = None,
  vocabulary: Vocabulary | None = None,
  **sizes: Any,
) -> tuple[Work, dict[str, int]]:
  """Return a RefillWork for requests, and its sizes (for the record of the run).

  Args:
    engine: The engine to run on.
    options: Options of the run.
    requests: Pairs (row, request), in order.
    clock: Counts time, rows and tokens.
    ahead: Number of requests to read at the start, to choose the sizes; None: all.
    vocabulary: Needed by stop texts and grammars.
    **sizes: Other arguments of scheduler_config.config_for.
  """
  requests = iter(requests)
  first = list(itertools.islice(requests, ahead))
  if not first:
    return NoWork(), {}
  names = engine.adapters
  if sizes.get('max_length') is not None:  # of rows without their soft prompts
    sizes['max_length'] += max(map(len, names.prompts.values()), default=0)
  config = scheduler_config.config_for(
    engine.model,
    [names.prompted(request) for _, request in first],
    prefill_chunk=options.prefill_chunk,
    prefill_budget=options.prefill_budget,
    decode_steps=scheduler_config.BATCH_DECODE_STEPS,
    speculate=options.speculate,
    **sizes,
  )
  note = loading.rounded_note(options, config.slots, engine)
  print_on_main(f'batch: {config.slots} rows{note}, refilled as they end')
  grammars = any(request.grammar for _, request in first)
  programs = config.programs_text(page_shards(engine.model, config.slots), grammars=grammars)
  print_on_main(f'programs, at most {programs}')
  scheduler = Scheduler(engine.model, engine.weights, config, vocabulary=vocabulary, adapters=names)
  work = RefillWork(scheduler, itertools.chain(first, requests), clock)
  return work, {'batch': config.slots, 'max_length': config.max_length}


class StaticWork:
  """Generates static batches of one shape. A row's result is a Completion.

  Args:
    engine: The engine to run on.
    batches: Lists of at most shape.batch triples (row, prompt, name of an adapter or None). Prompts
      have at most shape.prompt tokens. `row` is the row's index in the run.
    shape: Shape of the batches in the engine. Smaller batches are padded with rows whose results
      are dropped.
    clock: Counts time, rows and tokens.
    options: Options of the run.
    eos_id: Token that ends a row, or several.
  """

  def __init__(
    self,
    engine: Engine,
    batches: Iterable[Sequence[tuple[int, Sequence[int], str | None]]],
    shape: BatchShape,
    clock: Clock,
    options: InferOptions,
    eos_id: int | Sequence[int],
  ) -> None:
    self._engine, self._batches, self._shape, self._clock = engine, iter(batches), shape, clock
    self._options, self._eos_id = options, eos_id
    self.finished = False

  def step(self) -> list[tuple[int, Completion]]:
    """Generate the next batch."""
    batch = next(self._batches, None)
    if batch is None:
      self.finished = True
      return []
    rows, prompts, adapters = zip(*batch)
    options, shape = self._options, self._shape
    seeds = [row_seed(options.seed, row) for row in rows]
    with self._clock.running():
      completions = self._engine.generate(
        pad(prompts, shape.batch),
        max_new_tokens=options.max_new_tokens,
        sampling=options.sampling,
        seeds=pad(seeds, shape.batch),
        eos_id=self._eos_id,
        cache_size=shape.cache,
        prompt_size=shape.prompt,
        max_length=shape.length,
        adapter=pad(adapters, shape.batch),
      )[: len(prompts)]
    self._clock.add(len(prompts), sum(len(c.tokens) for c in completions))
    return list(zip(rows, completions))


class ScoreWork:
  """Scores given tokens. A row's result is its weighted log-probabilities, [n] float32.

  Args:
    engine: The engine to run on.
    groups: Pairs (name of an adapter or None, list of pairs (row, example)). Examples of similar
      lengths within a group are scored together.
    tokens: Maximum number of tokens of a batch, padding included.
    clock: Counts time, rows and tokens.
  """

  def __init__(
    self,
    engine: Engine,
    groups: Iterable[tuple[str | None, Sequence[tuple[int, ScoringExample]]]],
    tokens: int,
    clock: Clock,
  ) -> None:
    self._engine, self._clock = engine, clock
    self._packs = self._packed(groups, length_buckets.packer(engine.model, tokens))
    self.finished = False

  def step(self) -> list[tuple[int, np.ndarray]]:
    """Score the next batch."""
    adapter, group, pack = next(self._packs, (None, (), None))
    if pack is None:
      self.finished = True
      return []
    with self._clock.running():
      log_probs = functools.partial(self._engine.log_probs, adapter=adapter)
      scored = scoring.score_pack(log_probs, [e for _, e in group], pack)
    for item, _ in scored:
      self._clock.add(1, int(np.count_nonzero(group[item][1].weights)))
    return [(group[item][0], scores) for item, scores in scored]

  def _packed(
    self,
    groups: Iterable[tuple[str | None, Sequence[tuple[int, ScoringExample]]]],
    packer: length_buckets.Packer,
  ) -> Iterator[tuple[str | None, Sequence[tuple[int, ScoringExample]], length_buckets.Pack]]:
    for adapter, group in groups:
      for pack in packer.pack([len(example.targets) for _, example in group]):
        yield adapter, group, pack
