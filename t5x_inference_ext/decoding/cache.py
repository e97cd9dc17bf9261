"""The KV cache: each row has its own length; new tokens are written at the row's end."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys (rotated) and values of all layers.

  Attributes:
    keys, values: [L, B, S, K, Q], or a tuple of L arrays [B, S, K, Q] where the layers are unrolled.
    lengths: [B] int32, the positions of each row that are filled.
  """

  keys: jax.Array | tuple[jax.Array, ...]
  values: jax.Array | tuple[jax.Array, ...]
  lengths: jax.Array

  @property
  def size(self) -> int:
    """S, the positions that each row has room for."""
    return jax.tree.leaves(self.keys)[0].shape[-3]


def start(keys, values, lengths: jax.Array, size: int) -> KVCache:
  """A cache of `size` positions holding a prefill's keys and values [.., B, T, K, Q], of which lengths [B] count."""

  def grow(x):
    padding = [(0, 0)] * x.ndim
    padding[-3] = (0, size - x.shape[-3])
    return jnp.pad(x, padding)

  return KVCache(jax.tree.map(grow, keys), jax.tree.map(grow, values), lengths)


def append(cache: KVCache, keys, values) -> KVCache:
  """Writes one token's keys and values [.., B, 1, K, Q] at each row's end; a full row drops its write."""
  size = cache.size
  here = (jnp.arange(size)[None, :] == cache.lengths[:, None])[:, :, None, None]  # [B, S, 1, 1]

  def write(x, new):
    return jnp.where(here.reshape((1,) * (x.ndim - 4) + here.shape), new, x)

  return KVCache(
      jax.tree.map(write, cache.keys, keys), jax.tree.map(write, cache.values, values), cache.lengths + 1)
