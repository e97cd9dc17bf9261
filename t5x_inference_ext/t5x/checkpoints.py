"""Restoring in T5X, from any checkpoint that this package reads, directly onto the devices."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from absl import logging
from flax import traverse_util
import jax.numpy as jnp
from t5x import partitioning

from t5x_inference_ext.checkpoints.load import load_tensor
from t5x_inference_ext.errors import CheckpointError, MeshError
from t5x_inference_ext.quantization.formats import weight_format
from t5x_inference_ext.sharding.mesh import AXES, mesh_text
from t5x_inference_ext.t5x.models import InferenceModel
from t5x_inference_ext.t5x.module import Declaration, ParamPath, declarations
from t5x_inference_ext.t5x.partitioning import partitioner_rules


def restore_train_state(
  path: str, model: InferenceModel, train_state: Any, partitioner: partitioning.BasePartitioner
) -> Any:
  """Load a checkpoint's weights in the model's dtype; quantized weights stay as they are.

  Args:
    path: Directory of a serving checkpoint or of a T5X checkpoint. Its name may be any, not only
      checkpoint_STEP.
    model: The model that the checkpoint must hold.
    train_state: T5X's train state, with shapes instead of arrays and without an optimizer.
    partitioner: An InferencePartitioner.

  Returns:
    The train state with arrays on the model's mesh, and the checkpoint's step.

  Raises:
    CheckpointError: There is no checkpoint, or it holds another model: the message names the
      parameter, both shapes and the file.
    MeshError: The partitioner's mesh or rules differ from the model's.
  """
  _check_partitioner(partitioner, model)
  state = train_state.state_dict()
  if set(state['state']) != {'step'}:
    raise CheckpointError(
      "only weights can be restored, no optimizer state: the model's optimizer_def must be None"
    )
  checkpoint = model.open_checkpoint(path, config=model.model.config)
  for note in model.notes or checkpoint.notes:
    logging.info('%s', note)
  weights = checkpoint.weights
  kinds = tuple(weight_format(kind).on_devices('float') for kind in (weights, model.module.weights))
  if kinds[0] != kinds[1]:
    raise CheckpointError(
      f'{checkpoint.path} holds {kinds[0]} weights, but the model was built for {kinds[1]}: '
      'build it from the same checkpoint (in gin, InferenceModel.checkpoint)'
    )
  declared = declarations(model.model, weights, model.module.scan_layers)
  _check_state(traverse_util.flatten_dict(state['target']), declared, checkpoint.path)
  params = {
    name: load_tensor(checkpoint, model.model, d.tensor, d.layers) for name, d in declared.items()
  }
  return train_state.restore_state(
    {
      'target': traverse_util.unflatten_dict(params),
      'state': {'step': jnp.asarray(checkpoint.step or 0, jnp.int32)},
    }
  )


def _check_partitioner(partitioner: partitioning.BasePartitioner, model: InferenceModel) -> None:
  """Raise MeshError if the partitioner's mesh or rules differ from the model's."""
  mesh, layout = model.model.mesh, model.model.prefill_layout
  if partitioner.mesh != mesh:
    shape = dict(partitioner.mesh.shape)
    theirs = mesh_text(partitioner.mesh) if set(AXES) <= set(shape) else shape
    raise MeshError(
      f"the model's mesh is {mesh_text(mesh)} and the partitioner's {theirs}: use "
      'InferencePartitioner, built from the same model'
    )
  if partitioner.logical_axis_rules != partitioner_rules(layout):
    raise MeshError(
      f"the partitioner's axis rules are not those of the model's layout {layout}: "
      'use InferencePartitioner, built from the same model'
    )


def _check_state(
  target: Mapping[ParamPath, Any], declared: Mapping[ParamPath, Declaration], path: str
) -> None:
  """Raise CheckpointError for a train state whose parameters differ from the declared ones."""

  def names(paths: Iterable[ParamPath]) -> str:
    return ', '.join('/'.join(p) for p in sorted(paths))

  if extra := set(target) - set(declared):
    raise CheckpointError(f'the train state has parameters that {path} lacks: {names(extra)}')
  if missing := set(declared) - set(target):
    raise CheckpointError(f'{path} has parameters that the train state lacks: {names(missing)}')
  for name, d in declared.items():
    leaf = target[name]
    if leaf.shape != d.shape or leaf.dtype != d.dtype:
      raise CheckpointError(
        f'{"/".join(name)} is {leaf.dtype}{list(leaf.shape)} in the train state, and {d.dtype}'
        f'{list(d.shape)} as loaded from {path}: both must come from one model'
      )


class _Restorer:
  """Restores train states of a model: the base of the two classes that T5X calls."""

  def __init__(
    self, train_state: Any, partitioner: Any, model: InferenceModel, restore_dtype: Any
  ) -> None:
    self._train_state, self._partitioner, self._model = train_state, partitioner, model
    if restore_dtype is not None and restore_dtype != model.model.dtype:
      logging.info(
        'RestoreCheckpointConfig.dtype = %s is ignored: float weights are %s, as '
        'InferenceModel.dtype says, and int8 weights stay int8',
        restore_dtype,
        model.model.dtype,
      )

  def restore(
    self,
    step: int | None = None,
    path: str | None = None,
    *,
    fallback_state: Mapping[str, Any] | None = None,
    state_transformation_fns: Sequence[Any] = (),
    lazy_parameters: bool = False,
  ) -> Any:
    """Restore the checkpoint at `path`; see restore_train_state. Other options raise errors."""
    if step is not None or path is None:
      raise CheckpointError(
        "restoring needs the path of a checkpoint (RestoreCheckpointConfig.mode = 'specific')"
      )
    if fallback_state is not None or state_transformation_fns:
      raise CheckpointError(
        'RestoreCheckpointConfig.assignment_map, state_transformation_fns and fallback_to_scratch '
        "do not apply: parameters are found by their names in flaxformer's trees"
      )
    if lazy_parameters:
      raise CheckpointError(
        'lazy parameters are not supported: weights are loaded onto their shards'
      )
    return restore_train_state(path, self._model, self._train_state, self._partitioner)

  def save(self, *args: Any, **kwargs: Any) -> NoReturn:
    """Raise CheckpointError."""
    raise CheckpointError(
      'in T5X this package restores checkpoints, and saves none: '
      'python -m t5x_inference_ext.convert_checkpoint writes them'
    )


class InferenceCheckpointManager(_Restorer):
  """The value of RestoreCheckpointConfig.checkpoint_manager_cls.

  t5x.infer restores with it by default (infer.use_orbax = True).

  Args:
    directory: Unused: restore is given a path.
    train_state: T5X's train state, with shapes instead of arrays.
    partitioner: An InferencePartitioner.
    model: The model; in gin, %MODEL.
    restore_dtype: Ignored. Float weights are loaded in the model's dtype and int8 weights stay
      int8; T5X's own managers would cast all of them.
    dataset_iterator, save_dtype, keep, period: Unused: arguments that T5X passes, for saving.
  """

  def __init__(
    self,
    directory: str,
    train_state: Any,
    partitioner: Any,
    model: InferenceModel,
    dataset_iterator: Any = None,
    save_dtype: Any = None,
    restore_dtype: Any = None,
    keep: int | None = None,
    period: int | None = None,
  ) -> None:
    del dataset_iterator, save_dtype, keep, period
    super().__init__(train_state, partitioner, model, restore_dtype)
    self.directory = directory

  def wait_until_finished(self) -> None:
    """Return at once: nothing is saved."""

  def close(self) -> None:
    """Return at once: nothing is open."""


class InferenceCheckpointer(_Restorer):
  """The value of RestoreCheckpointConfig.checkpointer_cls, T5X's older interface.

  t5x.infer with infer.use_orbax = False, and t5x.interactive_model, restore with it.

  Args:
    train_state: T5X's train state, with shapes instead of arrays.
    partitioner: An InferencePartitioner.
    checkpoints_dir: Unused: restore is given a path.
    model: The model; in gin, %MODEL.
    restore_dtype: Ignored, as by InferenceCheckpointManager.
    dataset_iterator, save_dtype, keep, keep_dataset_checkpoints: Unused: arguments that T5X passes,
      for saving.
  """

  def __init__(
    self,
    train_state: Any,
    partitioner: Any,
    checkpoints_dir: str,
    dataset_iterator: Any = None,
    *,
    model: InferenceModel,
    keep: int | None = None,
    save_dtype: Any = None,
    restore_dtype: Any = None,
    keep_dataset_checkpoints: int | None = None,
  ) -> None:
    del dataset_iterator, keep, save_dtype, keep_dataset_checkpoints
    super().__init__(train_state, partitioner, model, restore_dtype)
    self.checkpoints_dir = checkpoints_dir
