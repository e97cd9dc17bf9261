"""Keys and values in the form that a KV cache holds: floats, or int8 with float32 scales."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from t5x_inference_ext.quantization.rounding import QMAX

# Positions in a tile of a TPU's memory. With several rows on a chip, XLA:TPU would copy a cache
# whose size is no multiple of this into another layout in every step.
_TILE_ROWS = 8
# Largest magnitude that a cache holds: far beyond the values of any sound model, and so small that
# the sum of 2^23 such values is finite.
_LARGEST = 2.0**104


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8KV:
  """Keys, or values, rounded to units * scales, with units in [-127, 127].

  Both arrays have the dimensions of the float keys or values. Code that moves, slices or writes
  positions and heads of a cache maps over the arrays, and so needs no special case for int8.

  Attributes:
    units: [.., K, S, Q] int8.
    scales: [.., K, S, 1] float32.
  """

  units: jax.Array
  scales: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the keys or values."""
    return self.units.shape


KV = jax.Array | Int8KV


def tile_positions(dtype: DTypeLike) -> int:
  """Return the tile size in positions: the smallest aligned group that a TPU writes in place.

  To write part of an int8 tile in place, XLA:TPU would copy the whole cache into another layout.
  """
  return 32 if jnp.dtype(dtype) == jnp.int8 else 1


def whole_tiles(size: int, dtype: DTypeLike) -> int:
  """Round `size` positions of keys and values in `dtype` up to whole tiles (int8: 32, else 8)."""
  tile = max(_TILE_ROWS, tile_positions(dtype))
  return -(-size // tile) * tile


def to_cache(x: Float[Array, '*lead q'], dtype: str) -> KV:
  """Convert keys or values to the cache's dtype, and replace values that are not finite.

  Attention multiplies the values at positions that a row does not see by 0, but 0 times NaN or
  infinity is NaN. So one broken row would break every row that is later stored in its place.

  Args:
    x: [.., K, S, Q]. Keys or values. NaN and infinities become the largest magnitude that a cache
      holds; logits show which row is broken (model.finite).
    dtype: Dtype of the cache: a float dtype or 'int8'.
  """
  x = x.astype(jnp.float32 if dtype == 'int8' else dtype)
  x = jnp.where(jnp.abs(x) <= _LARGEST, x, jnp.asarray(_LARGEST, x.dtype))
  if dtype != 'int8':
    return x
  # Scales are at least the smallest normal float32, so that zeros stay zeros.
  largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
  scales = jnp.maximum(largest / QMAX, jnp.finfo(jnp.float32).tiny)
  return Int8KV(jnp.rint(x / scales).astype(jnp.int8), scales)


def empty_kv(shape: tuple[int, ...], dtype: str) -> KV:
  """Return keys or values of zeros [.., K, S, Q] in the cache's form, without calling `to_cache`.

  XLA would fold the constants of to_cache(zeros) on the host, which takes minutes for a large
  cache.
  """
  if dtype != 'int8':
    return jnp.zeros(shape, dtype)
  scales = jnp.full((*shape[:-1], 1), jnp.finfo(jnp.float32).tiny, jnp.float32)
  return Int8KV(jnp.zeros(shape, jnp.int8), scales)


def units_and_scales(kv: KV, dtype: DTypeLike) -> tuple[jax.Array, jax.Array | None]:
  """Return the keys or values as an operand in `dtype`, and their scales [.., K, S] or None.

  Integers up to 127 are exact in bfloat16.
  """
  if isinstance(kv, Int8KV):
    return kv.units.astype(dtype), kv.scales[..., 0]
  return kv.astype(dtype), None
