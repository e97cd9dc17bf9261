"""The torus under the mesh: which physical axes of a slice become x, y and z, and which chip sits where (section 3.1).

A slice is a box of chips, each linked to the next along three physical axes. Collectives run along mesh axes, so a mesh
is fast where a step along any of its axes is one physical link. `device_grid` finds the chip at each position of a mesh;
mesh_choice.py chooses the mesh.
"""

import collections
from collections.abc import Sequence
import dataclasses
import itertools
import math

import numpy as np

from t5x_inference_ext.errors import MeshError

# Generation -> physical axes. The compiler's device kinds name the generations otherwise: kind_of.
GENERATIONS = {'v4': 3, 'v5e': 2, 'v5p': 3, 'v6e': 2}
_DEVICE_KINDS = {
  'TPU v4': 'v4',
  'TPU v5 lite': 'v5e',
  'TPU v5e': 'v5e',
  'TPU v5': 'v5p',
  'TPU v5p': 'v5p',
  'TPU v6 lite': 'v6e',
  'TPU v6e': 'v6e',
}

RING, CHAIN, BROKEN = 'ring', 'chain', 'broken'


@dataclasses.dataclass(frozen=True)
class TpuSlice:
  """A slice of a TPU pod: its generation ('v4', ...) and the chips along each physical axis (1 for one it lacks)."""

  kind: str
  shape: tuple[int, int, int]

  @property
  def chips(self) -> int:
    return math.prod(self.shape)

  @property
  def wraps(self) -> tuple[bool, bool, bool]:
    return wraparound(self.shape, self.kind)

  def __str__(self) -> str:
    """As parse_slice reads it, and as jax names the topology: v4:4x4x4, v5e:4x8."""
    return f'{self.kind}:{"x".join(map(str, self.shape[: GENERATIONS[self.kind]]))}'


def parse_slice(text: str) -> TpuSlice:
  """'v4:4x4x4' -> Slice('v4', (4, 4, 4)); without a generation v4 is meant; 'v5e:4x8' -> Slice('v5e', (4, 8, 1)).

  Raises:
    MeshError: an unknown generation, or not as many whole numbers above 0 as the generation has physical axes.
  """
  kind, colon, sizes = text.lower().rpartition(':')
  kind = kind if colon else 'v4'
  if kind not in GENERATIONS:
    raise MeshError(
      f'a slice is written generation:shape, e.g. v4:4x4x4 or v5e:4x8, with generation {", ".join(GENERATIONS)}; '
      f'got {text!r}'
    )
  parts = sizes.split('x')
  if len(parts) != GENERATIONS[kind] or not all(p.isdecimal() and int(p) > 0 for p in parts):
    example = f'{kind}:4x4x4' if GENERATIONS[kind] == 3 else f'{kind}:4x8'
    raise MeshError(
      f'a {kind} slice has {GENERATIONS[kind]} physical axes and is written e.g. {example}, got {text!r}'
    )
  return TpuSlice(kind, (*map(int, parts), 1)[:3])


def kind_of(device_kind: str) -> str | None:
  """'TPU v5 lite' -> 'v5e'; None for a kind that this module does not know."""
  return _DEVICE_KINDS.get(device_kind)


def wraparound(shape: Sequence[int], kind: str | None = 'v4') -> tuple[bool, bool, bool]:
  """Which physical axes of a whole slice link their last chip to their first.

  v4 and v5p: all of them where every dimension is a multiple of 4, else none (2x2x4 has none). v5e and v6e: an axis of
  16. An unknown kind: none.
  """
  dimensions = GENERATIONS.get(kind)
  if dimensions == 2:
    return tuple(size == 16 for size in shape)
  return (dimensions == 3 and all(size % 4 == 0 for size in shape),) * 3


