"""Looped collective matmuls (section 3.5): collectives in steps that overlap with their matmul.

Each step multiplies the data that a device has, while the next step's data travels one link of the
ring. The loops are unrolled, so that the compiler starts a step's collective-permute before the
step's matmul and waits for it afterwards. Results and bytes moved equal those of the collectives in
ops.py with one matmul. Over axes of size 1 only the matmul remains.
"""

from collections.abc import Sequence

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from t5x_inference_ext.model.collectives.ring import Ring, lanes
from t5x_inference_ext.quantization import int8


def all_gather_matmul(
  x: Float[Array, '*b slice'], w: Num[Array, 'in out'], axes: Sequence[str], directions: int = 2
) -> Float[Array, '*b out']:
  """Compute all_gather(x, last dimension) @ w, in as many steps as there are shards.

  Args:
    x: [..., in/n]. This shard's slice of the activations; n is the product of the axes' sizes.
    w: [in, out], float or int8.
    axes: Mesh axes that split x's last dimension, the first axis slowest.
    directions: 1: slices travel one way around the ring. 2: half of each slice travels each way.

  Returns:
    [..., out] in x's dtype; partial sums are added in float32.

  Raises:
    ValueError: w's number of rows differs from the gathered x's number of columns.
  """
  ring = Ring(axes)
  width = x.shape[-1]
  if w.shape[0] != width * ring.size:
    raise ValueError(
      f'{ring.size} slices of {width} columns cannot multiply a matrix of {w.shape[0]} rows'
    )
  if ring.size == 1:
    return int8.matmul(x, w)
  parts = lanes(width, directions)
  slices = [x[..., offset : offset + size] for offset, size, _ in parts]
  y = None
  for step in range(ring.size):
    for i, (offset, size, direction) in enumerate(parts):
      rows = lax.dynamic_slice_in_dim(w, ring.shard_at(step, direction) * width + offset, size, 0)
      product = int8.matmul(slices[i], rows, dtype=jnp.float32)
      y = product if y is None else y + product
      if step < ring.size - 1:
        slices[i] = ring.permute(slices[i], direction)
  assert y is not None, 'a ring has at least one step'
  return y.astype(x.dtype)


def matmul_reduce_scatter(
  x: Float[Array, '*b in'], w: Num[Array, 'in out'], axes: Sequence[str], directions: int = 2
) -> Float[Array, '*b slice']:
  """Compute reduce_scatter(x @ w, last dimension), in as many steps as there are shards.

  Each sum travels around the ring. Every shard on the way adds its product, and the last shard
  keeps the sum. Additions are in float32, but sums travel in x's dtype, so that no more bytes move
  than in one reduce-scatter: in bfloat16 a sum is rounded n times.

  Args:
    x: [..., in]. This shard's part of the contracted dimension.
    w: [in, out], float or int8.
    axes: Mesh axes to sum over. They split the result's last dimension into n shards, the first
      axis slowest.
    directions: 1: sums travel one way around the ring. 2: half of each sum's columns travels each
      way.

  Returns:
    [..., out/n] in x's dtype.

  Raises:
    ValueError: n does not divide w's columns.
  """
  ring = Ring(axes)
  if w.shape[1] % ring.size:
    raise ValueError(f'a matrix of {w.shape[1]} columns does not divide over {ring.size} shards')
  if ring.size == 1:
    return int8.matmul(x, w)
  width = w.shape[1] // ring.size
  parts = lanes(width, directions)
  sums: list[jax.Array] = []
  for step in range(ring.size):
    arrived, sums = sums, []
    for i, (offset, size, direction) in enumerate(parts):
      # Each sum is over the columns that belong to the shard at which it ends.
      shard = ring.shard_at(step + 1, direction)
      columns = lax.dynamic_slice_in_dim(w, shard * width + offset, size, 1)
      total = int8.matmul(x, columns, dtype=jnp.float32)
      if arrived:
        total += ring.permute(arrived[i], direction).astype(jnp.float32)
      sums.append(total.astype(x.dtype))
  return jnp.concatenate(sums, axis=-1)
