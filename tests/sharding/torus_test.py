"""Slices written and read, and which chip sits where. Links are counted here again."""

import itertools
import math
import random
import types

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.sharding import torus
from t5x_inference_ext.sharding.mesh import arrange, physical_shape
from t5x_inference_ext.sharding.torus import (
  GENERATIONS,
  TpuSlice,
  box_of,
  kind_of,
  parse_slice,
  wraparound,
)

# Slice -> a mesh of whole physical axes.
MESHES = {
  (2, 2, 1): (1, 2, 2),
  (2, 2, 2): (2, 2, 2),
  (2, 2, 4): (2, 4, 2),
  (2, 4, 4): (4, 4, 2),
  (4, 4, 4): (4, 4, 4),
  (4, 4, 8): (8, 4, 4),
  (4, 8, 8): (8, 8, 4),
  (8, 8, 8): (8, 8, 8),
  (8, 8, 16): (16, 8, 8),
}
WRAPPED = [(4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16)]

many = settings(deadline=None, derandomize=True, max_examples=100)


def _box(shape, seed=0):
  """[n, 3] coordinates of a box, shuffled."""
  coordinates = list(itertools.product(*map(range, shape)))
  random.Random(seed).shuffle(coordinates)
  return np.asarray(coordinates)


def _devices(shape, seed=0, kind='TPU v4', corner=(0, 0, 0)):
  return [
    types.SimpleNamespace(
      id=i, device_kind=kind, coords=[int(c) + o for c, o in zip(coords, corner)]
    )
    for i, coords in enumerate(_box(shape, seed))
  ]


def device_grid(coordinates, mesh, wraps=None):
  """torus.device_grid, by default of a whole v4 slice."""
  box = box_of(coordinates)
  return torus.device_grid(coordinates, mesh, wraps or wraparound(box[1] if box else (1, 1, 1)))


def axis_links(coordinates, grid, wraps=None):
  """torus.axis_links, by default of a whole v4 slice."""
  return torus.axis_links(coordinates, grid, wraps or wraparound(box_of(coordinates)[1]))


def _hops(a, b, shape, wraps):
  """Links between two chips, one axis after the other."""
  return sum(
    min(abs(p - q), size - abs(p - q)) if wrap else abs(p - q)
    for p, q, size, wrap in zip(a, b, shape, wraps)
  )


def _longest(positions, shape, wraps):
  """For each mesh axis: the most links between neighbours, inside and from last to first."""
  result = []
  for axis, size in enumerate(positions.shape[:3]):
    lines = np.moveaxis(positions, axis, 2).reshape(-1, size, 3).tolist()
    inside = max(
      (_hops(a, b, shape, wraps) for line in lines for a, b in itertools.pairwise(line)), default=1
    )
    closing = max(_hops(line[-1], line[0], shape, wraps) for line in lines)
    result.append((inside, closing))
  return result


@pytest.mark.parametrize(
  'text, expected',
  [
    ('4x4x4', TpuSlice('v4', (4, 4, 4))),
    ('v4:2x2x1', TpuSlice('v4', (2, 2, 1))),
    ('V5P:8X8X16', TpuSlice('v5p', (8, 8, 16))),
    ('v5e:4x8', TpuSlice('v5e', (4, 8, 1))),
    ('v6e:16x16', TpuSlice('v6e', (16, 16, 1))),
  ],
)
def test_slices_are_read(text, expected):
  parsed = parse_slice(text)
  assert parsed == expected
  assert parsed.chips == math.prod(expected.shape)
  assert str(parsed).endswith(text.lower()) and parse_slice(str(parsed)) == parsed


@many
@given(st.sampled_from(sorted(GENERATIONS)), st.tuples(*[st.integers(1, 99)] * 3))
def test_what_a_slice_writes_is_read(kind, sizes):
  written = TpuSlice(kind, (*sizes[: GENERATIONS[kind]], 1)[:3])
  assert parse_slice(str(written)) == written