def box_of(coordinates: np.ndarray) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
  """The lowest corner and the shape of the box that the coordinates [n, 3] fill once each; None if they fill none."""
  coordinates = np.asarray(coordinates)
  if coordinates.ndim != 2 or coordinates.shape[1] != 3 or not len(coordinates):
    return None
  corner = coordinates.min(axis=0)
  shape = coordinates.max(axis=0) - corner + 1
  if math.prod(shape.tolist()) != len(coordinates) or len(np.unique(coordinates, axis=0)) != len(
    coordinates
  ):
    return None
  return tuple(corner.tolist()), tuple(shape.tolist())


def device_grid(
  coordinates: np.ndarray, mesh_shape: Sequence[int], wraps: Sequence[bool] | None = None
) -> np.ndarray:
  """Which device stands at each mesh position, so that mesh neighbours are torus neighbours.

  A mesh axis made of one physical axis follows it. One made of several winds through them and, where one of them is
  even, comes back beside its start, so that it is a ring even without wraparound. Where no whole axes multiply to the
  mesh, physical axes are split: a ring of 4 is a square of 2 x 2 and loses nothing, so 2x2x16 still lies well on 4x4x4.
  Any other split puts some neighbours apart (8 chips in a row hold no 2 x 4 grid): then the arrangement with the fewest
  such pairs is taken, and `axis_links` says which axes suffer.

  Args:
    coordinates: [n, 3] physical coordinates of the devices, in any order; the box they fill may start anywhere.
    mesh_shape: (X, Y, Z), with X Y Z = n.
    wraps: per physical axis, whether its ends are linked; None for a whole v4 slice of the box's shape.

  Returns:
    [X, Y, Z] indices into `coordinates`. The same chips in another order get the same positions.

  Raises:
    MeshError: the coordinates fill no box, or the mesh has another number of positions.
  """
  coordinates = np.asarray(coordinates)
  box = box_of(coordinates)
  if box is None:
    raise MeshError(
      f'the {len(coordinates)} devices do not fill a box of the torus once each: leave none out'
    )
  corner, shape = box
  if math.prod(mesh_shape) != len(coordinates):
    raise MeshError(
      f'mesh {"x".join(map(str, mesh_shape))} needs {math.prod(mesh_shape)} devices and the slice '
      f'{"x".join(map(str, shape))} has {len(coordinates)}'
    )
  wraps = wraparound(shape) if wraps is None else wraps
  index = np.empty(shape, int)
  index[tuple((coordinates - corner).T)] = np.arange(len(coordinates))
  return index[tuple(np.moveaxis(_arrange(shape, tuple(mesh_shape), wraps), -1, 0))]


def axis_links(
  coordinates: np.ndarray, grid: np.ndarray, wraps: Sequence[bool] | None = None
) -> tuple[str, str, str]:
  """What each mesh axis is on the torus: 'ring', 'chain' or 'broken'.

  'chain': each position is one link from the next. 'ring': the last is one link from the first as well (an axis of 1 or
  2 always is). 'broken': some neighbours are more than one link apart.

  Args:
    coordinates, wraps: as in device_grid.
    grid: [X, Y, Z] indices into `coordinates`.
  """
  coordinates = np.asarray(coordinates)
  shape = tuple((coordinates.max(axis=0) - coordinates.min(axis=0) + 1).tolist())
  counts = _apart(
    coordinates[np.asarray(grid)], shape, wraparound(shape) if wraps is None else wraps
  )
  return tuple(BROKEN if inside else CHAIN if closing else RING for inside, closing in counts)


def neighbours_adjacent(
  coordinates: np.ndarray, grid: np.ndarray, wraps: Sequence[bool] | None = None
) -> bool:
  """Whether each device of the grid is one physical link from the next along every mesh axis: no axis is 'broken'."""
  return BROKEN not in axis_links(coordinates, grid, wraps)


