"""Rotary position embedding by halves: dimension i is rotated with dimension i + Q/2."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# (sin, cos), each [b, t, Q/2] float32.
Angles = tuple[Float[Array, 'b t half'], Float[Array, 'b t half']]


class RotaryAngles(NamedTuple):
  """Rotary angles of the new tokens of one pass, on one shard.

  Attributes:
    queries: Angles at the positions of this shard's queries.
    keys: Angles of all new positions.
  """

  queries: Angles
  keys: Angles


def rotary_angles(positions: Int[Array, 'b t'], d_head: int, max_timescale: float) -> Angles:
  """Return (sin, cos), each [b, t, Q/2] float32, for integer positions [b, t]."""
  timescale = max_timescale ** (jnp.arange(0, d_head, 2, dtype=jnp.float32) / d_head)  # [Q/2]
  angles = positions[:, :, None].astype(jnp.float32) / timescale[None, None, :]
  return jnp.sin(angles), jnp.cos(angles)


def rotate(
  x: Float[Array, 'b t heads q'], sin: Float[Array, 'b t half'], cos: Float[Array, 'b t half']
) -> Float[Array, 'b t heads q']:
  """Rotate queries or keys by the angles of their positions. The result has x's dtype."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  sin, cos = sin[:, :, None, :], cos[:, :, None, :]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
