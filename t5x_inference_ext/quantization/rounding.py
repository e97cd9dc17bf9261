"""Rounding of weights to integers with a float32 scale per output channel (section 3.6), in numpy.

w ~ q * scale, with q in [-127, 127] for int8 and [-8, 7] for int4. The scale is max|w| over all
weights that are summed into the channel, divided by the largest unit; or less, so that the largest
weights are clipped, if that reduces the squared error (best_scales). An int4 scale may be negative:
then the positive side of the channel has the eighth unit.
"""

from collections.abc import Iterator
import itertools

from jaxtyping import Float32, Int64, Real
import ml_dtypes
import numpy as np

from t5x_inference_ext.quantization.formats import bits_of, is_quantized

# Largest unit of int8.
QMAX = 127
_INT8 = np.dtype(np.int8)
# Factors of the scale that the search for the least squared error tries, exact in float32. int4,
# whose coarse units gain more from clipping, goes down further, and tries both signs.
_SEARCHED = {
  8: tuple(1 - k / 64 for k in range(24)),
  4: tuple(sign * (1 - k / 32) for sign in (1, -1) for k in range(24)),
}
# Squared errors are integers, in units of scale^2 / SQUARE_UNITS. An error is at most the largest
# unit / the least factor searched; the sum of its square over a million rows fits into 63 bits.
SQUARE_UNITS = 2**24

# Approximate number of elements in a block. Rows are processed in blocks so that temporaries stay
# in the processor's cache.
_BLOCK_ELEMENTS = 2**16
# Sides of a block of a transposed matrix.
_TILE_ROWS, _TILE_COLUMNS = 2**9, 2**7
_CACHE_LINE = 64


def largest_unit(dtype: np.dtype) -> int:
  """Return the largest unit of a quantized dtype: 127 for int8, 7 for int4."""
  return int(ml_dtypes.iinfo(dtype).max)


def searched(dtype: np.dtype) -> tuple[float, ...]:
  """Return the factors by which a search multiplies scales, the largest first."""
  return _SEARCHED[bits_of(dtype)]


def units_range(dtype: np.dtype) -> tuple[int, int]:
  """Return the least and the largest unit: -127 and 127 for int8, -8 and 7 for int4."""
  largest = largest_unit(dtype)
  return (-largest if bits_of(dtype) == 8 else -largest - 1), largest


def largest(w: Real[np.ndarray, 'L rows out']) -> Float32[np.ndarray, 'L out']:
  """Return max|w| of each layer and output channel; NaN if a weight is NaN."""
  out = np.zeros((w.shape[0], w.shape[2]), np.float32)
  transposed = _is_transposed(w)
  if transposed:  # nothing is written in the other order: blocks of whole columns
    w = w.swapaxes(1, 2)
  axis = 2 if transposed else 1
  for index in blocks(w):
    where = index[0], index[3 - axis]
    if w.dtype == ml_dtypes.bfloat16:
      # Without their sign, floats are in the order of their bits; NaN are above infinity.
      bits = (w[index].view(np.uint16) & np.uint16(0x7FFF)).max(axis)
      found = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    else:
      block = w[index].astype(np.float32, copy=False)
      found = np.maximum(block.max(axis), -block.min(axis))
    np.maximum(out[where], found, out=out[where])
  return out


def scales_of(
  maxima: Float32[np.ndarray, '*shape'], dtype: np.dtype = _INT8
) -> Float32[np.ndarray, '*shape']:
  """Return the scales of channels with largest magnitudes `maxima`; 1 for a channel of zeros.

  Args:
    maxima: max|w| of each channel.
    dtype: The quantized dtype.
  """
  # Scales are at least the smallest normal float32: division by a subnormal number loses precision.
  scales = np.maximum(maxima / np.float32(largest_unit(dtype)), np.finfo(np.float32).tiny)
  return np.where(maxima > 0, scales, np.float32(1))


