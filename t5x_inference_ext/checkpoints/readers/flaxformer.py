"""From flaxformer's parameter tree, as T5X trained it, to canonical tensors.

Scanned form, with the layer axis L on axis 1 (or 0: flaxformer's scan_axis):

  decoder/token_embedder/embedding          [V, E]
  decoder/decoder_norm/scale                [E]               and bias, of a layer norm
  decoder/decoder/NORM/scale                [E, L]            and bias
  decoder/decoder/MODULE/kernel             e.g. [E, L, F]    MODULEs and their axes: layer_kinds.py

A tree with one subtree a layer (decoder/layers_0/...) has the same without the layer axis. In the quantized form each
kernel is a pair: qkernel, int8 of the same shape, and qscale, in which the axes that a matmul sums over have size 1:
a weight is qkernel / qscale.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.arrays import KernelLayout, KernelPart, SourceArray, whole_array
from t5x_inference_ext.checkpoints.readers.flaxformer_names import (
  EMBEDDING,
  FINAL_NORM,
  LAYER,
  LAYERS,
  check_dtypes,
  check_names,
  check_shapes,
  listing,
  modules_in,
)
from t5x_inference_ext.checkpoints.readers.layer_kinds import (
  LAYER_KINDS,
  Kernel,
  LayerKind,
  Shapes,
  UnknownSizes,
)
from t5x_inference_ext.checkpoints.readers.tree import Tree
from t5x_inference_ext.checkpoints.tensor import (
  Cast,
  Merged,
  Moved,
  Reciprocal,
  Scaled,
  Squeezed,
  Stack,
  Tensor,
  Window,
)
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError

_STACK_AXIS = 1


@dataclasses.dataclass(frozen=True)
class Reading:
  """A tree as a model.

  Attributes:
    config: the model.
    weights: 'float32', 'bfloat16' or 'int8'.
    tensors: the canonical ones.
    arrays: the stored arrays that hold them, but for the scales of int8 ones.
    kind: of its layers.
    layer_axis: of the scanned form.
    form: how the tree arranges all this, for writing such a tree: JSON-ready.
  """

  config: ModelConfig
  weights: str
  tensors: dict[str, Tensor]
  arrays: tuple[SourceArray, ...]
  kind: LayerKind
  layer_axis: int
  form: dict[str, Any]


def canonical(
  tree: Tree,
  norm_scale: str | None = None,
  config: ModelConfig | None = None,
  rescale_logits: bool = True,
) -> Reading:
  """Presents a tree as canonical tensors.

  Args:
    tree: as read.
    norm_scale: the convention of the norms, which a tree does not say; None takes the kind of layer's usual one.
    config: the model that it has to be; None finds it from the names and shapes.
    rescale_logits: flaxformer's: whether attention logits are divided by sqrt(Q). Where they are not, the queries are
      multiplied by it here.

  Raises:
    CheckpointError: missing, extra or unfitting parameters, by name.
  """
  leaves = stack_layers(tree)
  quantized = any(name.endswith('/qkernel') for name in leaves)
  kind = find_kind(leaves)
  modules, norm = check_names(tree, leaves, kind, quantized)
  check_dtypes(leaves)
  axis = _layer_axis(leaves, kind)
  suffix = 'qkernel' if quantized else 'kernel'
  shapes = _shapes(leaves, kind, modules, suffix, axis)
  try:
    layers = leaves[f'{LAYERS}/{modules[0]}/{suffix}'].shape[axis]
    model = _model((layers, *leaves[EMBEDDING].shape), kind, shapes, norm, norm_scale, config)
    kernels = [kind.kernels(model, shapes)[module] for module in modules]
  except ValueError as e:
    raise CheckpointError(f'{tree.path}: {e}') from e
  check_shapes(tree, leaves, kind, kernels, model, quantized, axis, given=config is not None)

  tensors = {'embedding': leaves[EMBEDDING]}
  arrays = [whole_array(leaves[EMBEDDING], 'embedding', layered=False)]
  for name, place in (
    ('final_norm', FINAL_NORM),
    *((n, f'{LAYERS}/{module}') for n, module in kind.norms),
  ):
    for canonical_name, leaf in ((name, 'scale'), (params.bias_name(name), 'bias'))[
      : 2 if norm == 'layer' else 1
    ]:
      stored = _float32(leaves, f'{place}/{leaf}')
      layered = place != FINAL_NORM
      tensors[canonical_name] = Moved(stored, axis) if layered else stored
      arrays.append(
        SourceArray(
          stored,
          KernelLayout(
            model.num_layers if layered else None,
            axis,
            (),
            (model.d_model,),
            (KernelPart(canonical_name, 0, model.d_model),),
            0,
          ),
        )
      )
  factors = {
    'attention_output': kind.output_factor,
    'mlp_output': kind.output_factor,
    'query': 1.0 if rescale_logits else model.d_head**0.5,
  }
  for kernel in kernels:
    tensors.update(_matrices(tree, leaves, kernel, model, axis, factors, quantized))
    stored = leaves[f'{LAYERS}/{kernel.module}/{suffix}']
    if quantized and stored.dtype != np.int8:
      stored = Cast(stored, np.int8, f'target/{LAYERS}/{kernel.module}/{suffix}')
    # A quantized matrix's factor is in its scale.
    arrays.append(
      SourceArray(stored, arrangement(kernel, model, axis, {} if quantized else factors))
    )
  wanted = {**params.parameters(model), **(params.scales(model) if quantized else {})}
  for name, tensor in tensors.items():
    if tensor.shape != wanted[name].shape:
      raise CheckpointError(
        f'{name}: shape {list(tensor.shape)} in {tensor.path}, but the model asked for needs '
        f'{list(wanted[name].shape)}'
      )
  matrices = [tensors[name].dtype for name, p in wanted.items() if p.kind == 'matrix']
  weights = (
    'int8'
    if quantized
    else 'bfloat16'
    if all(d == ml_dtypes.bfloat16 for d in matrices)
    else 'float32'
  )
  form = {
    'layers': kind.name,
    'layer_axis': axis,
    'per_layer': any(LAYER.fullmatch(name) for name in tree.leaves),
    'kernels': {kernel.module: list(kernel.shape) for kernel in kernels},
  }
  return Reading(model, weights, tensors, tuple(arrays), kind, axis, form)


def stack_layers(tree: Tree) -> dict[str, Tensor]:
  """The leaves in scanned form, whichever form they are stored in."""
  layers, leaves = {}, {}
  for name, leaf in tree.leaves.items():
    match = LAYER.fullmatch(name)
    if match:
      layers.setdefault(match[2], {})[int(match[1])] = leaf
    else:
      leaves[name] = leaf
  if layers and any(name.startswith(f'{LAYERS}/') for name in leaves):
    raise CheckpointError(
      f'{tree.path} holds both {LAYERS} and decoder/layers_0, ...: two models in one tree'
    )
  count = 1 + max((max(of_layer) for of_layer in layers.values()), default=-1)
  for name, of_layer in layers.items():
    gone = sorted(set(range(count)) - set(of_layer))
    if gone:
      raise CheckpointError(
        f'{tree.path} lacks ' + listing(f'target/decoder/layers_{i}/{name}' for i in gone)
      )
    for i in range(1, count):
      if of_layer[i].shape != of_layer[0].shape:
        raise CheckpointError(
          f'target/decoder/layers_{i}/{name} has shape {list(of_layer[i].shape)} in {of_layer[i].path}, but layer 0 '
          f'has {list(of_layer[0].shape)}'
        )
    if len(of_layer[0].shape) < _STACK_AXIS:
      raise CheckpointError(f'target/decoder/layers_0/{name} is a scalar in {of_layer[0].path}')
    leaves[f'{LAYERS}/{name}'] = Stack([of_layer[i] for i in range(count)], _STACK_AXIS)
  return leaves


def find_kind(leaves: dict[str, Tensor]) -> LayerKind:
  """The kind of layer of which these (stacked) leaves have the most parameters, and lack the fewest."""
  stored = modules_in(leaves)

  def fit(kind):
    expected = {*kind.modules(stored), *(module for _, module in kind.norms)}
    return len(expected & stored), -len(expected - stored)

  return max(LAYER_KINDS, key=fit)


def _model(
  lve: tuple[int, int, int],
  kind: LayerKind,
  shapes: Shapes,
  norm: str,
  norm_scale: str | None,
  config: ModelConfig | None,
) -> ModelConfig:
  """The model of L, V, E and these shapes, or `config`. Raises ValueError: no model, or not that one."""
  facts = dict(block=kind.block, norm=norm, mlp=kind.mlp(shapes))
  if config is None:
    layers, vocab_size, d_model = lve
    return ModelConfig(
      **kind.sizes(shapes),
      **facts,
      num_layers=layers,
      d_model=d_model,
      vocab_size=vocab_size,
      norm_scale=norm_scale or ('one' if norm == 'layer' else kind.norm_scale),
    )
  for name, value in facts.items():
    if getattr(config, name) != value:
      raise UnknownSizes(
        f'the model asked for has {name}={getattr(config, name)}, but the tree has {name}={value}'
      )
  return config if norm_scale is None else dataclasses.replace(config, norm_scale=norm_scale)


def _matrices(
  tree: Tree,
  leaves: dict[str, Tensor],
  kernel: Kernel,
  config: ModelConfig,
  axis: int,
  factors: dict[str, float],
  quantized: bool,
) -> dict[str, Tensor]:
  """The canonical matrices [L, in, out] in one kernel, and their scales [L, out]."""
  place, start, tensors = f'{LAYERS}/{kernel.module}', 0, {}
  for name, width in kernel.parts:
    factor = factors.get(name, 1.0)
    window = (kernel.axis, start, width)
    start += width
    if not quantized:
      matrix = _merge(leaves[f'{place}/kernel'], kernel, axis, window)
      tensors[name] = matrix if factor == 1 else Scaled(matrix, factor)
      continue
    stored = leaves[f'{place}/qkernel']
    if stored.dtype != np.int8:
      stored = Cast(stored, np.int8, f'target/{place}/qkernel')
    tensors[name] = _merge(stored, kernel, axis, window)
    scale_name = params.parameters(config)[name].scale
    sharing = {n for n, p in params.parameters(config).items() if p.scale == scale_name}
    if sharing != sharing & {n for n, _ in kernel.parts}:
      raise CheckpointError(
        f'{tree.path} has quantized kernels with scales of their own for '
        f'{" and ".join(sorted(sharing))}, which in a parallel block share one: convert the float '
        'checkpoint'
      )
    # Summed axes have size 1, also the one along which parts lie: they share the scale.
    # AQT's scales are what a weight is multiplied with before rounding: flaxformer divides the product by them.
    scale = _merge(
      Reciprocal(_float32(leaves, f'{place}/qscale')),
      kernel,
      axis,
      None if kernel.axis < len(kernel.inputs) else window,
    )
    tensors[scale_name] = Squeezed(scale if factor == 1 else Scaled(scale, factor), 1)
  return tensors


def _merge(leaf: Tensor, kernel: Kernel, axis: int, window: tuple[int, int, int] | None) -> Tensor:
  """The part of a kernel within `window` (axis, start, width) as a matrix [L, in, out]."""
  view = Moved(leaf, axis)
  if window is not None and window[2] != view.shape[1 + window[0]]:
    view = Window(view, 1 + window[0], *window[1:])
  inputs = len(kernel.inputs)
  for first, count in ((1 + inputs, len(kernel.outputs)), (1, inputs)):
    for _ in range(count - 1):
      view = Merged(view, first)
  return view


def arrangement(
  kernel: Kernel, config: ModelConfig, axis: int, factors: Mapping[str, float]
) -> KernelLayout:
  """The canonical matrices in a stored kernel; canonical values are stored values times `factors`."""
  parts, start = [], 0
  for name, width in kernel.parts:
    parts.append(KernelPart(name, start, width, factors.get(name, 1.0)))
    start += width
  return KernelLayout(
    config.num_layers, axis, kernel.inputs, kernel.outputs, tuple(parts), kernel.axis
  )


def _layer_axis(leaves: dict[str, Tensor], kind: LayerKind) -> int:
  """The axis that is not E of a layer's norm scale [E, L] or [L, E]."""
  shape = leaves[f'{LAYERS}/{kind.norms[0][1]}/scale'].shape
  d_model = leaves[EMBEDDING].shape[-1:]
  return 0 if len(shape) == 2 and shape[1:] == d_model != shape[:1] else 1


def _shapes(
  leaves: dict[str, Tensor], kind: LayerKind, modules: tuple[str, ...], suffix: str, axis: int
) -> Shapes:
  """The kernels' shapes without the layer axis. Raises CheckpointError for one with too many or too few axes."""
  ranks = {EMBEDDING: (2,), f'{LAYERS}/{kind.norms[0][1]}/scale': (2,)}
  ranks.update(
    {f'{LAYERS}/{module}/{suffix}': tuple(1 + n for n in kind.ranks[module]) for module in modules}
  )
  for name, expected in ranks.items():
    if len(leaves[name].shape) not in expected:
      raise CheckpointError(
        f'target/{name}: shape {list(leaves[name].shape)} in {leaves[name].path} has '
        f'{len(leaves[name].shape)} axes, expected {" or ".join(map(str, expected))}'
      )
  stored = {module: leaves[f'{LAYERS}/{module}/{suffix}'].shape for module in modules}
  return {module: shape[:axis] + shape[axis + 1 :] for module, shape in stored.items()}


def _float32(leaves: dict[str, Tensor], name: str) -> Tensor:
  leaf = leaves[name]
  return leaf if leaf.dtype == np.float32 else Cast(leaf, np.float32, f'target/{name}')
