"""Steps compiled without weights run with them."""

import jax
import numpy as np
import pytest

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.t5x.precompile import precompile_step
from tests.t5x_adapter import running

LENGTHS = {'inputs': 8, 'targets': 8}


@pytest.mark.parametrize('mode', ['predict_with_aux', 'score'])
def test_compiled_step_runs(mode, int8_checkpoint):
  model = running.adapter_model(int8_checkpoint, '2x2x2', scan_layers=True)
  state, _, partitioner = running.restored(model, int8_checkpoint)
  compiled = precompile_step(model, partitioner, LENGTHS, batch_size=3, mode=mode)
  batch = dict.fromkeys(
    (
      'decoder_input_tokens',
      'decoder_target_tokens',
      'decoder_loss_weights',
      'decoder_causal_attention',
    ),
    np.ones((3, 16), np.int32),
  )
  key = () if mode == 'score' else (jax.random.PRNGKey(0),)
  result = compiled(state.params, batch, *key)
  step = model.score_batch if mode == 'score' else model.predict_batch_with_aux
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5),
    result,
    jax.jit(step)(state.params, batch, *key),
  )
  assert compiled.memory_analysis().argument_size_in_bytes > 0


def test_unknown_mode(int8_checkpoint):
  model = running.adapter_model(int8_checkpoint)
  with pytest.raises(RequestError, match="'train'"):
    precompile_step(model, running.InferencePartitioner(mesh='1x1x1'), LENGTHS, 1, mode='train')


def test_the_function_of_earlier_versions():
  with pytest.raises(ImportError, match='is now t5x_inference_ext.t5x.precompile.precompile_step '):
    from t5x_inference_ext.t5x.precompile import precompile  # noqa: F401
