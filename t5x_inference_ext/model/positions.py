"""Rotary positions, halves rotated: dimension i turns with dimension i + Q/2."""

import jax
import jax.numpy as jnp


def rotary_angles(
  positions: jax.Array, d_head: int, max_timescale: float
) -> tuple[jax.Array, jax.Array]:
  """positions [B, T] int32 -> (sin, cos), each [B, T, Q/2] float32."""
  timescale = max_timescale ** (jnp.arange(0, d_head, 2, dtype=jnp.float32) / d_head)  # [Q/2]
  angles = positions[:, :, None].astype(jnp.float32) / timescale[None, None, :]
  return jnp.sin(angles), jnp.cos(angles)


def rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """x [B, T, heads, Q] with angles [B, T, Q/2] -> [B, T, heads, Q] in x's dtype."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  sin, cos = sin[:, :, None, :], cos[:, :, None, :]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
