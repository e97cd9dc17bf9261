"""Arrays of a compiled program as its text writes them: bf16[64,4608]{1,0:T(8,128)(2,1)S(3)}."""

import dataclasses
import math
import re

from t5x_inference_ext.errors import UserError

# Bits of an element.
_BITS = {
  'pred': 8,
  's2': 2,
  'u2': 2,
  's4': 4,
  'u4': 4,
  's8': 8,
  'u8': 8,
  's16': 16,
  'u16': 16,
  's32': 32,
  'u32': 32,
  's64': 64,
  'u64': 64,
  'f16': 16,
  'bf16': 16,
  'f32': 32,
  'f64': 64,
  'c64': 64,
  'c128': 128,
  'f4e2m1fn': 4,
  'f8e3m4': 8,
  'f8e4m3': 8,
  'f8e4m3b11fnuz': 8,
  'f8e4m3fn': 8,
  'f8e4m3fnuz': 8,
  'f8e5m2': 8,
  'f8e5m2fnuz': 8,
  'f8e8m0fnu': 8,
  'token': 0,
  'opaque': 0,
}
HBM, HOST = 0, 5

_ARRAY = re.compile(r'([a-z]\w*)\[([0-9<=,\s]*)\](?:\{([^{}]*)\})?')
_COMMENT = re.compile(r'/\*.*?\*/')


class HloError(UserError):
  """Compiled text that this reader does not understand."""


@dataclasses.dataclass(frozen=True)
class ArrayShape:
  """One array.

  Attributes:
    minor_to_major: the dimensions as they lie in memory, the fastest first.
    tiles: as written after them, 'T(8,128)(2,1)'.
    space: the memory: 0 is HBM.
  """

  dtype: str
  dims: tuple[int, ...]
  minor_to_major: tuple[int, ...] = ()
  tiles: str = ''
  space: int = HBM

  @property
  def elements(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Without the padding of tiles."""
    return (self.elements * _BITS[self.dtype] + 7) // 8

  @property
  def on_chip(self) -> bool:
    return self.space not in (HBM, HOST)

  @property
  def order(self) -> tuple[int, ...]:
    """minor_to_major without dimensions of 1, which lie anywhere."""
    return tuple(d for d in self.minor_to_major if self.dims[d] != 1)

  def __str__(self) -> str:
    layout = ','.join(map(str, self.minor_to_major)) + (f':{self.tiles}' if self.tiles else '')
    return f'{self.dtype}[{",".join(map(str, self.dims))}]{{{layout}{f"S({self.space})" if self.space else ""}}}'


def parse_result(text: str) -> tuple[tuple[ArrayShape, ...], tuple[int, ...]]:
  """An instruction's type -> its arrays, and of a tuple how many arrays each of its elements has; () of an array."""
  if not text.startswith('('):
    return (_shape(_ARRAY.match(text)),), ()
  shapes, parts, inner = [], [], _COMMENT.sub('', text)[1:-1]
  depth = start = 0
  for n, letter in enumerate(inner + ','):
    depth += (letter in '([{') - (letter in ')]}')
    if letter == ',' and not depth and inner[start:n].strip():
      found = [_shape(m) for m in _ARRAY.finditer(inner[start:n])]
      shapes += found
      parts.append(len(found))
      start = n + 1
  return tuple(shapes), tuple(parts)


def _shape(match: re.Match) -> ArrayShape:
  dtype, dims, layout = match[1], match[2], match[3] or ''
  if dtype not in _BITS:
    raise HloError(f'the element type {dtype} is not known here: {match[0]}')
  order, _, tiles = layout.partition(':')
  space = re.search(r'S\((\d+)\)', tiles)
  return ArrayShape(
    dtype,
    tuple(int(d.strip('<= ')) for d in dims.split(',') if d.strip()),
    tuple(int(d) for d in order.split(',') if d.strip()),
    re.sub(r'S\(\d+\)', '', tiles),
    int(space[1]) if space else HBM,
  )
