"""Weight packing: how canonical tensors become the arrays on the devices.

Tensors are fused, cut into a block of columns for each shard, and padded to the mesh. A shard's
columns are contiguous, in the order of columns.py, so that one matmul computes all of them and no
reshape crosses shards. This order and the padding exist only on the devices: checkpoints hold
canonical tensors. Padding is zeros. The MLP is never padded: the mesh must divide its width.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
import dataclasses
import functools

from jax.sharding import PartitionSpec as P
import ml_dtypes
import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.quantization.formats import bits_of, is_quantized, weight_format
from t5x_inference_ext.sharding.columns import (
  PackedPart,
  input_parts,
  output_parts,
  positions_part,
  vocabulary_part,
)
from t5x_inference_ext.sharding.layout import Layout, check_model, num_shards
from t5x_inference_ext.sharding.mesh import AXES

Index = tuple[slice, ...]
# Function of a canonical tensor's name and an index, that returns the tensor's values there.
Reader = Callable[[str, Index], np.ndarray]

_DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class PackedTensor:
  """One array on the devices, or one array per layer.

  Attributes:
    shape: The dimensions, without layers.
    axes: The logical axis (params.py) of each dimension, without layers.
    spec: The sharding, without layers.
    kind: Kind of the tensor, as in params.Parameter.
    per_layer: Whether each layer has such an array.
    axis: The dimension of `shape` that consists of blocks, one block for each shard.
    parts: The parts of a block, in order.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  spec: P
  kind: str
  per_layer: bool
  axis: int
  parts: tuple[PackedPart, ...]

  def read(self, reader: Reader, layer: int | None, index: Index) -> np.ndarray:
    """Return the values at `index` (into `shape`), assembled from canonical tensors.

    Only the values needed are read.
    """
    lead = () if layer is None else (slice(layer, layer + 1),)
    begin, end, _ = index[self.axis].indices(self.shape[self.axis])
    block = sum(part.width for part in self.parts)
    pieces: list[np.ndarray] = []
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

  def _read_part(
    self,
    reader: Reader,
    lead: Index,
    index: Index,
    part: PackedPart,
    low: int,
    high: int,
    stop: int,
  ) -> list[np.ndarray]:
    """Read columns [low, high) of the part's concatenated tensors, with zeros from `stop` on."""
    pieces, offset = [], 0
    for name, width in zip(part.names, part.sizes, strict=True):
      first, last = max(low - offset, 0), min(high - offset, stop - offset, width)
      if first < last:
        columns = slice(first, last)
        where = tuple(columns if i == self.axis else s for i, s in enumerate(index))
        values = reader(name, lead + where)
        pieces.append(values[0] if lead else values)
      offset += width
    if high > stop:
      shape = [len(range(*s.indices(n))) for s, n in zip(index, self.shape, strict=True)]
      shape[self.axis] = high - max(low, stop)
      # Padding read alone is int8 zeros: concatenated with other values later, they take the other
      # dtype, while float zeros would turn int8 values into floats.
      pieces.append(np.zeros(shape, pieces[0].dtype if pieces else np.int8))
    return pieces


def tensor_dtype(tensor: PackedTensor, weights: str, compute: str) -> np.dtype:
  """Return the dtype of one of packed_tensors on the devices. See canonical_dtype."""
  names = (name for part in tensor.parts for name in part.names)
  return canonical_dtype(tensor.kind, names, weights, compute)


def canonical_dtype(kind: str, names: Iterable[str], weights: str, compute: str) -> np.dtype:
  """Return the dtype on the devices of a canonical tensor, or of an array of several.

  Args:
    kind: Kind of the tensors, as in params.Parameter.
    names: Names of the tensors.
    weights: Format of the checkpoint's weights (quantization.formats). Float matrices and tables
      take the compute dtype. Of the matrices in one array, the one with the most bits decides.
    compute: The dtype of activations and float weights, 'float32' or 'bfloat16'.
  """
  if kind not in ('matrix', 'embedding'):
    return _DTYPES['float32']
  stored = weight_format(weights).dtype(*names)
  return stored if is_quantized(stored) else _DTYPES[compute]


def matrix_bytes(
  tensors: Mapping[str, PackedTensor], weights: str, compute: str
) -> dict[str, float]:
  """Return the bytes of a weight element of each array of matrices, by name.

  Args:
    tensors: Tensors by name, from packed_tensors.
    weights: See tensor_dtype.
    compute: See tensor_dtype.
  """
  return {
    name: bits_of(tensor_dtype(tensor, weights, compute)) / 8
    for name, tensor in tensors.items()
    if tensor.kind == 'matrix'
  }


