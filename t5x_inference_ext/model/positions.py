"""Rotary position embedding by halves: dimension i is rotated with dimension i + R/2.

R is the number of a head's dimensions that are rotated: the first ones, usually all Q.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from t5x_inference_ext.config import ModelConfig

# (sin, cos), each [b, t, R/2] float32.
Angles = tuple[Float[Array, 'b t half'], Float[Array, 'b t half']]


class RotaryAngles(NamedTuple):
  """Rotary angles of the new tokens of one pass, on one shard.

  Attributes:
    queries: Angles at the positions of this shard's queries.
    keys: Angles of all new positions.
  """

  queries: Angles
  keys: Angles


def rotary_angles(positions: Int[Array, 'b t'], config: ModelConfig) -> Angles:
  """Return (sin, cos), each [b, t, R/2] float32, for integer positions [b, t]."""
  size = config.rotary_size
  timescale = config.rope_max_timescale ** (jnp.arange(0, size, 2, dtype=jnp.float32) / size)
  timescale = _stretched(timescale, config)  # [R/2]
  angles = positions[:, :, None].astype(jnp.float32) / timescale[None, None, :]
  return jnp.sin(angles), jnp.cos(angles)


def _stretched(timescale: jax.Array, config: ModelConfig) -> jax.Array:
  """Return the timescales that rope_scaling makes of a model's original ones.

  'llama3' stretches wavelengths by rope_factor if rope_low_factor of them do not fit into the
  original length, keeps them if rope_high_factor of them do, and interpolates in between.
  """
  c = config
  if c.rope_scaling == 'none':
    return timescale
  kept: jax.Array | float = 0.0  # share of the original frequency
  if c.rope_scaling == 'llama3':
    waves = c.rope_original_length / (2 * np.pi * timescale)
    kept = (waves - c.rope_low_factor) / (c.rope_high_factor - c.rope_low_factor)
    kept = jnp.clip(kept, 0, 1)
  return timescale / (kept + (1 - kept) / c.rope_factor)


def rotate(
  x: Float[Array, 'b t heads q'], sin: Float[Array, 'b t half'], cos: Float[Array, 'b t half']
) -> Float[Array, 'b t heads q']:
  """Rotate the first dimensions of queries or keys by the angles of their positions.

  The result has x's dtype.
  """
  size = 2 * sin.shape[-1]
  x, rest = x[..., :size], x[..., size:]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  sin, cos = sin[:, :, None, :], cos[:, :, None, :]
  y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
  return jnp.concatenate([y, rest], axis=-1) if rest.shape[-1] else y
