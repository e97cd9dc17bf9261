"""Int8 rounding at its edges; its contents on whole checkpoints are in tests/checkpoints/convert_test.py."""

import numpy as np
import pytest

from t5x_inference_ext.quantization import rounding


def round_trip(w, scale):
  return rounding.dequantize(rounding.quantize(w, scale), scale)


def test_halves_round_to_even():
  w = np.array([[127.0], [0.5], [1.5], [2.5], [-0.5], [-1.5], [126.5]], np.float32)
  scale = rounding.channel_scales(w)
  assert scale == 1
  np.testing.assert_array_equal(rounding.quantize(w, scale)[:, 0], [127, 0, 2, 2, 0, -2, 126])


def test_extremes_become_127():
  w = np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32) * np.float32(3e-20)
  q = rounding.quantize(w, rounding.channel_scales(w))
  np.testing.assert_array_equal(np.abs(q.astype(int)).max(0), 127)


@pytest.mark.parametrize('value', [1e-45, 1e-40, 1e-38, 1e-30, 1e30, 3e38])
def test_any_magnitude(value):
  """Errors are at most half a step, of at least the smallest normal number, and nothing overflows."""
  w = np.array([[value, 0], [-value / 3, 0]], np.float32)
  scale = rounding.channel_scales(w)
  assert scale[1] == 1 and np.isfinite(scale).all() and (scale > 0).all()
  error = np.abs(round_trip(w, scale).astype(np.float64) - w)
  assert error.max() <= max(value / 127 / 2 * 1.001, np.finfo(np.float32).tiny / 2)
  assert not error[:, 1].any()


def test_shared_scales():
  a, b = np.array([[1.0, 8.0]], np.float32), np.array([[2.0, 4.0], [-3.0, 0.0]], np.float32)
  np.testing.assert_array_equal(
    rounding.channel_scales(a, b), np.array([3, 8], np.float32) / np.float32(127)
  )


def test_blocks_do_not_show(monkeypatch):
  w = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32)
  scale = rounding.channel_scales(w)
  whole = rounding.quantize(w, scale)
  monkeypatch.setattr(rounding, '_BLOCK_ELEMENTS', 21)
  assert len(rounding.row_blocks(w)) == 17
  np.testing.assert_array_equal(rounding.channel_scales(w), scale)
  np.testing.assert_array_equal(rounding.quantize(w, scale), whole)
