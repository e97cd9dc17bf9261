"""InferencePartitioner: one set of shardings, the layouts', whoever asks; and what T5X's scripts ask a partitioner."""

import jax
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import pytest
from t5x import checkpoints
from t5x import utils

from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.t5x import module
from t5x_inference_ext.t5x import partitioning
from tests.t5x_adapter import running


def _initializer(model, partitioner):
  return utils.TrainStateInitializer(None, model.get_initial_variables, {'decoder_input_tokens': (3, 32)}, partitioner)


@pytest.mark.parametrize('scan_layers', [False, True])
def test_axis_rules_say_what_the_layout_says(scan_layers, int8_checkpoint):
  """T5X derives shardings from names and rules, the loader takes the layout's: they agree for every parameter."""
  model = running.adapter_model(int8_checkpoint, '2x2x2', scan_layers=scan_layers)
  partitioner = partitioning.InferencePartitioner(mesh='2x2x2')
  state = _initializer(model, partitioner).global_train_state_shape
  shapes = jax.tree_util.tree_leaves_with_path(state.params)
  specs = jax.tree.leaves(partitioner.get_mesh_axes(state).params, is_leaf=lambda x: isinstance(x, P))
  weights = module.weights_from_params(state.params)
  expected = dict(jax.tree_util.tree_leaves_with_path(
      model.model.weight_specs(weights), is_leaf=lambda x: isinstance(x, P)))
  assert len(shapes) == len(specs) == len(expected)
  for (path, shape), spec in zip(shapes, specs):
    layer = [jax.tree_util.GetAttrKey('layers')] if len(path) > 1 else []
    if layer and not scan_layers:
      layer.append(jax.tree_util.SequenceKey(int(path[0].key.removeprefix('layers_'))))
    wanted = expected[(*layer, jax.tree_util.GetAttrKey(path[-1].key))]
    assert NamedSharding(partitioner.mesh, spec).is_equivalent_to(
        NamedSharding(partitioner.mesh, wanted), shape.ndim), path


def test_mesh_is_the_models_or_given(int8_checkpoint):
  model = running.adapter_model(int8_checkpoint, mesh=None)
  partitioner = partitioning.InferencePartitioner(model)
  assert partitioner.mesh == model.model.mesh
  assert partitioner.mesh.size == 8 and partitioner.mesh.shape['data'] == 1
  few = partitioning.InferencePartitioner(mesh='1x1x3')
  assert few.mesh.devices.ravel().tolist() == jax.devices()[:3]
  assert few._num_partitions == 3
  assert few._model_parallel_submesh is None


def test_any_batch_is_one_shard_of_data():
  partitioner = partitioning.InferencePartitioner(mesh='2x2x2')
  layout = partitioner.get_data_layout(3)
  assert (layout.batch_size, layout.shard_id, layout.num_shards) == (3, 0, 1)
  assert partitioner.data_partition_spec == P('data')


def test_bad_mesh():
  with pytest.raises(MeshError, match='XxYxZ'):
    partitioning.InferencePartitioner(mesh='2x2')
  with pytest.raises(MeshError, match='needs 16 devices and there are 8'):
    partitioning.InferencePartitioner(mesh='4x2x2')
  with pytest.raises(MeshError, match='either a model, to share its mesh, or a mesh'):
    partitioning.InferencePartitioner()


def test_local_chunk_is_the_whole_array_in_one_process():
  info = partitioning.InferencePartitioner(mesh='2x2x2').get_local_chunk_info((16, 32, 4), (('y', 'z'), 'x'))
  assert [s.indices(n)[:2] for s, n in zip(info.slice, (16, 32, 4))] == [(0, 16), (0, 32), (0, 4)]
  assert info.replica_id == 0


class _TwoHosts:
  """What a LocalChunker knows on the second of two processes that share the mesh along one axis."""

  def __init__(self, axis):
    self.num_chunks = {'data': 1, 'x': 1, 'y': 1, 'z': 1, axis: 2}
    self.chunk_ids = {'data': 0, 'x': 0, 'y': 0, 'z': 0, axis: 1}

  def get_replica_id(self, used):
    return 0


@pytest.mark.parametrize(('axis', 'expected'), [('y', slice(8, 16)), ('x', slice(0, 16))])
def test_local_chunk_of_a_process(axis, expected, monkeypatch):
  partitioner = partitioning.InferencePartitioner(mesh='2x2x2')
  monkeypatch.setitem(partitioner.__dict__, '_local_chunker', _TwoHosts(axis))
  assert partitioner.get_local_chunk_info((16,), (('y', 'z'),)).slice == (expected,)


def test_scattered_chunk_is_refused(monkeypatch):
  partitioner = partitioning.InferencePartitioner(mesh='2x2x2')
  monkeypatch.setitem(partitioner.__dict__, '_local_chunker', _TwoHosts('z'))
  with pytest.raises(MeshError, match='one contiguous slice'):
    partitioner.get_local_chunk_info((16,), (('y', 'z'),))


def test_partition_replicates_what_has_no_spec():
  partitioner = partitioning.InferencePartitioner(mesh='2x2x2')
  double = partitioner.partition(lambda x: (2 * x, x), in_axis_resources=(P('x'),), out_axis_resources=(None, P('x')))
  doubled, same = double(np.arange(8.0))
  assert doubled.is_fully_replicated and not same.is_fully_replicated
  compiled = partitioner.compile(double, np.arange(8.0))
  np.testing.assert_array_equal(compiled(np.arange(8.0))[0], 2 * np.arange(8.0))


def test_t5x_can_save_what_is_loaded(int8_checkpoint, tmp_path):
  """T5X's own Checkpointer takes the partitioner's chunks and the parameters' axes, int8 ones too."""
  model = running.adapter_model(int8_checkpoint, '2x2x2')
  state, _, partitioner = running.restored(model, int8_checkpoint)
  running.saved_by_t5x(state, partitioner, tmp_path)
  again = checkpoints.load_t5x_checkpoint(str(tmp_path / 'checkpoint_1000'))['target']
  assert again['layers_0']['w_in'].dtype == np.int8
  np.testing.assert_array_equal(again['layers_0']['w_in'], state.params['layers_0']['w_in'])
