"""What collectives have of the torus, against links that are counted one by one."""

import itertools
import math

import numpy as np
import pytest

from t5x_inference_ext.sharding.links import LinkPath, paths
from t5x_inference_ext.sharding.mesh import AXES
from t5x_inference_ext.sharding.torus import device_grid, parse_slice


def of(name, mesh, axes):
  slice_ = parse_slice(name)
  return paths(slice_.shape, slice_.wraps, mesh, axes)


@pytest.mark.parametrize(
  'name,mesh,axes,expected',
  [
    ('v4:4x4x4', (4, 4, 4), 'x', [LinkPath(4, True)]),
    ('v4:4x4x4', (4, 4, 4), 'xzy', [LinkPath(4, True)] * 3),
    # Half a ring of 4: its chips are neighbours, on links that no other half uses.
    ('v4:4x4x4', (2, 8, 4), 'x', [LinkPath(2, False)]),
    ('v4:4x4x4', (2, 8, 4), 'y', [LinkPath(2, False), LinkPath(4, True)]),
    ('v4:4x4x4', (2, 8, 4), 'zy', [LinkPath(2, False), LinkPath(4, True), LinkPath(4, True)]),
    ('v4:4x4x4', (2, 8, 4), 'xy', [LinkPath(4, True)] * 2),
    ('v4:2x2x4', (2, 4, 2), 'y', [LinkPath(4, False)]),
    # Pairs of a ring of 8, folded: the link between the ends carries two of them, and one pair is
    # three links apart.
    ('v4:8x8x8', (2, 4, 64), 'x', [LinkPath(2, False, 2, 3)]),
    ('v4:8x8x8', (2, 4, 64), 'y', [LinkPath(4, False)]),
  ],
)
def test_paths(name, mesh, axes, expected):
  assert sorted(of(name, mesh, tuple(axes)), key=str) == sorted(expected, key=str)


def test_shared_links_are_slower():
  assert (LinkPath(2, False).links, LinkPath(2, False, 2).links, LinkPath(4, True).links) == (
    1,
    0.5,
    2,
  )
  assert (LinkPath(4, False).hops, LinkPath(2, False, 1, 3).hops, LinkPath(8, True).hops) == (
    3,
    3,
    4,
  )
  assert LinkPath(4, True).exchange == 0.5 and LinkPath(4, False, 2).exchange == 2


@pytest.mark.parametrize(
  'name,mesh',
  [
    ('v4:4x4x4', (2, 8, 4)),
    ('v4:4x4x4', (16, 2, 2)),
    ('v4:4x4x8', (8, 4, 4)),
    ('v4:2x2x4', (2, 8, 1)),
    ('v5e:4x8', (4, 8, 1)),
  ],
)
@pytest.mark.parametrize('axes', ['x', 'y', 'zy', 'xzy'])
def test_the_groups_are_boxes_of_their_paths(name, mesh, axes):
  slice_ = parse_slice(name)
  found = of(name, mesh, tuple(axes))
  coordinates = np.asarray(list(itertools.product(*map(range, slice_.shape))))
  grid = device_grid(coordinates, mesh, slice_.wraps)
  group = coordinates[grid[tuple(slice(None) if a in axes else 0 for a in AXES)].ravel()]
  along = [len(set(group[:, axis])) for axis in range(3)]
  assert sorted(p.chips for p in found) == sorted(n for n in along if n > 1)
  assert math.prod(p.chips for p in found) == len(group)
  assert all(p.load == p.step == 1 for p in found)
