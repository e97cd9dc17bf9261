"""Convert the KV cache to and from the nested dict of T5X's decoding functions.

T5X tiles, flattens and reorders rows along one axis of every leaf: axis 1 if layers are stacked,
else axis 0. T5X handles a leaf named cache_index differently, and inconsistently: after a prefill,
beam_search adds a beam axis to cache_index and never flattens it. So the leaf of lengths has
another name here.
"""

from collections.abc import Mapping
from typing import Any

from t5x_inference_ext.model.cache import KVCache
from t5x_inference_ext.quantization.kv import KV, Int8KV
from t5x_inference_ext.t5x.module import STACK
from t5x_inference_ext.t5x.types import Cache

_LENGTHS = 'cached_lengths'
_KEY, _VALUE = 'cached_key', 'cached_value'


def cache_to_t5x(cache: KVCache) -> Cache:
  """Return a KVCache as T5X's nested dict.

  Stacked layers: `cached_key` and `cached_value` [L, B, K, S, Q], `cached_lengths` [1, B].
  Unrolled layers: a dict of [B, K, S, Q] for each layer, `layers_0` and so on, and `cached_lengths`
  [B]. An int8 cache has `cached_key_scale` and `cached_value_scale` beside them.
  """
  keys, values = cache.keys, cache.values
  if isinstance(keys, tuple):
    assert isinstance(values, tuple)
    layers = {f'{STACK}_{i}': _named(k, v) for i, (k, v) in enumerate(zip(keys, values))}
    return {**layers, _LENGTHS: cache.lengths}
  assert not isinstance(values, tuple)
  return {**_named(keys, values), _LENGTHS: cache.lengths[None]}


def cache_from_t5x(cache: Mapping[str, Any]) -> KVCache:
  """Return T5X's nested dict as a KVCache; the inverse of `cache_to_t5x`."""
  if _KEY in cache:
    return KVCache(_kv(cache, _KEY), _kv(cache, _VALUE), cache[_LENGTHS][0])
  layers = [cache[f'{STACK}_{i}'] for i in range(len(cache) - 1)]
  keys, values = (tuple(_kv(layer, name) for layer in layers) for name in (_KEY, _VALUE))
  return KVCache(keys, values, cache[_LENGTHS])


def _named(keys: KV, values: KV) -> Cache:
  """Return a dict of keys and values by T5X's names, with their scales if they are int8."""
  named: Cache = {}
  for name, kv in ((_KEY, keys), (_VALUE, values)):
    if isinstance(kv, Int8KV):
      named |= {name: kv.units, f'{name}_scale': kv.scales}
    else:
      named[name] = kv
  return named


def _kv(named: Mapping[str, Any], name: str) -> KV:
  """Return the keys or the values from a dict of `_named`; `name` is _KEY or _VALUE."""
  scales = named.get(f'{name}_scale')
  return named[name] if scales is None else Int8KV(named[name], scales)
