"""The names in flaxformer's parameter tree, and whether a tree has those, and the shapes, that a model needs."""

import re

import ml_dtypes

from t5x_inference_ext.checkpoints.readers.layer_kinds import Kernel, LayerKind
from t5x_inference_ext.checkpoints.readers.tree import Tree
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError

EMBEDDING = 'decoder/token_embedder/embedding'
FINAL_NORM = 'decoder/decoder_norm'
LAYERS = 'decoder/decoder'
LAYER = re.compile(r'decoder/layers_(\d+)/(.*)')
SUPPORTED = (
  "Supported are decoders of flaxformer's ParallelFusedDecoderLayer or DecoderLayer: rotary positions, "
  'SwiGLU or GELU, no biases but those of layer norms, tied embedding'
)
# (in a parameter's name, why it can't be served)
_REASONS = (
  (r'relpos_bias|rel_embedding|position_embedder', 'positions must be rotary, not learned'),
  (r'^encoder/|encoder_decoder_attention|cross_attention', 'it must be a decoder alone'),
  (r'logits_dense', 'the output must be the embedding'),
  (r'_conv/', 'there are no convolutions'),
  (r'/bias$', 'only layer norms have biases'),
)


def check_names(
  tree: Tree, leaves: dict[str, Tensor], kind: LayerKind, quantized: bool
) -> tuple[tuple[str, ...], str]:
  """The modules of kernels, and the kind of norm. Raises CheckpointError for missing and extra parameters."""
  modules = kind.modules(modules_in(leaves))
  norms = [FINAL_NORM, *(f'{LAYERS}/{module}' for _, module in kind.norms)]
  norm = 'layer' if any(f'{name}/bias' in leaves for name in norms) else 'rms'
  expected = {EMBEDDING}
  expected |= {
    f'{name}/{leaf}' for name in norms for leaf in ('scale', 'bias')[: 2 if norm == 'layer' else 1]
  }
  expected |= {
    f'{LAYERS}/{module}/{kernel}'
    for module in modules
    for kernel in (('qkernel', 'qscale') if quantized else ('kernel',))
  }
  missing, extra = sorted(expected - set(leaves)), sorted(set(leaves) - expected)
  per_layer = any(LAYER.fullmatch(name) for name in tree.leaves)

  def stored(names):
    return listing(
      f'target/{n.replace(LAYERS, "decoder/layers_*") if per_layer else n}' for n in names
    )

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


def check_dtypes(leaves: dict[str, Tensor]) -> None:
  """Raises CheckpointError for a parameter that holds no floats; quantized kernels may be anything that holds int8."""
  for name, leaf in leaves.items():
    if not (
      name.endswith('/qkernel') or leaf.dtype.kind == 'f' or leaf.dtype == ml_dtypes.bfloat16
    ):
      raise CheckpointError(
        f'target/{name}: {leaf.path} holds {leaf.dtype.name} values, expected float32 or bfloat16'
      )


def check_shapes(
  tree: Tree,
  leaves: dict[str, Tensor],
  kind: LayerKind,
  kernels: list[Kernel],
  config: ModelConfig,
  quantized: bool,
  axis: int,
  given: bool,
) -> None:
  """Raises CheckpointError for the first parameter that is not this model's: its name, both shapes and its file."""

  def layered(shape):
    return (*shape[:axis], config.num_layers, *shape[axis:])

  expected = {EMBEDDING: (config.vocab_size, config.d_model)}
  for leaf in ('scale', 'bias')[: 2 if config.norm == 'layer' else 1]:
    expected[f'{FINAL_NORM}/{leaf}'] = (config.d_model,)
    for _, module in kind.norms:
      expected[f'{LAYERS}/{module}/{leaf}'] = layered((config.d_model,))
  for kernel in kernels:
    expected[f'{LAYERS}/{kernel.module}/{"qkernel" if quantized else "kernel"}'] = layered(
      kernel.shape
    )
    if quantized:
      expected[f'{LAYERS}/{kernel.module}/qscale'] = layered(
        (1,) * len(kernel.inputs) + kernel.outputs
      )
  per_layer = any(LAYER.fullmatch(name) for name in tree.leaves)
  source = 'the model asked for' if given else f'the rest of the checkpoint ({config})'
  for name, shape in expected.items():
    if leaves[name].shape != shape:
      stacked = f' (layers stacked on axis {axis})' if per_layer and name.startswith(LAYERS) else ''
      raise CheckpointError(
        f'target/{name}: shape {list(leaves[name].shape)}{stacked} in {leaves[name].path}, but '
        f'{source} needs {list(shape)}'
      )


def modules_in(leaves: dict[str, Tensor]) -> set[str]:
  """Where in a layer there are parameters."""
  return {
    name.removeprefix(f'{LAYERS}/').rpartition('/')[0]
    for name in leaves
    if name.startswith(f'{LAYERS}/')
  }


def listing(names, limit: int = 12) -> str:
  names = list(names)
  return ', '.join(names[:limit]) + (
    f' and {len(names) - limit} more' if len(names) > limit else ''
  )
