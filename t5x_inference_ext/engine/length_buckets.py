"""Batches for examples of different lengths, with few shapes and little padding."""

import collections
from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

SHORTEST = 16
STEP = 8
# A new shape is worth its compilation if it saves at least this much padding, as a fraction of a
# full batch's tokens: FIRST while no shape is compiled yet, LATER afterwards.
FIRST, LATER = 1 / 16, 1.0


class Pack(NamedTuple):
  """Examples that are scored in one batch.

  Attributes:
    items: Indices of the examples.
    rows: Rows of the batch, padding included.
    length: Length that every row is padded to.
  """

  items: list[int]
  rows: int
  length: int


class Packer:
  """Groups examples of similar lengths, in the shapes (rows, length) with the least padding.

  Examples are sorted by length and divided into parts, each with one shape. The division with the
  least cost is taken: the padding of all batches, plus a price for each shape that is not compiled
  yet. Shapes from earlier calls are reused.

  Args:
    tokens: Maximum number of tokens of a batch, before its rows are rounded up for the mesh.
    padded_batch: Model.padded_batch.
  """

  def __init__(self, tokens: int, padded_batch: Callable[[int], int]) -> None:
    self._tokens, self._padded_batch = tokens, padded_batch
    self._shapes: set[tuple[int, int]] = set()

  def pack(self, lengths: Sequence[int]) -> list[Pack]:
    """Return batches that together hold all examples, the longest first, given their lengths."""
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
    """Return the parts with the least cost, as pairs (number of examples, shape).

    Args:
      counts: Pairs (padded length, number of examples), the longest first.
    """
    worth = self._tokens * (LATER if self._shapes else FIRST)
    best: list[tuple[float, list]] = [(0.0, [])]  # best[n]: cost and parts of the first n lengths
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
    """Return the least cost, in tokens, of `count` examples up to `length`, and their shape."""
    most = self._padded_batch(max(1, self._tokens // length))
    rows = self._padded_batch(-(-count // -(-count // most)))
    new = -(-count // rows) * rows * length + worth, (rows, length)
    known = ((-(-count // r) * r * n, (r, n)) for r, n in self._shapes if n >= length)
    return min([new, *known])


@functools.lru_cache
def packer(model: Any, tokens: int) -> Packer:
  """Return the packer for a model and batch size; equal arguments give the same object."""
  return Packer(tokens, model.padded_batch)


def padded(length: int) -> int:
  """Return the least allowed size that is at least `length`.

  Allowed sizes begin with SHORTEST and are multiples of STEP. Where that would give more than
  sixteen sizes between consecutive powers of two, sizes are sixteenths of a power of two apart.
  """
  step = max(STEP, (1 << (max(length, SHORTEST) - 1).bit_length()) // 32)
  return max(SHORTEST, -(-length // step) * step)