def packed_tensors(
  config: ModelConfig, layout: Layout, mesh: Mapping[str, int], scaled: Collection[str]
) -> dict[str, PackedTensor]:
  """Return the arrays on the devices by name: the field names of model/weights.py's Weights.

  Arrays of a layer are named 'block part/field': 'parallel/w_in', or in a serial block
  'attention/w_in' and 'mlp/w_in'.

  Args:
    config: The model.
    layout: The layout of either phase; it decides the shardings.
    mesh: Axis name -> size.
    scaled: The weights that have scales (WeightFormat.scaled).

  Raises:
    MeshError: The mesh does not divide the model.
  """
  sizes = tuple(mesh[a] for a in AXES)
  return dict(_packed_tensors(config, layout, sizes, frozenset(scaled)))


@functools.lru_cache(maxsize=256)
def _packed_tensors(
  config: ModelConfig, layout: Layout, sizes: tuple[int, ...], scaled: frozenset[str]
) -> dict[str, PackedTensor]:
  mesh = dict(zip(AXES, sizes, strict=True))
  check_model(config, mesh)
  declared = {**params.parameters(config), **params.scales(config, scaled)}
  shards = num_shards(layout.stored_hidden, mesh)

  def fused(parts: Iterable[PackedPart]) -> PackedTensor:
    """Pack tensors into one array, a block for each shard."""
    parts = tuple(parts)
    first = declared[parts[0].names[0]]
    per_layer, shape, axes = _layer_shape(first)
    axis = next(i for i, name in enumerate(axes) if name in (params.HIDDEN_AXIS, params.VOCAB_AXIS))
    block = sum(part.width for part in parts)
    shape = (*shape[:axis], shards * block, *shape[axis + 1 :])
    return PackedTensor(shape, axes, layout.weight_spec(axes), first.kind, per_layer, axis, parts)

  def vector(name: str) -> PackedTensor:
    """Take a whole vector, or a table that no layout splits, as a single part."""
    kind = declared[name].kind
    per_layer, shape, axes = _layer_shape(declared[name])
    part = PackedPart((name,), shape[:1], shape[0], ((0, shape[0]),))
    return PackedTensor(shape, axes, layout.weight_spec(axes), kind, per_layer, 0, (part,))

  def norm(field: str, name: str) -> dict[str, PackedTensor]:
    names = {field: name, f'{field}_bias': params.bias_name(name)}
    return {f: vector(n) for f, n in names.items() if n in declared}

  def table(name: str) -> dict[str, PackedTensor]:
    if name not in declared:
      return {}
    rows = vocabulary_part(config, shards, name)
    found = {name: fused([rows])}
    if name in scaled:
      found[f'{name}{params.INT8_SUFFIX}'] = fused([_scales_of(rows, declared)])
    return found

  tensors = table('embedding')
  tensors |= norm('final_norm', 'final_norm')
  tensors |= norm('embedding_norm', 'embedding_norm')
  tensors |= table('head')
  if 'position_embedding' in declared:
    tensors['position_embedding'] = fused([positions_part(config, shards)])
  tensors |= {name: vector(name) for name in ('head_bias', 'relative_bias') if name in declared}
  for block_part in config.block_parts:
    columns = input_parts(config, block_part, shards)
    vectors = params.vector_names(config, block_part)
    fields = {field: vector(name) for field, name in vectors.items()}
    fields['w_in'] = fused(columns)
    fields['w_out'] = fused(output_parts(config, block_part, shards))
    if params.MATRICES in scaled:
      fields['in_scale'] = fused(_scales_of(part, declared) for part in columns)
      fields['out_scale'] = vector(params.output_scale_name(block_part))
    tensors |= {f'{block_part.name}/{field}': tensor for field, tensor in fields.items()}
  return tensors


def _layer_shape(p: params.Parameter) -> tuple[bool, tuple[int, ...], tuple[str, ...]]:
  """Return whether a tensor belongs to a layer, and its shape and axes without the layer axis."""
  if p.axes[0] == params.LAYERS_AXIS:
    return True, p.shape[1:], p.axes[1:]
  return False, p.shape, p.axes


def _scales_of(part: PackedPart, declared: Mapping[str, params.Parameter]) -> PackedPart:
  """Return the part of the scales that corresponds to a part of their matrices."""
  names = tuple(str(declared[name].scale) for name in part.names)
  return dataclasses.replace(part, names=names)
