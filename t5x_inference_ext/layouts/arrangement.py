"""How canonical tensors become the arrays on the chips: fused, cut into per-shard column blocks, padded to the mesh.

A shard's columns lie together as one block [gate | linear | query | key, value], so that one matmul gives a shard all
it needs and no reshape crosses shards. What depends on the mesh, this order and the padding, exists only here:
checkpoints hold canonical tensors. Padding is with zeros and never touches the MLP, whose width the mesh must divide.
"""

import dataclasses
from typing import Callable

from jax.sharding import PartitionSpec as P
import numpy as np

from t5x_inference_ext import parameters
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.layouts.layout import Layout, check_model, hidden_shards

Index = tuple[slice, ...]
# (canonical name, index) -> the values there.
Reader = Callable[[str, Index], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Part:
  """Canonical tensors, concatenated along the blocked axis, each shard holding `width` (the last ones padded)."""

  names: tuple[str, ...]
  sizes: tuple[int, ...]
  width: int


@dataclasses.dataclass(frozen=True)
class DeviceTensor:
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
  parts: tuple[Part, ...]

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
          start = shard * part.width - offset
          pieces.append(self._read_part(reader, lead, index, part, low + start, high + start))
        offset += part.width
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=self.axis)

  def _read_part(self, reader, lead, index, part, low, high):
    """Columns [low, high) of the part's tensors laid side by side, zeros beyond their end."""
    pieces, offset = [], 0
    for name, size in zip(part.names, part.sizes):
      a, b = max(low - offset, 0), min(high - offset, size)
      if a < b:
        where = tuple(slice(a, b) if i == self.axis else s for i, s in enumerate(index))
        values = reader(name, lead + where)
        pieces.append(values[0] if lead else values)
      offset += size
    if high > offset:
      shape = [len(range(*s.indices(n))) for s, n in zip(index, self.shape)]
      shape[self.axis] = high - max(low, offset)
      # int8 where nothing but padding is read: beside values of any dtype it takes theirs, and never widens int8.
      pieces.append(np.zeros(shape, pieces[0].dtype if pieces else np.int8))
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=self.axis)


def device_tensors(config: ModelConfig, layout: Layout, mesh: dict[str, int], int8: bool) -> dict[str, DeviceTensor]:
  """The arrays that serving this model on this mesh takes, by the field names of weights.Weights and LayerWeights.

  Args:
    config: the model.
    layout: decides the shardings.
    mesh: axis name -> size.
    int8: whether the matrices are int8 with scales.

  Raises:
    MeshError: the mesh does not divide the model.
  """
  check_model(config, mesh)
  canonical = {**parameters.parameters(config), **parameters.scales(config)}
  shards = hidden_shards(layout, mesh)
  e = config.d_model

  def part(*names, axis=-1):
    sizes = tuple(canonical[n].shape[axis] for n in names)
    return Part(names, sizes, -(-sum(sizes) // shards))

  def tensor(shape, spec, kind, axis, *parts, per_layer=True):
    shape = list(shape)
    shape[axis] = sum(p.width for p in parts) * shards
    return DeviceTensor(tuple(shape), spec, kind, per_layer, axis, parts)

  def whole(name, spec, per_layer):  # no blocks: one part, whose width is all of it
    size = canonical[name].shape[-1]
    return DeviceTensor((size,), spec, canonical[name].kind, per_layer, 0, (Part((name,), (size,), size),))

  columns = ('gate',), ('linear',), ('query',), ('key', 'value')
  tensors = {
      'embedding': tensor((0, e), layout.embedding, 'embedding', 0, part('embedding', axis=0),
                          per_layer=False),
      'final_norm': whole('final_norm', layout.norm, False),
      'norm': whole('layer_norm', layout.norm, True),
      'w_in': tensor((e, 0), layout.input_matrix, 'matrix', 1, *(part(*n) for n in columns)),
      'w_out': tensor((0, e), layout.output_matrix, 'matrix', 0,
                      part('mlp_output', axis=1), part('attention_output', axis=1)),
  }
  if int8:
    scale_columns = [tuple(canonical[n].scale for n in names) for names in columns]
    tensors['in_scale'] = tensor((0,), layout.input_scale, 'scale', 0, *(part(*n) for n in scale_columns))
    tensors['out_scale'] = whole('output_scale', layout.output_scale, True)
  return tensors
