"""Weight packing: every canonical value in its place, and zeros in all other places."""

from hypothesis import given, settings
from hypothesis import strategies as st
import ml_dtypes
import numpy as np
import pytest

from t5x_inference_ext import params
from t5x_inference_ext.config import ModelConfig, preset
from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.sharding.heads import HeadSplit
from t5x_inference_ext.sharding.layout import Layout, num_shards
from t5x_inference_ext.sharding.mesh import AXES
from t5x_inference_ext.sharding.packing import packed_tensors

many = settings(deadline=None, derandomize=True, max_examples=200)


INT8 = (params.MATRICES,)
# Quantized weights of formats: none, tables alone, matrices alone, and both.
SCALED = [(), ('head',), INT8, (*INT8, 'embedding'), (*INT8, 'embedding', 'head')]


def canonical(config: ModelConfig, scaled: tuple[str, ...]) -> dict[str, np.ndarray]:
  """Every value different within a tensor, and none 0, so that padding shows."""
  shapes = {n: p.shape for n, p in params.parameters(config).items()}
  shapes.update({n: p.shape for n, p in params.scales(config, scaled).items()})
  return {n: 1 + np.arange(np.prod(s), dtype=np.float32).reshape(s) for n, s in shapes.items()}


@st.composite
def cases(draw):
  """(config, layout, mesh, scaled): every kind of model, with heads and vocabulary of any size."""
  mesh = {axis: draw(st.sampled_from([1, 2, 3, 4]), label=axis) for axis in AXES}
  chips = mesh['x'] * mesh['y'] * mesh['z']
  kv_heads = draw(st.integers(1, 5), label='key heads')
  config = ModelConfig(
    num_layers=2,
    d_model=chips,
    d_ff=chips * draw(st.integers(1, 2), label='d_ff / chips'),
    num_heads=kv_heads * draw(st.integers(1, 7), label='queries of each'),
    num_kv_heads=kv_heads,
    d_head=2 * draw(st.integers(1, 5), label='half d_head'),
    vocab_size=draw(st.integers(1, 40), label='vocabulary'),
    block=draw(st.sampled_from(['parallel', 'serial'])),
    mlp=draw(st.sampled_from(['swiglu', 'gelu'])),
    norm=draw(st.sampled_from(['rms', 'layer'])),
    tied_head=draw(st.booleans(), label='tied head'),
  )
  layout = Layout(draw(st.sampled_from(['ws_1d', 'ws_2d', 'wg_xyz'])))
  return config, layout, mesh, draw(st.sampled_from(SCALED), label='scaled')


def whole(tensor, arrays, layer):
  return tensor.read(
    lambda name, index: arrays[name][index], layer, (slice(None),) * len(tensor.shape)
  )


@many
@given(cases(), st.data())
def test_any_range_is_that_range_of_the_whole(case, data):
  config, layout, mesh, scaled = case
  arrays = canonical(config, scaled)
  tensors = packed_tensors(config, layout, mesh, scaled)
  name = data.draw(st.sampled_from(sorted(tensors)), label='tensor')
  tensor = tensors[name]
  layer = data.draw(st.integers(0, 1), label='layer') if tensor.per_layer else None
  index = []
  for n in tensor.shape:
    begin = data.draw(st.integers(0, n - 1))
    index.append(slice(begin, data.draw(st.integers(begin + 1, n))))
  everything = whole(tensor, arrays, layer)
  assert everything.shape == tensor.shape
  read = 0

  def reader(name, where):
    nonlocal read
    values = arrays[name][where]
    read += values.size
    return values

  found = tensor.read(reader, layer, tuple(index))
  np.testing.assert_array_equal(found, everything[tuple(index)])
  assert found.shape == everything[tuple(index)].shape
  assert found.dtype == np.float32 or not found.any()
  assert read == np.count_nonzero(found), 'read more than was needed'


