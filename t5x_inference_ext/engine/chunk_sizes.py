"""Sizes of the chunks that prompts are prefilled in, and the choice among them.

Each pass reads all weights, so a prompt should take few passes; but a chunk is padded to one of few
sizes, each of which is a program. A prompt's first chunk attends to nothing before it. Most prompts
are short, so these sizes are some small ones and large ones. Later chunks are whole ones, the ends
of prompts, and what follows a cached prefix: a chat's next turn, a question after instructions, or
the few tokens after the last whole block of a prompt that was served before.
"""

from collections.abc import Sequence
import functools
import itertools
import math

UNIT = 16  # chunk sizes are multiples of it, but for the largest
_FACTOR = 4  # ratio of consecutive sizes of first chunks, below half of the largest
_MOST_FIRST = 4  # maximum number of sizes of first chunks
# Later chunks are the largest one, or these parts of it.
_LATER_PARTS = 18, 4.5, 1
# A later chunk may be longer than the largest first one by this part of it: prompts are often a
# power of two and some tokens more, for BOS, a template, or what a block of the prefix cache cuts.
_MORE = 8
# Fixed cost of a prefill pass, in positions: each pass reads all weights. Measured for a small
# model on a CPU: 50. On a TPU it is more.
_PASS_POSITIONS = 64


def first_chunks(largest: int) -> list[int]:
  """Return the sizes of chunks with nothing cached before them, in ascending order.

  Args:
    largest: The largest of them.
  """
  # Half, and room for BOS: many prompts are a power of two and BOS.
  half = min(_whole_units(largest / 2) + UNIT, largest)
  small = (UNIT * _FACTOR**i for i in itertools.count())
  found = {*itertools.takewhile(lambda size: size <= half / 2, small), half, largest}
  return sorted(found)[-_MOST_FIRST:]


def later_chunks(first: int, most: int) -> list[int]:
  """Return the sizes of chunks after cached positions, in ascending order.

  Args:
    first: The largest size of a first chunk.
    most: Maximum size of a chunk.
  """
  largest = max(first, min(most, first + first // _MORE // UNIT * UNIT))
  return sorted({min(largest, _whole_units(largest / part)) for part in _LATER_PARTS})


def next_chunk(sizes: Sequence[int], later: Sequence[int], left: int) -> int:
  """Return the size of the next chunk of a prompt that has `left` tokens left, at least 1.

  The chunks of a prompt are chosen for the least total cost: of sizes 16, 64 and 288, 130 tokens
  become chunks of 64, 64 and 16, not one of 288; 40 become one of 64, not 16, 16 and 16.

  Args:
    sizes: Possible sizes, in ascending order.
    later: Possible sizes of the chunks after it.
    left: The tokens left.
  """
  if left >= sizes[-1]:
    return sizes[-1]
  return _cheapest_chunk(tuple(sizes), tuple(later), left)[1]


@functools.cache
def _cheapest_chunk(sizes: tuple[int, ...], later: tuple[int, ...], left: int) -> tuple[int, int]:
  """Return the cost of a prompt's remaining tokens, in positions, and the next chunk's size."""
  if left <= 0:
    return 0, 0
  filled = [size for size in sizes if size <= left][-1:]
  padded = [size for size in sizes if size >= left][:1]
  costs = {
    size: _PASS_POSITIONS + size + _cheapest_chunk(later, later, left - size)[0]
    for size in padded + filled
  }
  size = min(costs, key=costs.__getitem__)  # of two that cost the same, the larger: fewer passes
  return costs[size], size


def _whole_units(size: float) -> int:
  """Round a size up to a multiple of UNIT."""
  return math.ceil(size / UNIT) * UNIT
