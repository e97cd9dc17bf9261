"""The collectives of a compiled program: their groups, mesh axes and bytes, and their time at link speed."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re

import numpy as np

from t5x_inference_ext.hardware import Chip
from t5x_inference_ext.precompile.hlo import Computation, Instruction, Module
from t5x_inference_ext.precompile.shapes import HloError
from t5x_inference_ext.sharding.torus import TpuSlice

HLO_COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')

_IOTA = re.compile(r'\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?')
_LIST = re.compile(r'\{([0-9, ]*)\}')


@dataclasses.dataclass(frozen=True)
class HloCollective:
  """One collective, per device.

  Attributes:
    kind: one of KINDS.
    size: devices of a group; of a collective-permute 2.
    bytes: what its time is counted from: an all-gather's result, a reduce-scatter's operand, else either.
    axes: the mesh axes along which its groups differ.
    whole: whether a group is all devices along these axes; False where it is a part of them.
    pairs: of a collective-permute, (source, target).
  """

  kind: str
  size: int
  bytes: int
  axes: tuple[str, ...]
  whole: bool = True
  pairs: tuple[tuple[int, int], ...] = ()


def find_collectives(
  module: Module, computation: Computation, instruction: Instruction, mesh: Mapping[str, int]
) -> HloCollective | None:
  """The collective that an instruction runs, or starts; None for any other instruction, and for a collective's end.

  The compiler may hide one inside a fusion or an asynchronous operation: it is found there. A fusion of an all-reduce
  that keeps a slice of the sum sends what a reduce-scatter sends, and counts as one.

  Args:
    mesh: axis -> size, the major axis first: device numbers are positions in the mesh.
  """
  if instruction.phase in ('update', 'done') or 'async-collective-done' in instruction.name:
    return None
  for i in module.inside(instruction):
    kind = i.operation
    if kind in HLO_COLLECTIVES:
      break
  else:
    return None
  hidden = i is not instruction
  where = (
    computation
    if not hidden
    else next(c for c in module.computations.values() if c.by_name.get(i.name) is i)
  )
  operand = sum(o.bytes for o in where.operands(i))
  if kind == 'collective-permute':
    pairs = tuple(
      tuple(map(int, p.split(','))) for p in _LIST.findall(i.attribute('source_target_pairs'))
    )
    axes, _ = _axes(pairs, mesh)
    return HloCollective(kind, 2, operand, axes, pairs=pairs)
  groups = replica_groups(i, module.partitions)
  size = len(groups[0])
  if (
    hidden and kind == 'all-reduce' and instruction.opcode == 'fusion' and _keeps_a_slice(where, i)
  ):
    kind = 'reduce-scatter'
  axes, whole = _axes(groups, mesh)
  # What an asynchronous start gives differs by kind; what each kind makes of its operands does not.
  return HloCollective(kind, size, operand * size if kind == 'all-gather' else operand, axes, whole)


def replica_groups(instruction: Instruction, partitions: int) -> tuple[tuple[int, ...], ...]:
  """The groups of devices: listed, {{0,1},{2,3}}, or counted out, [2,2]<=[2,2]T(1,0); none written means all devices.

  Raises:
    HloError: groups in another form.
  """
  found = re.search(
    r'replica_groups=(\{\{.*?\}\}|\{\}|\[[^ ]*?\]<=\[[0-9,]+\](?:T\([0-9,]+\))?)',
    instruction.attributes,
  )
  text = found[1] if found else '{}'
  if iota := _IOTA.fullmatch(text):
    shape, dims, order = (tuple(map(int, g.split(','))) if g else None for g in iota.groups())
    numbers = np.arange(math.prod(dims)).reshape(dims)
    numbers = numbers.transpose(order) if order else numbers
    return tuple(map(tuple, numbers.reshape(shape[0], -1).tolist()))
  if text == '{}':
    return (tuple(range(partitions)),)
  if text.startswith('{{'):
    return tuple(tuple(int(d) for d in group.split(',')) for group in _LIST.findall(text[1:-1]))
  raise HloError(f'replica groups in a form not known here: {instruction.attributes[:200]}')


def seconds(collective: HloCollective, chip: Chip, slice_: TpuSlice) -> float:
  """Its time alone on the links.

  An all-gather of K chips takes (K-1)/K of its result over the torus axes that it uses, all at once, and their hops;
  a reduce-scatter the same of its operand; an all-reduce both; an all-to-all half of an all-gather's bytes. Up to 4
  chips use one axis, up to 16 two, more of them three, as far as the torus has so many. Where a slice's axes are of
  other lengths, the chips count as a box of as many axes, as even as can be. A collective-permute takes its bytes over
  one link, and one hop.
  """
  if collective.kind == 'collective-permute':
    return collective.bytes / chip.link_bandwidth + chip.hop_latency
  k = collective.size
  if k == 1:
    return 0.0
  rate, hops = 0.0, 0
  for length in axis_lengths(k, chip):
    wraps = length == 16 if chip.torus == 2 else all(slice_.wraps)
    rate += chip.link_bandwidth * (2 if wraps else 1)
    hops += length // 2 if wraps else length - 1
  moved = collective.bytes * (k - 1) / k / rate
  latency = hops * chip.hop_latency
  return {'all-reduce': 2 * (moved + latency), 'all-to-all': moved / 2 + latency}.get(
    collective.kind, moved + latency
  )


def axis_lengths(k: int, chip: Chip) -> tuple[int, ...]:
  """How k chips lie along the torus axes that a collective over them uses: 64 -> (4, 4, 4), 8 -> (4, 2)."""
  axes = min(1 if k <= 4 else 2 if k <= 16 else 3, chip.torus)
  lengths = []
  for left in range(axes, 0, -1):
    # The least divisor that is not below the even share: the longest axis first.
    share = round(k ** (1 / left), 9)
    lengths.append(next(d for d in range(1, k + 1) if k % d == 0 and d >= share))
    k //= lengths[-1]
  return tuple(lengths)


def opposite(a: HloCollective, b: HloCollective) -> bool:
  """Whether two collective-permutes send along the same links the other way."""
  return a.kind == b.kind == 'collective-permute' and sorted(a.pairs) == sorted(
    (t, s) for s, t in b.pairs
  )


def _keeps_a_slice(body: Computation, reduced: Instruction) -> bool:
  users, seen = [reduced], []
  while users:
    i = users.pop()
    seen.append(i.opcode)
    users += body.users[i.name]
  return any(o in ('dynamic-slice', 'slice') for o in seen)


def _axes(groups: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> tuple[tuple[str, ...], bool]:
  """The mesh axes along which the devices of a group differ, and whether each group is all devices along them."""
  shape = tuple(mesh.values())
  if max(max(g, default=0) for g in groups) >= math.prod(shape):
    raise HloError(f'the program runs on more devices than the mesh {dict(mesh)} has')
  differs = np.zeros(len(shape), bool)
  for group in groups:
    places = np.stack(np.unravel_index(np.asarray(group, int), shape), axis=-1)
    differs |= (places != places[:1]).any(axis=0)
  axes = tuple(axis for axis, d in zip(mesh, differs) if d)
  return axes, math.prod(mesh[a] for a in axes) == len(groups[0])
