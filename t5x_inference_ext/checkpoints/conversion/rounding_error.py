"""Rounding errors: how far written values are from the source's."""

import dataclasses
from typing import Literal

import numpy as np

from t5x_inference_ext.quantization import rounding


@dataclasses.dataclass
class RoundingError:
  """Difference between a tensor w of the source and its written values w'.

  Attributes:
    largest: max|w' - w|.
    magnitude: max|w|.
    squares: Sum of (w' - w)^2.
    norm: Sum of w^2.
  """

  largest: float = 0.0
  magnitude: float = 0.0
  squares: float = 0.0
  norm: float = 0.0

  def add(
    self, w: np.ndarray, written: np.ndarray, scale: np.ndarray | None, magnitude: float
  ) -> None:
    """Add a block to the sums.

    Args:
      w: [L, in, out]. The source's values, float or int8.
      written: [L, in, out]. The values written for w, float or int8.
      scale: [L, out]. Scales of whichever of w and `written` is int8; None if both are float.
      magnitude: max|w|.
    """
    self.magnitude = max(self.magnitude, magnitude)
    for index in rounding.blocks(w):
      exact = _floats(w[index], index, scale)
      self.norm += _squares(exact)
      if written.dtype == w.dtype:  # written without conversion
        continue
      # Copy to w's memory order first: subtracting arrays of different orders is slow.
      order: Literal['F', 'C'] = 'F' if w.strides[1] < w.strides[2] else 'C'
      stored = np.asarray(written[index], order=order)
      difference = np.subtract(_floats(stored, index, scale), exact)
      self.largest = max(self.largest, float(difference.max()), -float(difference.min()))
      self.squares += _squares(difference)

  def merge(self, other: 'RoundingError') -> None:
    """Add the sums of another RoundingError."""
    self.largest = max(self.largest, other.largest)
    self.magnitude = max(self.magnitude, other.magnitude)
    self.squares, self.norm = self.squares + other.squares, self.norm + other.norm

  def summary(self) -> dict[str, float]:
    """Return the errors to six digits, so that the order of summation does not show."""
    return {'largest': float(f'{self.worst:.6g}'), 'relative': float(f'{self.relative:.6g}')}

  @property
  def worst(self) -> float:
    """max|w' - w| / max|w|."""
    return self.largest / self.magnitude if self.magnitude else 0.0

  @property
  def relative(self) -> float:
    """||w' - w|| / ||w||."""
    return (self.squares / self.norm) ** 0.5 if self.norm else 0.0


def _floats(
  block: np.ndarray, index: tuple[slice, slice, slice], scale: np.ndarray | None
) -> np.ndarray:
  """Return the float or int8 values of a block as float32."""
  layers, _, columns = index
  if block.dtype == np.int8:
    assert scale is not None
    return rounding.dequantize(block, scale[layers, None, columns])
  return block.astype(np.float32, copy=False)


def _squares(values: np.ndarray) -> float:
  """Return the sum of squares of float32 values."""
  values = values.ravel('K')
  # float32 is faster, if the sum is within its range.
  total = float(np.vdot(values, values))
  if 1e-20 < total < np.inf or not values.any():
    return total
  return float(np.square(values, dtype=np.float64).sum())
