"""T5X's InteractiveModel, restoring with this package. T5X's own class always restores with T5X's Checkpointer."""

import dataclasses
import functools

from t5x import interactive_model, utils

from t5x_inference_ext.t5x.checkpoints import InferenceCheckpointer
from t5x_inference_ext.t5x.models import InferenceModel


class InferenceInteractiveModel(interactive_model.InteractiveModel):
  """predict_with_aux, score and evaluate on natural text; takes what T5X's class takes.

  `model` is an InferenceModel and `partitioner` an InferencePartitioner of it; restore_mode is 'specific',
  and checkpoint_path any checkpoint that this package reads. dtype is ignored: the model has its own. There is no
  training.
  """

  def __init__(self, *, model: InferenceModel, **kwargs):
    self._checkpointer_cls = functools.partial(InferenceCheckpointer, model=model)
    super().__init__(model=model, **kwargs)

  # T5X's constructor makes these two without asking which class restores, and reads them back: it is put in here.

  @property
  def _restore_checkpoint_cfg(self) -> utils.RestoreCheckpointConfig | None:
    return self._restore_cfg

  @_restore_checkpoint_cfg.setter
  def _restore_checkpoint_cfg(self, cfg: utils.RestoreCheckpointConfig | None):
    self._restore_cfg = cfg and dataclasses.replace(cfg, checkpointer_cls=self._checkpointer_cls)

  @property
  def _save_checkpoint_cfg(self) -> utils.SaveCheckpointConfig:
    return self._save_cfg

  @_save_checkpoint_cfg.setter
  def _save_checkpoint_cfg(self, cfg: utils.SaveCheckpointConfig):
    self._save_cfg = dataclasses.replace(cfg, checkpointer_cls=self._checkpointer_cls)
