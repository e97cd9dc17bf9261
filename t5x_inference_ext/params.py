"""The parameters of a model, declared once: name, shape, kind and logical axes of every tensor.

These are the *canonical* tensors. They are independent of any mesh and unpadded. The layer axis
comes first, and each weight is a matrix [L, in, out]. The serving checkpoint stores them, readers
of other checkpoints convert to them, and weight packing (sharding/packing.py) cuts them into
shards. Layouts and T5X's rules give the mesh axes that split each logical axis.
"""

from collections.abc import Collection
import dataclasses

from t5x_inference_ext.config import BlockPart, ModelConfig

INT8_SUFFIX = '_scale'

# Logical axes of weights: one name for each meaning of a dimension.
LAYERS_AXIS = 'layers'  # L, the first axis of all tensors in layers
VOCAB_AXIS = 'vocab'  # V
EMBED_AXIS = 'embed'  # E of a matrix
HIDDEN_AXIS = 'hidden'  # MLP columns and heads: columns of input matrices, rows of output ones
FEATURES_AXIS = 'features'  # E of a vector; no layout splits it
BUCKETS_AXIS = 'buckets'  # distances of T5's relative bias

# Norms outside the layers.
OUTSIDE_NORMS = ('embedding_norm', 'final_norm')
# Tables with a row for each token. They are quantized only if a format names them, to int8.
TABLES = ('embedding', 'head')
# Stands for all matrices of the layers, beside names of tables: a format quantizes all or none.
MATRICES = 'matrices'
# All tensors outside the layers.
OUTSIDE_LAYERS = (
  *('embedding', 'position_embedding', 'relative_bias', 'head', 'head_bias'),
  *(f'{name}{INT8_SUFFIX}' for name in TABLES),
  *OUTSIDE_NORMS,
  *(f'{name}_bias' for name in OUTSIDE_NORMS),
)


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One canonical tensor.

  Attributes:
    shape: The dimensions, such as [L, E, H*Q].
    kind: 'matrix' (int8 in an int8 checkpoint), 'norm' or 'bias' (always float32), 'embedding'
      (a table of tokens or positions; also an untied head) or 'scale' (float32, one per output
      channel of an int8 matrix or table).
    axes: The logical axis of each dimension.
    scale: Name of the tensor's scales where it is quantized; None if it never is.
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

  def table(name: str, rows: int) -> dict[str, Parameter]:
    scale = name + INT8_SUFFIX if name in TABLES else None
    return {name: Parameter((rows, c.d_model), 'embedding', (VOCAB_AXIS, EMBED_AXIS), scale)}

  def vector(name: str, kind: str, size: int) -> dict[str, Parameter]:
    return {name: Parameter((c.num_layers, size), kind, (LAYERS_AXIS, FEATURES_AXIS))}

  def norm(name: str, biased: bool = c.norm == 'layer', size: int = c.d_model) -> None:
    found = vector(name, 'norm', size)
    if biased:
      found |= vector(bias_name(name), 'bias', size)
    if name in OUTSIDE_NORMS:
      found = {n: Parameter(p.shape[1:], p.kind, p.axes[1:]) for n, p in found.items()}
    tensors.update(found)

  tensors = table('embedding', c.vocab_size)
  if c.positions == 'learned':
    tensors |= table('position_embedding', c.num_positions or 0)
  if c.embedding_norm:
    norm('embedding_norm')
  if c.positions == 'relative':
    axes = FEATURES_AXIS, BUCKETS_AXIS
    tensors['relative_bias'] = Parameter((c.num_heads, c.relative_buckets), 'bias', axes)
  norm('final_norm')
  if not c.tied_head:
    tensors |= table('head', c.vocab_size)
  if c.head_bias:
    tensors['head_bias'] = Parameter((c.vocab_size,), 'bias', (FEATURES_AXIS,))
  for block_part in c.block_parts:
    for name in (*norm_names(c, block_part), *post_norm_names(c, block_part)):
      norm(name)
  for name, columns in ('query', q), ('key', kv), ('value', kv):
    tensors |= into_hidden(name, columns)
    if c.qkv_bias:
      tensors |= vector(bias_name(name), 'bias', columns)
    if c.qk_norm != 'none' and name != 'value':
      norm(f'{name}_norm', c.qk_norm.startswith('layer'), columns)
  for name in c.mlp_inputs:
    tensors |= into_hidden(name, c.d_ff)
    if c.mlp_bias:
      tensors |= vector(bias_name(name), 'bias', c.d_ff)
  # The parallel block sums attention and MLP in one accumulator (section 3.4), so its two output
  # matrices share one scale.
  attention = next(part for part in c.block_parts if part.attention)
  mlp = next(part for part in c.block_parts if part.mlp)
  tensors |= out_of_hidden('attention_output', q, output_scale_name(attention))
  tensors |= out_of_hidden('mlp_output', c.d_ff, output_scale_name(mlp))
  for name, biased in ('attention_output', c.attention_output_bias), ('mlp_output', c.mlp_bias):
    if biased:
      tensors |= vector(bias_name(name), 'bias', c.d_model)
  return tensors


