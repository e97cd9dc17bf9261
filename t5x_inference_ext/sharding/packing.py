"""How canonical tensors become the arrays on the chips: fused, cut into per-shard column blocks, padded to the mesh.

A shard's columns lie together as one block [gate | linear | query | key, value], so that one matmul gives a shard all
it needs and no reshape crosses shards. What depends on the mesh, this order and the padding, exists only here:
checkpoints hold canonical tensors. Padding is with zeros and never touches the MLP, whose width the mesh must divide.
"""

from collections.abc import Callable, Mapping
import dataclasses
import itertools

from jax.sharding import PartitionSpec as P
import ml_dtypes
import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.sharding.heads import kv_columns, stored_heads, vocabulary_rows
from t5x_inference_ext.sharding.layout import Layout, check_model, num_shards

Index = tuple[slice, ...]
# (canonical name, index) -> the values there.
Reader = Callable[[str, Index], np.ndarray]

_DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class PackedPart:
  """Canonical tensors laid side by side along the blocked axis, of which each shard holds a range.

  Attributes:
    names: the tensors.
    sizes: their sizes along the axis.
    width: what a shard holds, padding included.
    ranges: [start, stop) of each shard; zeros pad it to `width`.
  """

  names: tuple[str, ...]
  sizes: tuple[int, ...]
  width: int
  ranges: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class PackedTensor:
  """One array on the chips, or one a layer.

  Attributes:
    shape: without the layer axis.
    spec: its sharding, without the layer axis.
    kind: as in parameters.Parameter.
    per_layer: whether each layer has one.
    axis: the axis of `shape` that is a sequence of blocks.
    parts: what a block holds, in order.
  """

  shape: tuple[int, ...]
  spec: P
  kind: str
  per_layer: bool
  axis: int
  parts: tuple[PackedPart, ...]

  def read(self, reader: Reader, layer: int | None, index: Index) -> np.ndarray:
    """The values at `index` (into `shape`), assembled from canonical tensors; only what is needed is read."""
    lead = () if layer is None else (slice(layer, layer + 1),)
    begin, end, _ = index[self.axis].indices(self.shape[self.axis])
    block = sum(p.width for p in self.parts)
    pieces = []
    for shard in range(begin // block, -(-end // block)):
      offset = shard * block
      for part in self.parts:
        low, high = max(begin, offset), min(end, offset + part.width)
        if low < high:
          start, stop = part.ranges[shard]
          pieces += self._read_part(
            reader, lead, index, part, low + start - offset, high + start - offset, stop
          )
        offset += part.width
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=self.axis)

  def _read_part(self, reader, lead, index, part, low, high, stop):
    """Columns [low, high) of the part's tensors laid side by side, zeros from `stop` on."""
    pieces, offset = [], 0
    for name, width in zip(part.names, part.sizes):
      a, b = max(low - offset, 0), min(high - offset, stop - offset, width)
      if a < b:
        where = tuple(slice(a, b) if i == self.axis else s for i, s in enumerate(index))
        values = reader(name, lead + where)
        pieces.append(values[0] if lead else values)
      offset += width
    if high > stop:
      shape = [len(range(*s.indices(n))) for s, n in zip(index, self.shape)]
      shape[self.axis] = high - max(low, stop)
      # int8 where nothing but padding is read: beside values of any dtype it takes theirs, and never widens int8.
      pieces.append(np.zeros(shape, pieces[0].dtype if pieces else np.int8))
    return pieces


def tensor_dtype(tensor: PackedTensor, weights: str, compute: str) -> np.dtype:
  """What a tensor is on the chips, for a checkpoint's weights ('int8', ...) and the compute dtype."""
  if tensor.kind == 'matrix' and weights == 'int8':
    return np.dtype(np.int8)
  if tensor.kind in ('matrix', 'embedding'):
    return _DTYPES[compute]
  return _DTYPES['float32']


