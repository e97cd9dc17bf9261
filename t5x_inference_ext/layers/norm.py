"""RMS norm over a d_model that is split over the mesh."""

import jax
import jax.numpy as jnp
from jax import lax

from t5x_inference_ext.collectives import plain
from t5x_inference_ext.layouts.mesh import AXES


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float, d_model: int) -> jax.Array:
  """x [B, T, E_xyz], scale [E_xyz] (the value applied) -> [B, T, E_xyz].

  The mean square is taken in float32 over all of E: an all-reduce of one number per position.
  """
  x32 = x.astype(jnp.float32)
  square_sum = plain.all_reduce(jnp.sum(x32 * x32, axis=-1, keepdims=True), AXES)
  return (x32 * lax.rsqrt(square_sum / d_model + epsilon) * scale[None, None, :]).astype(x.dtype)
