"""Rounding of weights to int8 with one float32 scale per output channel (section 3.6), in numpy.

Symmetric: w ~ q * scale with q in [-127, 127]. The scale is max|w| / 127 over all weights that are
  summed into the channel, or slightly less if that reduces the squared error (best_scales).
"""

from collections.abc import Iterator
import itertools

from jaxtyping import Float32, Int8, Int64, Real
import ml_dtypes
import numpy as np

QMAX = 127
# Factors by which the search for the least squared error multiplies max|w| / 127, largest first.
# All are exact in float32.
SEARCHED = tuple(1 - k / 64 for k in range(24))
# Squared errors are integers, in units of scale^2 / SQUARE_UNITS. An error is at most 127 /
# SEARCHED[-1] scales; the sum of its square over a million rows fits into 63 bits.
SQUARE_UNITS = 2**24

# Approximate number of elements in a block. Rows are processed in blocks so that temporaries stay
# in the processor's cache.
_BLOCK_ELEMENTS, _TILE_ROWS = 2**17, 2**9


def largest(w: Real[np.ndarray, 'L rows out']) -> Float32[np.ndarray, 'L out']:
  """Return max|w| of each layer and output channel; NaN if a weight is NaN."""
  if w.dtype == ml_dtypes.bfloat16:
    # Without the sign bit, floats are ordered like their bits as integers; NaN is above infinity.
    bits = np.zeros((w.shape[0], w.shape[2]), np.uint16)
    for index in blocks(w):
      layers, _, columns = index
      found = (w[index].view(np.uint16) & np.uint16(0x7FFF)).max(1)
      np.maximum(bits[layers, columns], found, out=bits[layers, columns])
    return bits.view(ml_dtypes.bfloat16).astype(np.float32)
  out = np.zeros((w.shape[0], w.shape[2]), np.float32)
  for index in blocks(w):
    layers, _, columns = index
    block = w[index].astype(np.float32, copy=False)
    found = np.maximum(block.max(1), -block.min(1))
    np.maximum(out[layers, columns], found, out=out[layers, columns])
  return out


def scales_of(maxima: Float32[np.ndarray, '*shape']) -> Float32[np.ndarray, '*shape']:
  """Return the scales of channels with largest magnitudes `maxima`; 1 for a channel of zeros."""
  # Scales are at least the smallest normal float32: division by a subnormal number loses precision.
  scales = np.maximum(maxima / np.float32(QMAX), np.finfo(np.float32).tiny)
  return np.where(maxima > 0, scales, np.float32(1))


def quantize_layers(
  w: Real[np.ndarray, 'L rows out'], scale: Float32[np.ndarray, 'L out']
) -> Int8[np.ndarray, 'L rows out']:
  """Round weights, divided by their scales, to the nearest int8; halves round to even."""
  out = np.empty(w.shape, np.int8)
  for index in blocks(w):
    layers, _, columns = index
    units = w[index].astype(np.float32, copy=False) / scale[layers, None, columns]
    np.rint(units, out=units)
    # Convert to int8 before writing to `out`: the write transposes a tile, and int8 touches fewer
    # cache lines.
    out[index] = np.clip(units, -QMAX, QMAX, out=units).astype(np.int8)
  return out


def contiguous(
  w: Real[np.ndarray, 'L rows out'], dtype: np.dtype
) -> Real[np.ndarray, 'L rows out']:
  """Return w in C order and in `dtype`; w itself if it has both already.

  A transposed w is copied tile by tile, which takes a fifth of the time of one copy.
  """
  if w.dtype == dtype and w.flags.c_contiguous:
    return w
  out = np.empty(w.shape, dtype)
  for index in blocks(w):
    out[index] = w[index]
  return out


def dequantize(
  q: Int8[np.ndarray, '*lead in out'], scale: Float32[np.ndarray, '...']
) -> Float32[np.ndarray, '*lead in out']:
  """Return the float32 weights of q; `scale` broadcasts: [out], or [L, 1, out]."""
  return q.astype(np.float32) * scale


def squared_errors(
  w: Real[np.ndarray, 'L rows out'], scale: Float32[np.ndarray, 'L out']
) -> Int64[np.ndarray, 'searched L out']:
  """Return the squared rounding error of w with the scales times each factor in SEARCHED.

  Returns:
    [SEARCHED, L, out] int64: sums over rows, in units of (scale * factor)^2 / SQUARE_UNITS. Sums of
    integers do not depend on how a matrix is cut into blocks, nor on their order.
  """
  out = np.zeros((len(SEARCHED), w.shape[0], w.shape[2]), np.int64)
  for index in blocks(w):
    layers, _, columns = index
    block = w[index].astype(np.float32, copy=False)
    for i, factor in enumerate(SEARCHED):
      units = block / (scale[layers, None, columns] * np.float32(factor))
      error = units - np.clip(np.rint(units), -QMAX, QMAX)
      out[i, layers, columns] += (
        np.rint(error * error * np.float32(SQUARE_UNITS)).astype(np.int64).sum(1)
      )
  return out


def best_scales(
  scale: Float32[np.ndarray, 'L out'], errors: Int64[np.ndarray, 'searched L out']
) -> Float32[np.ndarray, 'L out']:
  """Multiply each scale by the factor with the least error; if several have it, the largest."""
  factors = np.asarray(SEARCHED)[:, None, None]
  best = np.argmin(errors * (factors * factors), 0)
  return (scale * np.asarray(SEARCHED, np.float32)[best]).astype(np.float32)


def blocks(w: np.ndarray) -> Iterator[tuple[slice, slice, slice]]:
  """Yield the indices of blocks of w [L, in, out], each of about _BLOCK_ELEMENTS elements.

  A block has all columns of some rows. If columns are contiguous in memory, as in torch.nn.Linear's
  weights, a block is instead a tile of _TILE_ROWS rows: the output is row-major, and writing whole
  columns would touch too many cache lines.
  """
  layers, rows, columns = w.shape
  if w.strides[1] < w.strides[2]:
    high, wide = _TILE_ROWS, max(1, _BLOCK_ELEMENTS // _TILE_ROWS)
    for i, j, k in itertools.product(range(layers), range(0, rows, high), range(0, columns, wide)):
      yield slice(i, i + 1), slice(j, j + high), slice(k, k + wide)
    return
  step = max(1, _BLOCK_ELEMENTS // max(1, columns))
  if step >= 2 * rows:
    step = step // max(1, rows)
    for i in range(0, layers, step):
      yield slice(i, i + step), slice(None), slice(None)
    return
  for i in range(layers):
    for j in range(0, rows, step):
      yield slice(i, i + 1), slice(j, j + step), slice(None)
