"""The cloud's names of slices."""

import pytest

from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.planner.machine import Machine
from t5x_inference_ext.precompile import slices
from t5x_inference_ext.sharding.cloud_names import cloud_name
from t5x_inference_ext.sharding.torus import GENERATIONS, parse_slice


@pytest.mark.parametrize(
  'name, slice_, chips',
  [
    ('v4-8', 'v4:2x2x1', 4),
    ('v4-128', 'v4:4x4x4', 64),
    ('V4-512', 'v4:4x8x8', 256),
    ('v5p-128', 'v5p:4x4x4', 64),
    ('v5p-12288', 'v5p:16x16x24', 6144),
    ('v5litepod-16', 'v5e:4x4', 16),
    ('v5e-16', 'v5e:4x4', 16),
    ('v6e-256', 'v6e:16x16', 256),
  ],
)
def test_a_name_stands_for_a_slice(name, slice_, chips):
  found = parse_slice(name)
  assert str(found) == slice_ == str(Machine.parse(name))
  assert Machine.parse(name).chips == chips
  own = name.lower().replace('v5e', 'v5litepod')
  assert cloud_name(found.kind, chips) == own


@pytest.mark.parametrize('kind', GENERATIONS)
def test_names_are_those_that_the_cloud_is_asked_for(kind):
  """The names that precompile gives the compiler are read as the slices that they name."""
  for text in slices.known_slices(kind):
    slice_ = parse_slice(text)
    if slice_.chips > 1 or GENERATIONS[kind] == 2:
      assert parse_slice(cloud_name(slice_.kind, slice_.chips)) == slice_


@pytest.mark.parametrize(
  'name, words',
  [
    ('v5-16', 'v5-16 may be v5p-16, which counts two TensorCores a chip, or v5litepod-16'),
    (
      'v4-127',
      'v4-127 counts two TensorCores a chip, and there is no such slice; known: v4-8, v4-16',
    ),
    ('v4-4', 'known: v4-8'),
    ('v5litepod-12', 'v5litepod-12 counts chips, and there is no such slice; known: v5litepod-1, '),
    ('v7-16', 'v7-16'),
    ('A100-8', "no chip is called 'A100-8'"),
  ],
)
def test_a_name_that_stands_for_none_is_refused(name, words):
  with pytest.raises(MeshError) as refused:
    Machine.parse(name)
  assert words in str(refused.value)
