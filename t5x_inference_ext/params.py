"""Every parameter of a model: its name, shape and meaning, written once.

These are the *canonical* tensors: independent of any mesh, unpadded, layers leading, each weight a matrix
[L, in, out]. The serving checkpoint stores them, readers of T5X checkpoints present them as views, and the layouts
cut them into shards.
"""

import dataclasses

from t5x_inference_ext.config import BlockPart, ModelConfig

INT8_SUFFIX = '_scale'


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One canonical tensor.

  Attributes:
    shape: e.g. [L, E, H*Q].
    kind: 'matrix' ([L, in, out], int8 in an int8 checkpoint), 'norm' or 'bias' (of a norm; always float32), 'embedding'
      ([V, E], never quantized here) or 'scale' (float32 [L, out]: the int8 matrices' output-channel scales).
    scale: for a matrix, the name of the scale tensor that it has when quantized.
  """

  shape: tuple[int, ...]
  kind: str
  scale: str | None = None


def parameters(config: ModelConfig) -> dict[str, Parameter]:
  """The float tensors of a model, by name, in storage order."""
  c = config
  q, kv = c.num_heads * c.d_head, c.num_kv_heads * c.d_head

  def matrix(rows, columns, scale):
    return Parameter((c.num_layers, rows, columns), 'matrix', scale)

  def norm(name, *lead):
    biases = {bias_name(name): Parameter((*lead, c.d_model), 'bias')} if c.norm == 'layer' else {}
    return {name: Parameter((*lead, c.d_model), 'norm'), **biases}

  # One scale for both: the parallel block sums the two products in one accumulator (section 3.4), as one matrix.
  outputs = {s.name: output_scale_name(s) for s in c.block_parts}
  attention_scale, mlp_scale = (
    outputs.get(n, outputs.get('parallel')) for n in ('attention', 'mlp')
  )
  tensors = {'embedding': Parameter((c.vocab_size, c.d_model), 'embedding'), **norm('final_norm')}
  for block_part in c.block_parts:
    tensors.update(norm(norm_name(block_part), c.num_layers))
  return {
    **tensors,
    'query': matrix(c.d_model, q, 'query_scale'),
    'key': matrix(c.d_model, kv, 'key_scale'),
    'value': matrix(c.d_model, kv, 'value_scale'),
    **{name: matrix(c.d_model, c.d_ff, name + INT8_SUFFIX) for name in c.mlp_inputs},
    'attention_output': matrix(q, c.d_model, attention_scale),
    'mlp_output': matrix(c.d_ff, c.d_model, mlp_scale),
  }


def norm_name(block_part: BlockPart) -> str:
  """The norm that feeds a sublayer."""
  return 'layer_norm' if block_part.name == 'parallel' else f'{block_part.name}_norm'


def bias_name(norm: str) -> str:
  return f'{norm}_bias'


def output_scale_name(block_part: BlockPart) -> str:
  """The scale of what a sublayer adds to the residual stream."""
  return 'output_scale' if block_part.name == 'parallel' else f'{block_part.name}_output_scale'


def scales(config: ModelConfig) -> dict[str, Parameter]:
  """The scale tensors [L, out] that an int8 model has beside its matrices, by name."""
  return {
    p.scale: Parameter((p.shape[0], p.shape[2]), 'scale')
    for p in parameters(config).values()
    if p.scale is not None
  }
