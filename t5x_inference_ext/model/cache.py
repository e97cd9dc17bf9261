"""The KV cache of a static batch: each row has its own length, and new tokens go to its end.

Keys and values are floats, or int8 with scales (quantization.kv.Int8KV). Functions map over the
arrays of a pytree, so they work for both. Heads come before positions, as in attention's products:
with heads between positions and features, XLA:TPU would copy the cache into another layout.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Int

from t5x_inference_ext.model.attention import Context
from t5x_inference_ext.quantization.kv import KV, tile_positions, whole_tiles

# Keys (or values) of all layers: one array with leading L, or one array per layer.
LayersKV = KV | tuple[KV, ...]
# (keys, values) of all layers.
KeysValues = tuple[LayersKV, LayersKV]
RowIndex = Int[Array, ''] | int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys (after rotary positions are applied) and values of all layers.

  Attributes:
    keys: [L, B, K, S, Q], or a tuple of L arrays [B, K, S, Q] if the layers are unrolled.
    values: Like keys.
    lengths: [B] int32. Filled positions of each row.
  """

  keys: LayersKV
  values: LayersKV
  lengths: jax.Array

  @property
  def size(self) -> int:
    """S, the positions that each row has room for."""
    return positions_of(self.keys)

  def by_layer(self, read: int | None = None) -> Any:
    """Return what a loop over the layers passes to `context`.

    Args:
      read: Number of positions that attention reads; None: all.

    Returns:
      The layers' own arrays: a tuple for each layer, or stacked [L, ..]. Stacked arrays of which
      attention reads only a part stay out of the loop, which then runs over layer indices [L].
    """
    if isinstance(self.keys, tuple) and isinstance(self.values, tuple):
      return tuple(zip(self.keys, self.values))
    return (self.keys, self.values) if read is None else layer_indices(self.keys)

  def context(self, layer: tuple[KV, ...] | jax.Array, read: int | None = None) -> Context:
    """Return the context of one layer's attention, given that layer's element of `by_layer`."""
    if isinstance(layer, tuple):
      keys, values = jax.tree.map(lambda x: x[:, :, :read], layer)
    else:
      keys, values = (read_layer(kv, layer, (None, None, read)) for kv in (self.keys, self.values))
    return Context(keys, values, self.lengths)


def layer_indices(stacked: LayersKV) -> Int[Array, ' L']:
  """Return 0, 1, ... L - 1, where L is the number of layers of stacked keys or values."""
  return jnp.arange(jax.tree.leaves(stacked)[0].shape[0])


def read_layer(stacked: LayersKV, layer: jax.Array, sizes: Sequence[int | None]) -> Any:
  """Return the first positions of one layer of stacked keys or values.

  A single slice selects both layer and positions: for two slices, XLA:TPU would copy the whole
  layer in between.

  Args:
    stacked: [L, ..].
    layer: Scalar int32. Index of the layer.
    sizes: How much to keep of each of the first dimensions after L; None keeps all.
  """

  def read(x: jax.Array) -> jax.Array:
    kept = [n if size is None else size for n, size in zip(x.shape[1:], sizes)]
    shape = (1, *kept, *x.shape[1 + len(kept) :])
    return lax.dynamic_slice(x, (layer, *(0,) * (x.ndim - 1)), shape)[0]

  return jax.tree.map(read, stacked)


def positions_of(kv: Any) -> int:
  """Return the number of positions of keys or values (arrays or their shapes)."""
  return jax.tree.leaves(kv)[0].shape[-2]


def start(keys: LayersKV, values: LayersKV, lengths: Int[Array, ' B'], size: int) -> KVCache:
  """Make a cache from the keys and values of a prefill.

  Args:
    keys: [.., B, K, T, Q], one array or one per layer.
    values: Like keys.
    lengths: [B] int32. Number of valid positions among each row's T.
    size: Positions of the cache, at least T. Rounded up to whole tiles.
  """
  size = whole_tiles(size, jax.tree.leaves(keys)[0].dtype)

  keys, values = jax.tree.map(lambda x: pad_positions(x, size), (keys, values))
  return KVCache(keys, values, lengths)


def pad_positions(x: jax.Array, size: int) -> jax.Array:
  padding = [(0, 0)] * x.ndim
  padding[-2] = (0, size - x.shape[-2])
  return jnp.pad(x, padding)


def append(
  cache: KVCache, keys: LayersKV, values: LayersKV, counts: Int[Array, ' B'] | None = None
) -> KVCache:
  """Write new tokens' keys and values at each row's end, and drop those beyond the cache's size.

  Args:
    cache: KVCache with at least T positions.
    keys: [.., B, K, T, Q]. Keys of the new tokens.
    values: Like keys.
    counts: [B] int32. How many of the T tokens are valid: the first ones. None: all T.
  """
  tokens = positions_of(keys)
  keys, values = lax.platform_dependent(
    cache, keys, values, counts, cuda=_scatter, rocm=_scatter, default=_row_by_row
  )
  return dataclasses.replace(
    cache, keys=keys, values=values, lengths=cache.lengths + (tokens if counts is None else counts)
  )


