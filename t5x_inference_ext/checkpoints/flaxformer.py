"""From flaxformer's parameter tree, as T5X trained it, to canonical tensors.

Scanned form (layer axis 1), C = Q + 2F/H columns of a head being query, swish input, linear input:

  decoder/token_embedder/embedding          [V, E]
  decoder/decoder_norm/scale                [E]
  decoder/decoder/layer_norm/scale          [E, L]
  decoder/decoder/q_wi_fused/kernel         [E, L, H, Q + 2F/H]
  decoder/decoder/kv_fused/kernel           [E, L, 1, 2Q]         key, value
  decoder/decoder/o_wo_fused/kernel         [H, L, Q + F/H, E]    attention output, MLP output

A tree with one subtree a layer (decoder/layers_0/...) has the same without the layer axis. In the quantized form each
kernel is a pair: qkernel, int8 of the same shape, and qscale, in which the axes that a matmul sums over have size 1.
"""

import re

import ml_dtypes
import numpy as np

from t5x_inference_ext.checkpoints.tensor import Cast, MergedHeads, Squeezed, Stack, Swapped, Tensor
from t5x_inference_ext.checkpoints.tree import Tree
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError

EMBEDDING = 'decoder/token_embedder/embedding'
FINAL_NORM = 'decoder/decoder_norm/scale'
LAYERS = 'decoder/decoder'
LAYER_NORM, Q_WI, KV, O_WO = 'layer_norm/scale', 'q_wi_fused', 'kv_fused', 'o_wo_fused'
_LAYER = re.compile(r'decoder/layers_(\d+)/(.*)')
_LAYER_AXIS = 1


def canonical(tree: Tree, norm_scale: str,
              config: ModelConfig | None = None) -> tuple[ModelConfig, str, dict[str, Tensor]]:
  """Presents a tree as canonical tensors.

  Args:
    tree: as read.
    norm_scale: the convention of the norms, which a tree does not say.
    config: the model that it has to be; None finds it from the shapes.

  Returns:
    The model, its weights ('float32', 'bfloat16' or 'int8') and its canonical tensors.

  Raises:
    CheckpointError: missing, extra or unfitting parameters, by name.
  """
  leaves = stack_layers(tree)
  quantized = check_names(tree, leaves)
  found = derive_config(leaves, 'qkernel' if quantized else 'kernel', norm_scale, tree.path)
  model = found if config is None else config
  check_shapes(tree, leaves, model, quantized, given=config is not None)

  q, g = model.d_head, model.d_ff // model.num_heads
  tensors = {
      'embedding': leaves[EMBEDDING],
      'final_norm': _float32(leaves, FINAL_NORM),
      'layer_norm': Swapped(_float32(leaves, f'{LAYERS}/{LAYER_NORM}')),
  }
  # (canonical name, fused kernel, axis of the heads with layers in front, first column, columns of a head)
  parts = (('query', Q_WI, 2, 0, q), ('key', KV, 2, 0, q), ('value', KV, 2, q, q), ('gate', Q_WI, 2, q, g),
           ('linear', Q_WI, 2, q + g, g), ('attention_output', O_WO, 1, 0, q), ('mlp_output', O_WO, 1, q, g))
  for name, fused, axis, start, width in parts:
    if not quantized:
      tensors[name] = MergedHeads(leaves[f'{LAYERS}/{fused}/kernel'], axis, start, width)
      continue
    kernel = leaves[f'{LAYERS}/{fused}/qkernel']
    if kernel.dtype != np.int8:
      kernel = Cast(kernel, np.int8, f'target/{LAYERS}/{fused}/qkernel')
    tensors[name] = MergedHeads(kernel, axis, start, width)
    scale = _float32(leaves, f'{LAYERS}/{fused}/qscale')
    if fused == O_WO:  # [1, L, 1, E]: one scale for both outputs
      tensors['output_scale'] = Squeezed(Squeezed(scale, 2), 0)
    else:  # [1, L, H, C]
      tensors[f'{name}_scale'] = Squeezed(MergedHeads(scale, axis, start, width), 1)
  return model, _weights([tensors[name].dtype for name, *_ in parts], quantized), tensors


def stack_layers(tree: Tree) -> dict[str, Tensor]:
  """The leaves in scanned form, whichever form they are stored in."""
  layers, leaves = {}, {}
  for name, leaf in tree.leaves.items():
    match = _LAYER.fullmatch(name)
    if match:
      layers.setdefault(match[2], {})[int(match[1])] = leaf
    else:
      leaves[name] = leaf
  if layers and any(name.startswith(f'{LAYERS}/') for name in leaves):
    raise CheckpointError(f'{tree.path} holds both {LAYERS} and decoder/layers_0, ...: two models in one tree')
  count = 1 + max((max(of_layer) for of_layer in layers.values()), default=-1)
  for name, of_layer in layers.items():
    gone = sorted(set(range(count)) - set(of_layer))
    if gone:
      raise CheckpointError(f'{tree.path} lacks ' + _list(f'target/decoder/layers_{i}/{name}' for i in gone))
    for i in range(1, count):
      if of_layer[i].shape != of_layer[0].shape:
        raise CheckpointError(
            f'target/decoder/layers_{i}/{name} has shape {list(of_layer[i].shape)} in {of_layer[i].path}, but layer 0 '
            f'has {list(of_layer[0].shape)}')
    if len(of_layer[0].shape) < _LAYER_AXIS:
      raise CheckpointError(f'target/decoder/layers_0/{name} is a scalar in {of_layer[0].path}')
    leaves[f'{LAYERS}/{name}'] = Stack([of_layer[i] for i in range(count)], _LAYER_AXIS)
  return leaves


