"""The int8 matmul equals that of the dequantized weights, as exactly as its dtype allows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.quantization import int8


def operands(*shape):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(*shape, 16))
  w = rng.integers(-127, 128, (16, 24))
  scale = (rng.random(24) + 0.1) / 127
  return jnp.float32(x), jnp.int8(w), jnp.float32(scale)


@pytest.mark.parametrize('shape', [(1,), (3,), (1, 1), (2, 3)])
def test_scales_belong_to_output_channels(shape):
  x, w, scale = operands(*shape)
  np.testing.assert_allclose(jax.jit(int8.matmul)(x, w, scale), x @ (w * scale[None]), atol=1e-5)
  np.testing.assert_allclose(
    int8.rescale(int8.matmul(x, w), scale), x @ (w * scale[None]), atol=1e-5
  )


def test_float_weights_need_no_scale():
  x, w, _ = operands(3)
  w = w.astype(np.float32) / 127
  np.testing.assert_allclose(int8.matmul(x, w), x @ w, atol=1e-5)


def test_a_transposed_matrix():
  x, w, _ = operands(2, 3)
  np.testing.assert_allclose(int8.matmul(x, w.T, transposed=True), x @ w, rtol=1e-5)


@pytest.mark.parametrize('rows', [1, 2])
def test_a_single_row_is_two_on_a_tpu_alone(rows, monkeypatch):
  x, w, scale = operands(rows)
  lowered = jax.jit(int8.matmul).trace(x, w, scale).lower(lowering_platforms=('tpu',)).as_text()
  assert 'tensor<2x16xf32>' in lowered
  assert ('tensor<2x16xf32>' in jax.jit(int8.matmul).lower(x, w, scale).as_text()) == (rows == 2)
  monkeypatch.setattr(
    jax.lax, 'platform_dependent', lambda *arguments, tpu, default: tpu(*arguments)
  )
  np.testing.assert_allclose(int8.matmul(x, w, scale), x @ (w * scale[None]), atol=1e-5)


def test_int8_is_exact_in_bfloat16():
  """Every integer of an int8 weight survives: one-hot inputs pick them out."""
  w = jnp.arange(-128, 128).astype(jnp.int8).reshape(16, 16)
  y = int8.matmul(jnp.eye(16, dtype=jnp.bfloat16), w)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(y, np.float32), w)


def test_bfloat16_activations():
  x, w, scale = operands(2, 3)
  y = int8.matmul(jnp.asarray(x, jnp.bfloat16), w, scale)
  assert y.dtype == jnp.bfloat16
  # 8 bits of x, of the product and of the result.
  np.testing.assert_allclose(
    np.asarray(y, np.float32),
    x @ (w * scale[None]),
    atol=3 * 2**-8 * np.abs(x @ (w * scale[None])).max(),
  )


def test_scales_are_applied_in_float32():
  """In bfloat16 the scale would lose 16 of its bits: 1 + 2**-8 would be 1, and the result 384."""
  y = int8.rescale(jnp.full((1, 1), 384, jnp.bfloat16), jnp.full(1, 1 + 2**-8, jnp.float32))
  assert float(y[0, 0]) == 386
