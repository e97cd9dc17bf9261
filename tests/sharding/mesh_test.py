"""Meshes, written and made."""

import dataclasses
import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import pytest

from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.sharding.mesh import (
  AXES,
  arrange,
  make_mesh,
  mesh_links,
  mesh_shape,
  mesh_text,
  parse_mesh,
  physical_shape,
)

many = settings(deadline=None, derandomize=True, max_examples=200)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
  """As much of a jax.Device as a Mesh and its arrangement ask for."""

  id: int
  coords: tuple[int, int, int]
  device_kind: str = 'TPU v4'


def _slice(shape, kind='TPU v4', corner=(0, 0, 0)):
  coordinates = list(itertools.product(*(range(c, c + s) for s, c in zip(shape, corner))))
  random.Random(0).shuffle(coordinates)
  return [FakeDevice(i, c, kind) for i, c in enumerate(coordinates)]


@many
@given(st.tuples(*[st.integers(1, 10**6)] * 3), st.sampled_from('xX'))
def test_what_is_written_is_read(shape, by):
  assert parse_mesh(by.join(map(str, shape))) == shape


@many
@given(st.one_of(st.text('0123x-+ .²٣', max_size=8), st.text(max_size=8)))
def test_anything_else_is_a_mesh_error(text):
  try:
    shape = parse_mesh(text)
  except MeshError as error:
    assert repr(text) in str(error) and 'XxYxZ' in str(error)
  else:
    assert len(shape) == 3 and min(shape) > 0
    assert [int(part) for part in text.lower().split('x')] == list(shape)


@pytest.mark.parametrize(
  'text', ['', '2', '2x2', '2x2x2x2', '0x1x1', '-1x1x1', '2x2x', 'axbxc', '2.0x1x1', '2 x1x1']
)
def test_not_meshes(text):
  with pytest.raises(MeshError, match='a mesh is written XxYxZ'):
    parse_mesh(text)


@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 1, 3), (2, 2, 2), (1, 8, 1)])
def test_the_first_devices_in_order(shape):
  mesh = make_mesh(shape)
  assert mesh.axis_names == AXES
  assert mesh_shape(mesh) == shape == parse_mesh(mesh_text(mesh))
  assert mesh.devices.ravel().tolist() == jax.devices()[: mesh.size]


def test_given_devices():
  devices = jax.devices()[::-1]
  assert make_mesh((1, 2, 2), devices).devices.ravel().tolist() == devices[:4]


def test_too_few_devices():
  with pytest.raises(MeshError) as error:
    make_mesh((2, 2, 1), jax.devices()[:3])
  assert 'mesh 2x2x1 needs 4 devices and there are 3' in str(error.value)
  assert 'xla_force_host_platform_device_count=4' in str(error.value)


def test_an_axis_that_a_mesh_lacks_counts_one():
  mesh = jax.sharding.AbstractMesh((4, 2), ('z', 'data'))
  assert mesh_shape(mesh) == (1, 1, 4)


def test_a_tpu_slice_is_arranged_by_its_torus():
  devices = _slice((4, 4, 4))
  mesh = make_mesh((4, 4, 4), devices)
  assert mesh.axis_names == AXES and mesh_text(mesh) == '4x4x4'
  assert [d.coords for d in mesh.devices.flat] == list(itertools.product(range(4), repeat=3))
  # Winding through two axes, one link a step and one home.
  walk = [d.coords for d in make_mesh((1, 4, 1), _slice((2, 2, 1))).devices.flat]
  assert all(sum(abs(p - q) for p, q in zip(a, b)) == 1 for a, b in zip(walk, walk[1:] + walk[:1]))


def test_links():
  assert mesh_links(make_mesh((4, 4, 4), _slice((4, 4, 4)))) == dict.fromkeys(AXES, 'ring')
  # A part of a larger slice does not wrap; v5e wraps along 16 alone; an unknown kind nowhere.
  assert mesh_links(make_mesh((4, 4, 4), _slice((4, 4, 4), corner=(0, 0, 4)))) == dict.fromkeys(
    AXES, 'chain'
  )
  assert mesh_links(make_mesh((8, 16, 1), _slice((8, 16, 1), 'TPU v5 lite'))) == dict(
    x='chain', y='ring', z='ring'
  )
  assert mesh_links(make_mesh((4, 4, 4), _slice((4, 4, 4), 'TPU v99'))) == dict.fromkeys(
    AXES, 'chain'
  )
  assert mesh_links(make_mesh((4, 16, 1), _slice((8, 8, 1), 'TPU v5 lite')))['y'] == 'broken'
  assert mesh_links(make_mesh((2, 2, 2))) is None


def test_physical_shapes():
  assert physical_shape(_slice((2, 2, 4))) == (2, 2, 4)
  assert physical_shape(_slice((2, 2, 4), corner=(2, 0, 4))) == (2, 2, 4)
  assert physical_shape(jax.devices()) is None


@pytest.mark.parametrize(
  'devices',
  [
    _slice((2, 2, 2))[:7],
    _slice((2, 2, 2)) + [FakeDevice(8, (0, 0, 0))],
    [dataclasses.replace(d, id=2 * d.id + core) for d in _slice((2, 2, 2)) for core in range(2)],
    _slice((2, 2, 2), 'NVIDIA H200'),
  ],
  ids=['hole', 'two slices', 'two devices a chip', 'GPU'],
)
def test_other_devices_keep_their_order(devices):
  assert physical_shape(devices) is None
  grid = arrange((len(devices), 1, 1), devices)
  assert grid.ravel().tolist() == devices
  assert mesh_links(make_mesh((len(devices), 1, 1), devices)) is None


def test_fewer_than_all_keep_their_order():
  devices = _slice((2, 2, 2))
  assert arrange((2, 2, 1), devices).ravel().tolist() == devices[:4]
