"""T5X's own checkpoint format, written: float32, or int8 with flaxformer's names qkernel and qscale.

The tree is arranged as the one that the weights came from, where that is known (flaxformer.Reading.form, which
serving checkpoints record); else as flaxformer's layer for such a model usually is: scanned, ParallelFusedDecoderLayer
where the model can be one, DecoderLayer with split heads where not.
"""

from collections.abc import Iterator, Sequence
import math
from typing import Any

import msgpack
import numpy as np

from t5x_inference_ext.checkpoints import manifest, serving
from t5x_inference_ext.checkpoints.arrays import KernelLayout, KernelPart, Rectangle
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.conversion.raw_array import RawArray, array_files
from t5x_inference_ext.checkpoints.readers import flaxformer_names, legacy
from t5x_inference_ext.checkpoints.readers.layer_kinds import (
  LAYER_KINDS,
  OUT,
  LayerKind,
  UnknownSizes,
)
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError

MANIFEST = 't5x_inference_ext.json'
T5X_MANIFEST_FORMAT = 't5x_inference_ext T5X checkpoint'
CHUNK_BYTES = 64 * 2**20


class T5xOutput:
  """A T5X checkpoint being written. An Output."""

  header = legacy.INDEX

  def __init__(
    self,
    source: Checkpoint,
    directory: str,
    weights: str,
    provenance: dict[str, Any],
    version: str,
    options: dict[str, Any],
  ):
    self.weights = weights
    form = source.form or usual_form(source.config)
    self._step = source.step
    self._leaves, self._places, self._layer_weights = {}, {}, set()
    self._directory = directory
    self._layers = source.config.num_layers
    try:
      self._per_layer, self._axis = form['per_layer'], form['layer_axis']
      self._lay_out(
        source.config, {k.name: k for k in LAYER_KINDS}[form['layers']], form['kernels']
      )
    except (TypeError, KeyError, AttributeError, UnknownSizes) as e:  # of a damaged header
      raise CheckpointError(
        f'{source.path}: source.form in {serving.CONFIG} is not an arrangement that T5X has: '
        f'{type(e).__name__} {e}'
      ) from e
    self.arrays = tuple(a for leaves in self._leaves.values() for a in leaves)
    self._manifest = {
      'format': T5X_MANIFEST_FORMAT,
      'version': 1,
      'written_by': f't5x_inference_ext {version}',
      'weights': weights,
      'options': options,
      'model': source.config.to_dict(),
      'source': provenance,
      'tensors': {
        a.name: {'shape': a.shape, 'dtype': a.dtype.name, 'chunks': a.chunk} for a in self.arrays
      },
    }

  def _lay_out(self, config: ModelConfig, kind: LayerKind, stored: dict[str, list[int]]) -> None:
    e = config.d_model
    vector = lambda name: KernelLayout(None, 0, (), (e,), (KernelPart(name, 0, e),), 0)
    v = config.vocab_size
    self._add(
      'embedding',
      flaxformer_names.EMBEDDING,
      KernelLayout(None, 0, (v,), (e,), (KernelPart('embedding', 0, v),), 0),
      np.float32,
    )
    leaf_names = (('', 'scale'), ('_bias', 'bias'))[: 2 if config.norm == 'layer' else 1]
    for suffix, leaf in leaf_names:
      self._add(
        f'final_norm{suffix}',
        f'{flaxformer_names.FINAL_NORM}/{leaf}',
        vector(f'final_norm{suffix}'),
        np.float32,
      )
      for name, module in kind.norms:
        self._add(
          f'{name}{suffix}',
          f'{flaxformer_names.LAYERS}/{module}/{leaf}',
          KernelLayout(
            self._layers, self._axis, (), (e,), (KernelPart(f'{name}{suffix}', 0, e),), 0
          ),
          np.float32,
        )
    factors = kind.factors(config)
    if self.weights == 'int8' and OUT in stored:
      stored = {
        **stored,
        OUT: stored[OUT][-2:],
      }  # flaxformer's quantized output projection has its heads joined
    kernels = kind.kernels(config, {module: tuple(shape) for module, shape in stored.items()})
    for module in stored:
      kernel = kernels[module]
      place = f'{flaxformer_names.LAYERS}/{module}'
      if self.weights == 'int8':
        matrix = kernel.layout(config.num_layers, self._axis)
        scale = kernel.scale_layout(config, self._axis, factors)
        self._add_parts(f'{place}/qkernel', matrix, np.int8)
        self._add_parts(f'{place}/qscale', scale, np.float32)
      else:
        self._add_parts(
          f'{place}/kernel', kernel.layout(config.num_layers, self._axis, factors), np.float32
        )

  def _add_parts(self, leaf: str, arrangement: KernelLayout, dtype: type) -> None:
    for part in arrangement.parts:
      self._add(part.name, leaf, arrangement, dtype)
    self._layer_weights |= {array.name for array in self._leaves[leaf]}

  def _add(self, name: str, leaf: str, arrangement: KernelLayout, dtype: type) -> None:
    """Says that the canonical tensor `name` goes to `leaf`."""
    self._places.setdefault(name, []).append((leaf, arrangement))
    if leaf in self._leaves:
      return
    shape = arrangement.to_stored(arrangement.factored)
    names = [leaf]
    if self._per_layer and arrangement.layers is not None:
      shape = shape[: self._axis] + shape[self._axis + 1 :]
      names = [
        leaf.replace(flaxformer_names.LAYERS, f'decoder/layers_{i}', 1) for i in range(self._layers)
      ]
    chunk = t5x_chunk_shape(shape, CHUNK_BYTES // np.dtype(dtype).itemsize)
    self._leaves[leaf] = [
      RawArray(self._directory, f'target.{n.replace("/", ".")}', shape, dtype, chunk) for n in names
    ]

  def dtype(self, name: str) -> np.dtype:
    return self._leaves[self._places[name][0][0]][0].dtype

  def is_layer_weight(self, array: str) -> bool:
    return array in self._layer_weights

  def placements(self, name: str, rectangle: Rectangle, values: np.ndarray) -> Iterator[tuple]:
    for leaf, arrangement in self._places[name]:
      part = next(p for p in arrangement.parts if p.name == name)
      scaled = part.to_stored(values)
      for bounds, index in arrangement.pieces(part, rectangle):
        piece = scaled[index]
        if self._per_layer and arrangement.layers is not None:
          for i in range(*bounds[0]):
            yield self._leaves[leaf][i], bounds[1:], piece[i - bounds[0][0]]
        elif arrangement.layers is None:
          yield self._leaves[leaf][0], bounds[1:], piece[0]
        else:
          yield (
            self._leaves[leaf][0],
            arrangement.to_stored(bounds),
            np.moveaxis(piece, 0, self._axis),
          )

  def headers(
    self, checksums: dict[str, list[int]], errors: dict[str, dict]
  ) -> Iterator[tuple[str, bytes]]:
    files = {serving.CHECKSUMS: serving.checksums_file(checksums), legacy.INDEX: self._index()}
    yield serving.CHECKSUMS, files[serving.CHECKSUMS]
    yield (
      MANIFEST,
      manifest.write({**self._manifest, 'errors': errors}, {**files, **array_files(self.arrays)}),
    )
    yield legacy.INDEX, files[legacy.INDEX]

  def _index(self) -> bytes:
    target = {}
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
    state = {'step': legacy.pack_array(np.int32(self._step or 0))}
    index = {'version': 3, 'optimizer': {'target': target, 'state': state}}
    return msgpack.packb(index, use_bin_type=True)


def usual_form(config: ModelConfig) -> dict[str, Any]:
  """How flaxformer usually arranges such a model, where nobody recorded it. Raises CheckpointError where it can't."""
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
        'T5X checkpoint is written only where this model came from one'
      )
    mlp = ('mlp/wi_0', 'mlp/wi_1') if c.mlp == 'swiglu' else ('mlp/wi',)
    heads = (
      'self_attention/query',
      *(() if c.num_kv_heads == 1 else ('self_attention/key', 'self_attention/value')),
    )
    names = (*(f'self_attention/{n}' for n in ('query', 'key', 'value', 'out')), *mlp, 'mlp/wo')
    shapes = dict.fromkeys(
      (*heads, 'self_attention/out'), (0, 0, 0)
    )  # of three axes: heads are split
  kernels = kind.kernels(c, shapes)
  return {
    'layers': kind.name,
    'layer_axis': 1,
    'per_layer': False,
    'kernels': {name: list(kernels[name].shape) for name in names},
  }


def t5x_chunk_shape(shape: Sequence[int], elements: int) -> tuple[int, ...]:
  """T5X's rule: the largest side goes down to its next divisor, until a chunk has at most so many elements."""
  sides = list(shape)
  while math.prod(sides) > elements:
    axis = sides.index(max(sides))
    sides[axis] = next(d for d in range(sides[axis] - 1, 0, -1) if shape[axis] % d == 0)
  return tuple(sides)
