"""RMS norm and layer norm over a d_model that is split over the mesh."""

import jax
from jax import lax
import jax.numpy as jnp

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.sharding.layout import Axes


def norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array | None, config: ModelConfig, axes: Axes
) -> jax.Array:
  """x [B, T, E/axes], scale (the value applied) and bias [E/axes] -> [B, T, E/axes].

  The moments are taken in float32 over all of E: an all-reduce of one number per position, for layer norm of two, the
  mean's before the variance's: their difference loses no digits.
  """
  x32 = x.astype(jnp.float32)

  def mean(values):
    return ops.all_reduce(jnp.sum(values, axis=-1, keepdims=True), axes) / config.d_model

  if config.norm == 'layer':
    x32 = x32 - mean(x32)
  y = x32 * lax.rsqrt(mean(x32 * x32) + config.norm_epsilon) * scale[None, None, :]
  return (y if bias is None else y + bias[None, None, :]).astype(x.dtype)
