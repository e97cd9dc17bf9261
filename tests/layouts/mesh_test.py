"""Meshes, written and made."""

from hypothesis import given, settings, strategies as st
import jax
import pytest

from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.layouts.mesh import AXES, make_mesh, mesh_shape, mesh_text, parse_mesh, single_device_mesh

many = settings(deadline=None, derandomize=True, max_examples=200)


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


@pytest.mark.parametrize('text', ['', '2', '2x2', '2x2x2x2', '0x1x1', '-1x1x1', '2x2x', 'axbxc', '2.0x1x1', '2 x1x1'])
def test_not_meshes(text):
  with pytest.raises(MeshError, match='a mesh is written XxYxZ'):
    parse_mesh(text)


@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 1, 3), (2, 2, 2), (1, 8, 1)])
def test_the_first_devices_in_order(shape):
  mesh = make_mesh(shape)
  assert mesh.axis_names == AXES
  assert mesh_shape(mesh) == shape == parse_mesh(mesh_text(mesh))
  assert mesh.devices.ravel().tolist() == jax.devices()[:mesh.size]


def test_given_devices():
  devices = jax.devices()[::-1]
  assert make_mesh((1, 2, 2), devices).devices.ravel().tolist() == devices[:4]
  assert single_device_mesh(devices[0]).devices.ravel().tolist() == devices[:1]
  assert single_device_mesh().devices.ravel().tolist() == jax.devices()[:1]


def test_too_few_devices():
  with pytest.raises(MeshError) as error:
    make_mesh((2, 2, 1), jax.devices()[:3])
  assert 'mesh 2x2x1 needs 4 devices and there are 3' in str(error.value)
  assert 'xla_force_host_platform_device_count=4' in str(error.value)


def test_an_axis_that_a_mesh_lacks_counts_one():
  mesh = jax.sharding.AbstractMesh((4, 2), ('z', 'data'))
  assert mesh_shape(mesh) == (1, 1, 4)
