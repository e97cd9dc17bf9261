"""Compile an inference step without weights. (T5X's own precompile is for training.)"""

from collections.abc import Callable, Mapping

import jax
from t5x import utils

from t5x_inference_ext._moved import renamed
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.t5x.models import InferenceModel
from t5x_inference_ext.t5x.partitioning import InferencePartitioner


def precompile_step(
  model: InferenceModel,
  partitioner: InferencePartitioner,
  task_feature_lengths: Mapping[str, int],
  batch_size: int,
  mode: str = 'predict',
) -> jax.stages.Compiled:
  """Compile the step that t5x.infer runs for a batch.

  The result has memory_analysis() and cost_analysis() of the step. No weights are needed.

  Args:
    model: An InferenceModel made from a checkpoint or from only a config.
    partitioner: An InferencePartitioner on the model's mesh.
    task_feature_lengths: Lengths of the task's features, e.g. {'inputs': 512, 'targets': 64}.
    batch_size: Number of rows.
    mode: 'predict', 'predict_with_aux' or 'score'.

  Returns:
    A function of parameters, batch and, except in mode 'score', a random key.

  Raises:
    RequestError: Unknown mode.
  """
  infer_step = infer_step_of(model, mode)
  batch, initializer = abstract_inputs(model, partitioner, task_feature_lengths, batch_size)
  key = () if mode == 'score' else (jax.eval_shape(lambda: jax.random.PRNGKey(0)),)
  step = partitioner.partition(
    infer_step,
    in_axis_resources=(
      initializer.train_state_axes.params,
      partitioner.data_partition_spec,
      *(None for _ in key),
    ),
    out_axis_resources=None,
  )
  return partitioner.compile(step, initializer.global_train_state_shape.params, batch, *key)


def abstract_inputs(
  model: InferenceModel,
  partitioner: InferencePartitioner,
  task_feature_lengths: Mapping[str, int],
  batch_size: int,
) -> tuple[dict[str, jax.ShapeDtypeStruct], utils.TrainStateInitializer]:
  """Return the shapes of a batch, and T5X's initializer object with the train state's shapes.

  Args:
    model: An InferenceModel.
    partitioner: An InferencePartitioner on the model's mesh.
    task_feature_lengths: Lengths of the task's features.
    batch_size: Number of rows.
  """
  converter = model.FEATURE_CONVERTER_CLS(pack=False)
  lengths = converter.get_model_feature_lengths(task_feature_lengths)
  dtypes = {
    name: feature.dtype for name, feature in converter.MODEL_FEATURES.items()
  }  # TensorFlow dtypes
  batch = {
    name: jax.ShapeDtypeStruct((batch_size, length), dtypes[name].as_numpy_dtype)
    for name, length in lengths.items()
  }
  shapes = {name: x.shape for name, x in batch.items()}
  return batch, utils.TrainStateInitializer(None, model.get_initial_variables, shapes, partitioner)


def infer_step_of(model: InferenceModel, mode: str) -> Callable:
  """Return the method that t5x.infer calls in a mode.

  Raises:
    RequestError: Unknown mode.
  """
  steps = {
    'predict': model.predict_batch,
    'predict_with_aux': model.predict_batch_with_aux,
    'score': model.score_batch,
  }
  if mode not in steps:
    raise RequestError(f'mode must be one of {", ".join(steps)}, got {mode!r}')
  return steps[mode]


__getattr__ = renamed(__name__, {'precompile': 'precompile_step'})
