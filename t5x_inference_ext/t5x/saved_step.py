"""Compile the step that t5x.infer runs for each batch, and save it in a file."""

from collections.abc import Mapping
import os
from typing import Any
from unittest import mock

import jax
import numpy as np
from t5x import utils

from t5x_inference_ext.engine import saved_program
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.t5x.models import InferenceModel
from t5x_inference_ext.t5x.partitioning import InferencePartitioner, SavedStep, describe_step
from t5x_inference_ext.t5x.precompile import abstract_inputs, infer_step_of
from t5x_inference_ext.t5x.refill import HostStep


def save_infer_step(
  path: str | os.PathLike,
  model: InferenceModel,
  partitioner: InferencePartitioner,
  task_feature_lengths: Mapping[str, int],
  batch_size: int,
  mode: str = 'predict',
) -> dict[str, Any]:
  """Compile t5x.infer's step, and save it for InferencePartitioner(executable=path).

  Args:
    path: The file to write.
    model: An InferenceModel of a checkpoint, or of a config alone.
    partitioner: An InferencePartitioner on the model's mesh.
    task_feature_lengths: Lengths of the task's features.
    batch_size: Number of rows in a batch, DatasetConfig.batch_size.
    mode: 'predict', 'predict_with_aux' or 'score'.

  Returns:
    The file's header.

  Raises:
    RequestError: Unknown mode, or the model has `refill`: its step is not compiled.
    SavedError: The file can't be written.
  """
  if model.refills:
    raise RequestError('a model with refill has no compiled step to save: make it without refill')
  infer_step = infer_step_of(model, mode)
  batch, initializer = abstract_inputs(model, partitioner, task_feature_lengths, batch_size)
  state = initializer.global_train_state_shape
  steps, partition = [], partitioner.partition

  def kept(*arguments: Any, **options: Any) -> Any:
    steps.append(partition(*arguments, **options))
    return steps[-1]

  # T5X wraps the step in its own function, which is only available as an argument of
  # partitioner.partition.
  with mock.patch.object(partitioner, 'partition', kept):
    utils.get_infer_fn(infer_step, batch_size, initializer.train_state_axes, partitioner)
  (step,) = steps
  assert not isinstance(step, HostStep)
  if isinstance(step, SavedStep):
    step = step.step
  key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
  rows = jax.ShapeDtypeStruct((batch_size,), np.int32)
  arguments = saved_program.shapes((state.params, batch, key, rows, state.flax_mutables))
  lowered = step.lower(*arguments)
  return saved_program.save(
    path, lowered.compile(), arguments, partitioner.mesh, describe_step(lowered)
  )
