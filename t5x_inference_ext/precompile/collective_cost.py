"""The collectives of a compiled program: groups, mesh axes, bytes, and time on the links."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
import re

import numpy as np

from t5x_inference_ext.hardware import Chip
from t5x_inference_ext.precompile.asynchronous import async_step
from t5x_inference_ext.precompile.hlo import Computation, Instruction, Module
from t5x_inference_ext.precompile.shapes import HloError
from t5x_inference_ext.sharding import links
from t5x_inference_ext.sharding.collective import Collective
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
    bytes: int. Bytes from which the time is computed: those of an all-gather's result, or of the
      operand for other kinds.
    axes: tuple of str. The mesh axes along which the devices of a group differ.
    pairs: tuple of (source, target). The devices of a collective-permute.
    groups: tuple of tuples of int. The devices of each group.
  """

  kind: str
  size: int
  bytes: int
  axes: tuple[str, ...]
  pairs: tuple[tuple[int, int], ...] = ()
  groups: tuple[tuple[int, ...], ...] = dataclasses.field(default=(), compare=False, repr=False)


def find_collective(
  module: Module, computation: Computation, instruction: Instruction, mesh: Mapping[str, int]
) -> HloCollective | None:
  """Return the collective that an instruction runs or starts, or None.

  A collective inside a fusion or an asynchronous operation is found too. A fusion of an all-reduce
  that keeps only a slice of the sum counts as a reduce-scatter, which sends as many bytes. An
  asynchronous collective counts where it starts (see asynchronous.async_step).

  Args:
    module: Module. The program.
    computation: Computation. The computation that contains the instruction.
    instruction: Instruction. The instruction to examine.
    mesh: mapping of axis to size, major axis first. Device numbers are positions in the mesh.

  Raises:
    HloError: The groups are in an unknown form, or there are more devices than the mesh has.
  """
  step = async_step(module, computation, instruction)
  if step and not step.begins:
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
  # The result type of an asynchronous start depends on the kind; the operands do not.
  gathered = operand * size if kind == 'all-gather' else operand
  return HloCollective(kind, size, gathered, _axes(groups, mesh), groups=groups)


def replica_groups(instruction: Instruction, partitions: int) -> tuple[tuple[int, ...], ...]:
  """Return the groups of devices of a collective.

  The text lists the groups, {{0,1},{2,3}}, or describes them by a transposed range of devices,
  [2,2]<=[2,2]T(1,0). Without groups in the text, all devices are one group.

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


def seconds(
  collective: HloCollective, chip: Chip, slice_: TpuSlice, chips: tuple[int, ...]
) -> float:
  """Return the time in seconds of a collective with no other traffic on its links.

  A collective-permute sends its bytes over one link, with one hop. For other kinds, sharding.links
  computes the time from the links between the chips of each group.

  Args:
    collective: HloCollective. The collective.
    chip: hardware.Chip. The rates of a link.
    slice_: TpuSlice. The slice whose torus carries the collective.
    chips: tuple of int. The chip of each device of the program, numbered in row-major order of the
      slice's shape.
  """
  if collective.kind == PERMUTE:
    return collective.bytes / chip.link_bandwidth + chip.hop_latency
  if collective.size == 1:
    return 0.0
  kind = collective.kind.replace('-', '_')
  move = Collective(kind, kind, collective.axes, collective.size, collective.bytes)
  paths = _paths(collective.groups, slice_.shape, slice_.wraps, chips)
  return links.collective_seconds(move, paths, chip.link_bandwidth, chip.hop_latency)


@functools.lru_cache(maxsize=256)
def _paths(
  groups: tuple[tuple[int, ...], ...],
  shape: tuple[int, ...],
  wraps: tuple[bool, ...],
  chips: tuple[int, ...],
) -> tuple[links.LinkPath, ...]:
  """Return the paths of groups of devices on the torus."""
  numbers = np.empty(math.prod(shape), int)
  for number, group in enumerate(groups):
    numbers[[chips[device] for device in group]] = number
  return links.group_paths(numbers.reshape(shape), wraps)


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