def packed_tensors(
  config: ModelConfig, layout: Layout, mesh: Mapping[str, int], int8: bool
) -> dict[str, PackedTensor]:
  """The arrays that serving this model on this mesh takes, by the field names of weights.Weights.

  Those of a layer are called 'sublayer/field': 'parallel/w_in', or 'attention/w_in' and 'mlp/w_in' in a serial block.

  Args:
    config: the model.
    layout: decides the shardings.
    mesh: axis name -> size.
    int8: whether the matrices are int8 with scales.

  Raises:
    MeshError: the mesh does not divide the model.
  """
  check_model(config, mesh)
  canonical = {**params.parameters(config), **params.scales(config)}
  shards = num_shards(layout.stored_hidden, mesh)
  split = stored_heads(config, shards)
  e, d = config.d_model, config.d_head

  def even(*names, axis=-1, padded=0, share=0):
    sizes = tuple(canonical[n].shape[axis] for n in names)
    share = share or -(-sum(sizes) // shards)
    bounds = [min(s * share, sum(sizes)) for s in range(shards + 1)]
    return PackedPart(names, sizes, padded or share, tuple(itertools.pairwise(bounds)))

  def queries(name, axis=-1):
    return (
      even(name, axis=axis)
      if split.pieces > 1
      else by_heads(name, split.local_heads, split.query_range, axis)
    )

  def by_heads(name, count, head_range, axis=-1):
    ranges = tuple((start * d, stop * d) for start, stop in map(head_range, range(shards)))
    return PackedPart((name,), (canonical[name].shape[axis],), count * d, ranges)

  def tensor(shape, spec, kind, axis, *parts, per_layer=True):
    shape = list(shape)
    shape[axis] = sum(p.width for p in parts) * shards
    return PackedTensor(tuple(shape), spec, kind, per_layer, axis, parts)

  def vector(name, per_layer):  # no blocks: one part, whose width is all of it
    part = PackedPart((name,), (e,), e, ((0, e),))
    return PackedTensor((e,), layout.vector, canonical[name].kind, per_layer, 0, (part,))

  def norm(field, name, per_layer):
    names = {field: name, f'{field}_bias': params.bias_name(name)}
    return {f: vector(n, per_layer) for f, n in names.items() if n in canonical}

  def column_parts(block_part, rename=lambda name: name):
    parts = [even(rename(n)) for n in config.mlp_inputs] if block_part.mlp else []
    if block_part.attention:
      parts.append(queries(rename('query')))
      if (
        config.num_kv_heads == 1
      ):  # one key head is less than a shard: all share its columns, and gather them
        parts.append(even(rename('key'), rename('value'), padded=kv_columns(config, split)[1]))
      else:
        parts += [
          by_heads(rename(n), split.local_groups, split.group_range) for n in ('key', 'value')
        ]
    return parts

  def row_parts(block_part):
    parts = [even('mlp_output', axis=1)] if block_part.mlp else []
    if block_part.attention:
      parts.append(queries('attention_output', axis=1))
    return parts

  vocabulary = even('embedding', axis=0, share=vocabulary_rows(config, shards))
  tensors = {
    'embedding': tensor((0, e), layout.embedding, 'embedding', 0, vocabulary, per_layer=False),
    **norm('final_norm', 'final_norm', False),
  }
  for block_part in config.block_parts:
    fields = {
      **norm('norm', params.norm_name(block_part), True),
      'w_in': tensor((e, 0), layout.input_matrix, 'matrix', 1, *column_parts(block_part)),
      'w_out': tensor((0, e), layout.output_matrix, 'matrix', 0, *row_parts(block_part)),
    }
    if int8:
      fields['in_scale'] = tensor(
        (0,),
        layout.input_scale,
        'scale',
        0,
        *column_parts(block_part, lambda name: canonical[name].scale),
      )
      fields['out_scale'] = vector(params.output_scale_name(block_part), True)
    tensors.update({f'{block_part.name}/{field}': t for field, t in fields.items()})
  return tensors
