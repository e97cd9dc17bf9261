"""Activation sharding: every axis has one thing to do, and is idle only where nothing divides."""

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
import pytest

from t5x_inference_ext.config import ModelConfig, preset
from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.sharding.activations import (
  padded_batch,
  padded_length,
  sampling_axes,
  shard_activations,
)
from t5x_inference_ext.sharding.layout import ATTENTION, FEEDFORWARD, Layout
from t5x_inference_ext.sharding.mesh import AXES, parse_mesh

many = settings(deadline=None, derandomize=True, max_examples=200)
LAYOUTS = [
  Layout(*parts)
  for parts in itertools.product(FEEDFORWARD, ATTENTION)
  if parts != ('wg_xyz', 'heads')
]

layouts = st.sampled_from(LAYOUTS)
meshes = st.fixed_dictionaries({axis: st.sampled_from([1, 2, 3, 4, 8]) for axis in AXES})
batches = st.integers(1, 600)
lengths = st.integers(1, 70)
# Key heads and the queries of each.
heads = st.sampled_from([(1, 48), (1, 6), (3, 1), (6, 1), (128, 1), (8, 8), (3, 2), (2, 4)])


def config(heads) -> ModelConfig:
  groups, queries = heads
  return ModelConfig(
    num_layers=1,
    d_model=16,
    d_ff=16,
    num_heads=groups * queries,
    d_head=4,
    vocab_size=9,
    num_kv_heads=groups,
  )


def size(axes, mesh):
  return math.prod(mesh[a] for a in axes)


def mesh_of(text):
  return dict(zip(AXES, parse_mesh(text)))


def used(axes, mesh):
  """A set of axes as a string; axes of size 1 do nothing wherever they are."""
  return ''.join(a for a in axes if mesh[a] > 1)


@many
@given(layouts, meshes, batches, lengths, heads)
def test_every_axis_splits_one_thing_and_divides_it(layout, mesh, batch, length, heads):
  length = padded_length(layout, mesh, batch, length)
  p = shard_activations(layout, config(heads), mesh, batch, length)
  # Tokens over the gathered axes; the residual stream over all, or few tokens not over hidden axes.
  assert sorted(p.rows + p.positions) == sorted(layout.gathered_axes)
  rows, positions, features = p.residual
  assert sorted(rows + positions + features) == sorted(
    AXES if p.residual_dim is not None else layout.embed_axes
  )
  assert rows[: len(p.rows)] == p.rows and positions[: len(p.positions)] == p.positions
  assert features[: len(layout.embed_axes)] == layout.embed_axes
  assert batch % size(rows, mesh) == 0 and length % size(positions, mesh) == 0
  # Features are split over hidden axes where tokens don't divide.
  if size(features, mesh) > size(layout.embed_axes, mesh):
    assert batch % size(p.rows + layout.hidden_axes, mesh) and length % size(
      p.positions + layout.hidden_axes, mesh
    )
  # Attention.
  split = p.attention_rows + p.attention_heads + p.attention_positions
  assert len(set(split)) == len(split)
  assert (
    p.attention_rows[: len(p.rows)] == p.rows
    and p.attention_positions[: len(p.positions)] == p.positions
  )
  assert (
    batch % size(p.attention_rows, mesh) == 0 and length % size(p.attention_positions, mesh) == 0
  )
  assert set(layout.hidden_axes) <= set(p.attention_rows + p.attention_heads)
  assert p.hidden_rows == tuple(a for a in p.attention_rows if a in layout.hidden_axes)
  # Rows may be split by part of the hidden axes: the fastest, so that the heads of the others are
  # consecutive.
  assert p.hidden_rows == layout.hidden_axes[len(layout.hidden_axes) - len(p.hidden_rows) :]
  if layout.attention == 'heads':
    assert p.attention_rows == p.rows
  # Nothing is idle but x, where its partial sums have neither rows, heads nor positions to be
  # reduced into.
  if size(split, mesh) < size(AXES, mesh):
    assert set(AXES) - set(split) == {'x'} and layout.embed_axes == ('x',) and length % mesh['x']


