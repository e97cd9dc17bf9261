"""The physical torus of a TPU slice, and the chip at each mesh position (the paper's section 3.1).

A slice is a box of chips, linked along up to three physical axes. A mesh is fast if each step along
its axes is one link: `device_grid` lays a mesh on a slice, and mesh_choice.py chooses the mesh.
"""

import collections
from collections.abc import Sequence
import dataclasses
import itertools
import math

import numpy as np

from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.sharding.cloud_names import cloud_slice
from t5x_inference_ext.text_format import parse_sizes

# Generation -> number of physical axes. jax names generations by their device kind (kind_of).
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

# How the mesh axes x, y, z divide one physical axis: a factor for each.
_Shares = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TpuSlice:
  """A slice of a TPU pod.

  Attributes:
    kind: The generation, a key of GENERATIONS.
    shape: Chips along each physical axis; 1 for an axis that the generation lacks.
  """

  kind: str
  shape: tuple[int, int, int]

  @property
  def chips(self) -> int:
    """The number of chips."""
    return math.prod(self.shape)

  @property
  def wraps(self) -> tuple[bool, bool, bool]:
    """For each physical axis, whether its ends are linked."""
    return wraparound(self.shape, self.kind)

  def __str__(self) -> str:
    """Return the slice's name, such as v4:4x4x4 or v5e:4x8, as parse_slice and jax read it."""
    return f'{self.kind}:{"x".join(map(str, self.shape[: GENERATIONS[self.kind]]))}'


def parse_slice(text: str) -> TpuSlice:
  """Return the slice of 'v4:4x4x4', '4x4x4' (v4), 'v5e:4x8' (4x8x1), or a cloud's name, 'v4-128'.

  Raises:
    MeshError: The text names no slice. The message says why, and how one is written.
  """
  if named := cloud_slice(text):
    return TpuSlice(*named)
  kind, colon, sizes = text.lower().rpartition(':')
  kind = kind if colon else 'v4'
  if kind not in GENERATIONS:
    raise MeshError(
      'a slice is written generation:shape, e.g. v4:4x4x4 or v5e:4x8, with generation '
      f'{", ".join(GENERATIONS)}; got {text!r}'
    )
  shape = parse_sizes(sizes)
  if len(shape) != GENERATIONS[kind]:
    example = f'{kind}:4x4x4' if GENERATIONS[kind] == 3 else f'{kind}:4x8'
    raise MeshError(
      f'a {kind} slice has {GENERATIONS[kind]} physical axes and is written e.g. {example}, '
      f'got {text[:99]!r}'
    )
  x, y, z = (*shape, 1)[:3]
  return TpuSlice(kind, (x, y, z))


def kind_of(device_kind: str) -> str | None:
  """Return the generation of a device kind: 'TPU v5 lite' -> 'v5e'; None for an unknown kind."""
  return _DEVICE_KINDS.get(device_kind)


def wraparound(shape: Sequence[int], kind: str | None = 'v4') -> tuple[bool, bool, bool]:
  """Return whether the ends of each physical axis of a whole slice are linked.

  On v4 and v5p all axes have linked ends if every size is a multiple of 4, else none has (2x2x4).
  On v5e and v6e, axes of size 16 have linked ends. For an unknown kind (None), no axis does.
  """
  dimensions = None if kind is None else GENERATIONS.get(kind)
  if dimensions == 2:
    first, second, third = (size == 16 for size in shape)
    return first, second, third
  linked = dimensions == 3 and all(size % 4 == 0 for size in shape)
  return linked, linked, linked


def box_of(coordinates: np.ndarray) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
  """Return the lowest corner and the shape of the box that coordinates [n, 3] fill; else None."""
  coordinates = np.asarray(coordinates)
  if coordinates.ndim != 2 or coordinates.shape[1] != 3 or not len(coordinates):
    return None
  corner = coordinates.min(axis=0)
  shape = coordinates.max(axis=0) - corner + 1
  different = len(np.unique(coordinates, axis=0))
  if not math.prod(shape.tolist()) == len(coordinates) == different:
    return None
  a, b, c = corner.tolist()
  x, y, z = shape.tolist()
  return (a, b, c), (x, y, z)


