"""Writing of T5X's checkpoint format: float32, or int8 with flaxformer's names qkernel and qscale.

If the arrangement of the weights' original tree is recorded (flaxformer.ParsedModel.form, which
serving checkpoints record), the output has the same arrangement. Otherwise it has flaxformer's
usual one: scanned layers, of ParallelFusedDecoderLayer if that layer can represent the model, else
of DecoderLayer with split heads.
"""

from collections.abc import Iterator, Sequence
import math
from typing import Any

import msgpack
import numpy as np
from numpy.typing import DTypeLike

from t5x_inference_ext.checkpoints import serving
from t5x_inference_ext.checkpoints.arrays import KernelLayout, KernelPart, Rectangle
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.conversion.output import ArrayWrite, Output
from t5x_inference_ext.checkpoints.conversion.raw_array import RawArray
from t5x_inference_ext.checkpoints.readers import flaxformer_names, legacy
from t5x_inference_ext.checkpoints.readers.layer_kinds import (
  LAYER_KINDS,
  OUT,
  LayerKind,
  UnknownSizes,
)
from t5x_inference_ext.checkpoints.tree_notes import MANIFEST
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError

T5X_MANIFEST_FORMAT = 't5x_inference_ext T5X checkpoint'
CHUNK_BYTES = 64 * 2**20


