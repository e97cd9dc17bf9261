"""Int8 weights with a float32 scale per output channel (the paper's section 3.6: weights only, matmuls in bf16)."""

import math

import jax
import jax.numpy as jnp


def matmul(
  x: jax.Array,
  w: jax.Array,
  scale: jax.Array | None = None,
  dtype: jnp.dtype | None = None,
  transposed: bool = False,
) -> jax.Array:
  """x [B, .., in] @ w [in, out], or [out, in] where `transposed`, -> [B, .., out] in x's dtype; w may be float or int8.

  Another `dtype`, such as float32 for partial sums that are to be added, is that of the product as well as the result.

  The scale [out] multiplies the product, not the weights: the weights are then read once, as int8, and converted on the
  way into the matrix unit. Integers up to 127 are exact in bfloat16.
  """
  contracted = ((x.ndim - 1,), (1 if transposed else 0,))

  def product(x, w):
    return jax.lax.dot_general(
      x, w.astype(x.dtype), (contracted, ((), ())), preferred_element_type=dtype
    )

  def doubled(x, w):
    # The barrier keeps the compiler from seeing that the rows are the same.
    return product(jax.lax.optimization_barrier(jnp.concatenate([x, x])), w)[:1]

  # A matrix by one row bypasses a TPU's matrix unit, and takes three times as long as by two.
  one = math.prod(x.shape[:-1]) == 1
  y = jax.lax.platform_dependent(x, w, tpu=doubled, default=product) if one else product(x, w)
  return y if scale is None else rescale(y, scale)


def rescale(y: jax.Array, scale: jax.Array) -> jax.Array:
  """y [..., out] * scale [out], multiplied in float32 and kept in y's dtype."""
  return (y.astype(jnp.float32) * scale.reshape((1,) * (y.ndim - 1) + scale.shape)).astype(y.dtype)
