"""The KV cache: each row has its own length, and grows at its end. What begins alike is stored once.

Keys and values are floats or int8 with scales (quantization.kv): all here is done to each array of them alike.
"""

import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from t5x_inference_ext.model.attention import Context
from t5x_inference_ext.quantization.kv import KV, tile_positions, whole_tiles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
  """The first positions of rows that begin alike.

  Attributes:
    keys, values: [L, P, K, Q], or a tuple of L arrays [P, K, Q].
    lengths: [B] int32: each row begins with so many of them; 0 for a row that shares nothing.
  """

  keys: KV | tuple[KV, ...]
  values: KV | tuple[KV, ...]
  lengths: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys (rotated) and values of all layers.

  Attributes:
    keys, values: [L, B, S, K, Q], or a tuple of L arrays [B, S, K, Q] where the layers are unrolled.
    lengths: [B] int32, the positions of each row that are filled.
    shared: what comes before these positions, or None: nothing.
  """

  keys: KV | tuple[KV, ...]
  values: KV | tuple[KV, ...]
  lengths: jax.Array
  shared: Shared | None = None

  @property
  def size(self) -> int:
    """S, the positions that each row has room for, beside what it shares."""
    return jax.tree.leaves(self.keys)[0].shape[-3]

  @property
  def positions(self) -> jax.Array:
    """[B] int32, the position in its sequence of each row's next token."""
    return self.lengths if self.shared is None else self.lengths + self.shared.lengths


def start(keys, values, lengths: jax.Array, size: int) -> KVCache:
  """A cache of `size` positions holding a prefill's keys and values [.., B, T, K, Q], of which lengths [B] count."""
  size = whole_tiles(size, jax.tree.leaves(keys)[0].dtype)

  def grow(x):
    padding = [(0, 0)] * x.ndim
    padding[-3] = (0, size - x.shape[-3])
    return jnp.pad(x, padding)

  return KVCache(jax.tree.map(grow, keys), jax.tree.map(grow, values), lengths)


def layers(cache: KVCache) -> Any:
  """What `context` takes, of all layers: with a leading L, or a tuple where the layers are unrolled."""
  parts = [cache.keys, cache.values]
  if cache.shared is not None:
    parts += [cache.shared.keys, cache.shared.values]
  return tuple(zip(*parts)) if isinstance(cache.keys, tuple) else tuple(parts)


def context(cache: KVCache, layer: Any) -> Context:
  """What one layer's attention sees, of its part of `layers`."""
  if cache.shared is None:
    return Context(*layer, cache.lengths)
  keys, values, *shared = layer
  return Context(keys, values, cache.lengths, *shared, cache.shared.lengths)


def append(cache: KVCache, keys, values, counts: jax.Array | None = None) -> KVCache:
  """Writes new tokens' keys and values [.., B, T, K, Q] at each row's end; what finds no room there is dropped.

  Args:
    cache: with at least T positions.
    keys, values: of the new tokens.
    counts: [B] int32, how many of the T are the row's, from the first; None: all.
  """
  tokens = jax.tree.leaves(keys)[0].shape[-3]
  keys, values = lax.platform_dependent(
    cache, keys, values, counts, cuda=_scatter, rocm=_scatter, default=_row_by_row
  )
  return dataclasses.replace(
    cache, keys=keys, values=values, lengths=cache.lengths + (tokens if counts is None else counts)
  )


def _row_by_row(cache: KVCache, keys, values, counts):
  """In a loop: in place, where a scatter or a masked rewrite makes XLA copy the whole cache every step (CPU)."""
  tokens = jax.tree.leaves(keys)[0].shape[-3]

  def write_row(i, kv):
    position = cache.lengths[i]
    count = tokens if counts is None else counts[i]

    def write(x, new):
      lead, size, tile = (0,) * (x.ndim - 4), x.shape[-3], tile_positions(x.dtype)
      tile = 1 if size % tile else tile
      # A window of whole tiles around the new positions, which stays inside: of the rest of it what is there is written.
      # The product comes last: then the compiler sees that the window begins at a tile.
      width = min(size, -(-(tokens + tile - 1) // tile) * tile)
      first = jnp.minimum(position // tile, (size - width) // tile) * tile
      late, at = position - first, jnp.arange(width).reshape(*(1,) * (len(lead) + 1), width, 1, 1)
      where = (*lead, i, first, 0, 0)
      new = lax.dynamic_slice_in_dim(new, i, 1, len(lead))
      old = lax.dynamic_slice(x, where, (*new.shape[:-3], width, *new.shape[-2:]))
      if tokens > 1:
        padding = [(0, 0)] * x.ndim
        padding[-3] = (0, width - tokens)
        new = jnp.roll(jnp.pad(new, padding), late, axis=-3)
      return lax.dynamic_update_slice(
        x, jnp.where((at >= late) & (at < late + count), new, old), where
      )

    return jax.tree.map(write, kv, (keys, values))

  return lax.fori_loop(0, cache.lengths.shape[0], write_row, (cache.keys, cache.values))


def _scatter(cache: KVCache, keys, values, counts):
  """All rows at once, in place on a GPU, where a loop would start a kernel for each row, layer, and key or value."""
  tokens = jax.tree.leaves(keys)[0].shape[-3]
  positions = cache.lengths[:, None] + jnp.arange(tokens)[None, :]  # [B, T]
  if counts is not None:  # others go nowhere
    positions = jnp.where(jnp.arange(tokens)[None, :] < counts[:, None], positions, cache.size)
  rows = jnp.arange(cache.lengths.shape[0])[:, None]

  def write(x, new):
    return x.at[(*(slice(None),) * (x.ndim - 4), rows, positions)].set(new, mode='drop')

  return jax.tree.map(write, (cache.keys, cache.values), (keys, values))


def local_row(cache: KVCache, row: jax.Array | int) -> KVCache:
  """One row, as a cache of one."""
  rows = lambda x: lax.dynamic_slice_in_dim(x, row, 1, x.ndim - 4)
  one = lambda x: lax.dynamic_slice_in_dim(x, row, 1, 0)
  shared = cache.shared and dataclasses.replace(cache.shared, lengths=one(cache.shared.lengths))
  return KVCache(
    jax.tree.map(rows, cache.keys), jax.tree.map(rows, cache.values), one(cache.lengths), shared
  )


def with_local_row(cache: KVCache, row: jax.Array | int, one: KVCache) -> KVCache:
  """The cache with a cache of one, no longer than it, in the place of a row. Both share the same, or nothing."""
  put = lambda x, new: lax.dynamic_update_slice(x, new, (*(0,) * (x.ndim - 4), row, 0, 0, 0))
  where = lambda x, new: lax.dynamic_update_slice(x, new, (row,))
  shared = cache.shared and dataclasses.replace(
    cache.shared, lengths=where(cache.shared.lengths, one.shared.lengths)
  )
  return KVCache(
    jax.tree.map(put, cache.keys, one.keys),
    jax.tree.map(put, cache.values, one.values),
    where(cache.lengths, one.lengths),
    shared,
  )


def with_heads(x: jax.Array, held: tuple, wanted: tuple) -> jax.Array:
  """[.., K, Q] with the key heads, and the copies and padding among them, that another placement has (heads.cached())."""
  if held == wanted:
    return x
  return jnp.take(x, jnp.asarray([0 if h is None else held.index(h) for h in wanted]), axis=-2)