@many
@given(layouts, meshes, batches, lengths, heads)
def test_devices_that_split_heads_have_them_all(layout, mesh, batch, length, heads):
  c = config(heads)
  p = shard_activations(layout, c, mesh, batch, padded_length(layout, mesh, batch, length))
  shards = size(p.attention_heads, mesh)
  assert p.heads.heads * shards >= c.num_heads
  assert p.heads.multiquery == (c.num_kv_heads == 1)
  hidden = size([a for a in p.attention_heads if a in layout.hidden_axes], mesh)
  assert p.heads.blocks * hidden == p.heads.stored.shards == size(layout.stored_hidden, mesh)
  assert p.heads.shards * hidden == shards
  if p.heads.multiquery:
    assert p.cache == P(p.attention_rows, None, None, None)
  else:
    assert len(p.heads.cached()) == p.heads.kv_heads * shards
    assert p.cache == P(p.attention_rows, p.attention_heads, None, None)


@many
@given(layouts, meshes, batches, heads)
def test_attention_by_batch_splits_rows_as_far_as_they_go(layout, mesh, batch, heads):
  """Over the hidden axes from the fastest, with or without x: no more devices could have a row."""
  p = shard_activations(layout, config(heads), mesh, batch, padded_length(layout, mesh, batch, 1))
  if layout.attention == 'batch':
    hidden, left = layout.hidden_axes, batch // size(p.rows, mesh)
    sizes = [
      size(embed + hidden[n:], mesh)
      for n in range(len(hidden) + 1)
      for embed in ((), layout.embed_axes)
    ]
    assert size(p.attention_rows, mesh) == size(p.rows, mesh) * max(
      n for n in sizes if left % n == 0
    )
    if batch % size(AXES, mesh) == 0:
      assert sorted(p.attention_rows) == sorted(AXES)
  if batch == 1:
    assert used(p.attention_rows, mesh) == ''


@many
@given(layouts, meshes, batches, lengths, heads)
def test_lengths_that_do_not_divide(layout, mesh, batch, length, heads):
  """Prefill pads them, as little as it can. A decode step has one position: it needs rows."""
  padded = padded_length(layout, mesh, batch, length)
  shard_activations(layout, config(heads), mesh, batch, padded)
  assert length <= padded < length + size(layout.gathered_axes, mesh)
  for shorter in range(length, padded):
    with pytest.raises(MeshError):
      shard_activations(layout, config(heads), mesh, batch, shorter)
  divides = batch % size(layout.gathered_axes, mesh) == 0
  assert (padded_length(layout, mesh, batch, 1) == 1) == divides
  if not divides:
    with pytest.raises(
      MeshError,
      match=f'multiple of {size(layout.gathered_axes, mesh)}, or a weight-stationary layout',
    ):
      shard_activations(layout, config(heads), mesh, batch, 1)


def test_a_decode_step_that_can_t_split_its_rows_says_what_could():
  with pytest.raises(MeshError) as error:
    shard_activations(Layout('wg_xy'), preset('palm_540b'), mesh_of('2x2x4'), 6, 1)
  assert str(error.value) == (
    'wg_xy/batch splits tokens over 4 devices of the mesh 2x2x4, and 6 rows of 1 do not divide: '
    'use a batch that is a multiple of 4, or a weight-stationary layout (ws_2d) for decode'
  )


@many
@given(layouts, meshes, batches)
def test_sampling_axes(layout, mesh, batch):
  axes = sampling_axes(layout, batch, mesh)
  assert len(set(axes)) == len(axes)
  assert batch % size(axes, mesh) == 0
  if batch % size(AXES, mesh) == 0:
    assert sorted(axes) == sorted(AXES)


