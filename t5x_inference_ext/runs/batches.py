"""Many prompts through one engine: batches of one shape, so that all share one compilation, and the clock on them."""

from collections.abc import Iterator, Sequence
import dataclasses

import numpy as np

PROMPT_MULTIPLE = (
  16  # prompts are padded to a multiple of this, so that similar files compile alike
)


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


def split(rows: Sequence, size: int) -> Iterator[Sequence]:
  """Consecutive runs of `size` rows; the last may be shorter."""
  return (rows[i : i + size] for i in range(0, len(rows), size))


def pad(rows: Sequence, size: int) -> list:
  """Copies of the first row up to `size`: it ends when the first row does, so that padding never prolongs a batch."""
  return [*rows, *[rows[0]] * (size - len(rows))]
