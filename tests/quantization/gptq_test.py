"""GPTQ beside the published algorithm in float64, and beside rounding."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from t5x_inference_ext.quantization import gptq

QUANTIZE = jax.jit(gptq.quantize, static_argnums=2)
INT4, INT8 = np.dtype(ml_dtypes.int4), np.dtype(np.int8)


def problem(rows: int, columns: int, seed: int = 0):
  """Weights, and a Hessian of correlated inputs."""
  rng = np.random.default_rng(seed)
  inputs = rng.normal(size=(4 * rows, rows)) @ rng.normal(size=(rows, rows))
  inputs *= rng.uniform(0.1, 2, rows)
  return rng.normal(size=(rows, columns)), inputs.T @ inputs / len(inputs)


def quantize(w, h, dtype):
  """The units, scales and losses in float64."""
  found = QUANTIZE(jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32), dtype, 0.01)
  return [np.asarray(x, np.float64) for x in found]


def published(w, h, scale, low, high):
  """Algorithm 1 of arXiv 2210.17323: by the upper Cholesky factor of H's inverse."""
  w, units = w.copy(), np.zeros_like(w)
  upper = np.linalg.cholesky(np.linalg.inv(h)).T
  for i in range(len(w)):
    units[i] = np.clip(np.round(w[i] / scale), low, high)
    error = (w[i] - units[i] * scale) / upper[i, i]
    w[i:] -= upper[i, i:, None] * error
  return units


def loss(w, units, scale, h):
  error = w - units * scale
  return np.einsum('ic,ij,jc->c', error, h, error)


@pytest.mark.parametrize('rows', [5, 128, 300])  # within a block, one block, several with padding
def test_the_published_algorithm(rows):
  w, h = problem(rows, 7)
  h += 0.01 * np.eye(rows) * np.diag(h).mean()
  scale = np.abs(w).max(0) / 7
  factor = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
  arguments = (jnp.asarray(a, jnp.float32) for a in (w, scale, factor))
  found = np.asarray(gptq.rounded_by_factor(*arguments, INT4))
  expected = published(w, h, scale, -8, 7)
  # In float32 a value may fall on the other side of a half, and then what follows differs too.
  assert (found == expected).mean() > 0.99
  np.testing.assert_allclose(loss(w, found, scale, h), loss(w, expected, scale, h), rtol=0.02)


@pytest.mark.parametrize('dtype, low, high', [(INT4, -8, 7), (INT8, -127, 127)])
def test_less_error_than_rounding(dtype, low, high):
  w, h = problem(96, 40)
  units, scale, relative = quantize(w, h, dtype)
  assert (units == np.round(units)).all() and low <= units.min() and units.max() <= high
  plain = np.abs(w).max(0) / high
  rounded = np.clip(np.round(w / plain), low, high)
  mine = loss(w, units, scale, h)
  assert mine.sum() < 0.5 * loss(w, rounded, plain, h).sum()
  clean = np.einsum('ic,ij,jc->c', w, h, w)
  np.testing.assert_allclose(relative, mine / clean, rtol=0.02)


def test_exact_weights_stay_exact():
  """Units times a scale come back, also in channels of zeros and for inputs that never occur."""
  _, h = problem(32, 1)
  h[5] = h[:, 5] = 0
  units = np.random.default_rng(1).integers(-7, 8, (32, 6)).astype(np.float32)
  units[0] = 7
  units[:, 2] = 0
  scale = np.float32([0.5, 0.25, 1, 2, 1 / 8, 4])
  found, scales, relative = quantize(units * scale, h, INT4)
  seen = np.arange(32) != 5
  np.testing.assert_allclose((found * scales)[seen], (units * scale)[seen], rtol=1e-5)
  assert relative.max() < 1e-9 and np.isfinite(scales).all()


def test_nan_for_an_impossible_factor():
  w, h = problem(8, 2)
  units, _, _ = quantize(w, -h, INT4)
  assert np.isnan(units).any()
