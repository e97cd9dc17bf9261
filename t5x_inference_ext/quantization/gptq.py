"""Rounding of a matrix for the least error of its products with given inputs: GPTQ (2210.17323).

For inputs x, the squared error of a channel's products is e' H e: e is the error of the channel's
weights, and H, the *Hessian*, the sum of x x' over all inputs. The weights are rounded one input
after the other. Each is moved first, so that it makes up for the errors of those before it. GPTQ
does that with a factor of H's inverse. Here it is done with H's own factor R, H = R R' with R upper
triangular, as in Babai's nearest plane: the values are equal, and nothing is inverted.

With H in place of R, the same sweep moves each weight to make up for the errors of all others. Such
sweeps, each after a fit of the scales, can only lower the error; they follow GPTQ's own.
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
# Rows that a sweep rounds between two matmuls.
_BLOCK = 128
# Sweeps by H after the first one by R.
_REFINEMENTS = 3

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
  units = sweep(w, jnp.zeros_like(w), scale, factor, dtype)
  for _ in range(_REFINEMENTS):
    scale = _fitted_scale(w, units, scale, damped)
    units = sweep(w, w - units * scale[None], scale, damped, dtype)
  scale = _fitted_scale(w, units, scale, damped)
  error = w - units * scale[None]
  loss = _products(error, h, error) / jnp.maximum(_products(w, h, w), jnp.finfo(h.dtype).tiny)
  return units[jnp.argsort(order)], scale, loss


def sweep(w: Matrix, error: Matrix, scale: Channels, m: Square, dtype: np.dtype) -> Matrix:
  """Round the rows of w one after the other, each moved against the errors of other rows.

  Args:
    w: The weights.
    error: w - units * scale before the sweep; zeros before the first one.
    scale: Scales of the channels.
    m: R for the first sweep, else H.
    dtype: int8 or int4.

  Returns:
    The units.
  """
  rows, columns = w.shape
  size = min(_BLOCK, rows)
  low, high = units_range(dtype)
  padding = ((0, -rows % size), (0, 0))
  w, error = jnp.pad(w, padding), jnp.pad(error, padding)
  m = jnp.pad(m, (padding[0], padding[0]))
  diagonal = jnp.where(jnp.arange(w.shape[0]) < rows, jnp.diagonal(m), 1)

  def row(i: jax.Array, state: tuple[jax.Array, ...], block: jax.Array) -> tuple[jax.Array, ...]:
    within, sums, errors, units = state
    mine, before = diagonal[block * size + i], errors[i]
    target = w[block * size + i] + sums[i] / mine - before
    rounded = jnp.clip(jnp.round(target / scale), low, high)
    after = w[block * size + i] - rounded * scale
    sums = sums + within[i][:, None] * (after - before)[None]
    return within, sums, errors.at[i].set(after), units.at[i].set(rounded)

  def rows_of(block: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    error, units = state
    start = block * size
    columns_of_m = lax.dynamic_slice_in_dim(m, start, size, 1)
    sums = _dot(columns_of_m.T, error)
    within = lax.dynamic_slice_in_dim(columns_of_m, start, size, 0)
    errors = lax.dynamic_slice_in_dim(error, start, size, 0)
    _, _, errors, found = lax.fori_loop(
      0, size, functools.partial(row, block=block), (within, sums, errors, jnp.zeros_like(errors))
    )
    put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
    return put(error, errors), put(units, found)

  return lax.fori_loop(0, w.shape[0] // size, rows_of, (error, jnp.zeros_like(w)))[1][:rows]


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