@many
@given(layouts, meshes, st.integers(1, 100))
def test_padded_batch_is_the_smallest_that_fills_what_fewer_rows_could(layout, mesh, batch):
  def devices(rows):
    """How many share the rows in a decode step's attention; 0 where it is refused."""
    try:
      return size(shard_activations(layout, config((1, 6)), mesh, rows, 1).attention_rows, mesh)
    except MeshError:
      return 0

  padded = padded_batch(layout, batch, mesh)
  best = list(itertools.accumulate(map(devices, range(1, padded + 1)), max))  # of 1, 2, ... rows
  assert batch <= padded < batch + size(AXES, mesh)
  assert devices(padded) == best[padded - 1] > 0
  assert all(devices(fewer) < max(best[fewer - 1], 1) for fewer in range(batch, padded))


@pytest.mark.parametrize(
  'layout, mesh, batch, length, rows, heads, positions',
  [
    # The paper's table 2, on 64 chips.
    ('ws_2d/heads', '4x4x4', 1, 2048, '', 'zyx', ''),
    ('ws_2d/batch', '4x4x4', 64, 1, 'xzy', '', ''),
    ('wg_xyz/batch', '4x4x4', 512, 2048, 'xzy', '', ''),
    ('ws_2d/batch', '4x4x4', 512, 1, 'xzy', '', ''),
    # A batch smaller than the mesh splits over fewer axes: of as many devices, over x, which heads
    # may not fill.
    ('ws_2d/batch', '4x4x4', 16, 1, 'xy', 'z', ''),
    ('ws_2d/batch', '4x4x4', 4, 1, 'x', 'zy', ''),
    ('ws_2d/batch', '2x4x4', 16, 8, 'zy', '', 'x'),
    ('ws_2d/batch', '2x4x4', 4, 8, 'y', 'z', 'x'),
    ('ws_2d/batch', '4x4x4', 1, 8, '', 'zy', 'x'),
    ('ws_1d/batch', '4x4x4', 4, 8, 'y', 'xz', ''),
    ('ws_1d/heads', '4x4x4', 64, 8, '', 'xzy', ''),
    # Too few rows to gather over: positions.
    ('wg_x/batch', '4x4x4', 1, 8, '', 'zy', 'x'),
    ('wg_xy/batch', '4x4x4', 1, 16, '', 'z', 'xy'),
    ('wg_xy/heads', '4x4x4', 4, 16, 'x', 'z', 'y'),
    ('wg_xyz/batch', '4x4x4', 1, 64, '', '', 'xzy'),
    ('wg_xyz/batch', '4x4x4', 16, 64, 'xz', '', 'y'),
    # Partial sums over x are reduced into heads if most parts get one, else into positions, else
    # nothing.
    ('ws_2d/heads', '2x4x4', 1, 2048, '', 'zyx', ''),
    ('ws_2d/heads', '8x1x1', 1, 1, '', 'x', ''),
    ('ws_2d/heads', '64x1x1', 1, 64, '', 'x', ''),
    ('ws_2d/heads', '128x1x1', 1, 128, '', '', 'x'),
    ('ws_2d/heads', '128x1x1', 1, 1, '', '', ''),
    # 48 heads over 32 shards are cut: what would have parts of heads splits rows or positions
    # instead, or nothing.
    ('ws_2d/batch', '2x8x4', 64, 1, 'xzy', '', ''),
    ('ws_2d/batch', '2x8x4', 1, 2048, '', 'z', 'xy'),
    ('ws_2d/heads', '2x8x4', 1, 2048, '', 'z', 'xy'),
    ('ws_2d/batch', '2x8x4', 1, 1, '', 'z', ''),
    ('ws_2d/batch', '2x8x4', 8, 1, 'y', 'z', ''),
    ('wg_xy/batch', '2x8x4', 16, 64, 'xy', 'z', ''),
  ],
)
def test_attention_of_palm_540b(layout, mesh, batch, length, rows, heads, positions):
  mesh = mesh_of(mesh)
  p = shard_activations(Layout.parse(layout), preset('palm_540b'), mesh, batch, length)
  assert (
    used(p.attention_rows, mesh),
    used(p.attention_heads, mesh),
    used(p.attention_positions, mesh),
  ) == (rows, heads, positions)