def check_names(tree: Tree, leaves: dict[str, Tensor]) -> bool:
  """Whether the (stacked) leaves are the quantized form. Raises CheckpointError for missing and extra parameters."""
  quantized = any(name.endswith('/qkernel') for name in leaves)
  kernels = ('qkernel', 'qscale') if quantized else ('kernel',)
  expected = {EMBEDDING, FINAL_NORM, f'{LAYERS}/{LAYER_NORM}'}
  expected |= {f'{LAYERS}/{fused}/{kernel}' for fused in (Q_WI, KV, O_WO) for kernel in kernels}
  missing, extra = sorted(expected - set(leaves)), sorted(set(leaves) - expected)
  per_layer = any(_LAYER.fullmatch(name) for name in tree.leaves)

  def stored(names):
    return _list(f'target/{n.replace(LAYERS, "decoder/layers_*") if per_layer else n}' for n in names)

  problems = []
  if missing:
    problems.append(f'lacks {stored(missing)}')
  if extra:
    problems.append(f'has parameters that this model does not use: {stored(extra)}')
  if problems:
    raise CheckpointError(f'{tree.path} {" and ".join(problems)}. Only PaLM-style decoders are supported: fused '
                          'parallel blocks, multiquery attention with rotary positions, SwiGLU, no biases, tied '
                          'embedding')
  return quantized


def derive_config(leaves: dict[str, Tensor], kernel: str, norm_scale: str, path: str) -> ModelConfig:
  """The model that has these shapes. Raises CheckpointError where none does."""
  ranks = {EMBEDDING: 2, f'{LAYERS}/{Q_WI}/{kernel}': 4, f'{LAYERS}/{KV}/{kernel}': 4}
  for name, rank in ranks.items():
    if len(leaves[name].shape) != rank:
      raise CheckpointError(f'target/{name}: shape {list(leaves[name].shape)} in {leaves[name].path} has '
                            f'{len(leaves[name].shape)} axes, expected {rank}')
  (v, e), (_, layers, heads, columns), (_, _, kv_heads, kv_columns) = (leaves[name].shape for name in ranks)
  q = kv_columns // 2
  if kv_columns % 2 or columns <= q or (columns - q) % 2:
    q_wi, kv = (list(leaves[f'{LAYERS}/{fused}/{kernel}'].shape) for fused in (Q_WI, KV))
    raise CheckpointError(f'{path}: {KV} {kv} and {Q_WI} {q_wi} do not fit each other: their last axes should be 2Q '
                          'and Q + 2F/H')
  try:
    return ModelConfig(num_layers=layers, d_model=e, d_ff=(columns - q) // 2 * heads, num_heads=heads, d_head=q,
                       vocab_size=v, num_kv_heads=kv_heads, norm_scale=norm_scale)
  except ValueError as e:
    raise CheckpointError(f'{path}: {e}') from e


def check_shapes(tree: Tree, leaves: dict[str, Tensor], config: ModelConfig, quantized: bool, given: bool) -> None:
  """Raises CheckpointError for the first parameter that is not this model's: its name, both shapes and its file."""
  c = config
  if c.d_ff % c.num_heads:
    raise CheckpointError(f'd_ff {c.d_ff} is not a multiple of {c.num_heads} heads: no fused kernel has this shape')
  g = c.d_ff // c.num_heads
  fused = {
      Q_WI: ((c.d_model, c.num_layers, c.num_heads, c.d_head + 2 * g), (0,)),
      KV: ((c.d_model, c.num_layers, c.num_kv_heads, 2 * c.d_head), (0,)),
      O_WO: ((c.num_heads, c.num_layers, c.d_head + g, c.d_model), (0, 2)),
  }
  expected = {
      EMBEDDING: (c.vocab_size, c.d_model),
      FINAL_NORM: (c.d_model,),
      f'{LAYERS}/{LAYER_NORM}': (c.d_model, c.num_layers),
  }
  for name, (shape, summed) in fused.items():
    expected[f'{LAYERS}/{name}/{"qkernel" if quantized else "kernel"}'] = shape
    if quantized:
      expected[f'{LAYERS}/{name}/qscale'] = tuple(1 if i in summed else n for i, n in enumerate(shape))
  per_layer = any(_LAYER.fullmatch(name) for name in tree.leaves)
  source = 'the model asked for' if given else f'the rest of the checkpoint ({config})'
  for name, shape in expected.items():
    if leaves[name].shape != shape:
      stacked = ' (layers stacked on axis 1)' if per_layer and name.startswith(LAYERS) else ''
      raise CheckpointError(f'target/{name}: shape {list(leaves[name].shape)}{stacked} in {leaves[name].path}, but '
                            f'{source} needs {list(shape)}')


def _float32(leaves: dict[str, Tensor], name: str) -> Tensor:
  leaf = leaves[name]
  return leaf if leaf.dtype == np.float32 else Cast(leaf, np.float32, f'target/{name}')


def _weights(dtypes: list[np.dtype], quantized: bool) -> str:
  if quantized:
    return 'int8'
  return 'bfloat16' if all(dtype == ml_dtypes.bfloat16 for dtype in dtypes) else 'float32'


def _list(names, limit: int = 12) -> str:
  names = list(names)
  return ', '.join(names[:limit]) + (f' and {len(names) - limit} more' if len(names) > limit else '')
