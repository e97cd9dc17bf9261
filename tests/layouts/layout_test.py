"""Layouts by name, and which batches a mesh takes."""

import itertools
import math

from hypothesis import given, settings, strategies as st
import pytest

from t5x_inference_ext.config import preset
from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.layouts.layout import Layout, batch_axes, check_model, hidden_shards, padded_batch
from t5x_inference_ext.layouts.mesh import AXES

many = settings(deadline=None, derandomize=True, max_examples=300)
meshes = st.fixed_dictionaries({axis: st.integers(1, 8) for axis in AXES})
batches = st.integers(1, 1200)


def size(axes, mesh):
  return math.prod(mesh[a] for a in axes)


def subsets():
  return [axes for k in range(4) for axes in itertools.combinations(AXES, k)]


@many
@given(meshes, batches)
def test_batch_axes_split_the_batch_evenly_over_as_many_as_it_fills(mesh, batch):
  fills = [axes for axes in subsets() if size(axes, mesh) == batch]
  if batch % size(AXES, mesh) and not fills:
    with pytest.raises(MeshError) as error:
      batch_axes(batch, mesh)
    text = f'a batch of {batch} does not divide over the mesh {mesh["x"]}x{mesh["y"]}x{mesh["z"]}'
    assert f'{text}: pad it to {padded_batch(batch, mesh)} rows' in str(error.value)
    return
  axes = batch_axes(batch, mesh)
  assert list(axes) == [a for a in AXES if a in axes]
  assert batch % size(axes, mesh) == 0
  assert size(axes, mesh) == math.gcd(batch, size(AXES, mesh)) or size(axes, mesh) == batch
  assert all(len(axes) >= len(other) for other in fills)


@many
@given(meshes, batches)
def test_padded_batch_is_the_smallest_that_is_taken(mesh, batch):
  padded = padded_batch(batch, mesh)
  assert padded >= batch
  batch_axes(padded, mesh)
  assert padded_batch(padded, mesh) == padded
  for fewer in range(batch, padded):
    with pytest.raises(MeshError):
      batch_axes(fewer, mesh)
  # Never more than a full round of the chips wasted.
  assert padded - batch < size(AXES, mesh)


@pytest.mark.parametrize('shape, batch, axes', [
    ((2, 2, 2), 8, 'xyz'), ((2, 2, 2), 16, 'xyz'), ((2, 2, 2), 4, 'xy'), ((2, 2, 2), 2, 'x'), ((2, 2, 2), 1, ''),
    ((1, 2, 4), 2, 'xy'), ((1, 2, 4), 4, 'xz'), ((2, 4, 1), 4, 'yz'), ((4, 2, 1), 2, 'yz'), ((1, 1, 1), 5, 'xyz')])
def test_batch_axes_of_small_meshes(shape, batch, axes):
  """Axes of size 1 come along: they cost nothing."""
  assert ''.join(batch_axes(batch, dict(zip(AXES, shape)))) == axes


def test_layouts_by_name():
  assert Layout.parse('ws_2d/batch') == Layout()
  assert str(Layout.parse('ws_2d/batch')) == 'ws_2d/batch'
  for text, says in (('ws_2d', 'feedforward/attention'), ('ws_2d/batch/x', 'feedforward/attention'),
                     ('ws_9d/batch', "'ws_9d'"), ('ws_2d/heads', "'heads'")):
    with pytest.raises(MeshError) as error:
      Layout.parse(text)
    assert says in str(error.value)


@many
@given(meshes)
def test_check_model_takes_what_every_device_can_share(mesh):
  config = preset('palm_540b')
  chips = size(AXES, mesh)
  assert hidden_shards(Layout(), mesh) == mesh['y'] * mesh['z']
  if config.d_model % chips or config.d_ff % chips:
    with pytest.raises(MeshError, match=f'does not divide over the {chips} devices'):
      check_model(config, mesh)
  else:
    check_model(config, mesh)


def test_check_model_names_what_does_not_divide():
  with pytest.raises(MeshError, match='d_ff=1028 does not divide over the 8 devices of the mesh 2x2x2'):
    check_model(preset('palm_tiny', d_ff=1028), dict(x=2, y=2, z=2))
