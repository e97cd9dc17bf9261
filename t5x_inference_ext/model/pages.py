"""The paged KV cache of decode slots: its size follows the tokens in use, not the longest row.

Attention takes the page axis as its batch axis: each page is read once, in place, with the queries
of the row that owns it (model.paged_attention). The host allocates pages to rows, and sets `table`,
`owners` and `starts`; the devices write new tokens.
"""

import dataclasses
import functools
from typing import Any, TypeVar

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Int

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model import cache as kv_cache
from t5x_inference_ext.model.cache import KeysValues, KVCache, LayersKV, RowIndex
from t5x_inference_ext.model.paged_attention import PagedContext
from t5x_inference_ext.quantization.kv import KV, tile_positions

# A page's number of positions must be a multiple of this: on v4, a cache of other sizes takes up to
# 1.7 times as long to read.
POSITIONS_MULTIPLE = 8
# Entry of `starts` for a page that no row owns: beyond every row's end.
UNUSED = 2**30


def check_page_size(size: int, dtype: str) -> None:
  """Raise RequestError unless a page can have `size` positions in a cache of `dtype`."""
  multiple = max(POSITIONS_MULTIPLE, tile_positions(dtype))
  if size < 1 or size % multiple:
    raise RequestError(
      f'a page has {size} positions: in a cache of {dtype} it must have a multiple of {multiple}, '
      f'such as {max(1, -(-size // multiple)) * multiple}'
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedPages:
  """Pages that several rows can read; every device has all of them.

  Attributes:
    keys: [L, K, NS, S, Q], or a tuple of L arrays [K, NS, S, Q] if the layers are unrolled. The
      pages are one context for all rows, so heads come before them.
    values: Like keys.
    visible: [B, NS] bool. Whether a row attends to a page; it then attends to the whole page.
    starts: [NS] int32. Position, in the rows that read a page, at which the page begins. Only
      attention rules (windows, position biases) use it.
  """

  keys: LayersKV
  values: LayersKV
  visible: jax.Array
  starts: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
  """Keys (after rotary positions are applied) and values of all layers, in pages of S positions.

  The devices that split rows have equally many pages each, numbered from 0. A row's pages are on
  the row's own device. Page 0 of each device is scratch space, where free slots write.

  Attributes:
    keys: [L, N, K, S, Q], or a tuple of L arrays [N, K, S, Q] if the layers are unrolled.
    values: Like keys.
    lengths: [B] int32. Number of filled positions of each row, including those in shared pages.
    table: [B, M] int32. The page that holds positions [m * S, (m + 1) * S) of a row.
    owners: [N] int32. The row, numbered on its device, that a page belongs to.
    starts: [N] int32. Position in the owner's row at which a page begins; UNUSED without an owner.
    shared: Shared pages, which come before a row's own pages; or None.
    read: Number of pages per device that attention reads, from the first on; all pages in use are
      among them. Static.
    read_shared: Number of shared pages that attention reads, from the first on. Static.
  """

  keys: LayersKV
  values: LayersKV
  lengths: jax.Array
  table: jax.Array
  owners: jax.Array
  starts: jax.Array
  shared: SharedPages | None = None
  read: int = dataclasses.field(default=0, metadata={'static': True})
  read_shared: int = dataclasses.field(default=0, metadata={'static': True})

  @property
  def page_size(self) -> int:
    """S, positions of a page."""
    return kv_cache.positions_of(self.keys)

  def by_layer(self, read: int | None = None) -> Any:
    """Return the arguments of `context` for all layers: layer indices, or one tuple per layer.

    `read` must be None: the cache's field `read` gives the number of pages that attention reads.
    """
    assert read is None
    if not isinstance(self.keys, tuple):
      return kv_cache.layer_indices(self.keys)
    parts = [self.keys, self.values]
    if self._shared_read is not None:
      parts += [self._shared_read.keys, self._shared_read.values]
    return tuple(zip(*parts))

  @property
  def _shared_read(self) -> SharedPages | None:
    """The shared pages, if attention reads any."""
    return self.shared if self.read_shared else None

  def context(self, layer: tuple[KV, ...] | jax.Array, read: int | None = None) -> PagedContext:
    """Return the context of one layer's attention, given that layer's element of `by_layer`."""
    assert read is None
    parts: Any = layer
    index = None
    if not isinstance(layer, tuple):
      index, parts = layer, [self.keys, self.values]
      if self._shared_read is not None:
        parts += [self._shared_read.keys, self._shared_read.values]
    keys, values = parts[:2]
    # Unrolled layers are not sliced here: before a kernel, XLA would copy the slice.
    if index is not None:
      keys, values = (_first(kv, 0, self.read, index) for kv in (keys, values))
    owners, starts = self.owners[: self.read], self.starts[: self.read]
    context = PagedContext(keys, values, self.lengths, owners, starts)
    if self._shared_read is None:
      return context
    size = self.read_shared * self.page_size
    keys, values = (_first(_merged(kv), 1, size, index) for kv in parts[2:])
    return context._replace(
      shared_keys=keys,
      shared_values=values,
      shared_visible=self._shared_read.visible[:, : self.read_shared],
      shared_starts=self._shared_read.starts[: self.read_shared],
    )


def _merged(kv: LayersKV) -> LayersKV:
  """Merge the pages of keys or values [.., K, NS, S, Q] into one context [.., K, NS * S, Q].

  Do this before slicing: XLA:TPU would copy a slice that is reshaped.
  """
  return jax.tree.map(lambda x: x.reshape(*x.shape[:-3], -1, x.shape[-1]), kv)


def _first(kv: LayersKV, axis: int, count: int, layer: jax.Array | None) -> Any:
  """Return the first elements of a layer's keys or values along a dimension.

  Args:
    kv: Keys or values of one layer, or stacked with leading L.
    axis: The dimension in a layer's array.
    count: Number of elements to keep.
    layer: Index of the layer if kv is stacked, else None.
  """
  if layer is None:
    return jax.tree.map(lambda x: lax.slice_in_dim(x, 0, count, axis=axis), kv)
  return kv_cache.read_layer(kv, layer, (*(None,) * axis, count))


AnyCache = TypeVar('AnyCache', KVCache, PagedCache)


def append_tokens(
  cache: KVCache | PagedCache,
  keys: LayersKV,
  values: LayersKV,
  counts: Int[Array, ' B'] | None = None,
) -> Any:
  """Write new tokens' keys and values at each row's end, in either kind of cache.

  Args:
    cache: This shard's part of the cache.
    keys: [.., B, K, T, Q]. Keys of the new tokens. T is at most a page's size.
    values: Like keys.
    counts: [B] int32. Number of valid tokens, which come first. None: all T.
  """
  if isinstance(cache, KVCache):
    return kv_cache.append(cache, keys, values, counts)
  tokens = kv_cache.positions_of(keys)
  assert tokens <= cache.page_size, 'a row writes into at most two pages'
  keys, values = lax.platform_dependent(
    cache, keys, values, counts, cuda=_scatter, rocm=_scatter, default=_row_by_row
  )
  return dataclasses.replace(
    cache, keys=keys, values=values, lengths=cache.lengths + (tokens if counts is None else counts)
  )


def _row_by_row(
  cache: PagedCache, keys: LayersKV, values: LayersKV, counts: jax.Array | None
) -> KeysValues:
  """Write one row after another, in place (see cache._row_by_row)."""
  tokens, size, width = kv_cache.positions_of(keys), cache.page_size, cache.table.shape[1]
  wide = kv_cache.as_windows((cache.keys, cache.values), (keys, values))

  def write_row(i: jax.Array, kv: KeysValues) -> KeysValues:
    length = cache.lengths[i]
    count = tokens if counts is None else counts[i]
    for crossed in range(1 if tokens == 1 else 2):  # the page of the first token, and the next one
      index = length // size + crossed
      page = cache.table[i, jnp.minimum(index, width - 1)]
      offset = length - index * size  # of the first token in this page; negative in the next page
      wanted = jnp.where(index < width, count, 0)

      write = functools.partial(
        _write_tokens, row=i, page=page, offset=offset, count=wanted, tokens=tokens
      )
      kv = jax.tree.map(write, kv, wide)
    return kv

  return lax.fori_loop(0, cache.lengths.shape[0], write_row, (cache.keys, cache.values))


def _write_tokens(
  x: jax.Array,
  new: jax.Array,
  row: RowIndex,
  page: RowIndex,
  offset: RowIndex,
  count: RowIndex,
  tokens: int,
) -> jax.Array:
  """Write one row of `new` into a page at `offset`; see cache.write_window."""
  new = lax.dynamic_slice_in_dim(new, row, 1, new.ndim - 4)
  return kv_cache.write_window(x, page, new, offset, count, tokens)


def _scatter(
  cache: PagedCache, keys: LayersKV, values: LayersKV, counts: jax.Array | None
) -> KeysValues:
  """Write all rows at once, in place on a GPU (see cache._scatter)."""
  tokens, size, width = kv_cache.positions_of(keys), cache.page_size, cache.table.shape[1]
  new = jnp.arange(tokens)[None, :]
  positions = cache.lengths[:, None] + new  # [B, T]
  index = positions // size
  pages = jnp.take_along_axis(cache.table, jnp.minimum(index, width - 1), axis=1)
  valid = index < width if counts is None else (index < width) & (new < counts[:, None])
  # Invalid tokens get a page index outside the pool, so that the scatter drops them.
  pages = jnp.where(valid, pages, cache.owners.shape[0])
  return jax.tree.map(
    lambda x, new: kv_cache.scatter_tokens(x, new, pages, positions % size),
    (cache.keys, cache.values),
    (keys, values),
  )


def copy_pages(
  pool: KeysValues,
  one: KeysValues,
  pages: Int[Array, ' M'],
  first: Int[Array, ''],
  stop: Int[Array, ''],
  axis: int = -4,
) -> KeysValues:
  """Copy pages [first, stop) of a dense row into the pages of a pool, in place.

  Args:
    pool: Keys and values of pages [.., N, K, S, Q], or of shared pages [.., K, NS, S, Q].
    one: Keys and values of one row [.., 1, K, positions, Q]; padded here with zeros to whole pages.
    pages: [M] int32. Page of the pool for each page of the row.
    first: Index in the row of the first page to copy.
    stop: Index in the row of the page after the last one to copy.
    axis: The dimension of pages in the pool, counted from the end.
  """
  size = kv_cache.positions_of(pool)
  one = jax.tree.map(lambda x: kv_cache.pad_positions(x, -(-x.shape[-2] // size) * size), one)

  def copy(m: jax.Array, pool: KeysValues) -> KeysValues:
    def write(x: jax.Array, row: jax.Array) -> jax.Array:
      page = lax.dynamic_slice_in_dim(row, m * size, size, row.ndim - 2)
      return lax.dynamic_update_slice_in_dim(x, jnp.moveaxis(page, -4, axis), pages[m], axis)

    return jax.tree.map(write, pool, one)

  return lax.fori_loop(first, stop, copy, pool)
