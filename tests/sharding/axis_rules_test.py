"""Rules by which logical axes, that is names, say what the layouts say in specs."""

import itertools

from jax.sharding import PartitionSpec as P
import pytest

from t5x_inference_ext import params
from t5x_inference_ext.config import preset
from t5x_inference_ext.sharding.activations import ACTIVATION_AXES, padded_length, shard_activations
from t5x_inference_ext.sharding.axis_rules import activation_rules, logical_axis_rules
from t5x_inference_ext.sharding.layout import ATTENTION, FEEDFORWARD, Layout
from t5x_inference_ext.sharding.packing import packed_tensors

MESH = dict(x=2, y=2, z=2)
LAYOUTS = [
  Layout(f, a)
  for f, a in itertools.product(FEEDFORWARD, ATTENTION)
  if (f, a) != ('wg_xyz', 'heads')
]
CONFIGS = {
  'parallel multiquery': preset('palm_tiny'),
  'serial multihead': preset('palm_tiny', num_kv_heads=8, block='serial', mlp='gelu', norm='layer'),
}


def phase_rules(layout, sharding):
  return (*activation_rules(sharding), *logical_axis_rules(layout))


def _spec(names, rules):
  """As flax resolves names: the first rule of a name whose mesh axes are free."""
  taken, entries = set(), []
  for name in names:
    axes = next(axes for rule, axes in rules if rule == name)
    axes = (axes,) if isinstance(axes, str) else axes or ()
    assert not taken & set(axes), f'{names} under {rules}'
    taken |= set(axes)
    entries.append(axes)
  return _trimmed(entries)


def _trimmed(spec):
  """A spec as tuples of axes, without the unsplit dimensions at its end."""
  entries = [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec]
  while entries and not entries[-1]:
    entries.pop()
  return entries


@pytest.mark.parametrize('layout', LAYOUTS, ids=str)
@pytest.mark.parametrize('config', CONFIGS)
def test_weights(config, layout):
  """With the rules of a phase in front as without: those name no weights."""
  config = CONFIGS[config]
  sharding = shard_activations(layout, config, MESH, 8, 8)
  scaled = params.MATRICES, *params.TABLES
  for name, tensor in packed_tensors(config, layout, MESH, scaled).items():
    assert len(tensor.axes) == len(tensor.shape)
    for rules in (logical_axis_rules(layout), phase_rules(layout, sharding)):
      assert _spec(tensor.axes, rules) == _trimmed(tensor.spec), name
      assert _spec(('layers', *tensor.axes), rules) == _trimmed(P(None, *tensor.spec)), name


@pytest.mark.parametrize('layout', LAYOUTS, ids=str)
@pytest.mark.parametrize('config', CONFIGS)
@pytest.mark.parametrize('rows, length', [(1, 16), (4, 16), (8, 1), (16, 1)])
def test_activations(config, layout, rows, length):
  length = padded_length(layout, MESH, rows, length)
  sharding = shard_activations(layout, CONFIGS[config], MESH, rows, length)
  rules = phase_rules(layout, sharding)
  assert _spec(ACTIVATION_AXES['residual'], rules) == _trimmed(P(*sharding.residual))
  assert _spec(ACTIVATION_AXES['cache'], rules) == _trimmed(sharding.cache)
  assert _spec(ACTIVATION_AXES['queries'], rules) == _trimmed(
    P(sharding.attention_rows, sharding.attention_positions, sharding.attention_heads)
  )
  assert _spec(ACTIVATION_AXES['mlp'], rules) == _trimmed(
    P(sharding.rows, sharding.positions, sharding.layout.hidden_axes)
  )


def test_names_have_one_meaning():
  """A name is a weight's or an activation's, and each has its rule."""
  weights = set(Layout().weight_axes)
  activations = {name for names in ACTIVATION_AXES.values() for name in names}
  assert not weights & activations
  rules = phase_rules(
    Layout(), shard_activations(Layout(), CONFIGS['parallel multiquery'], MESH, 8, 8)
  )
  names = [name for name, _ in rules]
  assert len(names) == len(set(names)) and set(names) == weights | activations


def test_rules_in_t5x_form():
  rules = dict(logical_axis_rules(Layout.parse('ws_2d/batch')))
  assert rules == {
    'layers': None,
    'vocab': ('z', 'y'),
    'embed': 'x',
    'hidden': ('z', 'y'),
    'features': None,
    'buckets': None,
  }
  assert dict(logical_axis_rules(Layout.parse('ws_1d/batch')))['embed'] is None
