"""Int8 rounding at its edges; tests/checkpoints/convert_test.py has whole checkpoints."""

import ml_dtypes
import numpy as np
import pytest

from t5x_inference_ext.checkpoints.conversion.rounding_error import RoundingError
from t5x_inference_ext.quantization import rounding


def scales(*matrices):
  """[out] scales that matrices [in, out] share."""
  return rounding.scales_of(np.maximum.reduce([rounding.largest(w[None])[0] for w in matrices]))


def quantize(w, scale):
  return round_layers(w[None], scale[None])[0]


def round_layers(w, scale, dtype=np.int8):
  return RoundingError().round(w, scale, np.dtype(dtype), 0.0)


def test_halves_round_to_even():
  w = np.array([[127.0], [0.5], [1.5], [2.5], [-0.5], [-1.5], [126.5]], np.float32)
  scale = scales(w)
  assert scale == 1
  np.testing.assert_array_equal(quantize(w, scale)[:, 0], [127, 0, 2, 2, 0, -2, 126])


def test_extremes_become_127():
  w = np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32) * np.float32(3e-20)
  q = quantize(w, scales(w))
  np.testing.assert_array_equal(np.abs(q.astype(int)).max(0), 127)


@pytest.mark.parametrize('value', [1e-45, 1e-40, 1e-38, 1e-30, 1e30, 3e38])
def test_any_magnitude(value):
  """Errors are at most half a step (at least the smallest normal number); nothing overflows."""
  w = np.array([[value, 0], [-value / 3, 0]], np.float32)
  scale = scales(w)
  assert scale[1] == 1 and np.isfinite(scale).all() and (scale > 0).all()
  error = np.abs(rounding.dequantize(quantize(w, scale), scale).astype(np.float64) - w)
  assert error.max() <= max(value / 127 / 2 * 1.001, np.finfo(np.float32).tiny / 2)
  assert not error[:, 1].any()


def test_shared_scales():
  a, b = np.array([[1.0, 8.0]], np.float32), np.array([[2.0, 4.0], [-3.0, 0.0]], np.float32)
  np.testing.assert_array_equal(scales(a, b), np.array([3, 8], np.float32) / np.float32(127))


def test_blocks_do_not_show(monkeypatch):
  w = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32)
  scale = scales(w)
  whole = quantize(w, scale)
  monkeypatch.setattr(rounding, '_BLOCK_ELEMENTS', 21)
  assert len([*rounding.blocks(w[None])]) == 17
  np.testing.assert_array_equal(scales(w), scale)
  np.testing.assert_array_equal(quantize(w, scale), whole)


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize('written', [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize('order', [(0, 1, 2), (0, 2, 1)])
def test_what_is_written_lies_in_c_order(monkeypatch, dtype, written, order):
  monkeypatch.setattr(rounding, '_BLOCK_ELEMENTS', 600)
  monkeypatch.setattr(rounding, '_TILE_ROWS', 40)
  monkeypatch.setattr(rounding, '_TILE_COLUMNS', 15)
  w = np.random.default_rng(0).standard_normal((3, 50, 70)).astype(dtype).transpose(order)
  found = round_layers(w, None, written)
  assert found.flags.c_contiguous and found.dtype == written
  np.testing.assert_array_equal(found, w.astype(written))
  assert (found is w) == (written == dtype and order == (0, 1, 2))


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_the_order_in_memory_does_not_show(dtype):
  """Columns whose values lie together, as in a transposed matrix: several tiles of them."""
  w = np.random.default_rng(0).standard_normal((2, 1200, 700)).astype(dtype)
  transposed = np.ascontiguousarray(w.swapaxes(1, 2)).swapaxes(1, 2)
  assert len([*rounding.blocks(transposed)]) == 2 * 3 * 6
  maxima = rounding.largest(w)
  np.testing.assert_array_equal(maxima, np.abs(w.astype(np.float32)).max(1))
  np.testing.assert_array_equal(rounding.largest(transposed), maxima, strict=True)
  scale = rounding.scales_of(maxima)
  np.testing.assert_array_equal(
    rounding.squared_errors(transposed, scale), rounding.squared_errors(w, scale)
  )
  for used, written in ((scale, np.int8), (None, ml_dtypes.bfloat16), (None, np.float32)):
    found, wanted = RoundingError(), RoundingError()
    np.testing.assert_array_equal(
      found.round(transposed, used, np.dtype(written), 1.0),
      wanted.round(w, used, np.dtype(written), 1.0),
      strict=True,
    )
    assert (found.largest, found.magnitude) == (wanted.largest, wanted.magnitude)
    np.testing.assert_allclose(
      [found.squares, found.norm], [wanted.squares, wanted.norm], rtol=1e-5
    )


def test_largest_of_special_values():
  w = np.array([[0.0, -0.0, -np.inf, np.nan, 3e38], [-2.0, 0.0, 1.0, 9.0, -3.1e38]])[None]
  w = w.astype(ml_dtypes.bfloat16)
  wanted = np.abs(w.astype(np.float32)).max(1)
  np.testing.assert_array_equal(rounding.largest(w), wanted)
  assert np.isnan(wanted[0, 3]) and np.isinf(wanted[0, 2])
