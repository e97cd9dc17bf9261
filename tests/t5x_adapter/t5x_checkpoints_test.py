"""The restore classes: what they refuse, in words that say what, where and what to do."""

import dataclasses

import jax
import numpy as np
import pytest
from t5x import utils

from t5x_inference_ext import Engine, config
from t5x_inference_ext.checkpoints.convert import convert
from t5x_inference_ext.errors import CheckpointError, MeshError
from t5x_inference_ext.t5x.checkpoints import (
  InferenceCheckpointer,
  InferenceCheckpointManager,
  restore_train_state,
)
from t5x_inference_ext.t5x.models import InferenceModel
from t5x_inference_ext.t5x.partitioning import InferencePartitioner
from tests.t5x_adapter import running

MESH = '2x2x2'


def _shapes(model, mesh=MESH, optimizer=None):
  initializer = utils.TrainStateInitializer(
    optimizer,
    model.get_initial_variables,
    {'decoder_input_tokens': (3, 32)},
    InferencePartitioner(mesh=mesh),
  )
  return initializer.global_train_state_shape


def _restore(path, model, state=None, mesh=MESH):
  return restore_train_state(
    str(path), model, state or _shapes(model), InferencePartitioner(mesh=mesh)
  )


def test_missing_checkpoint(palm_tiny):
  model = running.adapter_model(palm_tiny, MESH)
  with pytest.raises(CheckpointError, match='no checkpoint at .*checkpoint_7'):
    _restore(palm_tiny.parent / 'checkpoint_7', model)
  with pytest.raises(CheckpointError, match='no checkpoint at .*checkpoint_7'):
    running.adapter_model(palm_tiny.parent / 'checkpoint_7', MESH)


def test_not_a_checkpoint(tmp_path, palm_tiny):
  with pytest.raises(CheckpointError, match='is not a checkpoint'):
    _restore(tmp_path, running.adapter_model(palm_tiny, MESH))


@pytest.mark.parametrize('path', ['palm_tiny', 'int8_checkpoint'])
def test_another_shape(path, request):
  """Names the parameter, both shapes and the file."""
  path = request.getfixturevalue(path)
  model = InferenceModel(
    running.VOCABULARY,
    config=config.preset('palm_tiny', vocab_size=512),
    mesh=MESH,
    dtype='float32',
    int8=path.name == 'serving',
  )
  message = rf'embedding: shape \[384, 256\] in {path}.*embedding.* needs \[512, 256\]'
  with pytest.raises(CheckpointError, match=message):
    _restore(path, model)


def test_another_number_of_heads(palm_tiny):
  """Fused, both shapes are the same: the stored ones tell them apart."""
  model = InferenceModel(
    running.VOCABULARY,
    config=config.preset('palm_tiny', num_heads=16, d_head=16),
    mesh=MESH,
    dtype='float32',
  )
  message = r'q_wi_fused/kernel: shape \[256, 4, 8, 288\] in .*needs \[256, 4, 16, 144\]'
  with pytest.raises(CheckpointError, match=message):
    _restore(palm_tiny, model)


def test_int8_where_float_was_expected(palm_tiny, int8_checkpoint):
  with pytest.raises(
    CheckpointError, match='holds int8 weights, but the model was built for float'
  ):
    _restore(int8_checkpoint, running.adapter_model(palm_tiny, MESH))
  with pytest.raises(
    CheckpointError, match='holds float weights, but the model was built for int8'
  ):
    _restore(palm_tiny, running.adapter_model(int8_checkpoint, MESH))


def test_int4(palm_tiny, tmp_path):
  """Matrices stay int4, and a table int8, and the logits are those of the engine."""
  convert(palm_tiny, tmp_path / 'int4', 'int4', bits='embedding:8,mlp_output:8')
  model = running.adapter_model(tmp_path / 'int4', MESH)
  params = _restore(tmp_path / 'int4', model).params
  found = {x.dtype.name for x in jax.tree.leaves(params)}
  assert found == {'int4', 'int8', 'float32'} and params['embedding'].dtype == np.int8
  tokens = np.random.default_rng(0).integers(2, 258, (8, 16))
  tokens[:, 0] = 0
  logits = jax.jit(model._compute_logits)(params, {'decoder_input_tokens': tokens})
  engine = Engine.load(tmp_path / 'int4', mesh='1x1x1', dtype='float32')
  targets = np.roll(tokens, -1, 1)
  own = np.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
  np.testing.assert_allclose(own[:, :-1], engine.log_probs(tokens, targets)[:, :-1], atol=1e-4)
  with pytest.raises(CheckpointError, match='holds int4.*, but the model was built for float'):
    _restore(tmp_path / 'int4', running.adapter_model(palm_tiny, MESH))


