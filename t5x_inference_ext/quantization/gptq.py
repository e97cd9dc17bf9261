"""Rounding of a matrix for the least error of its products with given inputs: GPTQ (2210.17323).

For inputs x, the squared error of a channel's products is e' H e: e is the error of the channel's
weights, and H, the *Hessian*, the sum of x x' over all inputs. The weights are rounded one input
after the other. Each is moved first, so that it makes up for the errors of those before it. GPTQ
does that with a factor of H's inverse. Here it is done with H's own factor R, H = R R' with R upper
triangular, as in Babai's nearest plane: the values are equal, and nothing is inverted. At last each
channel's scale is fitted to its integers.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from t5x_inference_ext.quantization.rounding import searched, units_range

# Parts of the mean of H's diagonal to add to it: otherwise inputs that the calibration text does
# not have would leave weights undetermined. The first one with a factor in float32 is taken.
DAMPINGS = (0.01, 0.1, 1.0)
# Rows that are rounded between two matmuls.
_BLOCK = 128

Matrix = Float[Array, 'rows columns']
Channels = Float[Array, ' columns']
Square = Float[Array, 'rows rows']


def quantize(
  w: Matrix, hessian: Square, dtype: np.dtype, damping: float | Float[Array, '']
) -> tuple[Matrix, Channels, Channels]:
  """Round a matrix to integers and one scale a channel, for the inputs of a Hessian.

  Args:
    w: [rows, columns] float32. The weights; a column is an output channel.
    hessian: [rows, rows] float32. Sum of x x' over the inputs x.
    dtype: int8 or int4.
    damping: One of DAMPINGS.

  Returns:
    Units [rows, columns], whole numbers as float32; scales [columns]; and the squared error of each
    channel's products [columns], relative to the squares of the products. NaN if an argument has
    NaN, or the damping does not suffice.
  """
  rows = w.shape[0]
  diagonal = jnp.diagonal(hessian)
  order = jnp.argsort(-diagonal)  # inputs with the largest squares first: they matter most
  h = hessian[order][:, order]
  damped = h + jnp.eye(rows) * jnp.maximum(damping * jnp.mean(diagonal), jnp.finfo(h.dtype).tiny)
  w = w[order]
  # Backwards, R is the lower triangular factor of H backwards.
  factor = lax.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]
  scale = _first_scale(w, jnp.diagonal(damped), dtype)
  units = rounded_by_factor(w, scale, factor, dtype)
  scale = _fitted_scale(w, units, scale, damped)
  error = w - units * scale[None]
  loss = _products(error, h, error) / jnp.maximum(_products(w, h, w), jnp.finfo(h.dtype).tiny)
  return units[jnp.argsort(order)], scale, loss


def rounded_by_factor(w: Matrix, scale: Channels, factor: Square, dtype: np.dtype) -> Matrix:
  """Round the rows of w one after the other, each moved against the errors of those before it.

  Args:
    w: The weights.
    scale: Scales of the channels.
    factor: R, the upper triangular factor of the Hessian.
    dtype: int8 or int4.

  Returns:
    The units.
  """
  rows = w.shape[0]
  size = min(_BLOCK, rows)
  low, high = units_range(dtype)
  padding = 0, -rows % size
  w = jnp.pad(w, (padding, (0, 0)))
  diagonal = jnp.pad(jnp.diagonal(factor), padding, constant_values=1)
  factor = jnp.pad(factor, (padding, padding))

  def row(i: jax.Array, state: tuple[jax.Array, ...], block: jax.Array) -> tuple[jax.Array, ...]:
    within, sums, errors, units = state
    own = w[block * size + i]
    target = own + sums[i] / diagonal[block * size + i]
    rounded = jnp.clip(jnp.round(target / scale), low, high)
    error = own - rounded * scale
    sums = sums + within[i][:, None] * error[None]
    return within, sums, errors.at[i].set(error), units.at[i].set(rounded)

  def rows_of(block: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    errors, units = state
    start = block * size
    columns = lax.dynamic_slice_in_dim(factor, start, size, 1)
    sums = _dot(columns.T, errors)  # errors of later rows are still 0
    within = lax.dynamic_slice_in_dim(columns, start, size, 0)
    empty = jnp.zeros_like(sums)
    step = functools.partial(row, block=block)
    _, _, own, found = lax.fori_loop(0, size, step, (within, sums, empty, empty))
    put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
    return put(errors, own), put(units, found)

  zeros = jnp.zeros_like(w)
  return lax.fori_loop(0, w.shape[0] // size, rows_of, (zeros, zeros))[1][:rows]


def _first_scale(w: Matrix, diagonal: Float[Array, ' rows'], dtype: np.dtype) -> Channels:
  """Return the searched scales with the least error, if every input were alone."""
  low, high = units_range(dtype)
  largest = jnp.max(jnp.abs(w), 0) / high
  largest = jnp.where(largest > 0, jnp.maximum(largest, jnp.finfo(w.dtype).tiny), 1)

  def error(factor: jax.Array) -> jax.Array:
    scale = (largest * factor)[None]
    units = w / scale
    missed = (units - jnp.clip(jnp.round(units), low, high)) * scale
    return jnp.sum(missed * missed * diagonal[:, None], 0)

  factors = jnp.asarray(searched(dtype), w.dtype)
  return largest * factors[jnp.argmin(lax.map(error, factors), 0)]


def _fitted_scale(w: Matrix, units: Matrix, scale: Channels, h: Square) -> Channels:
  """Return the scales with the least error for given units: u' H w / u' H u."""
  moved = _dot(h, units)
  above, below = jnp.sum(moved * w, 0), jnp.sum(moved * units, 0)
  found = above / jnp.where(below > 0, below, 1)
  return jnp.where((below > 0) & (jnp.abs(found) > jnp.finfo(w.dtype).tiny), found, scale)


def _products(a: Matrix, h: Square, b: Matrix) -> Channels:
  return jnp.sum(a * _dot(h, b), 0)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
