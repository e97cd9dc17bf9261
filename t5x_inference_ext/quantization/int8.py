"""Int8 weights with a float32 scale per output channel (the paper's section 3.6: weights only, matmuls in bf16)."""

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, w: jax.Array, scale: jax.Array | None = None, dtype: jnp.dtype | None = None) -> jax.Array:
  """x [..., in] @ w [in, out] -> [..., out] in x's dtype; w may be float or int8.

  Another `dtype`, such as float32 for partial sums that are to be added, is that of the product as well as the result.

  The scale [out] multiplies the product, not the weights: the weights are then read once, as int8, and converted on the
  way into the matrix unit. Integers up to 127 are exact in bfloat16.
  """
  y = jax.lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=dtype)
  return y if scale is None else rescale(y, scale)


def rescale(y: jax.Array, scale: jax.Array) -> jax.Array:
  """y [..., out] * scale [out], multiplied in float32 and kept in y's dtype."""
  return (y.astype(jnp.float32) * scale.reshape((1,) * (y.ndim - 1) + scale.shape)).astype(y.dtype)
