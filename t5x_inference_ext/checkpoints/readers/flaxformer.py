"""Conversion of flaxformer's parameter tree, as T5X trains it, to canonical tensors.

Scanned form, with the layer axis L on axis 1 (or 0: flaxformer's scan_axis):

  decoder/token_embedder/embedding          [V, E]
  decoder/relpos_bias/rel_embedding         [H, buckets]      if positions are T5's relative bias
  decoder/logits_dense/kernel               [E, V]            if the head is not the embedding
  decoder/decoder_norm/scale                [E]               and, with layer norm, bias
  decoder/decoder/NORM/scale                [E, L]            and, with layer norm, bias
  decoder/decoder/MODULE/kernel             e.g. [E, L, F]    see layer_kinds.py for MODULE and axes

A tree with one subtree per layer (decoder/layers_0/...) has these parameters without the layer
axis. In the quantized form each kernel is a pair: qkernel, int8 of the kernel's shape, and qscale,
in which the axes that a matmul sums over have size 1. A weight is qkernel / qscale.
"""

from collections.abc import Collection
import dataclasses
from typing import Any

import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.arrays import SourceArray, whole_array
from t5x_inference_ext.checkpoints.conventions import ConventionSources, ResolvedOption
from t5x_inference_ext.checkpoints.families.tensors import weights_dtype
from t5x_inference_ext.checkpoints.readers.flaxformer_model import TreeShape, find_model
from t5x_inference_ext.checkpoints.readers.flaxformer_names import (
  EMBEDDING,
  FINAL_NORM,
  HEAD,
  LAYER,
  LAYERS,
  RELATIVE_BIAS,
  check_dtypes,
  check_names,
  check_shapes,
  is_per_layer,
  modules_in,
  norm_leaves,
)
from t5x_inference_ext.checkpoints.readers.kernel import Kernel
from t5x_inference_ext.checkpoints.readers.layer_kinds import LAYER_KINDS, LayerKind, Shapes
from t5x_inference_ext.checkpoints.readers.tree import Tree
from t5x_inference_ext.checkpoints.tensor import Cast, Stack, Tensor
from t5x_inference_ext.checkpoints.views import Affine, Transposed
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError, name_list

_STACK_AXIS = 1


@dataclasses.dataclass(frozen=True)
class ParsedModel:
  """A parameter tree, interpreted as a model.

  Attributes:
    config: The model.
    weights: Dtype of the matrices: 'float32', 'bfloat16' or 'int8'.
    tensors: The canonical tensors, by name.
    arrays: The stored arrays that hold the canonical tensors, except the scales of int8 weights.
    conventions: The conventions that the weights do not show, by name.
    kind: The kind of the model's layers.
    layer_axis: Position of the layer axis in the scanned form.
    form: The arrangement of the parameters in the tree, JSON-ready, for writing such a tree.
  """

  config: ModelConfig
  weights: str
  tensors: dict[str, Tensor]
  arrays: tuple[SourceArray, ...]
  conventions: dict[str, ResolvedOption]
  kind: LayerKind
  layer_axis: int
  form: dict[str, Any]


