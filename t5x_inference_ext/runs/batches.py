"""Many prompts through one engine: batches of one shape, so that all share one compilation, and the clock on them."""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import time
from typing import TypeVar

import jax
import numpy as np

from t5x_inference_ext.engine import length_buckets, scoring
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.scoring import ScoringExample

PROMPT_MULTIPLE = (
  16  # prompts are padded to a multiple of this, so that similar files compile alike
)
COMPILE_EVENTS = '/jax/core/compile/'
_T = TypeVar('T')


@dataclasses.dataclass
class Clock:
  """Where the time of a run went.

  Attributes:
    rows: served.
    tokens: useful ones: generated (EOS included), or scored; padding not counted.
    seconds: in the engine, without compilation.
    compile_seconds: of tracing and compilation.
  """

  rows: int = 0
  tokens: int = 0
  seconds: float = 0.0
  compile_seconds: float = 0.0

  @property
  def tokens_per_second(self) -> float:
    return self.tokens / self.seconds if self.seconds else 0.0

  def to_dict(self) -> dict[str, float]:
    return {**dataclasses.asdict(self), 'tokens_per_second': self.tokens_per_second}

  def add(self, rows: int, tokens: int) -> None:
    self.rows += rows
    self.tokens += tokens

  def over(self, items: Iterator[_T]) -> Iterator[_T]:
    """The items, each with the time that it takes to come."""
    end = object()
    while True:
      with self:
        item = next(items, end)
      if item is end:
        return
      yield item

  def __enter__(self):
    self._start = time.perf_counter()
    self._compiled = 0.0
    jax.monitoring.register_event_duration_secs_listener(self._on_event)
    return self

  def __exit__(self, *_):
    jax.monitoring.unregister_event_duration_listener(self._on_event)
    elapsed = time.perf_counter() - self._start
    self.compile_seconds += self._compiled
    self.seconds += max(0.0, elapsed - self._compiled)

  def _on_event(self, event: str, seconds: float, **_):
    if event.startswith(COMPILE_EVENTS):
      self._compiled += seconds


@dataclasses.dataclass(frozen=True)
class BatchShape:
  """The one shape of every batch of a run.

  Attributes:
    batch: rows, a number that the mesh divides.
    prompt: tokens that prompts are padded to.
    cache: positions of each row's cache, or None: as many as the prompts and new tokens need.
    length: prompt and new tokens of a row together, at most, or None: no such limit.
  """

  batch: int
  prompt: int
  cache: int | None = None
  length: int | None = None


def prompt_size(longest: int, limit: int | None = None) -> int:
  """`longest` rounded up to share compilations between files, within the limit that a cache sets."""
  size = -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
  return size if limit is None else max(longest, min(size, limit))


def row_seed(seed: int, row: int) -> int:
  """The seed of a row: from the run's seed and the row's place alone, different for every row of a run."""
  return (int(np.random.SeedSequence(seed).generate_state(1)[0]) + row) % 2**32


def row_seeds(seed: int, row: int, samples: int) -> tuple[int, ...]:
  """The seeds of a row's samples: different for every sample of a run; of one sample row_seed's."""
  return tuple(row_seed(seed, row * samples + i) for i in range(samples))


def generate_batches(
  engine: Engine,
  batches: Iterable[Sequence[tuple[int, Sequence[int]]]],
  shape: BatchShape,
  clock: Clock,
  *,
  max_new_tokens: int,
  sampling: SamplingParams,
  seed: int,
  eos_id: int,
) -> Iterator[tuple[int, list]]:
  """(row, [tokens, score]) of each prompt, in order.

  Args:
    engine: to generate with.
    batches: lists of at most shape.batch pairs (row, prompt), a prompt of at most shape.prompt tokens; a row is its place
      in the run.
    shape: of the batches as the engine sees them: short ones are padded, and the padding's rows dropped.
    clock: is advanced.
    max_new_tokens: the limit for each row.
    sampler: how to choose tokens.
    seed: of the run.
    eos_id: ends a row.
  """
  for some in batches:
    rows, prompts = zip(*some)
    seeds = [row_seed(seed, row) for row in rows]
    with clock:
      completions = engine.generate(
        pad(prompts, shape.batch),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seeds=pad(seeds, shape.batch),
        eos_id=eos_id,
        cache_size=shape.cache,
        prompt_size=shape.prompt,
        max_length=shape.length,
      )[: len(prompts)]
    clock.add(len(prompts), sum(len(c.tokens) for c in completions))
    yield from ((row, [c.tokens, c.score]) for row, c in zip(rows, completions))


def score_batches(
  engine: Engine, examples: Sequence[ScoringExample], tokens: int, clock: Clock
) -> Iterator[tuple[int, np.ndarray]]:
  """The place of each example and its weighted log-probabilities [n], those of like lengths together.

  Args:
    engine: to score with.
    examples: in any order.
    tokens: of a batch, padding included.
    clock: is advanced.
  """
  for result in clock.over(
    scoring.score_examples(engine.log_probs, examples, length_buckets.packer(engine.model, tokens))
  ):
    clock.add(1, int(np.count_nonzero(examples[result[0]].weights)))
    yield result


def split(rows: Sequence, size: int) -> Iterator[Sequence]:
  """Consecutive runs of `size` rows; the last may be shorter."""
  return (rows[i : i + size] for i in range(0, len(rows), size))


def pad(rows: Sequence, size: int) -> list:
  """Copies of the first row up to `size`: it ends when the first row does, so that padding never prolongs a batch."""
  return [*rows, *[rows[0]] * (size - len(rows))]
