"""Both ways to write tokens into the cache, one of them for GPUs, give equal caches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.model import cache as kv_cache
from t5x_inference_ext.model.cache import KVCache
from t5x_inference_ext.quantization.kv import to_cache

B, S, K, Q = 4, 8, 2, 6
LENGTHS = np.asarray([0, S - 1, S, 3], np.int32)  # empty, nearly full, full, and between


def _cache(lead, tokens=1):
  keys, values, new_keys, new_values = (
    jax.random.normal(jax.random.key(i), (*lead, B, K, size, Q))
    for i, size in enumerate((S, S, tokens, tokens))
  )
  return KVCache(keys, values, jnp.asarray(LENGTHS)), new_keys, new_values


@pytest.mark.parametrize(
  'tokens, counts', [(1, None), (1, (1, 1, 1, 0)), (3, None), (3, (3, 1, 2, 0))]
)
@pytest.mark.parametrize('lead', [(), (3,)], ids=['one layer', 'stacked'])
@pytest.mark.parametrize('write', [kv_cache._scatter, kv_cache._row_by_row])
def test_each_row_is_written_at_its_end(write, lead, tokens, counts):
  cache, *new = _cache(lead, tokens)
  written = jax.jit(write)(cache, *new, None if counts is None else np.asarray(counts, np.int32))
  for old, wanted, found in zip((cache.keys, cache.values), new, written):
    expected = np.array(old)
    for row, length in enumerate(LENGTHS):
      count = min(
        S - length, tokens if counts is None else counts[row]
      )  # what finds no room is dropped
      expected[..., row, :, length : length + count, :] = np.asarray(wanted)[..., row, :, :count, :]
    np.testing.assert_array_equal(found, expected)


def test_a_tuple_of_layers_is_appended_to():
  cache, keys, values = _cache(())
  layers = KVCache((cache.keys,) * 2, (cache.values,) * 2, cache.lengths)
  appended = jax.jit(kv_cache.append)(layers, (keys, keys + 1), (values, values + 1))
  np.testing.assert_array_equal(appended.lengths, LENGTHS + 1)
  np.testing.assert_array_equal(appended.keys[1][3, :, 3], keys[3, :, 0] + 1)
  np.testing.assert_array_equal(appended.values[0][0, :, 0], values[0, :, 0])


@pytest.mark.parametrize('tokens', [1, 3, 40])
@pytest.mark.parametrize('size', [64, 72])
@pytest.mark.parametrize('write', [kv_cache._scatter, kv_cache._row_by_row])
def test_units_and_scales_are_written_alike(write, size, tokens):
  """Windows of whole tiles are written where the cache has whole tiles alone."""
  lengths = jnp.asarray([0, 31, size - 1, size])
  keys, values = (jax.random.normal(jax.random.key(i), (2, B, K, size, Q)) for i in range(2))
  new = [jax.random.normal(jax.random.key(2 + i), (2, B, K, tokens, Q)) for i in range(2)]
  counts = np.minimum(tokens, [tokens, 2, tokens, tokens]).astype(np.int32)
  int8 = lambda x: to_cache(x, 'int8')
  found = jax.jit(write)(KVCache(int8(keys), int8(values), lengths), *map(int8, new), counts)
  wanted = map(int8, jax.jit(write)(KVCache(keys, values, lengths), *new, counts))
  jax.tree.map(np.testing.assert_array_equal, tuple(found), tuple(wanted))


def test_gpus_take_the_scatter():
  cache, keys, values = _cache(())
  traced = jax.jit(kv_cache.append).trace(cache, keys, values)
  lowered = {
    platform: traced.lower(lowering_platforms=(platform,)).as_text()
    for platform in ('cuda', 'rocm', 'cpu', 'tpu')
  }
  assert {p: 'stablehlo.scatter' in text for p, text in lowered.items()} == {
    'cuda': True,
    'rocm': True,
    'cpu': False,
    'tpu': False,
  }
