"""Arrays in the text of a compiled program, such as bf16[64,4608]{1,0:T(8,128)(2,1)S(3)}."""

import dataclasses
import functools
import math
import re

from t5x_inference_ext.errors import UserError

HBM, HOST = 0, 5

_ARRAY = re.compile(r'([a-z]\w*)\[([0-9<=,\s]*)\](?:\{([^{}]*)\})?')
_COMMENT = re.compile(r'/\*.*?\*/')
# Most names of element types contain the number of bits: bf16, s8, f8e4m3fn. The others are listed.
_NUMBERED = re.compile(r'(?:[suc]|bf|f)(\d+)(?:e\d+m\d+\w*)?')
_UNNUMBERED = {'pred': 8, 'token': 0, 'opaque': 0}


class HloError(UserError):
  """The compiled text has a form that this parser does not understand."""


@dataclasses.dataclass(frozen=True)
class ArrayShape:
  """An array's element type, dimensions and place in memory.

  Attributes:
    dtype: str. XLA's name of the element type, such as 'bf16'.
    dims: tuple of int. Sizes of the dimensions.
    minor_to_major: tuple of int. The dimensions in memory order, fastest first.
    tiles: str. The tiling as in the text: 'T(8,128)(2,1)'.
    space: int. Memory space: 0 is HBM, 5 is host memory, others are on-chip.
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
    """Bytes of the elements, without the padding of tiles."""
    return (self.elements * _element_bits(self.dtype) + 7) // 8

  @property
  def on_chip(self) -> bool:
    return self.space not in (HBM, HOST)

  @property
  def order(self) -> tuple[int, ...]:
    """`minor_to_major` without dimensions of size 1, whose position has no meaning."""
    return tuple(d for d in self.minor_to_major if self.dims[d] != 1)

  def __str__(self) -> str:
    layout = ','.join(map(str, self.minor_to_major)) + (f':{self.tiles}' if self.tiles else '')
    space = f'S({self.space})' if self.space else ''
    return f'{self.dtype}[{",".join(map(str, self.dims))}]{{{layout}{space}}}'


def parse_result(text: str) -> tuple[tuple[ArrayShape, ...], tuple[int, ...]]:
  """Parse an instruction's type; return the arrays, and the number of arrays per tuple element.

  For a type that is not a tuple, the second result is ().

  Raises:
    HloError: An element type is unknown, or the text is not a type.
  """
  if not text.startswith('('):
    match = _ARRAY.match(text)
    if match is None:
      raise HloError(f'not the type of an array: {text[:200]}')
    return (_shape(match),), ()
  shapes: list[ArrayShape] = []
  parts: list[int] = []
  inner = _COMMENT.sub('', text)[1:-1]
  depth = start = 0
  for n, letter in enumerate(inner + ','):
    depth += (letter in '([{') - (letter in ')]}')
    if letter == ',' and not depth and inner[start:n].strip():
      found = [_shape(m) for m in _ARRAY.finditer(inner[start:n])]
      shapes += found
      parts.append(len(found))
      start = n + 1
  return tuple(shapes), tuple(parts)


@functools.cache
def _element_bits(dtype: str) -> int:
  if dtype in _UNNUMBERED:
    return _UNNUMBERED[dtype]
  numbered = _NUMBERED.fullmatch(dtype)
  if numbered is None:
    raise HloError(f'the element type {dtype} is unknown')
  return int(numbered[1])


def _shape(match: re.Match[str]) -> ArrayShape:
  dtype, dims, layout = match[1], match[2], match[3] or ''
  _element_bits(dtype)
  order, _, tiles = layout.partition(':')
  space = re.search(r'S\((\d+)\)', tiles)
  return ArrayShape(
    dtype,
    tuple(int(d.strip('<= ')) for d in dims.split(',') if d.strip()),
    tuple(int(d) for d in order.split(',') if d.strip()),
    re.sub(r'S\(\d+\)', '', tiles),
    int(space[1]) if space else HBM,
  )
