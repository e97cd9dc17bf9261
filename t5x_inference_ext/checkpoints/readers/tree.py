"""What a reader of a T5X checkpoint finds: the tree of parameters, as stored."""

import dataclasses
from typing import Any

import numpy as np

from t5x_inference_ext.checkpoints.tensor import Tensor


@dataclasses.dataclass(frozen=True)
class Tree:
  """Attributes:
  path: the checkpoint directory.
  description: what was found there, in words.
  leaves: by their place under target, e.g. 'decoder/decoder/kv_fused/kernel'.
  step: the training step, where recorded.
  """

  path: str
  description: str
  leaves: dict[str, Tensor]
  step: int | None


def step_number(values: Any) -> int | None:
  """The training step that a checkpoint holds; None where that is no whole number."""
  values = np.asarray(values)
  if values.size != 1 or values.dtype.kind not in 'iuf' or not np.isfinite(values).all():
    return None
  return int(values.item())
