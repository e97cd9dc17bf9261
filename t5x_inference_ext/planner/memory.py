"""The memory of one chip in a pass: weights, cache, and estimated temporaries."""

import dataclasses
import functools
import math

from t5x_inference_ext.hardware import MAX_ATTENTION_LOGITS
from t5x_inference_ext.planner.case import ACTIVATION_BYTES, PassCase
from t5x_inference_ext.planner.work import cache_bytes, stored_weights
from t5x_inference_ext.sharding.packing import PackedTensor

_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class PlannedMemory:
  """Bytes on one chip.

  Attributes:
    weights: All stored weights.
    cache: Keys and values of all positions that the run will have.
    working: Estimated temporaries of a pass.
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
    """Whether a chip has the needed memory."""
    return self.needed <= self.available


@functools.lru_cache(maxsize=65536)  # one pass is part of many plans
def memory(case: PassCase, positions: int) -> PlannedMemory:
  """Return the memory of one chip in a pass.

  Args:
    case: The pass.
    positions: S, positions of each row that the cache has room for.
  """
  return PlannedMemory(
    stored_weights(case).bytes,
    cache_bytes(case, positions),
    _working_bytes(case),
    case.machine.chip.usable_bytes,
  )


def _working_bytes(case: PassCase) -> float:
  """Estimate the bytes of temporaries at the point of a pass where they are largest.

  Inside a layer, the temporaries are: the residual stream, before and after an addition; the MLP's
  columns (gate times linear) or the queries, whichever are larger; the attention logits that are
  computed at once; the largest gathered matrix. After the last layer they are the logits of each
  row's last position. The larger of the two sums is returned.
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
  """Return the bytes on a chip of the largest matrix after gathering; 0 if none is gathered."""
  gathered = case.size(case.layout.gathered_axes)
  if gathered == 1:
    return 0.0
  largest = max(
    _widest_part(case.tensors[name]) * width for name, width in case.weight_bytes.items()
  )
  return largest * gathered / case.machine.chips


def _widest_part(tensor: PackedTensor) -> int:
  """Return the elements, over all shards, of the largest matrix in a packed tensor."""
  other_dimension = math.prod(tensor.shape) // tensor.shape[tensor.axis]
  return max(part.width for part in tensor.parts) * len(tensor.parts[0].ranges) * other_dimension
