"""The collectives of a compiled program: groups, mesh axes, bytes, and time on the links."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re

import numpy as np

from t5x_inference_ext.hardware import Chip
from t5x_inference_ext.precompile.hlo import Computation, Instruction, Module
from t5x_inference_ext.precompile.shapes import HloError
from t5x_inference_ext.sharding.torus import TpuSlice

PERMUTE = 'collective-permute'
HLO_COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', PERMUTE)

_IOTA = re.compile(r'\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?')
_LIST = re.compile(r'\{([0-9, ]*)\}')
_GROUPS = re.compile(r'replica_groups=(\{\{.*?\}\}|\{\}|\[[^ ]*?\]<=\[[0-9,]+\](?:T\([0-9,]+\))?)')


@dataclasses.dataclass(frozen=True)
class HloCollective:
  """One collective, as seen by each device.

  Attributes:
    kind: str. One of HLO_COLLECTIVES.
    size: int. Devices in a group; 2 for a collective-permute.
    bytes: int. Bytes that its time is computed from: an all-gather's result, a reduce-scatter's
      operand; for other kinds operand and result are equal.
    axes: tuple of str. The mesh axes along which the devices of a group differ.
    pairs: tuple of (source, target). The devices of a collective-permute.
  """

  kind: str
  size: int
  bytes: int
  axes: tuple[str, ...]
  pairs: tuple[tuple[int, int], ...] = ()


def find_collective(
  module: Module, computation: Computation, instruction: Instruction, mesh: Mapping[str, int]
) -> HloCollective | None:
  """Return the collective that an instruction runs or starts, or None.

  A collective inside a fusion or an asynchronous operation is found, too. A fusion of an all-reduce
  that keeps only a slice of the sum is counted as a reduce-scatter, because it sends equally many
  bytes. For the done instruction of an asynchronous collective, return None.

  Args:
    module: Module. The program.
    computation: Computation. The computation that contains the instruction.
    instruction: Instruction. The instruction to examine.
    mesh: mapping of axis to size, major axis first. Device numbers are positions in the mesh.

  Raises:
    HloError: The groups are in an unknown form, or there are more devices than the mesh has.
  """
  if instruction.phase in ('update', 'done') or 'async-collective-done' in instruction.name:
    return None
  inside = module.inside(instruction)
  i = next((i for i in inside if i.operation in HLO_COLLECTIVES), None)
  if i is None:
    return None
  kind, home = i.operation, module.home(i, computation)
  operand = sum(o.bytes for o in home.operands(i))
  if kind == PERMUTE:
    pairs = _pairs(i)
    return HloCollective(kind, 2, operand, _axes(pairs, mesh), pairs)
  if kind == 'all-reduce' and instruction.opcode == 'fusion' and _keeps_a_slice(home, i):
    kind = 'reduce-scatter'
  groups = replica_groups(i, module.partitions)
  size = len(groups[0])
  # The result of an asynchronous start depends on the kind; the operands do not.
  gathered = operand * size if kind == 'all-gather' else operand
  return HloCollective(kind, size, gathered, _axes(groups, mesh))


def replica_groups(instruction: Instruction, partitions: int) -> tuple[tuple[int, ...], ...]:
  """Return the groups of devices of a collective.

  The text lists them, {{0,1},{2,3}}, or enumerates them, [2,2]<=[2,2]T(1,0). A text without groups
  means one group of all devices.

  Args:
    instruction: Instruction. The collective.
    partitions: int. Devices of the program.

  Raises:
    HloError: The groups are in another form.
  """
  found = _GROUPS.search(instruction.attributes)
  text = found[1] if found else '{}'
  if iota := _IOTA.fullmatch(text):
    shape, dims = _integers(iota[1]), _integers(iota[2])
    numbers = np.arange(math.prod(dims)).reshape(dims)
    numbers = numbers.transpose(_integers(iota[3])) if iota[3] else numbers
    return tuple(map(tuple, numbers.reshape(shape[0], -1).tolist()))
  if text == '{}':
    return (tuple(range(partitions)),)
  if text.startswith('{{'):
    return tuple(map(_integers, _LIST.findall(text[1:-1])))
  raise HloError(f'replica groups in an unknown form: {instruction.attributes[:200]}')


def seconds(collective: HloCollective, chip: Chip, slice_: TpuSlice) -> float:
  """Return the time in seconds of a collective with no other traffic on its links.

  An all-gather over K chips takes the time to send (K-1)/K of its result over all torus axes that
  it uses at once, plus the hops. A reduce-scatter takes as long for its operand, an all-reduce
  takes both times, and an all-to-all takes the time of half an all-gather's bytes. Up to 4 chips
  use one axis, up to 16 use two, and more use three, if the torus has so many. The chips are
  assumed to form a box with that many axes, of lengths as equal as possible. A collective-permute
  takes the time of its bytes over one link, plus one hop.
  """
  if collective.kind == PERMUTE:
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
  if collective.kind == 'all-reduce':
    return 2 * (moved + latency)
  return (moved / 2 if collective.kind == 'all-to-all' else moved) + latency


def axis_lengths(k: int, chip: Chip) -> tuple[int, ...]:
  """Return the lengths of k chips along a collective's torus axes: 64 -> (4, 4, 4), 8 -> (4, 2)."""
  axes = min(1 if k <= 4 else 2 if k <= 16 else 3, chip.torus)
  lengths: list[int] = []
  for left in range(axes, 0, -1):
    # Take the least divisor that is at least the even share, so that the longest axis comes first.
    share = round(k ** (1 / left), 9)
    lengths.append(next(d for d in range(1, k + 1) if k % d == 0 and d >= share))
    k //= lengths[-1]
  return tuple(lengths)


def opposite(a: HloCollective, b: HloCollective) -> bool:
  """Return whether two collective-permutes send over the same links in opposite directions."""
  turned = sorted((target, source) for source, target in b.pairs)
  return a.kind == b.kind == PERMUTE and sorted(a.pairs) == turned


def _keeps_a_slice(body: Computation, reduced: Instruction) -> bool:
  """Return whether a fused computation slices the result of its all-reduce."""
  users = [reduced]
  while users:
    i = users.pop()
    if i.opcode in ('dynamic-slice', 'slice'):
      return True
    users += body.users[i.name]
  return False


def _pairs(i: Instruction) -> tuple[tuple[int, int], ...]:
  """Return the (source, target) devices of a collective-permute."""
  pairs = (_integers(pair) for pair in _LIST.findall(i.attribute('source_target_pairs')))
  return tuple((source, target) for source, target in pairs)


def _axes(groups: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
  """Return the mesh axes along which the devices of a group differ."""
  shape = tuple(mesh.values())
  if max(max(g, default=0) for g in groups) >= math.prod(shape):
    raise HloError(f'the program runs on more devices than the mesh {dict(mesh)} has')
  differs = np.zeros(len(shape), bool)
  for group in groups:
    places = np.stack(np.unravel_index(np.asarray(group, int), shape), axis=-1)
    differs |= (places != places[:1]).any(axis=0)
  return tuple(axis for axis, d in zip(mesh, differs) if d)


def _integers(text: str) -> tuple[int, ...]:
  return tuple(map(int, text.split(',')))
