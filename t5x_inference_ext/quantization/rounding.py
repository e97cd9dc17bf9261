"""Rounding weights to int8 with one float32 scale per output channel (the paper's section 3.6), in numpy.

Symmetric: w ~ q * scale with q in [-127, 127] and scale = max|w| / 127 over everything that is summed into the channel.
"""

from collections.abc import Iterator

import numpy as np

QMAX = 127
# What the search for the least squared error multiplies max|w| / 127 with, largest first. Exact in float32.
SEARCHED = tuple(1 - k / 64 for k in range(24))
# An error of at most 127 / SEARCHED[-1] steps, squared, in these units, over a million rows, fits 63 bits.
SQUARE_UNITS = 2**24

# Rows are worked on in blocks of about this many elements, so that temporaries stay in the processor's cache.
_BLOCK_ELEMENTS = 2**17


def row_blocks(w: np.ndarray) -> list[np.ndarray]:
  """Views of w [in, out] that are consecutive blocks of its rows."""
  rows = max(1, _BLOCK_ELEMENTS // max(1, w.shape[1]))
  return [w[i : i + rows] for i in range(0, w.shape[0], rows)]


def channel_scales(*matrices: np.ndarray) -> np.ndarray:
  """The scales [out] float32 for matrices [in, out] that share them. A channel of zeros has scale 1."""
  return scales_of(np.maximum.reduce([largest(w[None])[0] for w in matrices]))


def largest(w: np.ndarray) -> np.ndarray:
  """max|w| over the rows of w [L, in, out]: [L, out] float32. NaN where a value is NaN."""
  out = np.zeros((w.shape[0], w.shape[2]), np.float32)
  for layers, rows in blocks(w.shape):
    block = w[layers, rows].astype(np.float32, copy=False)
    np.maximum(out[layers], np.maximum(block.max(1), -block.min(1)), out=out[layers])
  return out


def scales_of(maxima: np.ndarray) -> np.ndarray:
  """The scales for channels whose largest magnitudes are `maxima`, float32 of any shape."""
  # The smallest normal number bounds scales from below: a subnormal one has too few bits left to divide by.
  scales = np.maximum(maxima / np.float32(QMAX), np.finfo(np.float32).tiny)
  return np.where(maxima > 0, scales, np.float32(1))


def quantize(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """w [in, out] in units of scale [out], rounded to the nearest int8, halves to even."""
  return quantize_layers(w[None], scale[None])[0]


def quantize_layers(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """The same of w [L, in, out] and scale [L, out]."""
  out = np.empty(w.shape, np.int8)
  for layers, rows in blocks(w.shape):
    units = w[layers, rows].astype(np.float32, copy=False) / scale[layers, None]
    np.rint(units, out=units)
    out[layers, rows] = np.clip(units, -QMAX, QMAX, out=units)
  return out


def dequantize(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """q [in, out] int8 and scale [out] -> float32; or [L, in, out] and [L, 1, out]."""
  return q.astype(np.float32) * scale


def squared_errors(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """How far w is from what quantize(w, scale * f) stands for, for each f of SEARCHED.

  Args:
    w: [L, in, out] of any float.
    scale: [L, out].

  Returns:
    [SEARCHED, L, out] int64: the sum over rows of squared errors, in units of (scale * f)^2 / SQUARE_UNITS. Integers,
    because their sum is the same in whatever blocks and order a matrix is read.
  """
  out = np.zeros((len(SEARCHED), w.shape[0], w.shape[2]), np.int64)
  for layers, rows in blocks(w.shape):
    block = w[layers, rows].astype(np.float32, copy=False)
    for i, factor in enumerate(SEARCHED):
      units = block / (scale[layers, None] * np.float32(factor))
      error = units - np.clip(np.rint(units), -QMAX, QMAX)
      out[i, layers] += np.rint(error * error * np.float32(SQUARE_UNITS)).astype(np.int64).sum(1)
  return out


def best_scales(scale: np.ndarray, errors: np.ndarray) -> np.ndarray:
  """Of the scales [L, out] times each f of SEARCHED, those with the least of squared_errors' `errors`; ties: the largest."""
  factors = np.asarray(SEARCHED)[:, None, None]
  best = np.argmin(errors * (factors * factors), 0)
  return (scale * np.asarray(SEARCHED, np.float32)[best]).astype(np.float32)


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
  """Ranges of layers and rows of [L, in, out] of about _BLOCK_ELEMENTS, or of one row."""
  layers, rows, columns = shape
  step = max(1, _BLOCK_ELEMENTS // max(1, columns))
  if step >= 2 * rows:
    step = step // max(1, rows)
    for i in range(0, layers, step):
      yield slice(i, i + step), slice(None)
    return
  for i in range(layers):
    for j in range(0, rows, step):
      yield slice(i, i + 1), slice(j, j + step)
