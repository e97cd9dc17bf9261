"""Collectives of a compiled program, read from its HLO text."""

import collections
from collections.abc import Iterable
import dataclasses
import math
import re

KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')

_WIDTHS = {
  'pred': 1,
  's8': 1,
  'u8': 1,
  'bf16': 2,
  'f16': 2,
  's32': 4,
  'u32': 4,
  'f32': 4,
  's64': 8,
  'f64': 8,
}
# `%name = <type> all-gather(<operands>), <attributes>`, the type an array's or, of several at once,
# a tuple's.
_LINE = re.compile(
  r'^\s*(?:ROOT )?%?[\w.-]+ = (?P<type>.*?) (?P<kind>'
  + '|'.join(KINDS)
  + r')(?P<phase>-start|-done)?'
  r'\((?P<operands>.*?)\), (?P<attributes>.*)$'
)
_MENTION = re.compile(r' (?:' + '|'.join(KINDS) + r')(?:-start)?\(')
_COMPUTATION = re.compile(r'^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$')
_CALLED = re.compile(
  r'(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)'
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"([0-9]+)"\}')
_ARRAY = re.compile(r'\b([a-z]+[0-9]*)\[([0-9,]*)\]')
_LISTED = re.compile(r'replica_groups=\{\{([0-9,]+)\}')
_IOTA = re.compile(r'replica_groups=\[([0-9]+),([0-9]+)\]<=')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One instruction, per device.

  Attributes:
    kind: One of KINDS.
    shards: K, the devices in a group; 0 for a collective-permute.
    result: Bytes of the result.
  """

  kind: str
  shards: int
  result: int

  @property
  def moved(self) -> float:
    """Bytes that a device sends: (K-1)/K of operand or result; all-reduce: twice that."""
    if self.kind == 'collective-permute':
      return self.result
    largest = self.result * self.shards if self.kind == 'reduce-scatter' else self.result
    return largest * (self.shards - 1) / self.shards * (2 if self.kind == 'all-reduce' else 1)


def collectives(text: str) -> list[Collective]:
  """List every collective that compiled.as_text() runs; one in a loop as often as the loop runs.

  Raises:
    ValueError: A collective that this reader does not understand: each must be counted.
  """
  here, calls = collections.defaultdict(list), collections.defaultdict(collections.Counter)
  computation = entry = None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      computation = match['name']
      entry = computation if match['entry'] else entry
    elif match := _LINE.match(line):
      if match['phase']:
        # What an asynchronous start gives differs by kind (operands, results, contexts): CPU
        # programs have none.
        raise ValueError(f'an asynchronous collective: {line}')
      result = sum(_bytes(dtype, dims) for dtype, dims in _ARRAY.findall(match['type']))
      shards = 0 if match['kind'] == 'collective-permute' else _group_size(line)
      here[computation].append(Collective(match['kind'], shards, result))
    elif _MENTION.search(line):
      raise ValueError(f'a collective in a form not known here: {line}')
    times = 1
    if ' while(' in line:
      trips = _TRIPS.search(line)
      times = int(trips[1]) if trips else math.nan
    for called in _CALLED.findall(line):
      calls[computation][called] += times

  def run(name):
    found = list(here[name])
    for called, times in calls[name].items():
      inside = run(called)
      if inside and math.isnan(times):
        raise ValueError(f'collectives in {called}, a loop of unknown length')
      found += inside * (int(times) if inside else 0)
    return found

  return run(entry)


def moved(found: Iterable[Collective]) -> dict[str, float]:
  """Sum up the bytes moved by each kind."""
  totals = collections.defaultdict(float)
  for c in found:
    totals[c.kind] += c.moved
  return dict(totals)


def _bytes(dtype: str, dims: str) -> int:
  return _WIDTHS[dtype] * math.prod(int(d) for d in dims.split(',') if d)


def _group_size(line: str) -> int:
  listed, iota = _LISTED.search(line), _IOTA.search(line)
  if listed:
    return listed[1].count(',') + 1
  if iota:
    return int(iota[2])
  raise ValueError(f'no replica groups: {line}')
