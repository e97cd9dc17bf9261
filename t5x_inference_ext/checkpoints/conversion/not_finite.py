"""Error for weights that are NaN, infinite or too large for the output dtype."""

import ml_dtypes
import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.errors import CheckpointError


class NotFinite(CheckpointError):
  """The source has values that can't be written. Repeating the command does not help."""


# Largest finite magnitude of each written dtype. For int8 and int4 it is bfloat16's: the program
# dequantizes to bfloat16.
_FLOAT32, _BFLOAT16 = (
  float(ml_dtypes.finfo(dtype).max) for dtype in (np.float32, ml_dtypes.bfloat16)
)


def check_finite(
  source: Checkpoint,
  name: str,
  values: np.ndarray,
  first_layer: int,
  written: np.dtype | type = np.float32,
) -> None:
  """Raise NotFinite unless all of a tensor's values can be written.

  Args:
    source: Checkpoint that holds the tensor.
    name: Name of the tensor.
    values: [layers, ...] float32. Values of some layers, or the maxima of their magnitudes.
    first_layer: Index of the first of these layers.
    written: Dtype in which the values are written.
  """
  limit = _FLOAT32 if np.dtype(written) == np.float32 else _BFLOAT16
  bad = ~(np.abs(values) <= limit).reshape(len(values), -1).all(1)
  if not bad.any():
    return
  what, advice = (
    f'values above {limit:.3g}, which become infinite in {np.dtype(written).name}',
    'no trained model has such values',
  )
  if not np.isfinite(values).all():
    limit, what, advice = (
      _FLOAT32,
      'NaN or infinite values',
      'take a checkpoint from before training diverged',
    )
  tensor = source.tensors[name]
  where, whole = '', (slice(None),)
  if name not in params.OUTSIDE_LAYERS:
    layer = first_layer + int(np.argmax(bad))
    where, whole = f' in layer {layer}', (slice(layer, layer + 1),)
  raise NotFinite(
    f'{name}: {_count(tensor, whole, limit)} {what}{where}, read from {tensor.path}: {advice}'
  )


def _count(tensor: Tensor, where: tuple[slice, ...], limit: float) -> int:
  """Return the number of values at `where` that are not within +-`limit`, NaN included."""
  axis = len(where) if len(tensor.shape) > len(where) else 0
  bounds = [
    s.indices(n)[:2] for s, n in zip(where + (slice(None),) * len(tensor.shape), tensor.shape)
  ]
  step = max(
    1, 2**24 // max(1, int(np.prod([e - b for i, (b, e) in enumerate(bounds) if i != axis])))
  )
  count = 0
  for begin in range(bounds[axis][0], bounds[axis][1], step):
    index = [slice(*b) for b in bounds]
    index[axis] = slice(begin, min(begin + step, bounds[axis][1]))
    values = tensor.read(tuple(index))
    count += values.size - int((np.abs(values.astype(np.float32, copy=False)) <= limit).sum())
  return count