def device_grid(
  coordinates: np.ndarray, mesh_shape: Sequence[int], wraps: Sequence[bool]
) -> np.ndarray:
  """Return the device at each mesh position, so that mesh neighbours are torus neighbours.

  A mesh axis made of one physical axis follows that axis. A mesh axis made of several physical axes
  winds through them; if one of these has an even size, the path ends beside its start, so the mesh
  axis is a ring even without wraparound. If the mesh can't be made of whole physical axes, physical
  axes are split. A ring of 4 is a square of 2 x 2, whose halves are neighbours on separate links,
  so 2x2x16 still fits 4x4x4. With any other split, some mesh neighbours are not torus neighbours (8
  chips in a row hold no 2 x 4 grid). Then the arrangement with the fewest such pairs is chosen, and
  `axis_links` reports the affected mesh axes.

  Args:
    coordinates: [n, 3]. Physical coordinates of the devices, in any order. The box that they fill
      may start anywhere.
    mesh_shape: (X, Y, Z), with X Y Z = n.
    wraps: For each physical axis, whether its ends are linked.

  Returns:
    [X, Y, Z] indices into `coordinates`. The order of the rows of `coordinates` does not affect a
    chip's position.

  Raises:
    MeshError: The coordinates fill no box, or the mesh's size is not n.
  """
  coordinates = np.asarray(coordinates)
  box = box_of(coordinates)
  if box is None:
    raise MeshError(
      f'the {len(coordinates)} devices do not fill a box of the torus exactly once: use all of its '
      'chips'
    )
  corner, shape = box
  if math.prod(mesh_shape) != len(coordinates):
    raise MeshError(
      f'mesh {"x".join(map(str, mesh_shape))} needs {math.prod(mesh_shape)} devices and the slice '
      f'{"x".join(map(str, shape))} has {len(coordinates)}'
    )
  index = np.empty(shape, int)
  index[tuple((coordinates - corner).T)] = np.arange(len(coordinates))
  return index[tuple(np.moveaxis(_arrange(shape, tuple(mesh_shape), wraps), -1, 0))]


def axis_links(
  coordinates: np.ndarray, grid: np.ndarray, wraps: Sequence[bool]
) -> tuple[str, str, str]:
  """Return the links of each mesh axis on the torus: 'ring', 'chain' or 'broken'.

  In a chain each position is one link from the next. In a ring, in addition, the last position is
  one link from the first (an axis of 1 or 2 is always a ring). In a broken axis some neighbours are
  more than one link apart.

  Args:
    coordinates: [n, 3]. Physical coordinates of the devices.
    grid: [X, Y, Z]. Indices into `coordinates`.
    wraps: For each physical axis, whether its ends are linked.
  """
  coordinates = np.asarray(coordinates)
  shape = tuple((coordinates.max(axis=0) - coordinates.min(axis=0) + 1).tolist())

  def link(inside: int, closing: int) -> str:
    if inside:
      return BROKEN
    return CHAIN if closing else RING

  x, y, z = (link(*counts) for counts in _apart(coordinates[np.asarray(grid)], shape, wraps))
  return x, y, z


def _arrange(shape: tuple[int, ...], mesh: tuple[int, ...], wraps: Sequence[bool]) -> np.ndarray:
  """Return [X, Y, Z, 3] positions in the box, for the best division of the physical axes.

  The best one has the fewest mesh neighbours more than one link apart, then the most rings.
  """
  by_splits = collections.defaultdict(list)
  for shares in itertools.product(*(_factors(size, len(mesh)) for size in shape)):
    if tuple(math.prod(column) for column in zip(*shares, strict=True)) == mesh:
      # Try whole axes first: a physical axis shared by two mesh axes carries the traffic of both.
      splits = sum(max(0, sum(factor > 1 for factor in row) - 1) for row in shares)
      by_splits[splits].append(shares)
  best, best_apart = None, (math.inf, math.inf)
  for _, candidates in sorted(by_splits.items()):
    for shares in candidates:
      positions = _positions(shares)
      counts = _apart(positions, shape, wraps)
      apart = sum(inside for inside, _ in counts), sum(closing > 0 for _, closing in counts)
      if apart < best_apart:
        best, best_apart = positions, apart
    if best_apart[0] == 0:
      break
  if best is None:  # no division into whole factors exists (6 x 6 on 4 x 9)
    return np.stack(np.unravel_index(np.arange(math.prod(mesh)).reshape(mesh), shape), axis=-1)
  return best


