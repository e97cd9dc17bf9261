"""The tree of parameters in a T5X checkpoint, as stored."""

import dataclasses
from typing import Any

import numpy as np

from t5x_inference_ext.checkpoints.tensor import Tensor


@dataclasses.dataclass(frozen=True)
class Tree:
  """Parameters of a T5X checkpoint. No values have been read yet.

  Attributes:
    path: Checkpoint directory.
    description: Format of the checkpoint, for messages.
    leaves: Parameters by path under target, such as 'decoder/decoder/kv_fused/kernel'.
    step: Training step, or None if not recorded.
  """

  path: str
  description: str
  leaves: dict[str, Tensor]
  step: int | None


def step_number(values: Any) -> int | None:
  """Return the training step in a checkpoint's value; None if it is not a whole number."""
  values = np.asarray(values)
  if values.size != 1 or values.dtype.kind not in 'iuf' or not np.isfinite(values).all():
    return None
  return int(values.item())
