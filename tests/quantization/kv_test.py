"""Keys and values as int8: units, scales, and attention over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.model.attention import Context, attend
from t5x_inference_ext.model.paged_attention import PagedContext, attend_pages
from t5x_inference_ext.quantization.kv import Int8KV, empty_kv, to_cache


def dequantized(kv):
  return np.asarray(kv.units, np.float32) * kv.scales


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_each_position_and_head_has_its_own_scale(dtype):
  x = (
    jax.random.normal(jax.random.key(0), (3, 5, 2, 16), dtype)
    * jnp.asarray([1e-30, 1.0, 1e30], dtype)[:, None, None, None]
  )
  kv = to_cache(x, 'int8')
  assert (kv.units.dtype, kv.units.shape, kv.shape) == (np.int8, x.shape, x.shape)
  assert (kv.scales.dtype, kv.scales.shape) == (np.float32, (3, 5, 2, 1))
  np.testing.assert_array_equal(np.abs(kv.units).max(-1), 127)
  x = np.asarray(x, np.float32)
  assert (np.abs(dequantized(kv) - x) <= 0.501 * np.asarray(kv.scales)).all()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_zeros_stay_zeros_and_all_else_is_finite(dtype):
  """And so are sums of it: float32's largest would be infinite in bfloat16."""
  x = np.zeros((1, 5, 1, 4), np.float32)
  x[0, 1, 0, 2] = np.nan
  x[0, 2] = np.inf
  x[0, 3, 0, :2] = -np.inf, np.finfo(np.float32).max
  x[0, 4] = 2e31
  kv = to_cache(jnp.asarray(x), dtype)
  values = dequantized(kv) if dtype == 'int8' else np.asarray(kv, np.float32)
  np.testing.assert_array_equal(values[0, 0], 0)
  np.testing.assert_allclose(values[0, 4], 2e31, rtol=1e-2)
  for held in jax.tree.leaves(kv):
    for sums in (held.astype(jnp.float32), held.astype(jnp.bfloat16)):
      assert np.isfinite(np.asarray(sums, np.float32) * 2**23).all()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_float_cache_is_of_its_dtype(dtype):
  assert to_cache(jnp.ones((1, 2, 1, 4)), dtype).dtype == dtype


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('kv_heads', [1, 2])
def test_attention_is_that_over_what_the_units_stand_for(kv_heads, shared):
  rng = np.random.default_rng(0)
  b, t, h, d, s, p = 3, 2, 4, 8, 5, 3
  q = jnp.asarray(rng.normal(size=(b, t, h, d)), jnp.float32)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  new, cached = (to_cache(normal(2, b, kv_heads, n, d), 'int8') for n in (t, s))
  begins = to_cache(normal(2, kv_heads, p, d) * 3, 'int8')
  lengths, common = jnp.array([0, 5, 2]), jnp.array([3, 0, 2])
  seen = jnp.arange(p)[None, :] < common[:, None]  # of shared pages of one position

  def attention(form):
    keys, values = form(cached, 0), form(cached, 1)
    if not shared:
      return attend(q, form(new, 0), form(new, 1), Context(keys, values, lengths))
    own = keys, values, lengths + common, jnp.arange(b), common
    context = PagedContext(*own, form(begins, 0), form(begins, 1), seen, jnp.arange(p))
    return attend_pages(q, form(new, 0), form(new, 1), context)

  found = attention(lambda kv, i: Int8KV(kv.units[i], kv.scales[i]))
  np.testing.assert_allclose(found, attention(lambda kv, i: dequantized(kv)[i]), atol=1e-6)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_an_empty_cache_is_that_of_zeros(dtype):
  found, wanted = empty_kv((2, 3, 1, 4), dtype), to_cache(jnp.zeros((2, 3, 1, 4)), dtype)
  assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, wanted)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
