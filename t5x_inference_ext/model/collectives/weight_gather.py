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
from jaxtyping import Array, Float, Num, Shaped

from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.quantization import int8


class Gatherer:
  """Orders the gathered matmuls of a layer: one matrix is in use while the next is in flight.

  Otherwise a compiler may start all gathers at once, and hold each gathered matrix until its use.
  Here the gather for matmul n starts when matmul n - 2 is done, so it has the time of matmul n - 1
  to finish. Matmuls by weights that stay in place do not use the Gatherer.
  """

  def __init__(self) -> None:
    """Make a Gatherer for a new layer."""
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
    y = gathered_matmul(after(x, last), after(w, before_last), row_axes, column_axes)
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
) -> Float[Array, '*b out']:
  """Compute x @ all_gather(w). The weights move in their own dtype (int8: one byte each).

  Args:
    x: [..., in]. Some tokens, with all their features.
    w: [in/R, out/C]. This shard's part of a matrix, float or int8.
    row_axes: Mesh axes that split the matrix's rows, R shards in all, the first axis slowest; may
      be empty.
    column_axes: Mesh axes that split its columns, C shards. No axis may be in both.

  Returns:
    [..., out] in x's dtype.

  Raises:
    ValueError: The number of w's rows is not 1/R of the number of x's columns.
  """
  shards = ops.axis_size(row_axes)
  if x.shape[-1] != w.shape[0] * shards:
    raise ValueError(
      f'{shards} shards of {w.shape[0]} rows cannot be multiplied by {x.shape[-1]} columns'
    )
  # Gather over the fewer shards first: then most bytes move in the second gather, over more axes,
  # and so over more torus links.
  for axes, dim in sorted(
    [(row_axes, 0), (column_axes, 1)], key=lambda gather: ops.axis_size(gather[0])
  ):
    w = ops.all_gather(w, axes, dim)
  return int8.matmul(x, with_layout_constraint(w, Layout((0, 1))))