@pytest.mark.parametrize(
  'text',
  [
    '',
    '4',
    'v4',
    'v4:',
    ':4x4x4',
    'v9:4x4x4',
    'v4:4x4',
    'v5e:4x4x4',
    'v4:0x4x4',
    'v4:-4x4x4',
    'v4:4x4x',
    'axbxc',
    'v4:4x4x4x4',
    'v4 4x4x4',
    'v4:v4:4x4x4',
    'v4:4.0x4x4',
    '4x8',
    'v4:²x2x2',
  ],
)
def test_not_slices(text):
  with pytest.raises(MeshError, match='written') as error:
    parse_slice(text)
  assert repr(text) in str(error.value) and 'e.g.' in str(error.value)


@many
@given(st.text('v456exp:0123 -', max_size=10))
def test_anything_else_is_a_mesh_error(text):
  try:
    parsed = parse_slice(text)
  except MeshError as error:
    assert repr(text) in str(error)
  else:
    assert len(parsed.shape) == 3 and min(parsed.shape) > 0


@pytest.mark.parametrize(
  'shape, kind, expected',
  [
    ((4, 4, 4), 'v4', (True,) * 3),
    ((8, 8, 16), 'v5p', (True,) * 3),
    ((2, 4, 4), 'v4', (False,) * 3),
    ((2, 2, 4), 'v5p', (False,) * 3),
    ((4, 4, 1), 'v4', (False,) * 3),
    ((4, 8, 1), 'v5e', (False,) * 3),
    ((8, 16, 1), 'v6e', (False, True, False)),
    ((16, 16, 1), 'v5e', (True, True, False)),
    ((4, 4, 4), None, (False,) * 3),
  ],
)
def test_wraparound(shape, kind, expected):
  assert wraparound(shape, kind) == expected
  if kind:
    assert TpuSlice(kind, shape).wraps == expected


@pytest.mark.parametrize('shape, mesh', MESHES.items())
def test_mesh_neighbours_are_torus_neighbours(shape, mesh):
  devices = _devices(shape, seed=1)
  assert physical_shape(devices) == shape
  grid = arrange(mesh, devices)
  assert grid.shape == mesh
  assert sorted(d.id for d in grid.flat) == list(range(len(devices)))
  positions = np.asarray([d.coords for d in grid.flat]).reshape(*mesh, 3)
  wraps = wraparound(shape)
  assert any(wraps) == (shape in WRAPPED)
  for size, (inside, closing) in zip(mesh, _longest(positions, shape, wraps)):
    assert inside == 1
    # A chain without wraparound ends far from its start; an axis of 2 is its own way back, one of 1
    # has none.
    assert closing == (1 if any(wraps) else size - 1)


@pytest.mark.parametrize(
  'shape, mesh',
  [
    ((2, 2, 2), (1, 8, 1)),
    ((2, 2, 4), (1, 16, 1)),
    ((2, 2, 4), (8, 2, 1)),
    ((4, 4, 4), (4, 16, 1)),
    ((4, 4, 4), (1, 1, 64)),
    ((4, 8, 8), (32, 8, 1)),
    ((2, 2, 1), (4, 1, 1)),
    ((4, 8, 1), (1, 32, 1)),
    ((4, 3, 1), (1, 12, 1)),
    ((3, 4, 1), (12, 1, 1)),
    ((4, 4, 4), (2, 2, 16)),
    ((4, 4, 4), (8, 8, 1)),
    ((4, 4, 4), (2, 32, 1)),
  ],
)
def test_merged_axes_are_rings_and_rings_of_4_are_squares(shape, mesh):
  coordinates = _box(shape, seed=2)
  grid = device_grid(coordinates, mesh)
  assert sorted(grid.flat) == list(range(len(coordinates)))
  assert all(
    links == (1, 1 if size > 1 else 0)
    for size, links in zip(mesh, _longest(coordinates[grid], shape, wraparound(shape)))
  )
  assert axis_links(coordinates, grid) == ('ring',) * 3


def test_merged_axes_of_odd_sizes_are_a_chain():
  coordinates = _box((3, 5, 1))
  grid = device_grid(coordinates, (15, 1, 1))
  assert axis_links(coordinates, grid) == ('chain', 'ring', 'ring')
  assert _longest(coordinates[grid], (3, 5, 1), (False,) * 3)[0] == (1, 6)


