"""Attention against plain numpy, with and without a context, for one key head and for several."""

import numpy as np
import pytest

from t5x_inference_ext.layers.attention import Context, attend


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
  k, v = rng.normal(size=(2, b, new, kv_heads, d)).astype(np.float32)
  context, lengths = None, [0] * b
  if cached:
    lengths = [0, 3]  # an empty row, and one filled in part: what lies beyond must not be seen
    keys, values = rng.normal(size=(2, b, cached, kv_heads, d)).astype(np.float32)
    context = Context(keys, values, np.asarray(lengths, np.int32))
  out = np.asarray(attend(q, k, v, context))
  for i, length in enumerate(lengths):
    past = (keys[i, :length], values[i, :length]) if cached else (k[i, :0], v[i, :0])
    all_k, all_v = (np.repeat(np.concatenate([p, x[i]]), h // kv_heads, axis=1) for p, x in zip(past, (k, v)))
    visible = np.concatenate([np.ones((new, length), bool), np.tril(np.ones((new, new), bool))], axis=1)
    np.testing.assert_allclose(out[i], _numpy(q[i], all_k, all_v, visible), atol=1e-6)
