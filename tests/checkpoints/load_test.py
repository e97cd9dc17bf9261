"""Loading: each shard reads its own values once, in its own dtype; only one shard is ever held."""

import collections
import dataclasses
import re

import jax
import ml_dtypes
import numpy as np
import pytest

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.checkpoints.load import MAX_UNROLLED_LAYERS, load_weights, scans_layers
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.sharding.mesh import make_mesh, parse_mesh
from tests import reference
from tests.checkpoints import synthetic

CONFIG = ModelConfig(num_layers=3, d_model=16, d_ff=24, num_heads=3, d_head=8, vocab_size=101)
TENSORS = reference.random_tensors(CONFIG)


@dataclasses.dataclass(frozen=True)
class Recording(reference.ArrayTensor):
  """Remembers the size of every read."""

  reads: list = dataclasses.field(default_factory=list)

  def read(self, index=...):
    values = self.array[index]
    self.reads.append(values.size)
    return values


def checkpoint(arrays=TENSORS, config=CONFIG):
  return reference.MemoryCheckpoint(config, {n: Recording(x) for n, x in arrays.items()})


def model(mesh='2x2x2', dtype='float32', config=CONFIG):
  return Model(config, make_mesh(parse_mesh(mesh)), dtype=dtype)


@pytest.mark.parametrize('mesh', ['1x1x1', '2x1x2', '2x2x2'])
@pytest.mark.parametrize('stacked', [False, True], ids=['unrolled', 'stacked'])
def test_every_value_is_read_once_and_in_shards(mesh, stacked):
  source, target = checkpoint(), model(mesh)
  load_weights(source, target, stacked=stacked)
  _, y, z = target.mesh.devices.shape
  for name, tensor in source.tensors.items():
    assert sum(tensor.reads) == tensor.array.size, name
    layers = 1 if name in ('embedding', 'final_norm') else CONFIG.num_layers
    if name.endswith('norm'):  # whole everywhere
      assert max(tensor.reads) == CONFIG.d_model
      continue
    # A shard of one layer. Keys and values are split as one: the first shards hold keys, the last
    # ones values. A shard holds whole heads, 2 of 3. 101 rows leave some shards a row more.
    together = 2 if name in ('key', 'value') and y * z > 1 else 1
    if name in ('query', 'attention_output'):
      together = -(-CONFIG.num_heads // (y * z)) * y * z / CONFIG.num_heads
    assert (
      max(tensor.reads) <= together * tensor.array.size / layers / target.mesh.size + CONFIG.d_model
    ), name


def test_stacked_is_the_layers_of_unrolled():
  tuple_of, stack = (load_weights(checkpoint(), model(), stacked=s) for s in (False, True))
  assert isinstance(tuple_of.layers, tuple) and len(tuple_of.layers) == 3
  assert not isinstance(stack.layers, tuple)
  for i, layer in enumerate(tuple_of.layers):
    for one, all_of in zip(jax.tree.leaves(layer), jax.tree.leaves(stack.layers)):
      np.testing.assert_array_equal(np.asarray(one), np.asarray(all_of)[i])
      assert all_of.sharding.spec == jax.sharding.PartitionSpec(None, *one.sharding.spec)


@pytest.mark.parametrize(
  'layers, stacked', [(MAX_UNROLLED_LAYERS, False), (MAX_UNROLLED_LAYERS + 1, True)]
)
def test_deep_models_are_stacked(layers, stacked):
  config = dataclasses.replace(CONFIG, num_layers=layers)
  weights = load_weights(
    checkpoint(reference.random_tensors(config), config), model('1x1x1', config=config)
  )
  assert isinstance(weights.layers, tuple) != stacked


def test_accelerators_have_no_loop_unless_it_is_asked_for():
  depths = MAX_UNROLLED_LAYERS, MAX_UNROLLED_LAYERS + 1
  found = {p: [scans_layers(n, None, p) for n in depths] for p in ('cpu', 'tpu', 'gpu')}
  assert found == dict(cpu=[False, True], tpu=[False, False], gpu=[False, False])
  for platform in found:
    assert [scans_layers(n, asked, platform) for n in depths for asked in (True, False)] == [
      True,
      False,
    ] * 2


@pytest.mark.parametrize('norm_scale, added', [('zero', 1), ('one', 0)])
def test_norms_are_the_values_applied(norm_scale, added):
  config = dataclasses.replace(CONFIG, norm_scale=norm_scale)
  weights = load_weights(checkpoint(config=config), model(config=config))
  np.testing.assert_array_equal(weights.final_norm, TENSORS['final_norm'] + added)
  np.testing.assert_array_equal(
    weights.layers[1]['parallel'].norm, TENSORS['layer_norm'][1] + added
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_dtypes_of_float_weights(dtype):
  """Matrices and embedding serve in the compute dtype, rounded to nearest; norms in float32."""
  weights = load_weights(checkpoint(), model(dtype=dtype))
  layer = weights.layers[0]['parallel']
  assert {str(x.dtype) for x in (weights.embedding, layer.w_in, layer.w_out)} == {dtype}
  assert weights.final_norm.dtype == layer.norm.dtype == np.float32
  assert layer.in_scale is None and layer.out_scale is None and not weights.quantized
  wanted = TENSORS['embedding'].astype(
    {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}[dtype]
  )
  np.testing.assert_array_equal(np.asarray(weights.embedding)[:101], wanted)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_int8_stays_int8(dtype):
  arrays = reference.quantized(CONFIG, TENSORS)
  weights = load_weights(checkpoint(arrays), model('1x1x1', dtype=dtype))
  layer = weights.layers[2]['parallel']
  assert weights.quantized and layer.w_in.dtype == layer.w_out.dtype == np.int8
  assert layer.in_scale.dtype == layer.out_scale.dtype == np.float32
  assert str(weights.embedding.dtype) == dtype
  names = ('gate', 'linear', 'query', 'key', 'value')
  np.testing.assert_array_equal(layer.w_in, np.concatenate([arrays[n][2] for n in names], axis=1))
  np.testing.assert_array_equal(
    layer.in_scale, np.concatenate([arrays[n + '_scale'][2] for n in names])
  )
  np.testing.assert_array_equal(layer.out_scale, arrays['output_scale'][2])


@pytest.mark.parametrize('stacked, per_layer', [(False, 3), (True, 1)])
def test_progress_counts_every_tensor(stacked, per_layer):
  seen = []
  load_weights(
    checkpoint(), model('1x1x1'), stacked=stacked, progress=lambda jobs: seen.extend(jobs) or seen
  )
  names = collections.Counter(name for name, _ in seen)
  fields = {f'parallel/{field}': per_layer for field in ('norm', 'w_in', 'w_out')}
  assert names == {'embedding': 1, 'final_norm': 1, **fields}


def test_serial_layers_with_biases():
  config = dataclasses.replace(CONFIG, block='serial', mlp='gelu', norm='layer', num_kv_heads=3)
  arrays = reference.random_tensors(config)
  weights = load_weights(checkpoint(arrays, config), model('1x1x1', config=config))
  layer = weights.layers[1]
  assert set(layer) == {'attention', 'mlp'}
  np.testing.assert_array_equal(weights.final_norm_bias, arrays['final_norm_bias'])
  np.testing.assert_array_equal(layer['mlp'].norm_bias, arrays['mlp_norm_bias'][1])
  np.testing.assert_array_equal(layer['mlp'].w_in, arrays['linear'][1])
  np.testing.assert_array_equal(layer['mlp'].w_out, arrays['mlp_output'][1])
  np.testing.assert_array_equal(
    layer['attention'].w_in,
    np.concatenate([arrays[n][1] for n in ('query', 'key', 'value')], axis=1),
  )
  np.testing.assert_array_equal(layer['attention'].w_out, arrays['attention_output'][1])


@pytest.mark.parametrize(
  'name,index,value', [('gate', (0, 3, 1), np.nan), ('embedding', (2, 1), np.inf)]
)
@pytest.mark.parametrize('stacked', [False, True], ids=['unrolled', 'stacked'])
def test_weights_that_are_not_finite_are_refused(tmp_path, name, index, value, stacked):
  arrays = {n: x.copy() for n, x in synthetic.canonical().items()}
  arrays[name][index] = value
  source = open_checkpoint(synthetic.write_legacy(tmp_path / 'c', synthetic.fused(arrays)))
  with pytest.raises(
    CheckpointError,
    match=f'^{name}: NaN or infinite values, read from {re.escape(str(tmp_path))}/c',
  ):
    load_weights(source, model('1x1x1', config=source.config), stacked=stacked)