def _positions(shares: Sequence[_Shares]) -> np.ndarray:
  """Return [X, Y, Z, 3] torus positions. shares[i]: factors (x, y, z) of physical axis i."""
  # One array [size, 3] per mesh axis j: the path along j as digits, one digit for each physical
  # axis.
  walks = [_cyclic_gray_code(column) for column in zip(*shares, strict=True)]
  places = []
  for i, row in enumerate(shares):
    # The smallest factor becomes the most significant digit, since a step of that digit is long.
    order = sorted(range(len(row)), key=lambda j: row[j])
    digits = _gray_code([row[j] for j in order])
    table = np.empty(row, int)
    table[tuple(digits[:, order.index(j)] for j in range(len(row)))] = np.arange(math.prod(row))
    places.append(table[np.ix_(*(walk[:, i] for walk in walks))])
  return np.stack(places, axis=-1)


def _factors(size: int, parts: int) -> list[_Shares]:
  """Return all ways to write `size` as a product of `parts` factors, by descending first factor."""
  if parts == 1:
    return [(size,)]
  found = []
  for divisor in range(size, 0, -1):
    if size % divisor == 0:
      found += [(divisor, *rest) for rest in _factors(size // divisor, parts - 1)]
  return found


def _gray_code(sizes: Sequence[int]) -> np.ndarray:
  """Return the reflected mixed-radix Gray code of `sizes`: all digit tuples, [product, len(sizes)].

  Consecutive tuples differ by 1 in one digit.
  """
  if not sizes:
    return np.zeros((1, 0), int)
  rest = _gray_code(sizes[1:])
  rows = [
    np.column_stack([np.full(len(rest), i), rest[::-1] if i % 2 else rest]) for i in range(sizes[0])
  ]
  return np.concatenate(rows)


def _cyclic_gray_code(sizes: Sequence[int]) -> np.ndarray:
  """Return all digit tuples like _gray_code, in a cyclic order if one exists.

  In a cyclic order, the last tuple also differs by 1 from the first. One exists if two sizes are
  above 1 and one of them is even. The path goes through the even number of rows, back and forth
  over all columns except the first, and then returns along the first column.
  """
  even = next((i for i, size in enumerate(sizes) if size % 2 == 0), None)
  if even is None or math.prod(sizes) == sizes[even]:
    return _gray_code(sizes)
  columns = _gray_code([*sizes[:even], *sizes[even + 1 :]])
  walk = [(0, 0)]
  for row, column in _gray_code([sizes[even], len(columns) - 1]).tolist():
    walk.append((row, column + 1))
  walk += [(row, 0) for row in range(sizes[even] - 1, 0, -1)]
  rows, order = np.asarray(walk).T
  return np.insert(columns[order], even, rows, axis=1)


def _apart(
  positions: np.ndarray, shape: Sequence[int], wraps: Sequence[bool]
) -> list[tuple[int, int]]:
  """Count pairs of mesh neighbours that are more than one link apart.

  Returns:
    For each mesh axis, (number of such pairs of consecutive positions, number of such pairs of last
    and first position).
  """

  def count(a: np.ndarray, b: np.ndarray) -> int:
    distance = np.abs(a - b)
    distance = np.where(wraps, np.minimum(distance, np.asarray(shape) - distance), distance)
    return int((distance.sum(axis=-1) != 1).sum())

  counts = []
  for axis in range(positions.ndim - 1):
    line = np.moveaxis(positions, axis, 0)
    closing = count(line[0], line[-1]) if len(line) > 2 else 0
    counts.append((count(line[1:], line[:-1]), closing))
  return counts
