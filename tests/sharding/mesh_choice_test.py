"""The meshes of a slice and the one it has where none is asked for."""

import itertools
import math
import types

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from t5x_inference_ext.config import preset
from t5x_inference_ext.sharding.activations import shard_activations
from t5x_inference_ext.sharding.layout import Layout, check_model
from t5x_inference_ext.sharding.mesh import AXES
from t5x_inference_ext.sharding.mesh_choice import (
  choose_mesh,
  default_mesh,
  torus_mesh,
  torus_meshes,
)
from t5x_inference_ext.sharding.torus import (
  BROKEN,
  axis_links,
  device_grid,
  parse_slice,
  wraparound,
)
from t5x_inference_ext.sharding.traffic import layer_collectives

MODELS = ('palm_8b', 'palm_62b', 'palm_540b')
many = settings(deadline=None, derandomize=True, max_examples=100)


def _mesh(name, config, split=True):
  slice_ = parse_slice(name)
  return torus_mesh(slice_.shape, slice_.wraps, config, split)


def _coordinates(shape):
  return np.asarray(list(itertools.product(*map(range, shape))))


@pytest.mark.parametrize(
  'name',
  [
    'v4:2x2x1',
    'v4:2x2x2',
    'v4:2x2x4',
    'v4:2x4x4',
    'v4:4x4x4',
    'v4:4x4x8',
    'v5e:4x8',
    'v5e:8x16',
    'v5e:16x16',
  ],
)
def test_mesh_neighbours_are_torus_neighbours(name):
  slice_ = parse_slice(name)
  found = torus_meshes(slice_.shape, slice_.wraps)
  whole = torus_meshes(slice_.shape, slice_.wraps, split=False)
  assert set(whole) <= set(found) and len(set(found)) == len(found)
  coordinates = _coordinates(slice_.shape)
  for mesh in found:
    assert math.prod(mesh) == slice_.chips and mesh[1] >= mesh[2]
    grid = device_grid(coordinates, mesh, slice_.wraps)
    assert BROKEN not in axis_links(coordinates, grid, slice_.wraps)


@pytest.mark.parametrize(
  'name, split',
  [
    ('v4:4x4x4', {(2, 8, 4), (8, 4, 2), (2, 16, 2), (32, 2, 1)}),
    ('v4:4x4x8', {(2, 8, 8), (2, 32, 2)}),
    ('v4:2x4x4', set()),
    ('v4:8x8x8', set()),
    ('v5e:4x8', set()),
  ],
)
def test_only_rings_of_4_are_split(name, split):
  """Half of a chain of 4, or of a ring of 8, lies on links that the other half needs."""
  slice_ = parse_slice(name)
  extra = set(torus_meshes(slice_.shape, slice_.wraps)) - set(
    torus_meshes(slice_.shape, slice_.wraps, split=False)
  )
  assert split <= extra and bool(split) == bool(extra)


@pytest.mark.parametrize(
  'name, meshes',
  [
    # 8 chips: two dimensions would move more bytes than one.
    ('v4:2x2x1', '1x2x2'),
    ('v4:2x2x2', '1x4x2'),
    ('v5e:4x4', '1x4x4'),
    ('v4:2x2x4', '2x4x2'),
    ('v4:2x4x4', '2x4x4'),
    # Half a ring of 4 for x: the columns over x are what takes longest.
    ('v4:4x4x4', '2x8x4'),
    ('v4:4x4x8', '4x8x4'),
    ('v4:8x8x8', '8x8x8'),
    ('v5e:16x16', '16x16x1'),
  ],
)
@pytest.mark.parametrize('model', ['palm_62b', 'palm_540b'])
def test_the_mesh_of_a_slice(name, meshes, model):
  assert 'x'.join(map(str, _mesh(name, preset(model)))) == meshes
  shape = parse_slice(name).shape
  for turned in set(itertools.permutations(shape)):
    if parse_slice(name).kind == 'v4':
      assert torus_mesh(turned, wraparound(turned), preset(model)) == _mesh(name, preset(model))


def _moved(config, mesh):
  sizes, rows = dict(zip(AXES, mesh)), math.prod(mesh)
  return sum(
    m.moved
    for m in layer_collectives(
      config, shard_activations(Layout(), config, sizes, rows, 1), sizes, rows, 1
    )
  )


@many
@given(st.tuples(*[st.sampled_from([1, 2, 4, 8])] * 3), st.sampled_from(MODELS), st.booleans())
def test_one_dimension_only_where_two_move_more(shape, model, split):
  config, wraps = preset(model), wraparound(shape)
  mesh = torus_mesh(shape, wraps, config, split)
  found = torus_meshes(shape, wraps, split)
  assert mesh in found
  one = min(_moved(config, m) for m in found if m[0] == 1)
  two = min((_moved(config, m) for m in found if m[0] > 1), default=math.inf)
  assert (mesh[0] == 1) == (one <= two)


@pytest.mark.parametrize('ratio', [1, 4, 16, 64])
def test_x_falls_as_d_ff_grows(ratio):
  """A wider MLP has more columns to move over x."""
  narrow, wide = (_mesh('v4:4x4x8', preset('palm_8b', d_ff=4096 * r)) for r in (ratio, 4 * ratio))
  assert wide[0] <= narrow[0]


def test_devices_without_a_torus_or_that_do_not_divide_have_another():
  config = preset('palm_540b')
  chips = [
    types.SimpleNamespace(id=i, device_kind='TPU v4', coords=tuple(c))
    for i, c in enumerate(_coordinates((4, 4, 4)))
  ]
  assert choose_mesh(config, chips) == _mesh('v4:4x4x4', config)
  assert choose_mesh(config, chips[:63]) == default_mesh(config, 63)
  odd = preset('palm_tiny', d_model=96, d_ff=384)  # 64 chips do not divide it
  assert choose_mesh(odd, chips) == default_mesh(odd, 64) != _mesh('v4:4x4x4', odd)


@many
@given(st.integers(1, 600), st.sampled_from(['palm_tiny', 'palm_540b', 'megatron_530b']))
def test_the_default_mesh_divides_the_model_and_wastes_no_device_that_could_serve(devices, name):
  config = preset(name)
  x, y, z = default_mesh(config, devices)
  check_model(config, dict(x=x, y=y, z=z))
  chips = x * y * z
  assert chips <= devices
  for more in range(chips + 1, devices + 1):
    assert config.d_model % more or config.d_ff % more
