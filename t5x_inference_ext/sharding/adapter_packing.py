"""Adapters on the devices: names and shardings of their arrays, and packing into shards.

Low-rank terms are split like the matrices that they add to. For an input matrix [E, columns], `a`
[E, C] is split like its rows and `b` [C, columns] like its columns; for an output matrix [rows, E],
`a` [rows, C] like its rows and `b` [C, E] like its columns. C are the ranks of all adapters of the
matrix, side by side; `owners` [C] is the number of the adapter that each belongs to, 1 and up.

A block part's arrays (model/weights.py, `BlockPartWeights.adapters`) are named:

  in_a, in_owners       of all input matrices, in the order of columns.input_parts
  in_b/PART             of one part; PART is its first matrix
  out_a/PART, out_b/PART, out_owners/PART    of one part of columns.output_parts
  scaling/MATRIX        [1 + adapters, columns]: factors by adapter; row 0, for none, is ones
"""

from jax.sharding import PartitionSpec as P
import numpy as np
import numpy.typing as npt

from t5x_inference_ext import params
from t5x_inference_ext.sharding.columns import PackedPart
from t5x_inference_ext.sharding.layout import Layout

_AXES = {
  'in_a': (params.EMBED_AXIS, params.FEATURES_AXIS),
  'in_b': (params.FEATURES_AXIS, params.HIDDEN_AXIS),
  'in_owners': (params.FEATURES_AXIS,),
  'out_a': (params.HIDDEN_AXIS, params.FEATURES_AXIS),
  'out_b': (params.FEATURES_AXIS, params.EMBED_AXIS),
  'out_owners': (params.FEATURES_AXIS,),
  'scaling': (params.FEATURES_AXIS, params.FEATURES_AXIS),
}
# Arrays of matrices, which have the dtype of activations.
_MATRICES = ('in_a', 'in_b', 'out_a', 'out_b')


def adapter_spec(name: str, layout: Layout) -> P:
  """Return the sharding of a block part's adapter array, without layers."""
  return layout.weight_spec(_AXES[name.partition('/')[0]])


def is_adapter_matrix(name: str) -> bool:
  """Return whether an adapter array is multiplied with activations."""
  return name.partition('/')[0] in _MATRICES


def pack_part(values: npt.NDArray, part: PackedPart, axis: int) -> npt.NDArray:
  """Cut the concatenated tensors of a part into one block for each shard, padded with zeros.

  Args:
    values: Array whose dimension `axis` is that of the part's tensors.
    part: One of columns.input_parts or columns.output_parts.
    axis: The dimension that shards split.
  """
  blocks = []
  for start, stop in part.ranges:
    block = values.take(range(start, stop), axis)
    padding = [(0, 0)] * values.ndim
    padding[axis] = 0, part.width - (stop - start)
    blocks.append(np.pad(block, padding))
  return np.concatenate(blocks, axis)
