"""What one chip computes and reads in a pass, counted from the arrays that are there: padding is work too."""

import dataclasses
import math

from t5x_inference_ext.planner.case import CACHE_ELEMENT_BYTES, PassCase
from t5x_inference_ext.sharding.packing import PackedTensor, tensor_dtype

_SCALE_BYTES = 4  # an int8 cache has a float32 scale for each row, position and head


@dataclasses.dataclass(frozen=True)
class PassWork:
  """Of one chip, in one pass.

  Attributes:
    matmul_flops: of the layers' matrices, and `matmul_rows` the rows of each product.
    logits_flops: of the unembedding, and `logits_rows` likewise.
    attention_flops: of both products with keys and values.
    weight_bytes: matrices, scales, norms and embedding, as they are read: gathered ones whole.
    cache_bytes: keys and values that attention reads.
  """

  matmul_flops: float
  matmul_rows: float
  logits_flops: float
  logits_rows: float
  attention_flops: float
  weight_bytes: float
  cache_bytes: float


def work(case: PassCase) -> PassWork:
  """Counts a pass."""
  c, p, chips = case.config, case.sharding, case.machine.chips
  tokens = case.batch * case.padded
  gathered = case.size(case.layout.gathered_axes)
  matrices = sum(math.prod(t.shape) for t in case.tensors.values() if t.kind == 'matrix')
  table = case.tensors['embedding'].shape[0] * c.d_model
  read = sum(
    stored_bytes(case, t) * (gathered if t.kind == 'matrix' else 1) for t in case.tensors.values()
  )
  rows = case.batch / case.size(p.attention_rows)
  positions = case.padded / case.size(p.attention_positions)
  # Products with the keys and with the values; what a mask hides is computed too.
  attention = 4 * rows * positions * p.heads.heads * c.d_head * _seen(case) * c.num_layers
  return PassWork(
    matmul_flops=2 * tokens * matrices * c.num_layers / chips,
    matmul_rows=tokens / gathered,
    # Of each row's last position.
    logits_flops=2 * case.batch * table / chips,
    logits_rows=case.batch,
    attention_flops=attention,
    weight_bytes=read,
    cache_bytes=cache_bytes(case, _seen(case)),
  )


def stored_bytes(case: PassCase, tensor: PackedTensor) -> int:
  """Of a weight, on one chip, in all layers."""
  dtype = tensor_dtype(tensor, case.weights, 'bfloat16')
  split = math.prod(
    case.size((axes,) if isinstance(axes, str) else axes or ()) for axes in tensor.spec
  )
  count = math.prod(tensor.shape) // split * (case.config.num_layers if tensor.per_layer else 1)
  return count * dtype.itemsize


def cache_bytes(case: PassCase, positions: int) -> float:
  """Keys and values of so many positions of each row, on one chip, in all layers."""
  c, p = case.config, case.sharding
  scale = _SCALE_BYTES if case.cache == 'int8' else 0
  of_head = c.d_head * CACHE_ELEMENT_BYTES[case.cache] + scale
  return (
    2
    * c.num_layers
    * case.batch
    / case.size(p.attention_rows)
    * positions
    * p.heads.kv_heads
    * of_head
  )


def _seen(case: PassCase) -> int:
  """S, with what the pass is padded by."""
  return case.context + case.padded - case.length
