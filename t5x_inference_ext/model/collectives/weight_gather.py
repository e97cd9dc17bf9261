"""Matmuls by weights that are gathered while they are used: weight-gathered layouts (3.2.3).

A gathered matrix is large (one layer of PaLM 540B in bfloat16 is 8.5 GiB). It should arrive during
the matmul just before the one that uses it, not earlier. An optimization barrier ties the start of
each gather to an earlier result. XLA:TPU respects the barrier; XLA:CPU drops it and gathers all
matrices at once.
"""

from collections.abc import Sequence

import jax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, Shaped

from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.collectives.ring import Ring, lanes
from t5x_inference_ext.quantization import int8


class Gatherer:
  """Orders the gathered matmuls of a layer: one matrix is in use while the next is in flight.

  Otherwise a compiler may start all gathers at once, and hold each gathered matrix until its use.
  Here the gather for matmul n starts when matmul n - 2 is done, so it has the time of matmul n - 1
  to finish. Matmuls by weights that stay in place do not use the Gatherer.
  """

  def __init__(self, directions: int = 0) -> None:
    """Make a Gatherer for a new layer; see gathered_matmul for `directions`."""
    self._directions = directions
    # Results of the last two matmuls, the older one first.
    self._done: tuple[jax.Array | None, jax.Array | None] = (None, None)

  def matmul(
    self,
    x: Float[Array, '*b in'],
    w: Num[Array, 'rows columns'],
    row_axes: Sequence[str],
    column_axes: Sequence[str],
  ) -> Float[Array, '*b out']:
    """Compute gathered_matmul(x, w, row_axes, column_axes) as the layer's next matmul."""
    before_last, last = self._done
    y = gathered_matmul(
      after(x, last), after(w, before_last), row_axes, column_axes, self._directions
    )
    self._done = last, y
    return y


def after(value: Shaped[Array, '*s'], done: Shaped[Array, '...'] | None) -> Shaped[Array, '*s']:
  """Return `value`, but let nothing use it before `done` is computed (None: no constraint)."""
  return value if done is None else lax.optimization_barrier((value, done))[0]


def gathered_matmul(
  x: Float[Array, '*b in'],
  w: Num[Array, 'rows columns'],
  row_axes: Sequence[str],
  column_axes: Sequence[str],
  directions: int = 0,
) -> Float[Array, '*b out']:
  """Compute x @ all_gather(w). The weights move in their own dtype (int8: one byte each).

  In a 3D torus a chip has six links: an all-gather uses all of them, a ring one or two. A ring in
  one direction hides behind its matmul only if there are enough tokens that 2 * tokens / (FLOP/s) >
  (bytes of a weight) / (a link's bytes/s).

  Args:
    x: [..., in]. Some tokens, with all their features.
    w: [in/R, out/C]. This shard's part of a matrix, float or int8.
    row_axes: Mesh axes that split the matrix's rows, R shards in all, the first axis slowest; may
      be empty.
    column_axes: Mesh axes that split its columns, C shards. No axis may be in both.
    directions: 0: one all-gather of the whole matrix, then one matmul. 1: shards travel around a
      ring over all the axes, and each is multiplied while the next one travels; two shards are held
      besides the result. 2: half of each shard, cut across its longer side, travels each way.

  Returns:
    [..., out] in x's dtype. In a ring of bfloat16 activations the result is summed in float32 and
    rounded R times (twice that if each half shard has half the rows), since a float32 copy of the
    result could be too large to hold.

  Raises:
    ValueError: The number of w's rows is not 1/R of the number of x's columns.
  """
  shards = ops.axis_size(row_axes)
  if x.shape[-1] != w.shape[0] * shards:
    raise ValueError(
      f'{shards} shards of {w.shape[0]} rows cannot be multiplied by {x.shape[-1]} columns'
    )
  if directions == 0 or Ring((*row_axes, *column_axes)).size == 1:
    # Gather over the fewer shards first: then most bytes move in the second gather, over more axes,
    # and so over more torus links.
    for axes, dim in sorted(
      [(row_axes, 0), (column_axes, 1)], key=lambda gather: ops.axis_size(gather[0])
    ):
      w = ops.all_gather(w, axes, dim)
    w = with_layout_constraint(w, Layout((0, 1)))
    return int8.matmul(x, w)
  return _ring_matmul(x, w, row_axes, column_axes, directions)


def _ring_matmul(
  x: jax.Array, w: jax.Array, row_axes: Sequence[str], column_axes: Sequence[str], directions: int
) -> jax.Array:
  ring = Ring((*row_axes, *column_axes))
  column_shards = ops.axis_size(column_axes)
  dim = 0 if w.shape[0] > w.shape[1] else 1
  parts = lanes(w.shape[dim], directions)
  held = [lax.slice_in_dim(w, offset, offset + size, axis=dim) for offset, size, _ in parts]
  y = jnp.zeros((*x.shape[:-1], w.shape[1] * column_shards), x.dtype)
  for step in range(ring.size):
    # Without the barrier the shards may all travel before the first one is used.
    y, *held = lax.optimization_barrier((y, *held))
    for i, (offset, _, direction) in enumerate(parts):
      here = held[i]
      if step < ring.size - 1:
        held[i] = ring.permute(here, direction)
      shard = ring.shard_at(step, direction)
      row = shard // column_shards * w.shape[0] + (offset if dim == 0 else 0)
      column = shard % column_shards * w.shape[1] + (offset if dim == 1 else 0)
      part = lax.dynamic_slice_in_dim(x, row, here.shape[0], x.ndim - 1)
      total = int8.matmul(part, here, dtype=jnp.float32)
      total += lax.dynamic_slice_in_dim(y, column, here.shape[1], y.ndim - 1).astype(jnp.float32)
      y = lax.dynamic_update_slice_in_dim(y, total.astype(y.dtype), column, y.ndim - 1)
  return y
