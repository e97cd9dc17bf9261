"""How far what was written is from what was read."""

import dataclasses

import numpy as np

from t5x_inference_ext.quantization import rounding


@dataclasses.dataclass
class RoundingError:
  """How far what was written is from the source, of one tensor.

  Attributes:
    largest: max|w' - w|.
    magnitude: max|w|.
    squares: the sum of (w' - w)^2.
    norm: the sum of w^2.
  """

  largest: float = 0.0
  magnitude: float = 0.0
  squares: float = 0.0
  norm: float = 0.0

  def add(
    self, w: np.ndarray, written: np.ndarray, scale: np.ndarray | None, magnitude: float
  ) -> None:
    """Counts a block w [L, in, out] and what was written of it; scale [L, out] of what is int8; magnitude = max|w|."""
    self.magnitude = max(self.magnitude, magnitude)
    for layers, rows in rounding.blocks(w.shape):
      values = [v[layers, rows] for v in (w, written)]
      exact, rounded = (
        rounding.dequantize(v, scale[layers, None])
        if v.dtype == np.int8
        else v.astype(np.float32, copy=False)
        for v in values
      )
      difference = np.subtract(rounded, exact)
      self.largest = max(self.largest, float(difference.max()), -float(difference.min()))
      exact = np.ascontiguousarray(exact)
      self.squares += _squares(difference)
      self.norm += _squares(exact)

  def merge(self, other: 'RoundingError') -> None:
    self.largest, self.magnitude = (
      max(self.largest, other.largest),
      max(self.magnitude, other.magnitude),
    )
    self.squares, self.norm = self.squares + other.squares, self.norm + other.norm

  def to_list(self) -> list[float]:
    return [self.largest, self.magnitude, self.squares, self.norm]

  def summary(self) -> dict[str, float]:
    """For manifests: to six digits, which do not depend on the order of summing."""
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
  """The sum of the squares of contiguous float32 values: summed as float32, which is quicker, unless it is out of range."""
  total = float(np.vdot(values, values))
  if 1e-20 < total < np.inf or not values.any():
    return total
  return float(np.square(values, dtype=np.float64).sum())
