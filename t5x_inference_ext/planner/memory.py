"""What a chip has to hold: weights and cache as they are placed, and an estimate of what a pass works with."""

import dataclasses
import functools
import math

from t5x_inference_ext.planner.case import ACTIVATION_BYTES, WEIGHT_BYTES, PassCase
from t5x_inference_ext.planner.work import cache_bytes, stored_bytes

# Attention of more logits than this goes a few rows at a time (model/transformer.py).
_ATTENTION_LOGITS = 2**30
_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class PlannedMemory:
  """Bytes on one chip.

  Attributes:
    weights: all of them, at rest.
    cache: keys and values of all positions that the run will have.
    working: an estimate of a pass's temporaries.
    available: what a program may take.
  """

  weights: float
  cache: float
  working: float
  available: float

  @property
  def needed(self) -> float:
    return self.weights + self.cache + self.working

  @property
  def fits(self) -> bool:
    return self.needed <= self.available


@functools.lru_cache(maxsize=65536)  # each pass is part of many plans
def memory(case: PassCase, positions: int) -> PlannedMemory:
  """Of a pass.

  Args:
    case: the pass.
    positions: S, that the cache has for each row.
  """
  weights = sum(stored_bytes(case, t) for t in case.tensors.values())
  return PlannedMemory(
    weights, cache_bytes(case, positions), working_bytes(case), case.machine.chip.usable_bytes
  )


def working_bytes(case: PassCase) -> float:
  """What is alive at once in the widest place of a layer, and after the last one; an estimate.

  The residual stream and its sum; the input product's MLP columns, gate and linear in one, or the queries; what
  attention computes at once of its logits; the largest gathered matrix. Or the logits of each row's last position.
  """
  c, p = case.config, case.sharding
  tokens = case.batch * case.padded / case.size(case.layout.gathered_axes)
  stream = 2 * tokens * c.d_model / case.size(case.layout.embed_axes)
  columns = tokens * c.d_ff / case.size(case.layout.hidden_axes)
  rows, positions = (
    case.batch / case.size(p.attention_rows),
    case.padded / case.size(p.attention_positions),
  )
  queries = rows * positions * p.heads.heads * c.d_head
  logits = rows * positions * p.heads.heads * (case.context + case.padded - case.length) * _FLOAT32
  layer = (
    ACTIVATION_BYTES * (stream + max(columns, queries))
    + min(logits, _ATTENTION_LOGITS)
    + _gathered(case)
  )
  vocabulary = case.tensors['embedding'].shape[0]
  return max(layer, case.batch * vocabulary / case.size(case.layout.stored_hidden) * _FLOAT32)


def _gathered(case: PassCase) -> float:
  """The largest matrix on a chip when its shards have come together; 0 where none are gathered."""
  gathered = case.size(case.layout.gathered_axes)
  if gathered == 1:
    return 0.0
  largest = max(
    max(part.width for part in t.parts) * len(t.parts[0].ranges) * _other(t)
    for t in case.tensors.values()
    if t.kind == 'matrix'
  )
  return largest * gathered / case.machine.chips * WEIGHT_BYTES[case.weights]


def _other(tensor) -> int:
  """The size of a matrix's other dimension than the one that is made of blocks."""
  return math.prod(tensor.shape) // tensor.shape[tensor.axis]
