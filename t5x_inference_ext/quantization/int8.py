"""Matmuls by int8 weights with float32 output-channel scales (the paper's section 3.6)."""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num


def matmul(
  x: Float[Array, '*b in'],
  w: Num[Array, 'rows columns'],
  scale: Float[Array, ' out'] | None = None,
  dtype: DTypeLike | None = None,
  transposed: bool = False,
) -> Float[Array, '*b out']:
  """Multiply activations by a float or int8 matrix.

  The scale multiplies the product, not the weights. So the weights are read from memory once, as
  int8, and converted on the way into the matrix unit. Integers up to 127 are exact in bfloat16.

  Args:
    x: [..., in]. Activations, with at least one leading dimension.
    w: [in, out], or [out, in] if `transposed`; float or int8.
    scale: [out] float32, the int8 matrix's output-channel scales, or None.
    dtype: Dtype of the product and the result, e.g. float32 for partial sums to be added. None: x's
      dtype.
    transposed: Whether w is [out, in].
  """
  contracted = ((x.ndim - 1,), (1 if transposed else 0,))

  def product(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.dot_general(
      x, w.astype(x.dtype), (contracted, ((), ())), preferred_element_type=dtype
    )

  def doubled(x: jax.Array, w: jax.Array) -> jax.Array:
    # Without the barrier, the compiler would see that the two rows are equal, and compute one.
    return product(jax.lax.optimization_barrier(jnp.concatenate([x, x])), w)[:1]

  # On a TPU, a product with a single row bypasses the matrix unit and takes three times as long as
  # with two rows. So the row is duplicated.
  one_row = math.prod(x.shape[:-1]) == 1
  y = jax.lax.platform_dependent(x, w, tpu=doubled, default=product) if one_row else product(x, w)
  return y if scale is None else rescale(y, scale)


def rescale(y: Float[Array, '*b out'], scale: Float[Array, ' out']) -> Float[Array, '*b out']:
  """Multiply y by output-channel scales in float32. The result has y's dtype."""
  return (y.astype(jnp.float32) * scale.reshape((1,) * (y.ndim - 1) + scale.shape)).astype(y.dtype)
