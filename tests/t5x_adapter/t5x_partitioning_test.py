"""InferencePartitioner: one set of shardings, the layouts', and what T5X asks of it."""

from flax import linen as nn
from flax.linen import partitioning as flax_partitioning
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
from t5x import checkpoints, utils

from t5x_inference_ext import compiler_options
from t5x_inference_ext.config import preset
from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.params import EMBED_AXIS, HIDDEN_AXIS
from t5x_inference_ext.sharding.activations import ACTIVATION_AXES
from t5x_inference_ext.sharding.mesh import make_mesh
from t5x_inference_ext.t5x import module, partitioning
from t5x_inference_ext.t5x.models import InferenceModel
from tests.t5x_adapter import running


def _initializer(model, partitioner):
  return utils.TrainStateInitializer(
    None, model.get_initial_variables, {'decoder_input_tokens': (3, 32)}, partitioner
  )


def _specs(tree):
  return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, P))


@pytest.mark.parametrize('scan_layers', [False, True])
@pytest.mark.parametrize(
  'config', [{}, dict(num_kv_heads=8, block='serial', mlp='gelu', norm='layer')]
)
@pytest.mark.parametrize(
  'layouts', [('ws_1d/heads', 'ws_1d/batch'), ('wg_xyz/batch', 'ws_2d/batch')]
)
def test_axis_rules_say_what_the_layout_says(layouts, config, scan_layers):
  """T5X derives shardings from names and rules, the loader takes the layout's: they agree."""
  model = InferenceModel(
    running.VOCABULARY,
    config=preset('palm_tiny', **config),
    int8=True,
    mesh='2x2x2',
    prefill_layout=layouts[0],
    decode_layout=layouts[1],
    scan_layers=scan_layers,
  )
  partitioner = partitioning.InferencePartitioner(model)
  state = _initializer(model, partitioner).global_train_state_shape
  weights = module.weights_from_params(state.params)
  theirs = module.weights_from_params(partitioner.get_mesh_axes(state).params)
  shapes, specs, expected = (
    jax.tree.leaves(weights),
    _specs(theirs),
    _specs(model.model.weight_specs(weights)),
  )
  assert len(shapes) == len(jax.tree.leaves(state.params)) == len(specs) == len(expected)
  for shape, spec, wanted in zip(shapes, specs, expected):
    assert NamedSharding(partitioner.mesh, spec).is_equivalent_to(
      NamedSharding(partitioner.mesh, wanted), shape.ndim
    )
  assert any(len(spec) > 1 and spec[-1] for spec in specs)


def test_logical_axes_have_names(int8_checkpoint):
  model = running.adapter_model(int8_checkpoint, '2x2x2', scan_layers=True)
  partitioner = partitioning.InferencePartitioner(model)
  axes = partitioner.get_logical_axes(
    _initializer(model, partitioner).global_train_state_shape
  ).params
  assert axes['embedding'] == P('vocab', 'embed')
  assert axes['layers']['parallel']['w_in'] == P('layers', 'embed', 'hidden')
  assert axes['layers']['parallel']['norm'] == P('layers', 'features')


def test_phase_rules_come_in_front(palm_tiny):
  """flax constrains the cache to the phase's sharding by its names, and weights by theirs."""
  model = running.adapter_model(
    palm_tiny, '2x2x2', prefill_layout='wg_xyz/batch', decode_layout='ws_2d/heads'
  )
  partitioner = partitioning.InferencePartitioner(model)
  phases = {
    'prefill': model.model.prefill_sharding(8, 16),
    'decode': model.model.decode_sharding(8),
  }
  assert phases['prefill'].cache != phases['decode'].cache
  for sharding in phases.values():
    rules = partitioner.phase_rules(sharding)

    @jax.jit
    def constrained(cache, matrix):
      with flax_partitioning.axis_rules(rules):  # noqa: B023  # traced at once
        return (
          nn.with_logical_constraint(cache, ACTIVATION_AXES['cache'], mesh=partitioner.mesh),
          nn.with_logical_constraint(matrix, (EMBED_AXIS, HIDDEN_AXIS), mesh=partitioner.mesh),
        )

    cache, matrix = constrained(np.zeros((8, 4, 1, 2)), np.zeros((8, 8)))
    assert cache.sharding.is_equivalent_to(NamedSharding(partitioner.mesh, sharding.cache), 4)
    assert matrix.sharding.is_equivalent_to(
      NamedSharding(
        partitioner.mesh, model.model.prefill_layout.weight_spec((EMBED_AXIS, HIDDEN_AXIS))
      ),
      2,
    )


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
  info = partitioning.InferencePartitioner(mesh='2x2x2').get_local_chunk_info(
    (16, 32, 4), (('y', 'z'), 'x')
  )
  assert [s.indices(n)[:2] for s, n in zip(info.slice, (16, 32, 4))] == [(0, 16), (0, 32), (0, 4)]
  assert info.replica_id == 0


class _TwoHosts:
  """A LocalChunker on the second of two processes that share the mesh along one axis."""

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
  double = partitioner.partition(
    lambda x: (2 * x, x), in_axis_resources=(P('x'),), out_axis_resources=(None, P('x'))
  )
  doubled, same = double(np.arange(8.0))
  assert doubled.is_fully_replicated and not same.is_fully_replicated
  compiled = partitioner.compile(double, np.arange(8.0))
  np.testing.assert_array_equal(compiled(np.arange(8.0))[0], 2 * np.arange(8.0))


def test_t5x_can_save_what_is_loaded(int8_checkpoint, tmp_path):
  """T5X's own Checkpointer takes the partitioner's chunks and the parameters' axes."""
  model = running.adapter_model(int8_checkpoint, '2x2x2')
  state, _, partitioner = running.restored(model, int8_checkpoint)
  running.saved_by_t5x(state, partitioner, tmp_path)
  again = checkpoints.load_t5x_checkpoint(str(tmp_path / 'checkpoint_1000'))['target']
  saved, held = (tree['layers_0']['parallel']['w_in'] for tree in (again, state.params))
  assert saved.dtype == np.int8
  np.testing.assert_array_equal(saved, held)


def test_programs_take_the_compiler_s_options(monkeypatch):
  unknown = 'xla_no_compiler_has_this_option'
  kinds = compiler_options._OF_KIND
  monkeypatch.setitem(kinds, jax.devices()[0].device_kind, {unknown: True})
  partitioner = partitioning.InferencePartitioner.__new__(partitioning.InferencePartitioner)
  partitioner._inference_mesh = make_mesh((1, 1, 1))
  partitioner._host_driven, partitioner._executable, partitioner._scaled = False, None, ()
  step = partitioner.partition(jnp.sin, None, None)
  with pytest.raises(jax.errors.JaxRuntimeError, match=unknown):
    step.lower(jnp.zeros(2)).compile()
