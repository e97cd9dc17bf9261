"""Layouts by name, what each splits over which axes, and the pairs and meshes that are refused."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
import pytest

from t5x_inference_ext.config import preset
from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.params import EMBED_AXIS, FEATURES_AXIS, HIDDEN_AXIS, LAYERS_AXIS, VOCAB_AXIS
from t5x_inference_ext.sharding.layout import (
  ATTENTION,
  FEEDFORWARD,
  ORDER,
  Layout,
  check_model,
  check_pair,
  num_shards,
)
from t5x_inference_ext.sharding.mesh import AXES

many = settings(deadline=None, derandomize=True, max_examples=300)
meshes = st.fixed_dictionaries({axis: st.integers(1, 8) for axis in AXES})

LAYOUTS = [
  Layout(*parts)
  for parts in itertools.product(FEEDFORWARD, ATTENTION)
  if parts != ('wg_xyz', 'heads')
]


def test_layouts_by_name():
  assert Layout.parse('ws_2d/batch') == Layout() == Layout('ws_2d', 'batch')
  assert len(LAYOUTS) == 9
  for layout in LAYOUTS:
    assert Layout.parse(str(layout)) == layout
  assert len(set(map(str, LAYOUTS))) == len(LAYOUTS)


@pytest.mark.parametrize(
  'text, says',
  [
    ('ws_2d', "a layout is written feedforward/attention, e.g. ws_2d/batch, got 'ws_2d'"),
    ('ws_2d/batch/two_way', 'a layout is written feedforward/attention'),
    (None, 'a layout is written feedforward/attention'),
    ('', 'a layout is written feedforward/attention'),
    ('ws_9d/batch', "unknown layout part 'ws_9d'; known: ws_1d, ws_2d, wg_x, wg_xy, wg_xyz"),
    ('wg_z/batch', "unknown layout part 'wg_z'"),
    ('batch/ws_2d', "unknown layout part 'batch'"),
    ('ws_2d/sequence', "unknown layout part 'sequence'; known: batch, heads"),
    ('ws_2d/', "unknown layout part ''; known: batch, heads"),
    (
      'wg_xyz/heads',
      'wg_xyz/heads makes no sense: wg_xyz splits rows over every axis, which leaves none to split '
      'heads over; use wg_xyz/batch',
    ),
  ],
)
def test_what_is_no_layout_is_refused_with_the_reason(text, says):
  with pytest.raises(MeshError) as error:
    Layout.parse(text)
  assert says in str(error.value)


@pytest.mark.parametrize(
  'feedforward, matrix, gathered, embed, hidden',
  [
    ('ws_1d', P((), ('x', 'z', 'y')), '', '', 'xzy'),
    ('ws_2d', P(('x',), ('z', 'y')), '', 'x', 'zy'),
    ('wg_x', P(('x',), ('z', 'y')), 'x', '', 'zy'),
    ('wg_xy', P(('x',), ('z', 'y')), 'xy', '', 'z'),
    ('wg_xyz', P(('x',), ('z', 'y')), 'xzy', '', ''),
  ],
)
def test_the_axes_of_the_paper(feedforward, matrix, gathered, embed, hidden):
  """Appendix A.2: weights EF_xyz or E_xF_yz, and what is gathered, summed and split at work."""
  layout = Layout(feedforward)
  assert layout.weight_spec((EMBED_AXIS, HIDDEN_AXIS)) == matrix
  assert layout.weight_spec((HIDDEN_AXIS, EMBED_AXIS)) == P(*reversed(matrix))
  assert layout.weight_spec((VOCAB_AXIS, EMBED_AXIS)) == P(*reversed(matrix))
  assert layout.weight_spec((LAYERS_AXIS, HIDDEN_AXIS)) == P(None, matrix[1])
  assert layout.weight_spec((FEATURES_AXIS,)) == P(None)
  assert tuple(
    ''.join(axes) for axes in (layout.gathered_axes, layout.embed_axes, layout.hidden_axes)
  ) == (gathered, embed, hidden)


@pytest.mark.parametrize('layout', LAYOUTS, ids=str)
def test_every_axis_splits_weights_once_and_tokens_or_features_once(layout):
  assert sorted(layout.stored_embed + layout.stored_hidden) == sorted(AXES) == sorted(ORDER)
  assert sorted(layout.gathered_axes + layout.embed_axes + layout.hidden_axes) == sorted(AXES)
  for axes in (layout.stored_hidden, layout.hidden_axes):
    assert list(axes) == [a for a in ORDER if a in axes]
  assert not set(layout.embed_axes) & set(layout.hidden_axes)


def test_pairs():
  """Only ws_1d stores weights in a way of its own; attention and collectives do not matter."""
  taken = set()
  for prefill, decode in itertools.product(LAYOUTS, repeat=2):
    if (prefill.feedforward == 'ws_1d') == (decode.feedforward == 'ws_1d'):
      check_pair(prefill, decode)
      taken.add((prefill.feedforward, prefill.attention, decode.feedforward, decode.attention))
      continue
    with pytest.raises(MeshError) as error:
      check_pair(prefill, decode)
    assert str(error.value) == (
      f'{prefill} for prefill and {decode} for decode place the weights differently (ws_1d splits '
      "them over d_ff alone, all others over d_model and d_ff), so one set can't serve both: "
      'use ws_1d for both phases, or for neither'
    )
  assert len(taken) == 2 * 2 + 7 * 7


@many
@given(meshes)
def test_check_model_takes_what_every_device_can_share(mesh):
  config = preset('palm_540b')
  chips = num_shards(AXES, mesh)
  if config.d_model % chips or config.d_ff % chips:
    with pytest.raises(MeshError, match=f'does not divide over the {chips} devices'):
      check_model(config, mesh)
  else:
    check_model(config, mesh)


def test_check_model_names_what_does_not_divide():
  with pytest.raises(
    MeshError,
    match='d_ff=1028 does not divide over the 8 devices of the mesh 2x2x2: choose a mesh '
    'whose device count divides 1028',
  ):
    check_model(preset('palm_tiny', d_ff=1028), dict(x=2, y=2, z=2))
