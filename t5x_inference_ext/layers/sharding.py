"""Moving activations between 'split by hidden columns' and 'split by batch' (the paper's section 3.3)."""

import dataclasses

import jax
from jax import lax

from t5x_inference_ext.collectives import plain
from t5x_inference_ext.layouts.layout import Layout


@dataclasses.dataclass(frozen=True)
class BatchSharding:
  """Which mesh axes attention splits the batch over; over the others it is replicated."""

  layout: Layout
  axes: tuple[str, ...]

  def _runs(self):
    # The hidden axes as runs that share one collective: all at once unless the batch fills only some of them.
    hidden = self.layout.hidden_axes
    filled = [a in self.axes for a in hidden]
    return [hidden] if all(filled) or not any(filled) else [(a,) for a in hidden]

  def to_batch(self, y: jax.Array) -> jax.Array:
    """[B, T, c] of the shard's columns, partial sums over x -> [B/axes, T, shards, c]: all columns, summed."""
    reduce = self.layout.embed_axes
    width = y.shape[-1]
    y = plain.reduce_scatter(y, reduce, 0) if reduce[0] in self.axes else plain.all_reduce(y, reduce)
    for run in reversed(self._runs()):
      y = plain.all_to_all(y, run, 0, 2) if run[0] in self.axes else plain.all_gather(y, run, 2)
    return y.reshape(*y.shape[:2], -1, width)

  def from_batch(self, y: jax.Array) -> jax.Array:
    """[B/axes, T, shards * c], columns ordered by shard -> [B, T, c] of the shard's columns, replicated over x."""
    for run in self._runs():
      if run[0] in self.axes:
        y = plain.all_to_all(y, run, 2, 0)
      elif (size := plain.axis_size(run)) > 1:
        width = y.shape[2] // size
        y = lax.dynamic_slice_in_dim(y, plain.shard_index(run) * width, width, axis=2)
    reduce = self.layout.embed_axes
    return plain.all_gather(y, reduce, 0) if reduce[0] in self.axes else y