def rounded(
  w: Real[np.ndarray, 'L rows out'],
  scale: Float32[np.ndarray, 'L out'] | None,
  out: Real[np.ndarray, 'L rows out'],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Round w into `out`, block by block, in one pass over w and `out`.

  Quantized values are the nearest integers to weights / scale; halves round to even.

  Args:
    w: float, or int8 or int4 with scales.
    scale: Scales of whichever of w and `out` is quantized; None if neither is.
    out: Array to fill, in C order.

  Yields:
    The weights of a block before and after rounding, float32; both may be overwritten.
  """
  for index, block in _filled(w, out):
    layers, _, columns = index
    before = w[index].astype(np.float32)
    factors = np.float32(1) if scale is None else scale[layers, None, columns]
    if is_quantized(w.dtype):
      before *= factors
    if is_quantized(out.dtype):
      after = before / factors
      np.clip(np.rint(after, out=after), *units_range(out.dtype), out=after)
      np.copyto(block, after, casting='unsafe')
      after *= factors
    else:
      block[...] = before
      after = block.astype(np.float32)
    yield before, after


def contiguous(w: Real[np.ndarray, 'L rows out']) -> Real[np.ndarray, 'L rows out']:
  """Return w in C order; w itself if it is already in C order."""
  if w.flags.c_contiguous:
    return w
  out = np.empty(w.shape, w.dtype)
  for index, block in _filled(w, out):
    block[...] = w[index]
  return out


def _filled(
  w: np.ndarray, out: np.ndarray
) -> Iterator[tuple[tuple[slice, slice, slice], np.ndarray]]:
  """Yield the index of each block, and an array to fill with the values of `out` at that index.

  If w is transposed, the array is a small buffer in w's order, copied to `out` when the next block
  is requested. The buffer's rows are padded: matrix sides are often powers of two, so that without
  padding the values of a row compete for few sets of the processor's cache.
  """
  if not _is_transposed(w):
    for index in blocks(w):
      yield index, out[index]
    return
  padding = _CACHE_LINE // out.itemsize
  tile = np.empty((_TILE_COLUMNS, _TILE_ROWS + padding), out.dtype)
  for index in blocks(w):
    to = out[index]
    block = tile[None, : to.shape[2], : to.shape[1]].swapaxes(1, 2)
    yield index, block
    to[...] = block


def dequantize(
  q: Real[np.ndarray, '*lead in out'], scale: Float32[np.ndarray, '...']
) -> Float32[np.ndarray, '*lead in out']:
  """Return the float32 weights of q; `scale` broadcasts: [out], or [L, 1, out]."""
  return q.astype(np.float32) * scale


def squared_errors(
  w: Real[np.ndarray, 'L rows out'], scale: Float32[np.ndarray, 'L out'], dtype: np.dtype = _INT8
) -> Int64[np.ndarray, 'factors L out']:
  """Return the squared error of rounding w to `dtype`, with the scales times each searched factor.

  Returns:
    [factors, L, out] int64: sums over rows, in units of (scale * factor)^2 / SQUARE_UNITS. Sums of
    integers do not depend on how a matrix is cut into blocks, nor on their order.
  """
  out = np.zeros((len(searched(dtype)), w.shape[0], w.shape[2]), np.int64)
  low, high = units_range(dtype)
  for index in blocks(w):
    layers, _, columns = index
    block = w[index].astype(np.float32, copy=False)
    for i, factor in enumerate(searched(dtype)):
      units = block / (scale[layers, None, columns] * np.float32(factor))
      error = units - np.clip(np.rint(units), low, high)
      out[i, layers, columns] += (
        np.rint(error * error * np.float32(SQUARE_UNITS)).astype(np.int64).sum(1)
      )
  return out


def best_scales(
  scale: Float32[np.ndarray, 'L out'],
  errors: Int64[np.ndarray, 'factors L out'],
  dtype: np.dtype = _INT8,
) -> Float32[np.ndarray, 'L out']:
  """Multiply each scale by the factor with the least error, or by the largest such factor."""
  factors = np.asarray(searched(dtype))
  squares = (factors * factors)[:, None, None]
  best = np.argmin(errors * squares, 0)
  return (scale * factors.astype(np.float32)[best]).astype(np.float32)


def rounded_weights(
  w: Real[np.ndarray, 'L rows out'], dtype: np.dtype, search: bool
) -> Float32[np.ndarray, 'L rows out']:
  """Return the weights that w stands for after rounding to `dtype`, with searched scales or not."""
  scale = scales_of(largest(w), dtype)
  if search:
    scale = best_scales(scale, squared_errors(w, scale, dtype), dtype)
  units = np.empty(w.shape, dtype)
  for _ in rounded(w, scale, units):
    pass
  return dequantize(units, scale[:, None])


def blocks(w: np.ndarray) -> Iterator[tuple[slice, slice, slice]]:
  """Yield the indices of blocks of w [L, in, out], each of about _BLOCK_ELEMENTS elements.

  A block has all columns of some rows, unless a column's values lie together in memory, as in the
  weights of torch.nn.Linear. Then a block is a tile: results are written in the other order, and
  those of whole columns would be spread over too many lines of the processor's cache.
  """
  layers, rows, columns = w.shape
  if _is_transposed(w):
    high, wide = _TILE_ROWS, _TILE_COLUMNS
    for i, j, k in itertools.product(range(layers), range(0, columns, wide), range(0, rows, high)):
      yield slice(i, i + 1), slice(k, k + high), slice(j, j + wide)
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


def _is_transposed(w: np.ndarray) -> bool:
  """Return whether the values of a column of w [L, in, out] lie together."""
  return w.strides[1] < w.strides[2]
