"""Collectives of a compiled program, and the bytes that they move."""

import collections
from collections.abc import Iterable
import dataclasses

from t5x_inference_ext.precompile.collective_cost import HLO_COLLECTIVES, PERMUTE, replica_groups
from t5x_inference_ext.precompile.hlo_parser import parse_hlo
from t5x_inference_ext.precompile.loops import executed


@dataclasses.dataclass(frozen=True)
class Collective:
  """One instruction, per device.

  Attributes:
    kind: One of HLO_COLLECTIVES.
    shards: K, the devices in a group; 0 for a collective-permute.
    result: Bytes of the result.
  """

  kind: str
  shards: int
  result: int

  @property
  def moved(self) -> float:
    """Bytes that a device sends: (K-1)/K of operand or result; all-reduce: twice that."""
    if self.kind == PERMUTE:
      return self.result
    largest = self.result * self.shards if self.kind == 'reduce-scatter' else self.result
    return largest * (self.shards - 1) / self.shards * (2 if self.kind == 'all-reduce' else 1)


def collectives(text: str) -> list[Collective]:
  """List every collective that compiled.as_text() runs; one in a loop as often as the loop runs."""
  module = parse_hlo(text)
  runs, unknown = executed(module)
  found = []
  for run in runs:
    for i in module.inside(run.instruction):
      if i.operation in HLO_COLLECTIVES:
        assert not i.phase, f'{i.name} is asynchronous, which no CPU program is'
        assert not set(run.loops) & set(unknown), f'{i.name} is in a loop of unknown length'
        shards = 0 if i.opcode == PERMUTE else len(replica_groups(i, module.partitions)[0])
        found += run.times * [Collective(i.opcode, shards, i.bytes)]
  return found


def moved(found: Iterable[Collective]) -> dict[str, float]:
  """Sum up the bytes moved by each kind."""
  totals = collections.defaultdict(float)
  for c in found:
    totals[c.kind] += c.moved
  return dict(totals)
