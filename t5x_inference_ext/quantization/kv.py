"""Keys and values as a cache holds them: as they are computed, or int8 with a float32 scale per position and head."""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_inference_ext.quantization.rounding import QMAX


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8KV:
  """Keys, or values, ~ units * scales. Symmetric: units are in [-127, 127].

  Both arrays have the dimensions of what they stand for, so that what moves, cuts or writes positions and heads of a
  cache does so to every array of it, and need not know what it holds.

  Attributes:
    units: [.., S, K, Q] int8.
    scales: [.., S, K, 1] float32.
  """

  units: jax.Array
  scales: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    return self.units.shape

  @property
  def ndim(self) -> int:
    return self.units.ndim


KV = jax.Array | Int8KV


def tile_positions(dtype: str | jnp.dtype) -> int:
  """Positions that a TPU can't write apart: it lays int8 out anew, whole, to write less than a tile of it in place."""
  return 32 if jnp.dtype(dtype) == jnp.int8 else 1


def whole_tiles(size: int, dtype: str | jnp.dtype) -> int:
  """The positions, at least `size`, that a cache of keys and values in `dtype` has."""
  tile = tile_positions(dtype)
  return -(-size // tile) * tile


def to_cache(x: jax.Array, dtype: str) -> KV:
  """Keys or values [.., S, K, Q] as a cache of `dtype`, a float's or 'int8', holds them. NaN stays NaN, in the scale."""
  if dtype != 'int8':
    return x.astype(dtype)
  x = x.astype(jnp.float32)
  # The smallest normal number bounds scales from below: zeros stay zeros.
  scales = jnp.maximum(
    jnp.max(jnp.abs(x), axis=-1, keepdims=True) / QMAX, jnp.finfo(jnp.float32).tiny
  )
  return Int8KV(jnp.rint(x / scales).astype(jnp.int8), scales)


def units_and_scales(kv: KV, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
  """What products take, in `dtype` (127 is exact in bfloat16), and what multiplies them: [.., S, K], None for floats."""
  if isinstance(kv, Int8KV):
    return kv.units.astype(dtype), kv.scales[..., 0]
  return kv.astype(dtype), None