class T5xOutput(Output):
  """A T5X checkpoint while it is being written."""

  manifest_name, manifest_format, manifest_version = MANIFEST, T5X_MANIFEST_FORMAT, 1
  header = legacy.INDEX

  def __init__(
    self, source: Checkpoint, directory: str, weights: str, record: dict[str, Any]
  ) -> None:
    check_written(source.config)
    form = source.form or usual_form(source.config)
    self._directory, self._step, self._num_layers = directory, source.step, source.config.num_layers
    # Each leaf of the tree, which holds canonical tensors, is stored as one array or as one per
    # layer.
    self._leaves: dict[str, list[RawArray]] = {}
    self._places: dict[str, list[tuple[str, KernelLayout]]] = {}
    self._layer_weights: set[str] = set()
    try:
      self._per_layer, self._axis = form['per_layer'], form['layer_axis']
      kind = {k.name: k for k in LAYER_KINDS}[form['layers']]
      self._lay_out_vectors(source.config, kind)
      self._lay_out_kernels(source.config, kind, form['kernels'], weights)
    except (TypeError, KeyError, AttributeError, UnknownSizes) as e:  # a damaged header
      raise CheckpointError(
        f'{source.path}: source.form in {serving.CONFIG} is not an arrangement of T5X: '
        f'{type(e).__name__} {e}'
      ) from e
    arrays = tuple(a for leaves in self._leaves.values() for a in leaves)
    super().__init__(source, weights, arrays, record)

  def _lay_out_vectors(self, config: ModelConfig, kind: LayerKind) -> None:
    """Define the arrays of the embedding, norms and biases."""
    v, e = config.vocab_size, config.d_model
    embedding = KernelLayout(None, 0, (v,), (e,), (KernelPart('embedding', 0, v),), 0)
    self._add(flaxformer_names.EMBEDDING, embedding, np.float32)
    leaf_names = (('', 'scale'), ('_bias', 'bias'))[: 2 if config.norm == 'layer' else 1]
    for suffix, leaf in leaf_names:
      final = KernelLayout(None, 0, (), (e,), (KernelPart(f'final_norm{suffix}', 0, e),), 0)
      self._add(f'{flaxformer_names.FINAL_NORM}/{leaf}', final, np.float32)
      for name, module in kind.norms:
        part = KernelPart(f'{name}{suffix}', 0, e)
        norm = KernelLayout(self._num_layers, self._axis, (), (e,), (part,), 0)
        self._add(f'{flaxformer_names.LAYERS}/{module}/{leaf}', norm, np.float32)

  def _lay_out_kernels(
    self, config: ModelConfig, kind: LayerKind, stored: dict[str, list[int]], weights: str
  ) -> None:
    factors = kind.factors(config)
    shapes = {module: tuple(shape) for module, shape in stored.items()}
    if weights == 'int8' and OUT in shapes:  # flaxformer's quantized output kernel has merged heads
      shapes[OUT] = shapes[OUT][-2:]
    kernels = kind.kernels(config, shapes)
    for module in stored:
      kernel, place = kernels[module], f'{flaxformer_names.LAYERS}/{module}'
      if weights == 'int8':
        matrix = kernel.layout(self._num_layers, self._axis)
        scale = kernel.scale_layout(config, self._axis, factors)
        arrays = [
          *self._add(f'{place}/qkernel', matrix, np.int8),
          *self._add(f'{place}/qscale', scale, np.float32),
        ]
      else:
        matrix = kernel.layout(self._num_layers, self._axis, factors)
        arrays = self._add(f'{place}/kernel', matrix, np.float32)
      self._layer_weights |= {array.name for array in arrays}

  def _add(self, leaf: str, layout: KernelLayout, dtype: DTypeLike) -> list[RawArray]:
    """Define the arrays of a leaf that holds the canonical tensors of `layout`; return them."""
    for part in layout.parts:
      self._places.setdefault(part.name, []).append((leaf, layout))
    shape, names = layout.to_stored(layout.factored), [leaf]
    if self._per_layer and layout.layers is not None:
      shape = shape[: self._axis] + shape[self._axis + 1 :]
      names = [
        leaf.replace(flaxformer_names.LAYERS, f'decoder/layers_{i}', 1)
        for i in range(self._num_layers)
      ]
    chunk = t5x_chunk_shape(shape, CHUNK_BYTES // np.dtype(dtype).itemsize)
    self._leaves[leaf] = [
      RawArray(self._directory, f'target.{n.replace("/", ".")}', shape, dtype, chunk) for n in names
    ]
    return self._leaves[leaf]

  def dtype(self, name: str) -> np.dtype:
    return self._leaves[self._places[name][0][0]][0].dtype

  def is_layer_weight(self, array: str) -> bool:
    return array in self._layer_weights

  def placements(self, name: str, rectangle: Rectangle, values: np.ndarray) -> Iterator[ArrayWrite]:
    for leaf, layout in self._places[name]:
      part = next(p for p in layout.parts if p.name == name)
      arrays, stored = self._leaves[leaf], part.to_stored(values)
      for bounds, index in layout.pieces(part, rectangle):
        piece = stored[index]
        if layout.layers is None:
          yield arrays[0], bounds[1:], piece[0]
        elif self._per_layer:
          for i in range(*bounds[0]):
            yield arrays[i], bounds[1:], piece[i - bounds[0][0]]
        else:
          yield arrays[0], layout.to_stored(bounds), np.moveaxis(piece, 0, self._axis)

  def index_files(self) -> dict[str, bytes]:
    target: dict[str, Any] = {}
    for array in self.arrays:
      *keys, last = array.name.split('.')[1:]
      node = target
      for key in keys:
        node = node.setdefault(key, {})
      node[last] = {
        'driver': 'zarr',
        'dtype': array.dtype.name,
        'kvstore': {'driver': 'file', 'path': f'{array.name}/'},
        'metadata': {k: array.metadata[k] for k in ('shape', 'chunks', 'compressor')},
      }
    state = {'step': legacy.pack_array(np.asarray(self._step or 0, np.int32))}
    index = {'version': 3, 'optimizer': {'target': target, 'state': state}}
    return {legacy.INDEX: msgpack.packb(index, use_bin_type=True)}


def check_written(config: ModelConfig) -> None:
  """Raise CheckpointError if the model has a feature that a T5X checkpoint can't represent."""
  features = dict(config.features)
  if config.mlp not in ('swiglu', 'gelu'):
    features['mlp'] = config.mlp
  for name, value in features.items():
    raise CheckpointError(
      f'a model with {name}={value} is not written as a T5X checkpoint, which has no place for it: '
      'use the serving format'
    )


def usual_form(config: ModelConfig) -> dict[str, Any]:
  """Return flaxformer's usual arrangement of a model, for a source that records no tree.

  Raises:
    CheckpointError: No layer of flaxformer can represent the model.
  """
  c = config
  fused, serial, parallel = LAYER_KINDS
  if (
    c.block == 'parallel' and c.num_kv_heads == 1 and c.norm == 'rms' and c.d_ff % c.num_heads == 0
  ):
    kind, names, shapes = fused, fused.alternatives[0][0], {}
  else:
    kind = serial if c.block == 'serial' else parallel
    if c.num_kv_heads not in (1, c.num_heads):
      raise CheckpointError(
        f'flaxformer has no layer with {c.num_heads} query and {c.num_kv_heads} key/value heads: a '
        'T5X checkpoint is written only if this model came from a T5X checkpoint'
      )
    mlp = ('mlp/wi_0', 'mlp/wi_1') if c.mlp == 'swiglu' else ('mlp/wi',)
    heads = (
      'self_attention/query',
      *(() if c.num_kv_heads == 1 else ('self_attention/key', 'self_attention/value')),
    )
    names = (*(f'self_attention/{n}' for n in ('query', 'key', 'value', 'out')), *mlp, 'mlp/wo')
    shapes = dict.fromkeys((*heads, 'self_attention/out'), (0, 0, 0))  # three axes: split heads
  kernels = kind.kernels(c, shapes)
  return {
    'layers': kind.name,
    'layer_axis': 1,
    'per_layer': False,
    'kernels': {name: list(kernels[name].shape) for name in names},
  }


def t5x_chunk_shape(shape: Sequence[int], elements: int) -> tuple[int, ...]:
  """Return a chunk shape of at most `elements` elements, as T5X chooses it.

  The largest side is reduced to its next divisor until a chunk is small enough.
  """
  sides = list(shape)
  while math.prod(sides) > elements:
    axis = sides.index(max(sides))
    sides[axis] = next(d for d in range(sides[axis] - 1, 0, -1) if shape[axis] % d == 0)
  return tuple(sides)
