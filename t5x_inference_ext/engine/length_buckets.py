"""Ragged examples in batches of few shapes with little padding."""

import collections
from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

SHORTEST = 16
STEP = 8
# What a shape has to spare to be compiled, as a share of a full batch's tokens: of the first examples, and of more that
# come when some shapes are compiled.
FIRST, LATER = 1 / 16, 1.0


class Pack(NamedTuple):
  """Examples that go together.

  Attributes:
    items: their places.
    rows: of the batch, padding included.
    length: that all are padded to.
  """

  items: list[int]
  rows: int
  length: int


class Packer:
  """Puts examples of like lengths together, in the shapes (rows, length) that leave the least padding.

  Examples in the order of their lengths are cut where it pays: for every part the padding that its batches hold is
  weighed against a shape more to compile, all cuts considered. A part's batches have as many rows as each other. What was
  compiled for earlier examples is used again.

  Args:
    tokens: of a batch, at most, before its rows are rounded up to what the mesh takes.
    padded_batch: Model.padded_batch.
  """

  def __init__(self, tokens: int, padded_batch: Callable[[int], int]):
    self._tokens, self._padded_batch = tokens, padded_batch
    self._shapes: set[tuple[int, int]] = set()

  def pack(self, lengths: Sequence[int]) -> list[Pack]:
    """Batches of all examples of these lengths, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    counts = collections.Counter(padded(n) for n in lengths)
    packs, start = [], 0
    for count, (rows, length) in self._parts(sorted(counts.items(), reverse=True)):
      self._shapes.add((rows, length))
      packs += [
        Pack(order[i : min(i + rows, start + count)], rows, length)
        for i in range(start, start + count, rows)
      ]
      start += count
    return packs

  def _parts(self, counts: list[tuple[int, int]]) -> list[tuple[int, tuple[int, int]]]:
    """(padded length, examples), the longest first -> (examples, shape) of each part, with the least cost in all."""
    worth = self._tokens * (LATER if self._shapes else FIRST)
    best: list[tuple[float, list]] = [(0.0, [])]  # of the first n lengths
    for stop in range(1, len(counts) + 1):
      options, count = [], 0
      for start in range(stop - 1, -1, -1):
        length, more = counts[start]
        count += more
        cost, shape = self._cheapest(count, length, worth)
        options.append((best[start][0] + cost, start, count, shape))
      cost, start, count, shape = min(options)
      best.append((cost, [*best[start][1], (count, shape)]))
    return best[-1][1]

  def _cheapest(self, count: int, length: int, worth: float) -> tuple[float, tuple[int, int]]:
    """The cost, in tokens, of so many examples of at most a length, and the shape of their batches."""
    most = self._padded_batch(max(1, self._tokens // length))
    rows = self._padded_batch(-(-count // -(-count // most)))
    new = -(-count // rows) * rows * length + worth, (rows, length)
    known = ((-(-count // r) * r * n, (r, n)) for r, n in self._shapes if n >= length)
    return min([new, *known])


@functools.lru_cache
def packer(model: Any, tokens: int) -> Packer:
  """The Packer of a Model and batches of so many tokens: one for all calls, as what is compiled is kept, too."""
  return Packer(tokens, model.padded_batch)


def padded(length: int) -> int:
  """The smallest size of at least `length` of sixteen to an octave, multiples of STEP, from SHORTEST."""
  step = max(STEP, (1 << (max(length, SHORTEST) - 1).bit_length()) // 32)
  return max(SHORTEST, -(-length // step) * step)
