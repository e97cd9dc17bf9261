"""Every parameter of a model: its name, shape and meaning, written once.

These are the *canonical* tensors: independent of any mesh, unpadded, layers leading, each weight a matrix
[L, in, out]. The serving checkpoint stores them, readers of T5X checkpoints present them as views, and the layouts
cut them into shards.
"""

import dataclasses

from t5x_inference_ext.config import ModelConfig

INT8_SUFFIX = '_scale'


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One canonical tensor.

  Attributes:
    shape: e.g. [L, E, H*Q].
    kind: 'matrix' ([L, in, out], int8 in an int8 checkpoint), 'norm' (always float32), 'embedding' ([V, E], never
      quantized here) or 'scale' (float32 [L, out]: the int8 matrices' output-channel scales).
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

  return {
      'embedding': Parameter((c.vocab_size, c.d_model), 'embedding'),
      'final_norm': Parameter((c.d_model,), 'norm'),
      'layer_norm': Parameter((c.num_layers, c.d_model), 'norm'),
      'query': matrix(c.d_model, q, 'query_scale'),
      'key': matrix(c.d_model, kv, 'key_scale'),
      'value': matrix(c.d_model, kv, 'value_scale'),
      'gate': matrix(c.d_model, c.d_ff, 'gate_scale'),
      'linear': matrix(c.d_model, c.d_ff, 'linear_scale'),
      # One scale for both: the parallel block sums the two products in one accumulator (section 3.4), as one matrix.
      'attention_output': matrix(q, c.d_model, 'output_scale'),
      'mlp_output': matrix(c.d_ff, c.d_model, 'output_scale'),
  }


def scales(config: ModelConfig) -> dict[str, Parameter]:
  """The scale tensors [L, out] that an int8 model has beside its matrices, by name."""
  return {
      p.scale: Parameter((p.shape[0], p.shape[2]), 'scale')
      for p in parameters(config).values() if p.scale is not None
  }