def canonical(tree: Tree, sources: ConventionSources) -> ParsedModel:
  """Determine a tree's model, and find the canonical tensors in the tree's arrays.

  Args:
    tree: The parameters, as stored.
    sources: Sources of conventions. With rescale_logits=False, queries are multiplied by sqrt(Q),
      because the program divides attention logits by it.

  Raises:
    CheckpointError: A parameter is missing, unknown or of the wrong shape, or a convention is not
      stated. The message names it.
  """
  leaves = stack_layers(tree)
  quantized = any(name.endswith('/qkernel') for name in leaves)
  suffix = 'qkernel' if quantized else 'kernel'
  kind = find_kind(leaves)
  modules, norm = check_names(tree, leaves, kind, quantized)
  check_dtypes(leaves)
  axis = _layer_axis(leaves, kind)
  shapes = _shapes(leaves, kind, modules, suffix, axis)
  try:
    layers = leaves[f'{LAYERS}/{modules[0]}/{suffix}'].shape[axis]
    shape = TreeShape(kind, shapes, norm, layers, leaves)
    model, conventions = find_model(shape, sources, tree.path)
    kernels = [kind.kernels(model, shapes)[module] for module in modules]
  except CheckpointError:
    raise
  except ValueError as e:
    raise CheckpointError(f'{tree.path}: {e}') from e
  given = sources.config is not None
  check_shapes(tree, leaves, kind, kernels, model, quantized, axis, given=given)

  factors = kind.factors(model, conventions['rescale_logits'].value)
  arrays = _unquantized_arrays(leaves, kind, model, axis)
  scales: list[SourceArray] = []
  for kernel in kernels:
    place = f'{LAYERS}/{kernel.module}'
    if not quantized:
      layout = kernel.layout(model.num_layers, axis, factors)
      arrays.append(SourceArray(leaves[f'{place}/kernel'], layout))
      continue
    _check_shared_scales(tree, kernel, model)
    stored = _cast(leaves, f'{place}/qkernel', np.int8)
    arrays.append(SourceArray(stored, kernel.layout(model.num_layers, axis)))
    scale = _cast(leaves, f'{place}/qscale', np.float32)
    scales.append(SourceArray(scale, kernel.scale_layout(model, axis, factors)))
  tensors: dict[str, Tensor] = {}
  for array in (*arrays, *scales):
    tensors.update(array.tensors())
  _check_canonical(tensors, model)
  form = {
    'layers': kind.name,
    'layer_axis': axis,
    'per_layer': is_per_layer(tree),
    'kernels': {kernel.module: list(kernel.shape) for kernel in kernels},
  }
  weights = 'int8' if quantized else weights_dtype(tensors, model)
  return ParsedModel(model, weights, tensors, tuple(arrays), conventions, kind, axis, form)


def stack_layers(tree: Tree) -> dict[str, Tensor]:
  """Return the leaves of a tree in scanned form; a per-layer tree is stacked."""
  by_layer: dict[str, dict[int, Tensor]] = {}
  leaves = {}
  for name, leaf in tree.leaves.items():
    match = LAYER.fullmatch(name)
    if match:
      by_layer.setdefault(match[2], {})[int(match[1])] = leaf
    else:
      leaves[name] = leaf
  if by_layer and any(name.startswith(f'{LAYERS}/') for name in leaves):
    raise CheckpointError(
      f'{tree.path} holds both {LAYERS} and decoder/layers_0, ...: two models in one tree'
    )
  count = 1 + max((max(stored) for stored in by_layer.values()), default=-1)
  for name, stored in by_layer.items():
    if len(stored) < count:
      missing = (f'target/decoder/layers_{i}/{name}' for i in range(count) if i not in stored)
      raise CheckpointError(f'{tree.path} lacks ' + name_list(missing, count - len(stored)))
    for i in range(1, count):
      if stored[i].shape != stored[0].shape:
        raise CheckpointError(
          f'target/decoder/layers_{i}/{name} has shape {list(stored[i].shape)} in '
          f'{stored[i].path}, but layer 0 has {list(stored[0].shape)}'
        )
    if len(stored[0].shape) < _STACK_AXIS:
      raise CheckpointError(f'target/decoder/layers_0/{name} is a scalar in {stored[0].path}')
    leaves[f'{LAYERS}/{name}'] = Stack([stored[i] for i in range(count)], _STACK_AXIS)
  return leaves


def find_kind(leaves: Collection[str]) -> LayerKind:
  """Return the kind of layer with most of its parameters among the leaves of a scanned tree.

  Among several such kinds, return the one that misses the fewest parameters.
  """
  stored = modules_in(leaves)

  def fit(kind: LayerKind) -> tuple[int, int]:
    expected = {*kind.modules(stored), *(module for _, module in kind.norms)}
    return len(expected & stored), -len(expected - stored)

  return max(LAYER_KINDS, key=fit)