def scales(config: ModelConfig, scaled: Collection[str] = (MATRICES,)) -> dict[str, Parameter]:
  """Return the scale tensors of a model's quantized weights, by name.

  There is one scale for each output channel: [L, out] for a matrix, whose channels are columns of
  an input matrix or features of an output matrix; [V] for a table, whose channels are its rows.

  Args:
    config: The model.
    scaled: The quantized weights (WeightFormat.scaled): MATRICES, names of TABLES.
  """
  found = {}
  for name, p in parameters(config).items():
    if p.scale is None or (name if name in TABLES else MATRICES) not in scaled:
      continue
    if name in TABLES:
      found[p.scale] = Parameter(p.shape[:1], 'scale', p.axes[:1])
    else:
      axes = (LAYERS_AXIS, HIDDEN_AXIS if p.axes[-1] == HIDDEN_AXIS else FEATURES_AXIS)
      found[p.scale] = Parameter((p.shape[0], p.shape[2]), 'scale', axes)
  return found


def norm_names(config: ModelConfig, block_part: BlockPart) -> tuple[str, ...]:
  """Return the names of the norms before a block part, attention's first.

  A parallel block has one norm for attention and MLP, or one for each. The result is empty if all
  norms are after the block parts.
  """
  if config.norm_position == 'after':
    return ()
  if block_part.name == 'parallel':
    return ('layer_norm',) if config.parallel_norms == 1 else ('attention_norm', 'mlp_norm')
  return (f'{block_part.name}_norm',)


def post_norm_names(config: ModelConfig, block_part: BlockPart) -> tuple[str, ...]:
  """Return the name of the norm after a block part, as a tuple; () if there is none."""
  return () if config.norm_position == 'before' else (f'{block_part.name}_post_norm',)


def vector_names(config: ModelConfig, block_part: BlockPart) -> dict[str, str]:
  """Return a block part's norms and biases: field name on the devices -> canonical name."""
  names = dict(zip(('norm', 'mlp_norm'), norm_names(config, block_part)))
  names |= dict(zip(('post_norm',), post_norm_names(config, block_part)))
  matrices: tuple[str, ...] = ()
  if block_part.attention:
    names |= {name: name for name in ('query_norm', 'key_norm')}
    matrices += ('query', 'key', 'value', 'attention_output')
  if block_part.mlp:
    matrices += (*config.mlp_inputs, 'mlp_output')
  names |= {bias_name(field): bias_name(name) for field, name in names.items()}
  names |= {bias_name(name): bias_name(name) for name in matrices}
  declared = parameters(config)
  return {field: name for field, name in names.items() if name in declared}


def bias_name(tensor: str) -> str:
  """Return the name of the bias that belongs to a norm scale or a matrix."""
  return f'{tensor}_bias'


def output_scale_name(block_part: BlockPart) -> str:
  """Return the name of the int8 scale of a block part's output matrix."""
  return 'output_scale' if block_part.name == 'parallel' else f'{block_part.name}_output_scale'
