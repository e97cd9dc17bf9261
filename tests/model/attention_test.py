"""Attention against plain numpy, with and without a context, for one key head and for several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.model import attention
from t5x_inference_ext.model.attention import Context, attend
from t5x_inference_ext.model.paged_attention import PagedContext, attend_pages


def _numpy(q, k, v, visible):
  """q [T, H, Q], k and v [S, H, Q], visible [T, S] -> [T, H, Q]."""
  logits = np.einsum('thd,shd->hts', q, k) / np.sqrt(q.shape[-1])
  weights = np.exp(np.where(visible, logits, -np.inf))
  return np.einsum('hts,shd->thd', weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize('new', [1, 3])
@pytest.mark.parametrize('kv_heads', [1, 2])
@pytest.mark.parametrize('cached', [0, 5])
def test_a_token_sees_its_context_and_what_comes_before_it(new, kv_heads, cached):
  b, h, d, rng = 2, 4, 6, np.random.default_rng(0)
  q = rng.normal(size=(b, new, h, d)).astype(np.float32)
  k, v = rng.normal(size=(2, b, kv_heads, new, d)).astype(np.float32)
  context, lengths = None, [0] * b
  if cached:
    lengths = [0, 3]  # an empty row, and one filled in part: what lies beyond must not be seen
    keys, values = rng.normal(size=(2, b, kv_heads, cached, d)).astype(np.float32)
    context = Context(*map(jnp.asarray, (keys, values, np.asarray(lengths, np.int32))))
  out = np.asarray(attend(*map(jnp.asarray, (q, k, v)), context))
  for i, length in enumerate(lengths):
    past = (keys[i, :, :length], values[i, :, :length]) if cached else (k[i, :, :0], v[i, :, :0])
    all_k, all_v = (
      np.repeat(np.concatenate([p, x[i]], axis=1), h // kv_heads, axis=0).swapaxes(0, 1)
      for p, x in zip(past, (k, v))
    )
    visible = np.concatenate(
      [np.ones((new, length), bool), np.tril(np.ones((new, new), bool))], axis=1
    )
    np.testing.assert_allclose(out[i], _numpy(q[i], all_k, all_v, visible), atol=1e-6)


@pytest.mark.parametrize('pages', [False, True])
def test_a_single_query_of_a_key_head_is_padded_on_tpus_alone(pages, monkeypatch):
  """The matrix unit multiplies matrices: what it gives is what others compute."""
  rng, (b, h, d, s) = np.random.default_rng(0), (2, 3, 8, 64)
  q, k, v = (
    jnp.asarray(rng.normal(size=(b, *shape)), jnp.float32)
    for shape in ((1, h, d), (h, 1, d), (h, 1, d))
  )
  keys, values = jnp.asarray(rng.normal(size=(2, b, h, s, d)), jnp.float32)
  lengths = jnp.asarray([50, 64], jnp.int32)
  context = Context(keys, values, lengths)
  if pages:
    owners, starts = jnp.arange(b), jnp.zeros(b, jnp.int32)
    context = PagedContext(keys, values, lengths, owners, starts)
  run = jax.jit(attend_pages if pages else attend)
  found = {}
  for platform in ('tpu', 'cpu'):
    lowered = run.trace(q, k, v, context).lower(lowering_platforms=(platform,))
    found[platform] = lowered.as_text().count(f'{b}x{h}x{attention.PADDED_QUERIES}x')
  assert found['tpu'] > 4 and found['cpu'] == 0
  wanted = run(q, k, v, context)
  monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *x, tpu, default: tpu(*x))
  padded = jax.jit(lambda *x: (attend_pages if pages else attend)(*x))(q, k, v, context)
  np.testing.assert_allclose(padded, wanted, atol=1e-6)


@pytest.mark.parametrize('limit', [1, 2 * 3 * 4 * 9, 3 * 3 * 4 * 9])
@pytest.mark.parametrize('cached', [False, True])
def test_rows_in_several_passes_are_the_same(monkeypatch, limit, cached):
  """Where logits would be too large: one row of five at a time, or a few."""
  rng = np.random.default_rng(0)
  b, t, h, k, d, s = 5, 3, 4, 2, 8, 6
  shapes = (b, t, h, d), (b, k, t, d), (b, k, t, d)
  q, keys, values = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
  context = None
  if cached:
    kv = jnp.asarray(rng.normal(size=(2, b, k, s, d)), jnp.float32)
    context = Context(*kv, jnp.array([0, 6, 3, 1, 2]))
  whole = attend(q, keys, values, context)
  monkeypatch.setattr(attention, 'MAX_ATTENTION_LOGITS', limit)
  jaxpr = jax.make_jaxpr(attend)(q, keys, values, context)
  assert 'scan' in str(jaxpr)
  np.testing.assert_allclose(attend(q, keys, values, context), whole, atol=1e-6)


@pytest.mark.parametrize('kv_heads', [1, 2])
def test_what_rows_share_is_as_if_each_had_it(kv_heads):
  """Each row sees its own part of it, the first positions, in shared pages of one position."""
  rng = np.random.default_rng(0)
  b, t, h, d, s, p = 5, 3, 4, 8, 6, 4
  shapes = (b, t, h, d), (b, kv_heads, t, d), (b, kv_heads, t, d)
  q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
  own, shared = rng.normal(size=(2, b, kv_heads, s, d)), rng.normal(size=(2, kv_heads, p, d))
  lengths, common = np.array([0, 6, 3, 1, 2], np.int32), np.array([4, 0, 2, 3, 4], np.int32)
  each = np.zeros((2, b, kv_heads, p + s, d), np.float32)
  for row in range(b):
    n, m = common[row], lengths[row]
    each[:, row, :, :n] = shared[:, :, :n]
    each[:, row, :, n : n + m] = own[:, row, :, :m]
  total = jnp.asarray(lengths + common)
  wanted = attend(q, k, v, Context(*map(jnp.asarray, each), total))
  own, shared = (jnp.asarray(x, jnp.float32) for x in (own, shared))
  seen = jnp.arange(p)[None, :] < common[:, None]
  context = PagedContext(
    *own, total, jnp.arange(b), jnp.asarray(common), *shared, seen, jnp.arange(p)
  )
  np.testing.assert_allclose(attend_pages(q, k, v, context), wanted, atol=1e-5)
