"""Rounding errors: how far written values are from the source's."""

import dataclasses

import numpy as np

from t5x_inference_ext.quantization import rounding


@dataclasses.dataclass
class RoundingError:
  """Difference between a tensor w of the source and its written values w'.

  Attributes:
    largest: max|w' - w|.
    magnitude: max|w|.
    squares: Sum of (w' - w)^2.
    norm: Sum of w^2 over the values that are rounded.
  """

  largest: float = 0.0
  magnitude: float = 0.0
  squares: float = 0.0
  norm: float = 0.0

  def round(
    self, w: np.ndarray, scale: np.ndarray | None, dtype: np.dtype, magnitude: float
  ) -> np.ndarray:
    """Return values as they are written, in C order, and add their errors to the sums.

    Args:
      w: [L, in, out]. The source's values: float, int8 or int4.
      scale: [L, out]. Scales of the quantized side, or None if both are float.
      dtype: Dtype of the values written.
      magnitude: max|w|.
    """
    self.magnitude = max(self.magnitude, magnitude)
    if w.dtype == dtype:  # nothing is rounded, and errors of 0 need no norm
      return rounding.contiguous(w)
    out = np.empty(w.shape, dtype)
    for before, after in rounding.rounded(w, scale, out):
      self.norm += _squares(before)
      after -= before
      self.largest = max(self.largest, float(after.max()), -float(after.min()))
      self.squares += _squares(after)
    return out

  def add(self, before: np.ndarray, after: np.ndarray) -> None:
    """Add the errors of float32 weights `after` in place of `before`."""
    self.magnitude = max(self.magnitude, float(np.abs(before).max()))
    self.norm += _squares(before)
    difference = after - before
    self.largest = max(self.largest, float(np.abs(difference).max()))
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


def _squares(values: np.ndarray) -> float:
  """Return the sum of squares of float32 values."""
  values = values.ravel('K')
  # float32 is faster, if the sum is within its range.
  total = float(np.vdot(values, values))
  if 1e-20 < total < np.inf or not values.any():
    return total
  return float(np.square(values, dtype=np.float64).sum())
