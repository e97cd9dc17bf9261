"""RMS norm and layer norm over a d_model that is split over the mesh."""

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.weights import BlockPartWeights
from t5x_inference_ext.sharding.layout import Axes


def norm(
  x: Float[Array, 'b t e'],
  scale: Float[Array, ' e'],
  bias: Float[Array, ' e'] | None,
  config: ModelConfig,
  axes: Axes,
) -> Float[Array, 'b t e']:
  """Normalize x over d_model with the config's norm; see normalized.

  Args:
    x: [b, t, e]. The residual stream on this shard.
    scale: [e]. The factor to multiply by (not a stored scale around zero).
    bias: [e], or None without a bias.
    config: ModelConfig. Gives the norm, its epsilon and d_model.
    axes: Mesh axes that split d_model.

  Returns:
    [b, t, e] in x's dtype.
  """
  return scaled(normalized(x, config, axes), scale, bias, x.dtype)


def normalized(x: Float[Array, 'b t e'], config: ModelConfig, axes: Axes) -> Float[Array, 'b t e']:
  """Return x in float32, divided by its deviation over d_model, without a learned scale.

  The moments are computed in float32 over all of d_model. RMS norm all-reduces one number per
  position. Layer norm all-reduces two: first the mean, then the variance around that mean, so that
  no digits are lost to cancellation.
  """
  x32 = x.astype(jnp.float32)

  def mean(values: jax.Array) -> jax.Array:
    return ops.all_reduce(jnp.sum(values, axis=-1, keepdims=True), axes) / config.d_model

  if config.norm == 'layer':
    x32 = x32 - mean(x32)
  return x32 * lax.rsqrt(mean(x32 * x32) + config.norm_epsilon)


def scaled(
  y: Float[Array, 'b t e'],
  scale: Float[Array, ' e'],
  bias: Float[Array, ' e'] | None,
  dtype: DTypeLike,
) -> Float[Array, 'b t e']:
  """Apply a norm's learned scale and bias to normalized values; the result has `dtype`."""
  y = y * scale[None, None, :]
  return (y if bias is None else y + bias[None, None, :]).astype(dtype)


def scaled_by_two_norms(
  y: Float[Array, 'b t e'], w: BlockPartWeights
) -> tuple[Float[Array, 'b t e'], Float[Array, 'b t e']]:
  """Scale y by the two norms; return the inputs of attention and of the MLP."""
  assert w.norm is not None
  y32 = y.astype(jnp.float32)
  return (
    scaled(y32, w.norm, w.norm_bias, y.dtype),
    scaled(y32, w.vectors['mlp_norm'], w.vectors.get('mlp_norm_bias'), y.dtype),
  )