def _arrange(shape: tuple[int, ...], mesh: tuple[int, ...], wraps: Sequence[bool]) -> np.ndarray:
  """[X, Y, Z, 3] positions in the box: of all ways to share the physical axes out, the best."""
  by_splits = collections.defaultdict(list)
  for shares in itertools.product(*(_factors(size, len(mesh)) for size in shape)):
    if all(math.prod(column) == size for column, size in zip(zip(*shares), mesh)):
      # A physical axis that two mesh axes share carries the traffic of both: whole axes come first.
      by_splits[sum(max(0, sum(factor > 1 for factor in row) - 1) for row in shares)].append(shares)
  best = None
  for _, candidates in sorted(by_splits.items()):
    for shares in candidates:
      positions = _positions(shares)
      counts = _apart(positions, shape, wraps)
      key = sum(inside for inside, _ in counts), sum(closing > 0 for _, closing in counts)
      if best is None or key < best[0]:
        best = key, positions
    if best[0][0] == 0:
      break
  if best is None:  # Sizes without common factors, as 6 x 6 on 4 x 9: no way to share them out.
    return np.stack(np.unravel_index(np.arange(math.prod(mesh)).reshape(mesh), shape), axis=-1)
  return best[1]


def _positions(shares: Sequence[Sequence[int]]) -> np.ndarray:
  """[X, Y, Z, 3]: the place on each physical axis i, of which mesh axis j takes the factor shares[i][j]."""
  walks = [
    _ring(column) for column in zip(*shares)
  ]  # Per mesh axis, [size, 3]: its digit on each physical axis.
  places = []
  for i, row in enumerate(shares):
    # The smallest factor is the coarsest digit: its steps are the long ones.
    order = sorted(range(len(row)), key=lambda j: row[j])
    digits = _snake([row[j] for j in order])
    table = np.empty(row, int)
    table[tuple(digits[:, order.index(j)] for j in range(len(row)))] = np.arange(math.prod(row))
    places.append(table[np.ix_(*(walk[:, i] for walk in walks))])
  return np.stack(places, axis=-1)


def _factors(size: int, parts: int) -> list[tuple[int, ...]]:
  """All ways to write `size` as a product of that many factors, the first as large as can be first."""
  if parts == 1:
    return [(size,)]
  return [
    (d, *rest)
    for d in range(size, 0, -1)
    if size % d == 0
    for rest in _factors(size // d, parts - 1)
  ]


def _snake(sizes: Sequence[int]) -> np.ndarray:
  """[product, len(sizes)]: all digits in reflected mixed-radix order; each step moves one digit by one."""
  if not sizes:
    return np.zeros((1, 0), int)
  rest = _snake(sizes[1:])
  return np.concatenate(
    [
      np.column_stack([np.full(len(rest), i), rest[::-1] if i % 2 else rest])
      for i in range(sizes[0])
    ]
  )


def _ring(sizes: Sequence[int]) -> np.ndarray:
  """As _snake, but the last is one step from the first as well, where two sizes are above 1 and one of them is even.

  Through rows of an even number, there and back over all columns but the first, then home along the first.
  """
  even = next((i for i, size in enumerate(sizes) if size % 2 == 0), None)
  if even is None or math.prod(sizes) == sizes[even]:
    return _snake(sizes)
  columns = _snake([*sizes[:even], *sizes[even + 1 :]])
  walk = [(0, 0)]
  for row, column in _snake([sizes[even], len(columns) - 1]).tolist():
    walk.append((row, column + 1))
  walk += [(row, 0) for row in range(sizes[even] - 1, 0, -1)]
  rows, order = np.asarray(walk).T
  return np.insert(columns[order], even, rows, axis=1)


def _apart(
  positions: np.ndarray, shape: Sequence[int], wraps: Sequence[bool]
) -> list[tuple[int, int]]:
  """Per mesh axis of positions [X, Y, Z, 3], how many neighbours are not one link apart: inside, and last to first."""

  def not_one_link(a, b):
    distance = np.abs(a - b)
    distance = np.where(wraps, np.minimum(distance, np.asarray(shape) - distance), distance)
    return int((distance.sum(axis=-1) != 1).sum())

  counts = []
  for axis in range(positions.ndim - 1):
    line = np.moveaxis(positions, axis, 0)
    counts.append(
      (not_one_link(line[1:], line[:-1]), not_one_link(line[0], line[-1]) if len(line) > 2 else 0)
    )
  return counts