def _row_by_row(
  cache: KVCache, keys: LayersKV, values: LayersKV, counts: jax.Array | None
) -> KeysValues:
  """Write one row at a time, in place.

  For a scatter or a masked rewrite, XLA:CPU would copy the whole cache in every step.
  """
  tokens = positions_of(keys)
  wide = as_windows((cache.keys, cache.values), (keys, values))

  def write_row(i: jax.Array, kv: KeysValues) -> KeysValues:
    position = cache.lengths[i]
    count = tokens if counts is None else counts[i]

    def write(x: jax.Array, new: jax.Array) -> jax.Array:
      new = lax.dynamic_slice_in_dim(new, i, 1, new.ndim - 4)
      return write_window(x, i, new, position, count, tokens)

    return jax.tree.map(write, kv, wide)

  return lax.fori_loop(0, cache.lengths.shape[0], write_row, (cache.keys, cache.values))


def write_tile(x: jax.Array) -> int:
  """Return the positions of x [.., B, K, S, Q] that are read, changed and written together."""
  # With one key head, XLA:TPU writes a single position in one operation. With several it takes
  # two for a position, and one for a tile.
  tile = tile_positions(x.dtype) if x.shape[-3] == 1 else whole_tiles(1, x.dtype)
  return 1 if x.shape[-2] % tile else tile


def as_windows(kv: KeysValues, new: KeysValues) -> KeysValues:
  """Repeat a single token of each row as often as a window of `kv` has positions.

  Done once for all rows: XLA:TPU would take an operation for each row. Several tokens stay as they
  are.
  """

  def repeat(x: jax.Array, new: jax.Array) -> jax.Array:
    if new.shape[-2] > 1:
      return new
    return jnp.broadcast_to(new, (*new.shape[:-2], write_tile(x), new.shape[-1]))

  return jax.tree.map(repeat, kv, new)


def write_window(
  x: jax.Array, row: RowIndex, new: jax.Array, position: RowIndex, count: RowIndex, tokens: int
) -> jax.Array:
  """Write tokens into one row (or page) of x, in place.

  Args:
    x: [.., B, K, S, Q].
    row: Index of the row.
    new: [.., 1, K, T, Q]. The tokens, T at most S; or one token as `as_windows` repeats it.
    position: Position of the first token. Tokens outside of [0, S) are dropped.
    count: Number of valid tokens, which come first.
    tokens: T.
  """
  lead = (0,) * (x.ndim - 4)
  size, tile = x.shape[-2], write_tile(x)
  # Read, modify and write a tile-aligned window around the new positions, clamped to the row; other
  # values in it are unchanged. The multiplication by `tile` comes last, so that the compiler sees
  # that the window is aligned.
  width = min(size, -(-(tokens + tile - 1) // tile) * tile)
  first = jnp.clip(position // tile, 0, (size - width) // tile) * tile
  late, at = position - first, jnp.arange(width).reshape(*(1,) * (len(lead) + 2), width, 1)
  where: tuple[Any, ...] = (*lead, row, 0, first, 0)
  old = lax.dynamic_slice(x, where, (*new.shape[:-2], width, new.shape[-1]))
  if tokens > 1:
    # Not jnp.roll of padded tokens: XLA:TPU would copy all pages into another layout for it, 60 us
    # of a layer of 540B on v4:4x4x4.
    new = jnp.take(new, jnp.arange(width) - late, axis=-2, mode='clip')
  window = jnp.where((at >= late) & (at < late + count), new, old)
  return lax.dynamic_update_slice(x, window, where)


def _scatter(
  cache: KVCache, keys: LayersKV, values: LayersKV, counts: jax.Array | None
) -> KeysValues:
  """Write all rows at once, in place on a GPU.

  A loop over rows would start a GPU kernel for each row and layer, for keys and again for values.
  """
  tokens = positions_of(keys)
  positions = cache.lengths[:, None] + jnp.arange(tokens)[None, :]  # [B, T]
  if counts is not None:  # invalid tokens go to a position outside the cache, and are dropped
    positions = jnp.where(jnp.arange(tokens)[None, :] < counts[:, None], positions, cache.size)
  rows = jnp.arange(cache.lengths.shape[0])[:, None]
  return jax.tree.map(
    lambda x, new: scatter_tokens(x, new, rows, positions),
    (cache.keys, cache.values),
    (keys, values),
  )


def scatter_tokens(
  x: jax.Array, new: jax.Array, rows: Int[Array, 'B _'], positions: Int[Array, 'B T']
) -> jax.Array:
  """Write tokens new [.., B, K, T, Q] to rows (or pages) and positions of x [.., B, K, S, Q].

  A token outside of x is dropped.
  """
  # Heads are indices too, so that the indexed dimensions are neighbours and keep their order.
  heads = jnp.arange(x.shape[-3])[None, :, None]
  where = (*(slice(None),) * (x.ndim - 4), rows[:, None], heads, positions[:, None])
  return x.at[where].set(new, mode='drop')


def read_local_row(cache: KVCache, row: RowIndex) -> KVCache:
  """Return row number `row` of this shard's part of a cache."""

  def read(x: jax.Array, axis: int = 0) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, row, 1, axis)

  keys, values = jax.tree.map(lambda x: read(x, x.ndim - 4), (cache.keys, cache.values))
  return KVCache(keys, values, read(cache.lengths))


def with_heads(x: Array, held: Sequence[int | None], wanted: Sequence[int | None]) -> Array:
  """Reorder the key heads of x [.., K, S, Q] for another sharding.

  Args:
    x: Keys or values (or int8 scales [.., K, S, 1]).
    held: AttentionHeads.cached() of x's sharding: for each head of x, the model's key head that it
      holds; None for padding.
    wanted: AttentionHeads.cached() of the result's sharding, with other repeats and padding.
  """
  if held == wanted:
    return x
  indices = jnp.asarray([0 if head is None else held.index(head) for head in wanted])
  return jnp.take(x, indices, axis=-3)
