"""The parameters of a model, declared once: name, shape, kind and logical axes of every tensor.

These are the *canonical* tensors. They are independent of any mesh and unpadded. The layer axis
comes first, and each weight is a matrix [L, in, out]. The serving checkpoint stores them, readers
of other checkpoints convert to them, and weight packing (sharding/packing.py) cuts them into
shards. Layouts and T5X's rules give the mesh axes that split each logical axis.
"""

import dataclasses

from t5x_inference_ext.config import BlockPart, ModelConfig

INT8_SUFFIX = '_scale'

# Logical axes of weights: one name for each meaning of a dimension.
LAYERS_AXIS = 'layers'  # L, the first axis of all tensors inside layers
VOCAB_AXIS = 'vocab'  # V
EMBED_AXIS = 'embed'  # E of a matrix
HIDDEN_AXIS = 'hidden'  # MLP columns and heads: out of an input matrix, into an output matrix
FEATURES_AXIS = 'features'  # E of a vector, which no layout splits


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One canonical tensor.

  Attributes:
    shape: The dimensions, such as [L, E, H*Q].
    kind: 'matrix' (int8 in an int8 checkpoint), 'norm' or 'bias' (of a norm; always float32),
      'embedding' (never quantized) or 'scale' (float32, one per output channel of an int8 matrix).
    axes: The logical axis of each dimension.
    scale: For a matrix, the name of its scale tensor in an int8 checkpoint; else None.
  """

  shape: tuple[int, ...]
  kind: str
  axes: tuple[str, ...]
  scale: str | None = None


def parameters(config: ModelConfig) -> dict[str, Parameter]:
  """Return a model's float tensors by name, in storage order."""
  c = config
  q, kv = c.num_heads * c.d_head, c.num_kv_heads * c.d_head

  def into_hidden(name: str, columns: int) -> dict[str, Parameter]:
    axes, scale = (LAYERS_AXIS, EMBED_AXIS, HIDDEN_AXIS), name + INT8_SUFFIX
    return {name: Parameter((c.num_layers, c.d_model, columns), 'matrix', axes, scale)}

  def out_of_hidden(name: str, rows: int, scale: str) -> dict[str, Parameter]:
    axes = LAYERS_AXIS, HIDDEN_AXIS, EMBED_AXIS
    return {name: Parameter((c.num_layers, rows, c.d_model), 'matrix', axes, scale)}

  def norm(name: str, per_layer: bool) -> dict[str, Parameter]:
    shape: tuple[int, ...] = (c.d_model,)
    axes: tuple[str, ...] = (FEATURES_AXIS,)
    if per_layer:
      shape, axes = (c.num_layers, *shape), (LAYERS_AXIS, *axes)
    found = {name: Parameter(shape, 'norm', axes)}
    if c.norm == 'layer':
      found[bias_name(name)] = Parameter(shape, 'bias', axes)
    return found

  tensors = {
    'embedding': Parameter((c.vocab_size, c.d_model), 'embedding', (VOCAB_AXIS, EMBED_AXIS))
  }
  tensors |= norm('final_norm', per_layer=False)
  for block_part in c.block_parts:
    tensors |= norm(norm_name(block_part), per_layer=True)
  tensors |= into_hidden('query', q) | into_hidden('key', kv) | into_hidden('value', kv)
  for name in c.mlp_inputs:
    tensors |= into_hidden(name, c.d_ff)
  # The parallel block sums attention and MLP in one accumulator (section 3.4), so its two output
  # matrices share one scale.
  attention = next(part for part in c.block_parts if part.attention)
  mlp = next(part for part in c.block_parts if part.mlp)
  tensors |= out_of_hidden('attention_output', q, output_scale_name(attention))
  tensors |= out_of_hidden('mlp_output', c.d_ff, output_scale_name(mlp))
  return tensors


def scales(config: ModelConfig) -> dict[str, Parameter]:
  """Return the scale tensors [L, out] of an int8 model's matrices, by name."""
  found = {}
  for p in parameters(config).values():
    if p.scale is not None:
      # One scale for each output channel: columns of an input matrix, or features of an output
      # matrix.
      axes = (LAYERS_AXIS, HIDDEN_AXIS if p.axes[-1] == HIDDEN_AXIS else FEATURES_AXIS)
      found[p.scale] = Parameter((p.shape[0], p.shape[2]), 'scale', axes)
  return found


def norm_name(block_part: BlockPart) -> str:
  """Return the name of the norm scale that a block part uses."""
  return 'layer_norm' if block_part.name == 'parallel' else f'{block_part.name}_norm'


def bias_name(norm: str) -> str:
  """Return the name of the bias that belongs to a norm scale."""
  return f'{norm}_bias'


def output_scale_name(block_part: BlockPart) -> str:
  """Return the name of the int8 scale of a block part's output matrix."""
  return 'output_scale' if block_part.name == 'parallel' else f'{block_part.name}_output_scale'
