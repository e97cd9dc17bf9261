"""Canonical tensors and the arrays on the chips: every value in its place, zeros elsewhere, and only there."""

from hypothesis import given, settings, strategies as st
import ml_dtypes
import numpy as np
import pytest

from t5x_inference_ext import parameters
from t5x_inference_ext.config import ModelConfig, preset
from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.layouts.arrangement import device_tensors
from t5x_inference_ext.layouts.layout import Layout
from t5x_inference_ext.layouts.mesh import AXES

many = settings(deadline=None, derandomize=True, max_examples=200)


def canonical(config: ModelConfig, int8: bool) -> dict[str, np.ndarray]:
  """Every value different within a tensor, and none 0, so that padding shows."""
  shapes = {n: p.shape for n, p in parameters.parameters(config).items()}
  if int8:
    shapes.update({n: p.shape for n, p in parameters.scales(config).items()})
  return {n: 1 + np.arange(np.prod(s), dtype=np.float32).reshape(s) for n, s in shapes.items()}


@st.composite
def cases(draw):
  """(config, mesh, int8): heads, key columns and vocabulary of any size."""
  mesh = {axis: draw(st.sampled_from([1, 2, 3, 4]), label=axis) for axis in AXES}
  chips = mesh['x'] * mesh['y'] * mesh['z']
  config = ModelConfig(
      num_layers=2, d_model=chips, d_ff=chips * draw(st.integers(1, 2), label='d_ff / chips'),
      num_heads=draw(st.integers(1, 7), label='heads'), d_head=2 * draw(st.integers(1, 5), label='half d_head'),
      vocab_size=draw(st.integers(1, 40), label='vocabulary'))
  return config, mesh, draw(st.booleans(), label='int8')


def whole(tensor, arrays, layer):
  return tensor.read(lambda name, index: arrays[name][index], layer, (slice(None),) * len(tensor.shape))


@many
@given(cases(), st.data())
def test_any_range_is_that_range_of_the_whole(case, data):
  config, mesh, int8 = case
  arrays = canonical(config, int8)
  tensors = device_tensors(config, Layout(), mesh, int8)
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
  """Concatenated over shards, each part of a block is its canonical tensors side by side, then zeros."""
  config, mesh, int8 = case
  arrays = canonical(config, int8)
  shards = mesh['y'] * mesh['z']
  q, f = config.num_heads * config.d_head, config.d_ff
  tensors = device_tensors(config, Layout(), mesh, int8)
  width = -(-q // shards)
  kv_width = -(-2 * config.d_head // shards)

  def parts(values, widths):
    """[..., shards * block] -> for each part its columns of all shards."""
    blocks = values.reshape(*values.shape[:-1], shards, sum(widths))
    pieces = np.split(blocks, np.cumsum(widths)[:-1], axis=-1)
    return [p.reshape(*values.shape[:-1], -1) for p in pieces]

  def padded(values, size):
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, size - values.shape[-1])])

  widths = [f // shards, f // shards, width, kv_width]
  for layer in range(2):
    fused = {'w_in': ''} | ({'in_scale': '_scale'} if int8 else {})
    for name, suffix in fused.items():
      gate, linear, query, kv = parts(whole(tensors[name], arrays, layer), widths)
      np.testing.assert_array_equal(gate, arrays['gate' + suffix][layer], strict=True)
      np.testing.assert_array_equal(linear, arrays['linear' + suffix][layer], strict=True)
      np.testing.assert_array_equal(query, padded(arrays['query' + suffix][layer], width * shards), strict=True)
      keys_values = np.concatenate([arrays['key' + suffix][layer], arrays['value' + suffix][layer]], axis=-1)
      np.testing.assert_array_equal(kv, padded(keys_values, kv_width * shards), strict=True)
    mlp, attention = parts(whole(tensors['w_out'], arrays, layer).T, [f // shards, width])
    np.testing.assert_array_equal(mlp, arrays['mlp_output'][layer].T, strict=True)
    np.testing.assert_array_equal(attention, padded(arrays['attention_output'][layer].T, width * shards), strict=True)
    np.testing.assert_array_equal(whole(tensors['norm'], arrays, layer), arrays['layer_norm'][layer], strict=True)
    if int8:
      out_scale = whole(tensors['out_scale'], arrays, layer)
      np.testing.assert_array_equal(out_scale, arrays['output_scale'][layer], strict=True)
  embedding = whole(tensors['embedding'], arrays, None)
  assert len(embedding) % shards == 0 and len(embedding) - config.vocab_size < shards
  np.testing.assert_array_equal(embedding.T, padded(arrays['embedding'].T, len(embedding)), strict=True)
  np.testing.assert_array_equal(whole(tensors['final_norm'], arrays, None), arrays['final_norm'], strict=True)


@many
@given(cases())
def test_every_device_gets_as_much(case):
  config, mesh, int8 = case
  for name, tensor in device_tensors(config, Layout(), mesh, int8).items():
    for size, axes in zip(tensor.shape, tensor.spec):
      axes = (axes,) if isinstance(axes, str) else axes or ()
      assert size % int(np.prod([mesh[a] for a in axes])) == 0, name


@pytest.mark.parametrize('dtype', [np.int8, ml_dtypes.bfloat16, np.float32])
def test_padding_keeps_the_dtype(dtype):
  """Also where all that a shard has of a part is padding: int8 must not pass through float32 on its way."""
  config = ModelConfig(num_layers=1, d_model=8, d_ff=8, num_heads=1, d_head=2, vocab_size=5)
  arrays = {n: np.ones(p.shape, dtype) for n, p in parameters.parameters(config).items()}
  tensor = device_tensors(config, Layout(), dict(x=1, y=8, z=1), True)['w_in']
  block = tensor.shape[1] // 8
  last = tensor.read(lambda name, index: arrays[name][index], 0, (slice(0, 8), slice(7 * block, 8 * block)))
  assert last.dtype == dtype and last.shape == (8, block) == (8, 4)
  np.testing.assert_array_equal(last, np.tile(np.array([[1, 1, 0, 0]], dtype), (8, 1)), strict=True)


def test_palm_540b_on_64_chips():
  """48 heads over 16 shards pad nothing; over 64 a head is cut, and still nothing is padded."""
  config = preset('palm_540b')
  for mesh in (dict(x=4, y=4, z=4), dict(x=1, y=8, z=8)):
    tensors = device_tensors(config, Layout(), mesh, True)
    columns = 2 * config.d_ff + 48 * 256 + 2 * 256
    assert tensors['w_in'].shape == (18432, columns)
    assert tensors['w_out'].shape == (config.d_ff + 48 * 256, 18432)
    assert tensors['embedding'].shape[0] - 256128 < 64


def test_a_mesh_that_does_not_divide_the_mlp():
  with pytest.raises(MeshError, match='d_model=256 does not divide'):
    device_tensors(preset('palm_tiny'), Layout(), dict(x=3, y=1, z=1), False)
