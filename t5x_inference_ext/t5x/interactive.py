"""T5X's InteractiveModel with this package's checkpointer, for which T5X has no option."""

import dataclasses
import functools
from typing import Any

from t5x import interactive_model, utils

from t5x_inference_ext.t5x.checkpoints import InferenceCheckpointer
from t5x_inference_ext.t5x.models import InferenceModel


class InferenceInteractiveModel(interactive_model.InteractiveModel):
  """T5X's InteractiveModel: predicts, scores and evaluates natural text. It can't train.

  Args:
    model: InferenceModel.
    **kwargs: Arguments of T5X's class. `partitioner` is an InferencePartitioner of the model,
      `restore_mode` is 'specific', and `checkpoint_path` any checkpoint that this package reads.
      `dtype` has no effect: the model has its own dtype.
  """

  def __init__(self, *, model: InferenceModel, **kwargs: Any) -> None:
    self._checkpointer_cls = functools.partial(InferenceCheckpointer, model=model)
    super().__init__(model=model, **kwargs)

  # T5X's constructor assigns these two configurations, with T5X's checkpointer, and reads them
  # later. These setters replace the checkpointer by this package's.

  @property
  def _restore_checkpoint_cfg(self) -> utils.RestoreCheckpointConfig | None:
    return self._restore_cfg

  @_restore_checkpoint_cfg.setter
  def _restore_checkpoint_cfg(self, cfg: utils.RestoreCheckpointConfig | None) -> None:
    self._restore_cfg = cfg and dataclasses.replace(cfg, checkpointer_cls=self._checkpointer_cls)

  @property
  def _save_checkpoint_cfg(self) -> utils.SaveCheckpointConfig:
    return self._save_cfg

  @_save_checkpoint_cfg.setter
  def _save_checkpoint_cfg(self, cfg: utils.SaveCheckpointConfig) -> None:
    self._save_cfg = dataclasses.replace(cfg, checkpointer_cls=self._checkpointer_cls)
