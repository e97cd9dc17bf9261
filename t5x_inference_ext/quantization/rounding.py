"""Rounding weights to int8 with one float32 scale per output channel (the paper's section 3.6), in numpy.

Symmetric: w ~ q * scale with q in [-127, 127] and scale = max|w| / 127 over everything that is summed into the channel.
"""

import numpy as np

QMAX = 127

# Rows are worked on in blocks of about this many elements, so that temporaries stay in the processor's cache.
_BLOCK_ELEMENTS = 2**17


def row_blocks(w: np.ndarray) -> list[np.ndarray]:
  """Views of w [in, out] that are consecutive blocks of its rows."""
  rows = max(1, _BLOCK_ELEMENTS // max(1, w.shape[1]))
  return [w[i:i + rows] for i in range(0, w.shape[0], rows)]


def channel_scales(*matrices: np.ndarray) -> np.ndarray:
  """The scales [out] float32 for matrices [in, out] that share them. A channel of zeros has scale 1."""
  largest = np.zeros(matrices[0].shape[1], np.float32)
  for w in matrices:
    for block in row_blocks(w):
      np.maximum(largest, np.abs(block.astype(np.float32, copy=False)).max(0), out=largest)
  # The smallest normal number bounds scales from below: a subnormal one has too few bits left to divide by.
  scales = np.maximum(largest / np.float32(QMAX), np.finfo(np.float32).tiny)
  return np.where(largest > 0, scales, np.float32(1))


def quantize(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """w [in, out] in units of scale [out], rounded to the nearest int8, halves to even."""
  out = np.empty(w.shape, np.int8)
  for source, target in zip(row_blocks(w), row_blocks(out)):
    target[...] = np.clip(np.rint(source.astype(np.float32, copy=False) / scale), -QMAX, QMAX)
  return out


def dequantize(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """q [in, out] int8 and scale [out] -> float32."""
  return q.astype(np.float32) * scale
