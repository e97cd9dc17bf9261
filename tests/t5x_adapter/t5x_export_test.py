"""t5x.export writes a SavedModel of the adapter's model that answers as the model does."""

import functools

import jax
import jaxtyping
import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_inference_ext.t5x.checkpoints import InferenceCheckpointManager
from tests.t5x_adapter import inference_tasks, running

pytest.importorskip(
  'tensorflow_serving',
  reason=(
    't5x.export needs tensorflow_serving: pip install --no-deps tensorflow-serving-api==2.21.0'
  ),
)
from t5x import export_lib  # noqa: E402

LENGTHS = {'inputs': 24, 'targets': 24}


@pytest.fixture(autouse=True)
def unchecked_annotations():
  """The batch of an exported program is a symbol, which annotations of sizes (`int`) leave out."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)


def test_exported_model_answers(int8_checkpoint, tmp_path):
  """Int8 weights, any batch size: the batch is a symbol in the exported program."""
  model = running.adapter_model(int8_checkpoint, '1x1x1')
  features = {name: seqio.Feature(running.VOCABULARY, add_eos=False) for name in LENGTHS}
  export_lib.save(
    model=model,
    inference_mode='predict',
    partitioner=running.InferencePartitioner(mesh='1x1x1'),
    restore_checkpoint_cfg=running.utils.RestoreCheckpointConfig(
      str(int8_checkpoint),
      'specific',
      dtype='bfloat16',
      checkpoint_manager_cls=functools.partial(InferenceCheckpointManager, model=model),
    ),
    exportable_module_cls=export_lib.ExportableModule,
    create_preprocessor_fn=export_lib.create_decoder_preprocessor,
    output_features=features,
    task_feature_lengths=LENGTHS,
    batch_size=None,
    model_name='/ml/palm_tiny',
    output_dir=str(tmp_path / 'exported' / '1'),
  )
  served = tf.saved_model.load(str(tmp_path / 'exported_cpu' / '1')).signatures['serving_default']
  # T5X's preprocessor takes texts of one length only.
  texts = [row['prompt'][:11] for row in inference_tasks.rows()][:3]
  tokens = np.asarray([running.VOCABULARY.encode(text) for text in texts])
  size = sum(LENGTHS.values())
  inputs = np.zeros((3, size), np.int32)
  inputs[:, 1:12] = tokens
  causal = (np.arange(size) < 12).astype(np.int32)[None].repeat(3, axis=0)
  params = running.restored(model, int8_checkpoint)[0].params
  expected = np.asarray(
    jax.jit(model.predict_batch)(
      params, {'decoder_input_tokens': inputs, 'decoder_causal_attention': causal}
    )
  )
  for rows in (1, 3):
    answers = served(text_batch=tf.constant(texts[:rows]))['output_0'].numpy()
    assert [a.decode() for a in answers] == [
      running.VOCABULARY.decode(row) for row in expected[:rows].tolist()
    ]
