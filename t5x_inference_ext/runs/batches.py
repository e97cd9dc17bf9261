"""Shape and seeds of batches. All batches of a run have one shape, and so share one compilation."""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import itertools
from typing import TypeVar

import numpy as np

PROMPT_MULTIPLE = 16  # prompts are padded to a multiple of this, to share compilations
_Row = TypeVar('_Row')


@dataclasses.dataclass(frozen=True)
class BatchShape:
  """The one shape of every batch of a run.

  Attributes:
    batch: Number of rows. The mesh must divide it.
    prompt: Length in tokens that prompts are padded to.
    cache: Positions of each row's cache; None: as many as the prompts and new tokens need.
    length: Maximum number of tokens of a row, prompt and new tokens together; None: no limit.
  """

  batch: int
  prompt: int
  cache: int | None = None
  length: int | None = None


def prompt_size(longest: int, limit: int | None = None) -> int:
  """Return `longest` rounded up, to share compilations between files, but at most `limit`."""
  size = -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
  return size if limit is None else max(longest, min(size, limit))


def row_seed(seed: int, row: int) -> int:
  """Return the seed of a row, from the run's seed and the row's index. No two rows share a seed."""
  return (int(np.random.SeedSequence(seed).generate_state(1)[0]) + row) % 2**32


def row_seeds(seed: int, row: int, samples: int) -> tuple[int, ...]:
  """Return a seed for each sample of a row. No two samples of a run have equal seeds."""
  return tuple(row_seed(seed, row * samples + i) for i in range(samples))


def batched(rows: Iterable[_Row], size: int) -> Iterator[list[_Row]]:
  """Yield lists of `size` consecutive rows, which are read lazily. The last may be shorter."""
  rows = iter(rows)
  while batch := list(itertools.islice(rows, size)):
    yield batch


def pad(rows: Sequence[_Row], size: int) -> list[_Row]:
  """Pad rows with copies of the first row, to `size` rows in all.

  Copies end when the first row ends, so padding never makes a batch longer.
  """
  return [*rows, *[rows[0]] * (size - len(rows))]