@many
@given(cases())
def test_shards_hold_the_canonical_values(case):
  """In each shard's block: the MLP cut evenly, whole heads as in HeadSplit, zeros elsewhere."""
  config, layout, mesh, scaled = case
  arrays = canonical(config, scaled)
  shards = num_shards(layout.stored_hidden, mesh)
  assert shards == mesh['y'] * mesh['z'] * (mesh['x'] if layout.feedforward == 'ws_1d' else 1)
  tensors = packed_tensors(config, layout, mesh, scaled)
  split = HeadSplit.of(config.num_kv_heads, config.num_heads // config.num_kv_heads, shards)
  f, d = config.d_ff // shards, config.d_head

  def evenly(values, width):
    """[..., n] -> [..., shards, width], zeros last."""
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, shards * width - values.shape[-1])])
    return padded.reshape(*values.shape[:-1], shards, width)

  def by_heads(values, slots, head_range):
    """[..., heads * Q] -> [..., shards, slots * Q]."""
    out = np.zeros((*values.shape[:-1], shards, slots, d), values.dtype)
    values = values.reshape(*values.shape[:-1], -1, d)
    for shard in range(shards):
      start, stop = head_range(shard)
      out[..., shard, : stop - start, :] = values[..., start:stop, :]
    return out.reshape(*out.shape[:-2], -1)

  def columns(block_part, layer, suffix=''):
    parts = []
    if block_part.mlp:
      parts += [evenly(arrays[n + suffix][layer], f) for n in config.mlp_inputs]
    if block_part.attention:
      key, value = arrays['key' + suffix][layer], arrays['value' + suffix][layer]
      parts.append(by_heads(arrays['query' + suffix][layer], split.local_heads, split.query_range))
      if config.num_kv_heads == 1:
        parts.append(evenly(np.concatenate([key, value], axis=-1), -(-2 * d // shards)))
      else:
        parts += [by_heads(x, split.local_groups, split.group_range) for x in (key, value)]
    return np.concatenate(parts, axis=-1)

  def rows(block_part, layer):
    parts = [evenly(arrays['mlp_output'][layer].T, f)] if block_part.mlp else []
    if block_part.attention:
      parts.append(
        by_heads(arrays['attention_output'][layer].T, split.local_heads, split.query_range)
      )
    return np.concatenate(parts, axis=-1)

  def check(name, layer, wanted):
    found = whole(tensors.pop(name) if layer in (1, None) else tensors[name], arrays, layer)
    np.testing.assert_array_equal(found, wanted, strict=True)

  def check_norm(name, layer, norm):
    for suffix in ('', '_bias') if config.norm == 'layer' else ('',):
      check(
        name + suffix,
        layer,
        arrays[norm + suffix] if layer is None else arrays[norm + suffix][layer],
      )

  for layer in range(2):
    for block_part in config.block_parts:
      flat = lambda x: x.reshape(*x.shape[:-2], -1)  # noqa: E731
      check(f'{block_part.name}/w_in', layer, flat(columns(block_part, layer)))
      check(f'{block_part.name}/w_out', layer, flat(rows(block_part, layer)).T)
      own = config.block == 'serial'
      check_norm(
        f'{block_part.name}/norm', layer, f'{block_part.name}_norm' if own else 'layer_norm'
      )
      if params.MATRICES in scaled:
        check(f'{block_part.name}/in_scale', layer, flat(columns(block_part, layer, '_scale')))
        check(
          f'{block_part.name}/out_scale',
          layer,
          arrays[f'{block_part.name}_output_scale' if own else 'output_scale'][layer],
        )
  check_norm('final_norm', None, 'final_norm')
  height = -(-config.vocab_size // shards)
  for table in ('embedding',) if config.tied_head else ('embedding', 'head'):
    check(table, None, evenly(arrays[table].T, height).reshape(config.d_model, -1).T)
    if table in scaled:
      check(f'{table}_scale', None, evenly(arrays[f'{table}_scale'], height).ravel())
  assert not tensors, 'arrays that nothing above looked at'


@many
@given(cases())
def test_every_device_gets_as_much(case):
  config, layout, mesh, scaled = case
  tensors = packed_tensors(config, layout, mesh, scaled)
  assert {'embedding', 'final_norm'} < set(tensors)
  for name, tensor in tensors.items():
    for n, axes in zip(tensor.shape, tensor.spec, strict=True):
      assert n % num_shards((axes,) if isinstance(axes, str) else axes or (), mesh) == 0, name


@many
@given(cases())
def test_layouts_of_one_storage_kind_have_the_same_arrays(case):
  """One set of weights, loaded for one phase, serves both (section 3.2.3)."""
  config, layout, mesh, scaled = case
  mine = packed_tensors(config, layout, mesh, scaled)
  for feedforward in ('ws_1d', 'ws_2d', 'wg_x', 'wg_xy', 'wg_xyz'):
    other = packed_tensors(config, Layout(feedforward), mesh, scaled)
    if (feedforward == 'ws_1d') == (layout.feedforward == 'ws_1d'):
      assert other == mine
    else:
      specs = [
        {name: t.spec for name, t in tensors.items() if t.kind == 'matrix'}
        for tensors in (mine, other)
      ]
      assert all(specs[0][name] != specs[1][name] for name in specs[0])


@pytest.mark.parametrize('dtype', [np.int8, ml_dtypes.bfloat16, np.float32])
def test_padding_keeps_the_dtype(dtype):
  """Also where a shard has nothing but padding: int8 must not pass through float32."""
  config = ModelConfig(num_layers=1, d_model=8, d_ff=8, num_heads=1, d_head=2, vocab_size=5)
  arrays = {n: np.ones(p.shape, dtype) for n, p in params.parameters(config).items()}
  tensor = packed_tensors(config, Layout(), dict(x=1, y=8, z=1), INT8)['parallel/w_in']
  block = tensor.shape[1] // 8
  last = tensor.read(
    lambda name, index: arrays[name][index], 0, (slice(0, 8), slice(7 * block, 8 * block))
  )
  assert last.dtype == dtype and last.shape == (8, block) == (8, 5)
  np.testing.assert_array_equal(
    last, np.tile(np.array([[1, 1, 0, 0, 0]], dtype), (8, 1)), strict=True
  )


@pytest.mark.parametrize(
  'layout, mesh, heads',
  [
    ('ws_2d', (4, 4, 4), 48),
    ('wg_xyz', (4, 4, 4), 48),
    ('ws_2d', (1, 8, 8), 64),
    ('ws_1d', (4, 4, 4), 64),
  ],
)
def test_palm_540b_on_64_chips(layout, mesh, heads):
  """48 heads over 16 shards pad nothing; over 64 they become 64, as in the paper's section 4.

  A shard of 16 has 32 columns of the key head and its values, padded to a tile of 128; of 64, it
  has too few queries.
  """
  config = preset('palm_540b')
  tensors = packed_tensors(config, Layout(layout), dict(zip(AXES, mesh)), INT8)
  assert tensors['parallel/w_in'].shape == (
    18432,
    2 * config.d_ff + heads * 256 + (16 * 128 if heads == 48 else 2 * 256),
  )
  assert tensors['parallel/w_out'].shape == (config.d_ff + heads * 256, 18432)
  # Whole tiles of the vocabulary on each shard.
  shards = num_shards(Layout(layout).stored_hidden, dict(zip(AXES, mesh)))
  assert tensors['embedding'].shape[0] % (128 * shards) == 0
  assert 0 <= tensors['embedding'].shape[0] - 256128 < 128 * shards


def test_heads_that_do_not_divide_are_cut_between_shards():
  """48 heads of 256 over 32 shards: 384 columns each, in order, and nothing is padded."""
  config = preset('palm_540b')
  tensors = packed_tensors(config, Layout('ws_2d'), dict(x=2, y=8, z=4), INT8)
  assert tensors['parallel/w_in'].shape == (18432, 2 * config.d_ff + 48 * 256 + 32 * 128)
  assert tensors['parallel/w_out'].shape == (config.d_ff + 48 * 256, 18432)
  query = next(p for p in tensors['parallel/w_in'].parts if p.names == ('query',))
  assert query.ranges == tuple((384 * s, 384 * s + 384) for s in range(32))


def test_megatron_530b_on_64_chips():
  """A serial block: attention and MLP are matrices of their own. 128 heads divide."""
  config = preset('megatron_530b')
  for layout in ('ws_1d', 'ws_2d'):
    tensors = packed_tensors(config, Layout(layout), dict(x=4, y=4, z=4), ())
    shapes = {name: t.shape for name, t in tensors.items() if t.kind == 'matrix'}
    assert shapes == {
      'attention/w_in': (20480, 3 * 20480),
      'attention/w_out': (20480, 20480),
      'mlp/w_in': (20480, 81920),
      'mlp/w_out': (81920, 20480),
    }


def test_a_mesh_that_does_not_divide_the_mlp():
  with pytest.raises(MeshError, match='d_model=256 does not divide'):
    packed_tensors(preset('palm_tiny'), Layout(), dict(x=3, y=1, z=1), ())
