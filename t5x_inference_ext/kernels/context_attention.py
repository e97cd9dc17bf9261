"""Attention over cached keys and values, which reads each filled block once: a Pallas kernel.

The softmax is computed while keys and values stream by, as in flash attention (Dao et al. 2022):
logits never leave the chip's vector memory. Blocks of positions beyond a row's end are not read.
Key heads are computed one after the other. The kernel's twin in plain JAX is in model.attention and
model.paged_attention.

Shapes are per shard: rows b, key heads k, queries n of a row and key head (new tokens times the
query heads that share it), head dimension q.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_inference_ext.hardware import LANES
from t5x_inference_ext.quantization.kv import KV

_NAME = 'context_attention'  # of the kernel in compiled programs
# Positions of a block. Smaller blocks spend more time between blocks, larger ones more on the
# positions after a row's end.
_BLOCK = 512
# Queries of a row that meet a block at once: more share the reading of keys and values.
_QUERIES = 512
# Bytes of vector memory for the outputs of all rows; a core of v4 or v5e has 16 MiB.
_OUTPUT_BYTES = 6 * 2**20
# Both TensorCores of a v4 or v5p chip take half of the blocks each. Chips with one core take the
# two halves one after the other.
_HALVES = 2
# Rows of a bfloat16 tile.
_SUBLANES = 16
# Largest logit of a row that has seen no key yet. Minus infinity would give NaN in differences.
_NO_KEY = -1e30


class PartialSoftmax(NamedTuple):
  """Attention over some of the keys, not yet divided by the sum of weights.

  Attributes:
    out: [b, k, n, q] float32. Sum of exp(logit - largest) * value.
    largest: [b, k, n] float32. The largest logit; -1e30 if the row has no keys here.
    total: [b, k, n] float32. Sum of exp(logit - largest).
  """

  out: jax.Array
  largest: jax.Array
  total: jax.Array


class Blocks(NamedTuple):
  """Blocks of a cache, each with the row and the positions that it holds.

  Attributes:
    rows: [blocks] int32. The row that owns a block.
    starts: [blocks] int32. Position in that row at which the block begins.
    places: [2, blocks] int32. The block's index in the first dimension of the keys, and its number
      along their positions.
    size: Positions of a block. Static.
  """

  rows: jax.Array
  starts: jax.Array
  places: jax.Array
  size: int


def row_blocks(rows: int, positions: int) -> Blocks:
  """Return the blocks of a cache with `positions` positions of each row."""
  size = min(_BLOCK, positions)
  count = pl.cdiv(positions, size)
  row, block = jnp.divmod(jnp.arange(rows * count, dtype=jnp.int32), count)
  return Blocks(row, block * size, jnp.stack([row, block]), size)


def page_blocks(owners: Int[Array, ' n'], starts: Int[Array, ' n'], size: int) -> Blocks:
  """Return the blocks of a paged cache: its pages."""
  pages = jnp.arange(len(owners), dtype=jnp.int32)
  return Blocks(owners, starts, jnp.stack([pages, jnp.zeros_like(pages)]), size)


def attend_to_context(
  q: Float[Array, 'b k n q'],
  keys: KV,
  values: KV,
  lengths: Int[Array, ' b'],
  blocks: Blocks,
  interpret: bool,
) -> PartialSoftmax:
  """Attend to the cached positions of each query's row.

  Args:
    q: [b, k, n, q]. Queries, scaled, by key head.
    keys: [r, k, s, q]. Cached keys: r rows of s positions, or r pages of s positions.
    values: Like keys.
    lengths: [b] int32. Filled positions of each row; later positions are not attended to.
    blocks: The blocks of keys and values.
    interpret: Whether to run in JAX's interpreter, on any device, instead of on a TPU.
  """
  rows, heads, queries, d = q.shape
  tile = _query_tile(rows, queries, d)
  tiles = pl.cdiv(queries, tile)
  q = jnp.pad(q, ((0, 0), (0, 0), (0, tiles * tile - queries), (0, 0)))
  read = len(blocks.rows) * blocks.size  # positions, of which a pool of pages has more
  blocks = _in_halves(blocks)
  steps = len(blocks.rows) // _HALVES
  owner_lengths = jnp.take(lengths, blocks.rows, mode='clip')
  filled = jnp.clip(owner_lengths - blocks.starts, 0, blocks.size)
  operands, specs = [], []
  for x in (keys, values):
    units, scales = (x, None) if isinstance(x, jax.Array) else (x.units, x.scales)
    operands.append(units)
    specs.append(pl.BlockSpec((None, None, blocks.size, d), _block_index(steps, positions_dim=2)))
    if scales is not None:
      operands.append(jnp.swapaxes(scales, 2, 3))
      specs.append(pl.BlockSpec((None, None, 1, blocks.size), _block_index(steps, positions_dim=3)))
  widths = d, LANES, LANES  # out, largest and total; the last two are equal in all lanes
  out, largest, total = pl.pallas_call(
    functools.partial(_kernel, steps=steps, is_ragged=keys.shape[2] % blocks.size > 0),
    name=_NAME,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(_HALVES, heads, tiles, steps),
      in_specs=[
        pl.BlockSpec((rows, None, tile, d), lambda half, head, t, i, *_: (0, head, t, 0)),
        *specs,
      ],
      out_specs=[
        pl.BlockSpec(
          (None, rows, None, tile, width), lambda half, head, t, i, *_: (half, 0, head, t, 0)
        )
        for width in widths
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((_HALVES, rows, heads, tiles * tile, width), jnp.float32)
      for width in widths
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary', 'arbitrary', 'arbitrary')
    ),
    # For precompile.kernel_cost: the number of steps by which it multiplies the schedule of one
    # step, and the bytes of operands that no block holds.
    metadata={
      'steps': str(_HALVES * heads * tiles * steps),
      'parallel': str(_HALVES),
      'unread': str(_unread_bytes((keys, values), read)),
    },
    interpret=interpret,
  )(blocks.rows, filled, _places_read(blocks.places, filled, steps), q, *operands)
  return _joined(
    PartialSoftmax(out[..., :queries, :], largest[..., :queries, 0], total[..., :queries, 0])
  )


def _unread_bytes(kv: tuple[KV, KV], read: int) -> int:
  """Return the bytes of keys and values beyond the first `read` positions of all rows or pages."""

  def unread(x: jax.Array) -> int:
    rows, heads, positions, width = x.shape
    return max(0, rows * positions - read) * heads * width * x.dtype.itemsize

  return sum(map(unread, jax.tree.leaves(kv)))


def _query_tile(rows: int, queries: int, d: int) -> int:
  """Return how many queries of each row meet a block at once, a multiple of a tile's rows."""
  each = 2 * 4 * (d + 2 * LANES)  # bytes of a query's float32 outputs, which have two buffers
  most = min(_QUERIES, _OUTPUT_BYTES // (rows * each), -(-queries // _SUBLANES) * _SUBLANES)
  return max(1, most // _SUBLANES) * _SUBLANES


def _in_halves(blocks: Blocks) -> Blocks:
  """Return the blocks, and if their number is odd one more, beyond the end of every row."""
  if len(blocks.rows) % _HALVES == 0:
    return blocks
  return Blocks(
    jnp.pad(blocks.rows, (0, 1)),
    jnp.pad(blocks.starts, (0, 1), constant_values=jnp.iinfo(jnp.int32).max // 2),
    jnp.pad(blocks.places, ((0, 0), (0, 1))),
    blocks.size,
  )


def _places_read(
  places: Int[Array, '2 blocks'], filled: Int[Array, ' blocks'], steps: int
) -> Int[Array, '2 blocks']:
  """Replace the places of blocks that hold nothing by that of the last block before them.

  A block is fetched only if its place differs from the last one.
  """
  order = jnp.arange(len(filled), dtype=jnp.int32).reshape(_HALVES, steps)
  last = lax.cummax(jnp.where(filled.reshape(_HALVES, steps) > 0, order, 0), axis=1)
  return jnp.take(places, last.reshape(-1), axis=1)


def _block_index(steps: int, positions_dim: int) -> Any:
  """Return the index map of a block of keys, values or scales, from the prefetched places."""

  def index(half: Any, head: Any, tile: Any, i: Any, *prefetched: Any) -> tuple[Any, ...]:
    places, place = prefetched[-1], half * steps + i
    first, block = places[0, place], places[1, place]
    return (first, head, block, 0) if positions_dim == 2 else (first, head, 0, block)

  return index


def _kernel(
  rows_ref: Any,
  filled_ref: Any,
  places_ref: Any,
  q_ref: Any,
  *refs: Any,
  steps: int,
  is_ragged: bool,
) -> None:
  """Add one block of keys and values to the partial softmax of its row.

  Args:
    rows_ref, filled_ref: [blocks] int32. The owner of each block, and its filled positions.
    places_ref: Only the index maps use it.
    q_ref: [b, tile, q]. Queries of all rows that share a key head.
    *refs: Keys [s, q], with int8 their scales [1, s], values, their scales; then the outputs
      out [b, tile, q], largest and total [b, tile, lanes].
    steps: Blocks of each half.
    is_ragged: Whether blocks can reach beyond the cache's end, where anything may be.
  """
  *inputs, out_ref, largest_ref, total_ref = refs
  has_scales = len(inputs) == 4
  key_ref, key_scale_ref, value_ref, value_scale_ref = (
    inputs if has_scales else (inputs[0], None, inputs[1], None)
  )
  block = pl.program_id(0) * steps + pl.program_id(3)
  row, filled = rows_ref[block], filled_ref[block]

  @pl.when(pl.program_id(3) == 0)
  def start() -> None:
    out_ref[...] = jnp.zeros_like(out_ref)
    largest_ref[...] = jnp.full_like(largest_ref, _NO_KEY)
    total_ref[...] = jnp.zeros_like(total_ref)

  @pl.when(filled > 0)
  def add_block() -> None:
    q = q_ref[row]
    # Mosaic refuses any other precision of bfloat16 products.
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
    logits = lax.dot_general(
      q,
      key_ref[...].astype(q.dtype),
      (((1,), (1,)), ((), ())),
      precision=precision,
      preferred_element_type=jnp.float32,
    )
    if key_scale_ref is not None:
      logits = logits * key_scale_ref[...]
    positions = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    logits = jnp.where(positions < filled, logits, -jnp.inf)
    before = largest_ref[row][:, :1]
    largest = jnp.maximum(before, jnp.max(logits, axis=-1, keepdims=True))
    weights, rescale = jnp.exp(logits - largest), jnp.exp(before - largest)
    largest_ref[row] = jnp.broadcast_to(largest, largest_ref.shape[1:])
    total_ref[row] = total_ref[row] * rescale + jnp.sum(weights, axis=-1, keepdims=True)
    values = value_ref[...].astype(q.dtype)
    if value_scale_ref is not None:
      weights = weights * value_scale_ref[...]
    if is_ragged:
      seen = lax.broadcasted_iota(jnp.int32, values.shape, 0) < filled
      values = jnp.where(seen, values, 0)
      weights = jnp.where(positions < filled, weights, 0)  # the scales may be anything there
    added = jnp.dot(
      weights.astype(q.dtype), values, precision=precision, preferred_element_type=jnp.float32
    )
    out_ref[row] = out_ref[row] * rescale + added


def _joined(halves: PartialSoftmax) -> PartialSoftmax:
  """Combine the partial softmaxes of the two halves of the blocks, [2, ...] each."""
  largest = jnp.max(halves.largest, axis=0, keepdims=True)
  rescale = jnp.exp(halves.largest - largest)
  return PartialSoftmax(
    jnp.sum(halves.out * rescale[..., None], axis=0),
    largest[0],
    jnp.sum(halves.total * rescale, axis=0),
  )
