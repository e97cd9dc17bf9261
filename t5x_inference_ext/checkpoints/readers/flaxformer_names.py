"""Names in flaxformer's parameter tree, and checks of a tree's names, dtypes and shapes."""

from collections.abc import Collection, Iterable, Mapping
import re

import ml_dtypes

from t5x_inference_ext.checkpoints.readers.kernel import Kernel
from t5x_inference_ext.checkpoints.readers.layer_kinds import LayerKind
from t5x_inference_ext.checkpoints.readers.tree import Tree
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError, name_list

EMBEDDING = 'decoder/token_embedder/embedding'
FINAL_NORM = 'decoder/decoder_norm'
RELATIVE_BIAS = 'decoder/relpos_bias/rel_embedding'
HEAD = 'decoder/logits_dense/kernel'
LAYERS = 'decoder/decoder'
LAYER = re.compile(r'decoder/layers_(0|[1-9][0-9]{0,8})/(.*)')
# Optional parameters outside the layers, for all kinds of layers.
OPTIONAL = (RELATIVE_BIAS, HEAD)
SUPPORTED = (
  "Supported are decoders of flaxformer's ParallelFusedDecoderLayer or DecoderLayer, and T5X's "
  'decoder_only: positions that are rotary, a relative bias of all layers or none, an MLP of one '
  'or two inputs, no biases except in layer norms'
)
# (pattern of a name, why a model with a parameter of that name can't be served)
_REASONS = (
  (r'position_embedder', 'positions must not be learned'),
  (r'relpos_bias|rel_embedding', "a relative bias must be one table for all layers, decoder's"),
  (r'^encoder/|encoder_decoder_attention|cross_attention', 'it must be a decoder-only model'),
  (r'_conv/', 'there are no convolutions'),
  (r'/bias$', 'only layer norms have biases'),
)


def check_names(
  tree: Tree, leaves: Collection[str], kind: LayerKind, quantized: bool
) -> tuple[tuple[str, ...], str]:
  """Return a tree's kernel modules, and the kind of its norms, 'rms' or 'layer'.

  Raises:
    CheckpointError: Parameters are missing or unknown.
  """
  modules = kind.modules(modules_in(leaves))
  norms = [FINAL_NORM, *(f'{LAYERS}/{module}' for _, module in kind.norms)]
  norm = 'layer' if any(f'{name}/bias' in leaves for name in norms) else 'rms'
  kernel_leaves = ('qkernel', 'qscale') if quantized else ('kernel',)
  expected = {
    EMBEDDING,
    *(f'{name}/{leaf}' for name in norms for leaf in norm_leaves(norm)),
    *(f'{LAYERS}/{module}/{leaf}' for module in modules for leaf in kernel_leaves),
    *(name for name in OPTIONAL if name in leaves),
  }
  missing, extra = sorted(expected - set(leaves)), sorted(set(leaves) - expected)
  layers = 'decoder/layers_*' if is_per_layer(tree) else LAYERS

  def stored(names: list[str]) -> str:
    return name_list((f'target/{n.replace(LAYERS, layers)}' for n in names), len(names))

  problems = []
  if missing:
    problems.append(f'lacks {stored(missing)}')
  if extra:
    reasons = [
      reason for pattern, reason in _REASONS if any(re.search(pattern, name) for name in extra)
    ]
    problems.append(
      f'has parameters that this model does not use: {stored(extra)}'
      + (f' ({"; ".join(reasons)})' if reasons else '')
    )
  if problems:
    raise CheckpointError(f'{tree.path} {" and ".join(problems)}. {SUPPORTED}')
  return modules, norm


def check_dtypes(leaves: Mapping[str, Tensor]) -> None:
  """Raise CheckpointError for a parameter that is not float. A qkernel may have any dtype."""
  for name, leaf in leaves.items():
    is_float = leaf.dtype.kind == 'f' or leaf.dtype == ml_dtypes.bfloat16
    if not is_float and not name.endswith('/qkernel'):
      raise CheckpointError(
        f'target/{name}: {leaf.path} holds {leaf.dtype.name} values, expected float32 or bfloat16'
      )


def check_shapes(
  tree: Tree,
  leaves: Mapping[str, Tensor],
  kind: LayerKind,
  kernels: list[Kernel],
  config: ModelConfig,
  quantized: bool,
  axis: int,
  given: bool,
) -> None:
  """Raise CheckpointError for the first parameter whose shape differs from the model's.

  The message has the expected shape, the stored shape and the parameter's file.

  Args:
    tree: The tree, as stored.
    leaves: The leaves of the tree in scanned form.
    kind: The kind of layer.
    kernels: The kernels of one layer.
    config: The model.
    quantized: Whether kernels are qkernel and qscale.
    axis: Position of the layer axis.
    given: Whether the user gave `config`. Otherwise it was derived from the checkpoint.
  """

  def layered(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:axis], config.num_layers, *shape[axis:])

  expected: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.d_model)}
  for leaf in norm_leaves(config.norm):
    expected[f'{FINAL_NORM}/{leaf}'] = (config.d_model,)
    for _, module in kind.norms:
      expected[f'{LAYERS}/{module}/{leaf}'] = layered((config.d_model,))
  if HEAD in leaves:
    expected[HEAD] = (config.d_model, config.vocab_size)
  if RELATIVE_BIAS in leaves:
    expected[RELATIVE_BIAS] = (config.num_heads, config.relative_buckets)
  for kernel in kernels:
    place = f'{LAYERS}/{kernel.module}'
    expected[f'{place}/{"qkernel" if quantized else "kernel"}'] = layered(kernel.shape)
    if quantized:
      expected[f'{place}/qscale'] = layered((1,) * len(kernel.inputs) + kernel.outputs)
  source = 'the model asked for' if given else f'the rest of the checkpoint ({config})'
  for name, shape in expected.items():
    if leaves[name].shape != shape:
      is_stacked = is_per_layer(tree) and name.startswith(LAYERS)
      stacked = f' (layers stacked on axis {axis})' if is_stacked else ''
      raise CheckpointError(
        f'target/{name}: shape {list(leaves[name].shape)}{stacked} in {leaves[name].path}, but '
        f'{source} needs {list(shape)}'
      )


def is_per_layer(tree: Tree) -> bool:
  """Return whether a tree has one subtree per layer instead of scanned layers."""
  return any(LAYER.fullmatch(name) for name in tree.leaves)


def modules_in(leaves: Iterable[str]) -> set[str]:
  """Return the modules of a layer that have parameters among the leaves."""
  prefix = f'{LAYERS}/'
  return {n.removeprefix(prefix).rpartition('/')[0] for n in leaves if n.startswith(prefix)}


def norm_leaves(norm: str) -> tuple[str, ...]:
  """Return the names of the parameters of a norm of kind 'rms' or 'layer'."""
  return ('scale', 'bias') if norm == 'layer' else ('scale',)