def test_partitioner_on_another_mesh(palm_tiny):
  model = running.adapter_model(palm_tiny, MESH)
  with pytest.raises(MeshError, match="the model's mesh is 2x2x2 and the partitioner's 1x2x4"):
    _restore(palm_tiny, model, mesh='1x2x4')
  with pytest.raises(
    MeshError, match="partitioner's {'data': 1, 'model': 8}: use InferencePartitioner"
  ):
    restore_train_state(
      str(palm_tiny), model, _shapes(model), running.partitioning.PjitPartitioner(num_partitions=1)
    )


def test_partitioner_of_another_layout(palm_tiny):
  model = running.adapter_model(
    palm_tiny, MESH, prefill_layout='ws_1d/heads', decode_layout='ws_1d/batch'
  )
  with pytest.raises(MeshError, match='axis rules are not those of the model.s layout ws_1d/heads'):
    _restore(palm_tiny, model)


def test_train_state_of_another_model(palm_tiny):
  model = running.adapter_model(palm_tiny, MESH)
  state = _shapes(running.adapter_model(palm_tiny, MESH, dtype='bfloat16'))
  with pytest.raises(
    CheckpointError, match=r'embedding is bfloat16\[384, 256\] in the train state, and float32'
  ):
    _restore(palm_tiny, model, state)
  state = _shapes(running.adapter_model(palm_tiny, MESH, scan_layers=True))
  extra = 'layers/parallel/norm, layers/parallel/w_in'
  with pytest.raises(
    CheckpointError, match=f'the train state has parameters that .* lacks: {extra}'
  ):
    _restore(palm_tiny, model, state)
  state = _shapes(model)
  fewer = {k: v for k, v in state.params.items() if k != 'layers_3'}
  with pytest.raises(
    CheckpointError, match='has parameters that the train state lacks: layers_3/parallel/norm'
  ):
    _restore(palm_tiny, model, dataclasses.replace(state, params=fewer))


def test_optimizer_state(palm_tiny):
  model = running.adapter_model(palm_tiny, MESH)
  state = running.optimizer_state(model, InferencePartitioner(mesh=MESH))
  with pytest.raises(CheckpointError, match='no optimizer state'):
    _restore(palm_tiny, model, state)


@pytest.mark.parametrize(
  'make',
  [
    lambda model: InferenceCheckpointManager(
      '', _shapes(model), InferencePartitioner(mesh=MESH), model=model
    ),
    lambda model: InferenceCheckpointer(
      _shapes(model), InferencePartitioner(mesh=MESH), '', model=model
    ),
  ],
)
def test_options_that_do_not_apply(make, palm_tiny):
  manager = make(running.adapter_model(palm_tiny, MESH))
  path = str(palm_tiny)
  with pytest.raises(CheckpointError, match='assignment_map'):
    manager.restore(path=path, state_transformation_fns=[lambda state, target: state])
  with pytest.raises(CheckpointError, match='fallback_to_scratch'):
    manager.restore(path=path, fallback_state={})
  with pytest.raises(CheckpointError, match='lazy'):
    manager.restore(path=path, lazy_parameters=True)
  with pytest.raises(CheckpointError, match="mode = 'specific'"):
    manager.restore(step=1000)
  with pytest.raises(CheckpointError, match='saves none'):
    manager.save(None)


def test_norm_scale_reaches_the_weights(palm_tiny):
  """The norms are applied as stored around zero, the default, or around one, as the model says."""
  norms = []
  for scale in ('zero', 'one'):
    state, _, _ = running.restored(
      running.adapter_model(palm_tiny, MESH, norm_scale=scale), palm_tiny
    )
    norms.append(jax.device_get(state.params['final_norm']))
  assert abs(norms[0] - norms[1] - 1).max() < 1e-6
