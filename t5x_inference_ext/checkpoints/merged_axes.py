"""Ranges of several axes, and of the one axis that numpy's reshape merges them into."""

from collections.abc import Iterator, Sequence
import itertools
import math
from typing import TypeAlias

from t5x_inference_ext.checkpoints.tensor import Bounds, Span

# An index into a numpy array: an integer, a range or a new axis for each axis.
ArrayIndex: TypeAlias = tuple[int | slice | None, ...]


def merged_ranges(
  local: Sequence[Span], sizes: Sequence[int], offsets: Sequence[int]
) -> Iterator[tuple[Span, ArrayIndex]]:
  """Convert a range along each of several axes to contiguous ranges of their merged axis.

  Args:
    local: A range along each axis.
    sizes: The whole size of each axis.
    offsets: First index of each range in the caller's block.

  Yields:
    Pairs (range of the merged axis, index of its values in the block).
  """
  if not local:
    yield (0, 1), (None,)
    return
  begin, end = local[-1]
  inner = slice(offsets[-1], offsets[-1] + end - begin)
  for outer in itertools.product(*(range(b, e) for b, e in local[:-1])):
    base = 0
    for i, n in zip(outer, sizes):
      base = base * n + i
    base *= sizes[-1]
    yield (
      (base + begin, base + end),
      (*(o + i - b for o, i, (b, _) in zip(offsets, outer, local)), inner),
    )


def split_range(span: Span, sizes: Sequence[int]) -> Iterator[tuple[Bounds, ArrayIndex]]:
  """Cut a range of a merged axis into ranges along the original axes.

  Yields:
    Pairs (box, index). `box` has a range along each original axis. `index` selects the box's values
      from an array with the values of `span` alone.
  """
  if not sizes:
    yield (), (0,)
    return
  inner, position = sizes[-1], span[0]
  while position < span[1]:
    end = min(span[1], (position // inner + 1) * inner)
    outer: list[Span] = []
    rest = position // inner
    for n in reversed(sizes[:-1]):
      outer.insert(0, (rest % n, rest % n + 1))
      rest //= n
    first = position % inner
    yield (
      (*outer, (first, first + end - position)),
      (*((None,) * len(outer)), slice(position - span[0], end - span[0])),
    )
    position = end


def covering_box(span: Span, sizes: Sequence[int]) -> tuple[Bounds, int]:
  """Return the smallest box of the original axes that holds a range of their merged axis.

  Returns:
    A range along each axis, and the position of `span` in the box with its axes merged.
  """
  begin, end = span
  bounds: list[Span] = []
  for axis in range(len(sizes)):
    stride = math.prod(sizes[axis + 1 :])
    first, last = begin // stride, (end - 1) // stride
    begin, end = begin - first * stride, end - first * stride
    bounds.append((first, last + 1))
    if first != last:  # more than one index of this axis: take the inner axes whole
      bounds += [(0, n) for n in sizes[axis + 1 :]]
      break
  return tuple(bounds), begin