@pytest.mark.parametrize(
  'shape, mesh, expected',
  [
    # A row of 8 holds no 4 x 2 grid.
    ((8, 8, 1), (4, 16, 1), ('chain', 'broken', 'ring')),
    # Without wraparound a row of 4 is no square.
    ((2, 4, 4), (2, 2, 8), ('ring', 'broken', 'ring')),
    # 4 and 9 share out as 6 x 6, two pieces of each.
    ((4, 9, 1), (6, 6, 1), ('broken', 'ring', 'ring')),
    # Nor does a row of 8 with a second beside it.
    ((8, 2, 1), (4, 4, 1), ('chain', 'broken', 'ring')),
  ],
)
def test_what_no_arrangement_can_do_is_said(shape, mesh, expected):
  coordinates = _box(shape, seed=3)
  grid = device_grid(coordinates, mesh)
  assert sorted(grid.flat) == list(range(len(coordinates)))
  assert axis_links(coordinates, grid) == expected


@many
@given(st.tuples(*[st.sampled_from([1, 2, 3, 4])] * 3), st.data())
def test_any_mesh_and_any_order_of_devices(shape, data):
  """Every device once, the links as counted here, and the order of devices does not matter."""
  coordinates = _box(shape)
  n = len(coordinates)
  x = data.draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
  y = data.draw(st.sampled_from([d for d in range(1, n // x + 1) if n // x % d == 0]))
  mesh = x, y, n // x // y
  corner = data.draw(st.tuples(*[st.integers(0, 5)] * 3))
  order = np.asarray(data.draw(st.permutations(range(n))))
  grid, wraps = device_grid(coordinates, mesh), wraparound(shape)
  assert grid.shape == mesh and sorted(grid.flat) == list(range(n))
  assert (
    coordinates[order][device_grid(coordinates[order] + corner, mesh)] == coordinates[grid]
  ).all()
  counted = tuple(
    'broken' if size > 1 and inside > 1 else 'chain' if size > 2 and closing > 1 else 'ring'
    for size, (inside, closing) in zip(mesh, _longest(coordinates[grid], shape, wraps))
  )
  assert axis_links(coordinates, grid) == counted
  whole = any(
    tuple(math.prod(s for s, o in zip(shape, owners) if o == axis) for axis in range(3)) == mesh
    for owners in itertools.product(range(3), repeat=3)
  )
  assert 'broken' not in counted or not whole


def test_a_wrong_order_is_seen():
  coordinates = np.asarray(list(itertools.product(range(4), repeat=3)))
  grid = np.arange(64).reshape(4, 4, 4)
  assert axis_links(coordinates, grid) == ('ring',) * 3
  assert axis_links(coordinates, grid, (False,) * 3) == ('chain',) * 3
  # Row-major order jumps from the end of each row to the start of the next, and no wraparound goes
  # there.
  assert axis_links(coordinates, grid.reshape(4, 16, 1)) == ('ring', 'broken', 'ring')
  swapped = grid.copy()
  swapped[0, 0, 0], swapped[2, 2, 2] = grid[2, 2, 2], grid[0, 0, 0]
  assert 'broken' in axis_links(coordinates, swapped)


def test_boxes():
  assert box_of(_box((2, 3, 4)) + (5, 0, 1)) == ((5, 0, 1), (2, 3, 4))
  assert box_of(_box((2, 2, 2))[:-1]) is None
  assert box_of(np.concatenate([_box((2, 2, 2))[:-1]] + [_box((2, 2, 2))[:1]])) is None
  assert box_of(np.zeros((0, 3))) is None
  assert box_of(np.zeros((1, 2), int)) is None


def test_refusals():
  with pytest.raises(MeshError, match='the 7 devices do not fill a box'):
    device_grid(_box((2, 2, 2))[:-1], (7, 1, 1))
  with pytest.raises(MeshError, match='mesh 4x4x1 needs 16 devices and the slice 2x2x2 has 8'):
    device_grid(_box((2, 2, 2)), (4, 4, 1))


@pytest.mark.parametrize(
  'name, kind',
  [
    ('TPU v4', 'v4'),
    ('TPU v5', 'v5p'),
    ('TPU v5 lite', 'v5e'),
    ('TPU v6 lite', 'v6e'),
    ('TPU v99', None),
  ],
)
def test_device_kinds(name, kind):
  assert kind_of(name) == kind
