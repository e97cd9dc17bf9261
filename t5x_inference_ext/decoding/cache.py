"""The KV cache: each row has its own length; new tokens are written at the row's end."""

import dataclasses

import jax
from jax import lax
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
  keys, values = lax.platform_dependent(cache, keys, values, cuda=_scatter, rocm=_scatter, default=_row_by_row)
  return KVCache(keys, values, cache.lengths + 1)


def _row_by_row(cache: KVCache, keys, values):
  """In a loop: in place, where a scatter or a masked rewrite makes XLA copy the whole cache every step (CPU)."""

  def write_row(i, kv):
    position = cache.lengths[i]

    def write(x, new):
      lead = (0,) * (x.ndim - 4)
      where = (*lead, i, position, 0, 0)  # dynamic slices stay inside: at the last position, if the row is full
      new = lax.dynamic_slice_in_dim(new, i, 1, len(lead))
      old = lax.dynamic_slice(x, where, new.shape)
      return lax.dynamic_update_slice(x, jnp.where(position < x.shape[-3], new, old), where)

    return jax.tree.map(write, kv, (keys, values))

  return lax.fori_loop(0, cache.lengths.shape[0], write_row, (cache.keys, cache.values))


def _scatter(cache: KVCache, keys, values):
  """All rows at once, in place on a GPU, where a loop would start a kernel for each row, layer, and key or value."""

  def write(x, new):
    where = (*(slice(None),) * (x.ndim - 4), jnp.arange(x.shape[-4]), cache.lengths)
    return x.at[where].set(jnp.squeeze(new, -3), mode='drop', unique_indices=True)

  return jax.tree.map(write, (cache.keys, cache.values), (keys, values))
