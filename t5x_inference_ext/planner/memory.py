"""The memory of one chip in a pass: weights, cache, and an estimate of the temporaries."""

import dataclasses
import functools
import math

from t5x_inference_ext.hardware import MAX_ATTENTION_LOGITS
from t5x_inference_ext.planner.case import ACTIVATION_BYTES, WEIGHT_BYTES, PassCase
from t5x_inference_ext.planner.work import cache_bytes, stored_bytes
from t5x_inference_ext.sharding.packing import PackedTensor

_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class PlannedMemory:
  """Bytes on one chip.

  Attributes:
    weights: All weights, at rest.
    cache: Keys and values of all positions that the run will have.
    working: An estimate of a pass's temporaries.
    available: Bytes that a program may take.
  """

  weights: float
  cache: float
  working: float
  available: float

  @property
  def needed(self) -> float:
    """Weights, cache and temporaries together."""
    return self.weights + self.cache + self.working

  @property
  def fits(self) -> bool:
    """Whether a chip has that much."""
    return self.needed <= self.available


@functools.lru_cache(maxsize=65536)  # each pass is part of many plans
def memory(case: PassCase, positions: int) -> PlannedMemory:
  """Return the memory of one chip in a pass.

  Args:
    case: The pass.
    positions: S, the positions of each row that the cache has room for.
  """
  weights = sum(stored_bytes(case, t) for t in case.tensors.values())
  return PlannedMemory(
    weights, cache_bytes(case, positions), _working_bytes(case), case.machine.chip.usable_bytes
  )


def _working_bytes(case: PassCase) -> float:
  """Estimate the bytes of temporaries where a pass has most of them.

  In a layer: the residual stream and its sum; the MLP's columns, gate and linear in one, or the
    queries; attention's
  logits, up to the number that is computed at once; the largest gathered matrix. After the last
  layer: the logits of each row's last position.
  """
  c, p = case.config, case.sharding
  tokens = case.batch * case.padded / case.size(case.layout.gathered_axes)
  stream = 2 * tokens * c.d_model / case.size(case.layout.embed_axes)
  columns = tokens * c.d_ff / case.size(case.layout.hidden_axes)
  rows = case.batch / case.size(p.attention_rows)
  positions = case.padded / case.size(p.attention_positions)
  queries = rows * positions * p.heads.heads * c.d_head
  attention_logits = rows * positions * p.heads.heads * case.seen
  layer = (
    ACTIVATION_BYTES * (stream + max(columns, queries))
    + min(attention_logits, MAX_ATTENTION_LOGITS) * _FLOAT32
    + _gathered_bytes(case)
  )
  vocabulary = case.tensors['embedding'].shape[0]
  logits = case.batch * vocabulary / case.size(case.layout.stored_hidden)
  return max(layer, logits * _FLOAT32)


def _gathered_bytes(case: PassCase) -> float:
  """Return the bytes of the largest matrix on a chip once gathered; 0 where none is."""
  gathered = case.size(case.layout.gathered_axes)
  if gathered == 1:
    return 0.0
  largest = max(_widest_part(t) for t in case.tensors.values() if t.kind == 'matrix')
  return largest * gathered / case.machine.chips * WEIGHT_BYTES[case.weights]


def _widest_part(tensor: PackedTensor) -> int:
  """Return the elements, over all shards, of the largest matrix in a packed tensor."""
  other_dimension = math.prod(tensor.shape) // tensor.shape[tensor.axis]
  return max(part.width for part in tensor.parts) * len(tensor.parts[0].ranges) * other_dimension
