"""NaN and infinite weights: where, how many, and what to do."""

import numpy as np

from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.errors import CheckpointError


class NotFinite(CheckpointError):
  """A source that no repetition of the command will convert."""


def check_finite(source: Checkpoint, name: str, values: np.ndarray, first_layer: int) -> None:
  """Raises NotFinite if values [layers, ...] of a tensor, or maxima of their magnitudes, are not all finite."""
  bad = ~np.isfinite(values.reshape(len(values), -1)).all(1)
  if not bad.any():
    return
  tensor = source.tensors[name]
  layered = len(tensor.shape) == 3 or name.rpartition('_')[2] == 'scale' or (
      len(tensor.shape) == 2 and name != 'embedding')
  where, whole = '', (slice(None),)
  if layered:
    layer = first_layer + int(np.argmax(bad))
    where, whole = f' in layer {layer}', (slice(layer, layer + 1),)
  raise NotFinite(f'{name}: {_count(tensor, whole)} NaN or infinite values{where}, read from {tensor.path}: take a '
                  'checkpoint from before training diverged')


def _count(tensor: Tensor, where: tuple[slice, ...]) -> int:
  """How many values are not finite, in the whole layer, not only in the slice that showed it."""
  axis = len(where) if len(tensor.shape) > len(where) else 0
  bounds = [s.indices(n)[:2] for s, n in zip(where + (slice(None),) * len(tensor.shape), tensor.shape)]
  step = max(1, 2**24 // max(1, int(np.prod([e - b for i, (b, e) in enumerate(bounds) if i != axis]))))
  count = 0
  for begin in range(bounds[axis][0], bounds[axis][1], step):
    index = [slice(*b) for b in bounds]
    index[axis] = slice(begin, min(begin + step, bounds[axis][1]))
    values = tensor.read(tuple(index))
    count += values.size - int(np.isfinite(values).sum())
  return count