def _unquantized_arrays(
  leaves: dict[str, Tensor], kind: LayerKind, model: ModelConfig, layer_axis: int
) -> list[SourceArray]:
  """Return the arrays of the embedding, the head, the relative bias and the norms.

  These arrays are never quantized. The program always divides logits by sqrt(E), but flaxformer
  divides them only with a tied head. So with an untied head, the final norm is multiplied by
  sqrt(E).
  """
  arrays = [whole_array(leaves[EMBEDDING], 'embedding', None)]
  if RELATIVE_BIAS in leaves:
    arrays.append(whole_array(_cast(leaves, RELATIVE_BIAS, np.float32), 'relative_bias', None))
  factor = 1.0
  if HEAD in leaves:
    arrays.append(whole_array(Transposed(leaves[HEAD]), 'head', None))
    factor = model.d_model**0.5
  norms: list[tuple[str, str, int | None]] = [('final_norm', FINAL_NORM, None)]
  norms += [(name, f'{LAYERS}/{module}', layer_axis) for name, module in kind.norms]
  for name, place, axis in norms:
    for leaf in norm_leaves(model.norm):
      stored = _cast(leaves, f'{place}/{leaf}', np.float32)
      if place == FINAL_NORM and factor != 1:
        around_zero = leaf == 'scale' and model.norm_scale == 'zero'
        stored = Affine(stored, factor, (factor - 1) / factor if around_zero else 0.0)
      canonical_name = name if leaf == 'scale' else params.bias_name(name)
      arrays.append(whole_array(stored, canonical_name, axis))
  return arrays


def _check_shared_scales(tree: Tree, kernel: Kernel, model: ModelConfig) -> None:
  """Raise CheckpointError if kernels have separate scales where the model needs a shared one."""
  matrices = params.parameters(model)
  within = {name for name, _ in kernel.parts}
  for name in within:
    sharing = {n for n, p in matrices.items() if p.scale == matrices[name].scale}
    if not sharing <= within:
      raise CheckpointError(
        f'{tree.path} has quantized kernels with separate scales for '
        f'{" and ".join(sorted(sharing))}, which share one scale in a parallel block: '
        'convert the float checkpoint'
      )


def _check_canonical(tensors: dict[str, Tensor], model: ModelConfig) -> None:
  """Raise CheckpointError if a canonical tensor's shape is not the model's."""
  wanted = {**params.parameters(model), **params.scales(model)}
  for name, tensor in tensors.items():
    if tensor.shape != wanted[name].shape:
      raise CheckpointError(
        f'{name}: shape {list(tensor.shape)} in {tensor.path}, but the model asked for needs '
        f'{list(wanted[name].shape)}'
      )


def _layer_axis(leaves: dict[str, Tensor], kind: LayerKind) -> int:
  """Return the position of the layer axis, which in a norm scale, [E, L] or [L, E], is not E."""
  shape = leaves[f'{LAYERS}/{kind.norms[0][1]}/scale'].shape
  d_model = leaves[EMBEDDING].shape[-1:]
  return 0 if len(shape) == 2 and shape[1:] == d_model != shape[:1] else 1


def _shapes(
  leaves: dict[str, Tensor], kind: LayerKind, modules: tuple[str, ...], suffix: str, axis: int
) -> Shapes:
  """Return the kernels' shapes without the layer axis.

  Raises:
    CheckpointError: A leaf has too many or too few axes.
  """
  ranks: dict[str, tuple[int, ...]] = {EMBEDDING: (2,), f'{LAYERS}/{kind.norms[0][1]}/scale': (2,)}
  for module in modules:
    ranks[f'{LAYERS}/{module}/{suffix}'] = tuple(1 + n for n in kind.ranks[module])
  for name, expected in ranks.items():
    shape = leaves[name].shape
    if len(shape) not in expected:
      raise CheckpointError(
        f'target/{name}: shape {list(shape)} in {leaves[name].path} has {len(shape)} axes, '
        f'expected {" or ".join(map(str, expected))}'
      )
  stored = {module: leaves[f'{LAYERS}/{module}/{suffix}'].shape for module in modules}
  return {module: shape[:axis] + shape[axis + 1 :] for module, shape in stored.items()}


def _cast(leaves: dict[str, Tensor], name: str, dtype: type) -> Tensor:
  """Return a leaf, cast to a dtype."""
  leaf = leaves[name]
  return leaf if leaf.dtype == dtype else Cast(leaf, dtype, f'target/{name}')
