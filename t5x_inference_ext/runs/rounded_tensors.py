"""Checkpoints of which only some matrices are rounded: what one tensor's rounding costs."""

from collections.abc import Iterator, Mapping
import dataclasses

import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.tensor import Bounds, Tensor
from t5x_inference_ext.quantization import rounding


class Dequantized(Tensor):
  """The float32 weights that a quantized matrix or table stands for."""

  def __init__(self, units: Tensor, scale: Tensor) -> None:
    super().__init__(units.shape, np.float32, units.path)
    self._units, self._scale = units, scale

  def _read(self, bounds: Bounds) -> np.ndarray:
    first, *_, last = where = tuple(slice(*b) for b in bounds)
    is_table = len(where) == 2  # [V, E], with scales [V]; a matrix [L, in, out] has [L, out]
    scale = self._scale.read((first,) if is_table else (first, last))
    return rounding.dequantize(self._units.read(where), np.expand_dims(scale, 1))


def with_tensors(source: Checkpoint, tensors: Mapping[str, Tensor]) -> Checkpoint:
  """Return a checkpoint with some of its float tensors replaced."""
  return dataclasses.replace(source, tensors={**source.tensors, **tensors})


def rounded_alone(source: Checkpoint, rounded: Checkpoint) -> Iterator[tuple[str, Checkpoint]]:
  """Yield the source with one quantized tensor at a time, and that tensor's name.

  Args:
    source: A checkpoint of float weights.
    rounded: The checkpoint of quantized weights that it was converted to.
  """
  for name, p in params.parameters(source.config).items():
    if p.scale is not None and p.scale in rounded.tensors:
      weights = Dequantized(rounded.tensors[name], rounded.tensors[p.scale])
      yield name, with_tensors(source, {name: weights})
