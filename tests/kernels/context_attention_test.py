"""The kernel of attention to a cache, in JAX's interpreter, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.kernels import context_attention
from t5x_inference_ext.kernels.context_attention import attend_to_context, page_blocks, row_blocks
from t5x_inference_ext.quantization.kv import to_cache

# Rows, key heads, queries of each, head dimension, positions: one block and several, whole and cut,
# few queries and more than one tile of them.
SHAPES = [
  (2, 1, 6, 16, 40),
  (3, 1, 48, 32, 1100),
  (1, 3, 20, 128, 513),
  (4, 1, 600, 16, 64),
  (1, 1, 1, 8, 1536),
  (2, 4, 1, 16, 600),
]


def _floats(kv):
  """Keys or values as float32."""
  return np.asarray(kv if isinstance(kv, jax.Array) else kv.units * kv.scales)


def _check(partial, q, keys, values):
  """Compare one row's partial softmax with numpy's: q [k, n, q], keys and values [k, s, q]."""
  out, largest, total = map(np.asarray, partial)
  if not keys.shape[1]:
    assert not out.any() and not total.any() and (largest == -1e30).all()
    return
  logits = q @ keys.swapaxes(1, 2)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  np.testing.assert_allclose(largest, logits.max(-1), rtol=1e-5)
  np.testing.assert_allclose(total, weights.sum(-1), rtol=1e-4)
  np.testing.assert_allclose(out, weights @ values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', ['float32', 'int8'])
@pytest.mark.parametrize('shape', SHAPES, ids=lambda s: 'x'.join(map(str, s)))
def test_rows_of_any_length_are_those_of_numpy(shape, dtype):
  (b, k, n, d, s), rng = shape, np.random.default_rng(sum(shape))
  q = rng.normal(size=(b, k, n, d)).astype(np.float32)
  keys, values = (to_cache(jnp.asarray(rng.normal(size=(b, k, s, d))), dtype) for _ in range(2))
  lengths = rng.integers(1, s + 1, b)
  lengths[0] = s if b == 1 else 0
  partial = attend_to_context(
    jnp.asarray(q), keys, values, jnp.asarray(lengths, jnp.int32), row_blocks(b, s), interpret=True
  )
  for row, length in enumerate(lengths):
    mine = (x[row] for x in partial)
    _check(mine, q[row], _floats(keys)[row, :, :length], _floats(values)[row, :, :length])


@pytest.mark.parametrize('seed', range(4))
def test_pages_in_any_order_are_those_of_their_rows(seed):
  rng, size, d, n, k = np.random.default_rng(seed), 32, 16, 5, 1 + seed % 2
  lengths = rng.integers(0, 5 * size, 4)
  pages = [(row, at) for row, length in enumerate(lengths) for at in range(0, length, size)]
  pages += [(0, 2**30)] * int(rng.integers(0, 3))  # pages that no row owns
  order = rng.permutation(len(pages))
  owners, starts = (np.array([pages[i][k] for i in order], np.int32) for k in (0, 1))
  q = rng.normal(size=(4, k, n, d)).astype(np.float32)
  keys, values = (
    jnp.asarray(rng.normal(size=(len(pages), k, size, d)), jnp.float32) for _ in range(2)
  )
  blocks = page_blocks(jnp.asarray(owners), jnp.asarray(starts), size)
  partial = attend_to_context(
    jnp.asarray(q), keys, values, jnp.asarray(lengths, jnp.int32), blocks, interpret=True
  )
  for row, length in enumerate(lengths):
    mine = sorted(np.flatnonzero((owners == row) & (starts < length)), key=lambda i: starts[i])
    of_row = (
      np.concatenate([_floats(x)[i] for i in mine] or [np.zeros((k, 0, d))], axis=1)[:, :length]
      for x in (keys, values)
    )
    _check((x[row] for x in partial), q[row], *of_row)


def test_what_lies_beyond_a_row_or_in_another_one_is_not_seen():
  """NaN beyond a row's end, in the block that its end lies in, would show."""
  keys = jnp.ones((2, 1, 1000, 8)).at[0, :, 600:].set(jnp.nan).at[1].set(jnp.nan)
  q, lengths = jnp.ones((2, 1, 3, 8)), jnp.array([600, 0], jnp.int32)
  blocks = row_blocks(2, 1000)
  out, _, total = attend_to_context(q, keys, keys, lengths, blocks, interpret=True)
  assert np.isfinite(np.asarray(total)).all() and not np.asarray(total)[1].any()
  np.testing.assert_allclose(np.asarray(out)[0] / np.asarray(total)[0, ..., None], 1, rtol=1e-5)


def test_a_broken_query_breaks_its_own_row_alone():
  rng = np.random.default_rng(0)
  q, keys = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 1, 3, 8), (2, 1, 40, 8)))
  args = keys, keys, jnp.array([40, 40], jnp.int32), row_blocks(2, 40)
  sound = attend_to_context(q, *args, interpret=True)
  broken = attend_to_context(q.at[0].set(jnp.nan), *args, interpret=True)
  assert np.isnan(np.asarray(broken.out)[0]).all()
  for x, y in zip(sound, broken):
    np.testing.assert_array_equal(np.asarray(x)[1], np.asarray(y)[1])


@pytest.mark.parametrize(
  'rows,queries,tile', [(1, 3, 16), (8, 48, 48), (8, 9000, 192), (400, 9, 16)]
)
def test_a_tile_of_queries_leaves_room_in_vector_memory(rows, queries, tile):
  assert context_attention._query_tile(rows, queries, 256) == tile