@pytest.mark.parametrize(
  'layout, mesh, batch, padded',
  [
    ('ws_2d/batch', '2x2x2', 1, 1),
    ('ws_2d/batch', '2x2x2', 3, 4),
    ('ws_2d/batch', '2x2x2', 5, 8),
    ('ws_2d/batch', '2x2x2', 9, 16),
    ('ws_2d/heads', '2x2x2', 5, 5),
    ('ws_1d/heads', '2x2x2', 3, 3),
    ('ws_2d/batch', '4x4x4', 3, 3),
    ('ws_2d/batch', '4x4x4', 5, 8),
    ('ws_2d/batch', '4x4x4', 17, 32),
    ('ws_2d/batch', '4x4x4', 65, 128),
    ('ws_2d/batch', '1x2x4', 5, 6),
    ('ws_1d/batch', '8x1x1', 5, 5),
    ('wg_xy/heads', '2x2x2', 1, 4),
    ('wg_xyz/batch', '2x2x2', 1, 8),
    ('wg_x/batch', '1x2x4', 1, 1),
  ],
)
def test_padded_batch_of_small_meshes(layout, mesh, batch, padded):
  assert padded_batch(Layout.parse(layout), batch, mesh_of(mesh)) == padded


@pytest.mark.parametrize(
  'layout, rows, length, residual, summed',
  [
    # Rows, then positions, then features; of a block part in one array where both parts split one.
    ('ws_2d/batch', 8, 8, ('zy', '', 'x'), {'parallel': 0, 'attention': 0, 'mlp': 0}),
    ('ws_2d/batch', 1, 8, ('', 'zy', 'x'), {'parallel': 1, 'attention': 1, 'mlp': 1}),
    ('ws_2d/batch', 1, 301, ('', '', 'xzy'), {'parallel': None, 'attention': None, 'mlp': None}),
    # Few tokens that do not divide are not split.
    ('ws_2d/batch', 1, 3, ('', '', 'x'), {'parallel': None, 'attention': None, 'mlp': None}),
    ('ws_1d/batch', 2, 1, ('', '', ''), {'parallel': None, 'attention': None, 'mlp': None}),
    ('wg_x/batch', 2, 1, ('x', '', 'zy'), {'parallel': None, 'attention': None, 'mlp': None}),
    ('ws_2d/heads', 8, 8, ('zy', '', 'x'), {'parallel': None, 'attention': None, 'mlp': 0}),
    # No axis is left to sum over.
    ('wg_x/batch', 8, 8, ('xzy', '', ''), {'parallel': None, 'attention': None, 'mlp': None}),
  ],
)
def test_what_sums_are_split_over(layout, rows, length, residual, summed):
  mesh = mesh_of('2x2x2')
  for block in ('parallel', 'serial'):
    model = preset('palm_tiny', block=block)
    p = shard_activations(Layout.parse(layout), model, mesh, rows, length)
    assert tuple(map(''.join, p.residual)) == residual
    for part in model.block_parts:
      assert p.reduce_scatter_dim(part) == summed[part.name]


@pytest.mark.parametrize(
  'layout, mesh, rows, whole',
  [
    # Two axes with all of more than 4 devices, on which the sum would be an all-reduce anyway.
    ('ws_1d/batch', '4x4x1', 128, True),
    ('ws_2d/batch', '1x4x4', 32, True),
    ('ws_1d/batch', '4x4x1', 512, False),
    ('ws_2d/batch', '1x2x2', 32, False),
    ('ws_2d/batch', '2x8x4', 64, False),
    ('ws_1d/batch', '4x4x4', 64, False),
    ('ws_1d/batch', '16x1x1', 32, False),
    # Rows that do not divide.
    ('ws_2d/batch', '2x8x4', 16, True),
    ('ws_1d/batch', '16x1x1', 8, True),
    ('wg_x/batch', '2x4x4', 2, False),
  ],
)
def test_few_tokens_are_kept_whole_where_their_sum_is_an_all_reduce(layout, mesh, rows, whole):
  p = shard_activations(Layout.parse(layout), preset('palm_tiny'), mesh_of(mesh), rows, 1)
  assert (p.residual_dim is None) == whole
