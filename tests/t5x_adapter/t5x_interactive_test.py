"""T5X's InteractiveModel with this package's model and checkpoints."""

import jax
import numpy as np
import pytest

from t5x_inference_ext.errors import CheckpointError
from t5x_inference_ext.t5x.interactive import InferenceInteractiveModel
from t5x_inference_ext.t5x.partitioning import InferencePartitioner
from tests.t5x_adapter import inference_tasks, running


@pytest.fixture(autouse=True)
def prng():
  """InteractiveModel changes jax's default random numbers for the whole process."""
  before = jax.config.jax_default_prng_impl
  yield
  jax.config.update('jax_default_prng_impl', before)


def _interactive(checkpoint, tmp_path):
  return InferenceInteractiveModel(
    batch_size=3,
    task_feature_lengths=inference_tasks.LENGTHS,
    output_dir=str(tmp_path / 'output'),
    partitioner=InferencePartitioner(mesh='2x2x2'),
    model=running.adapter_model(checkpoint, '2x2x2'),
    dtype='bfloat16',
    restore_mode='specific',
    checkpoint_path=str(checkpoint),
    input_shapes={'decoder_input_tokens': (3, sum(inference_tasks.LENGTHS.values()))},
    add_eos=False,
  )


def test_predicts_and_scores(testdata, stock_rows, tmp_path):
  """From an Orbax checkpoint, which T5X's own class can't read."""
  model = _interactive(testdata / 'palm_tiny_orbax' / 'checkpoint_1000', tmp_path)
  assert model.step == 1000
  rows = inference_tasks.rows()[:4]
  predictions, _ = model.predict_with_aux([row['prompt'] for row in rows])
  expected = [row['prediction'] for row in stock_rows('predict')[:4]]
  assert [text.decode() for _, text in predictions] == expected
  scores = model.score([{'input': row['prompt'], 'target': row['greedy_text']} for row in rows])
  # The task's targets fill their length, so that nothing is left of the EOS that it appends.
  expected = [row['score'] for row in stock_rows('score')[:4]]
  np.testing.assert_allclose([score for _, score in scores], expected, rtol=1e-3)


def test_does_not_save(int8_checkpoint, tmp_path):
  model = _interactive(int8_checkpoint, tmp_path)
  with pytest.raises(CheckpointError, match='saves none'):
    model.save_checkpoint()
