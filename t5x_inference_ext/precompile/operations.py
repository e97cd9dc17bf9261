"""The cost of each instruction of a compiled program by itself: kind, bytes, FLOPs, time."""

from collections.abc import Mapping
import dataclasses
import re

from t5x_inference_ext.hardware import Chip
from t5x_inference_ext.precompile import collective_cost
from t5x_inference_ext.precompile.asynchronous import AsyncStep, async_step
from t5x_inference_ext.precompile.collective_cost import HloCollective
from t5x_inference_ext.precompile.hlo import Computation, Instruction, Module
from t5x_inference_ext.precompile.kernel_cost import KernelCost, kernel_cost
from t5x_inference_ext.precompile.kernel_schedule import KernelSchedule
from t5x_inference_ext.precompile.loops import Executed
from t5x_inference_ext.precompile.relayouts import relays
from t5x_inference_ext.precompile.work import flops, is_free, traffic
from t5x_inference_ext.sharding.torus import TpuSlice

MATMUL, ATTENTION, COPY, RELAYOUT, COLLECTIVE, OTHER = OPERATION_KINDS = (
  'matmul',
  'attention',
  'copy',
  'relayout',
  'collective',
  'other',
)

# Functions of attention: this package's attend, flaxformer's and flax's dot_product_attention.
_ATTENDS = re.compile(r'(?:^|\.)_?(?:attend|dot_product_attention\w*)(?:\.|$)')
_COPIES = ('copy', 'slice', 'dynamic-slice', 'dynamic-update-slice', 'concatenate', 'pad')
_RELAYOUTS = ('transpose', 'reshape')
_NAMES_ONLY = ('bitcast', 'parameter', 'constant', 'tuple', 'get-tuple-element')


@dataclasses.dataclass(frozen=True)
class OperationCost:
  """The cost of one instruction in one run of the program.

  Attributes:
    name: str. Name of the instruction.
    opcode: str. Opcode of the instruction.
    op_name: str. Name of the JAX operation that the instruction comes from, or ''.
    kind: str. One of OPERATION_KINDS. 'matmul': a matrix product outside attention. 'attention':
      anything inside attention. 'copy': moves bytes and keeps their layout. 'relayout': moves bytes
      into another layout.
    count: int. Number of runs.
    seconds: float. Total time of all runs in the serial estimate.
    busy_seconds: float. Total time for which an asynchronous operation occupies its resource: the
      links, or the memory. Equal to `seconds`, except for copies into on-chip memory, which are
      free in the serial estimate.
    exposed_seconds: float. Total time that the schedule waits for the operation in the overlapped
      estimate; equal to `seconds` for operations that are not asynchronous.
    bytes: int. Bytes read and written in one run; for a collective, the bytes from which its time
      is computed.
    flops: int. FLOPs of the matrix products in one run.
    estimated: bool. Whether the time is computed from the compiler's estimate of cycles.
    in_layer_loop: bool. Whether it runs inside the longest outermost loop, however deep.
    collective: HloCollective or None. The collective that it runs.
    functions: tuple of str. Functions of the user's program around it, innermost first.
    step: AsyncStep or None. The instruction's part in an asynchronous operation.
    kernel: KernelCost or None. The price of the Pallas kernel that it runs.
  """

  name: str
  opcode: str
  op_name: str
  kind: str
  count: int
  seconds: float
  busy_seconds: float
  exposed_seconds: float
  bytes: int
  flops: int
  estimated: bool
  in_layer_loop: bool
  collective: HloCollective | None = None
  functions: tuple[str, ...] = ()
  step: AsyncStep | None = None
  kernel: KernelCost | None = None

  @property
  def is_priced(self) -> bool:
    """Whether the compiler's estimate or schedule gives the time."""
    scheduled = self.kernel is not None and self.kernel.schedule_seconds is not None
    return self.estimated or scheduled

  @property
  def hidden_seconds(self) -> float:
    """The part of `seconds` that the schedule hides behind other work."""
    return max(0.0, self.seconds - self.exposed_seconds)


def operation_cost(
  module: Module,
  run: Executed,
  chip: Chip,
  slice_: TpuSlice,
  mesh: Mapping[str, int],
  chips: tuple[int, ...],
  schedules: Mapping[str, KernelSchedule],
) -> OperationCost:
  """Return the cost of an instruction, with nothing overlapped.

  Args:
    module: Module. The program.
    run: Executed. The instruction, and how often it runs.
    chip: hardware.Chip. The rates of a chip.
    slice_: TpuSlice. The slice whose torus carries the collectives.
    mesh: mapping of axis to size, in the order of the devices.
    chips: tuple of int. The chip of each device; see collective_cost.seconds.
    schedules: mapping of kernel name to KernelSchedule.
  """
  i = run.instruction
  step = async_step(module, run.computation, i)
  collective = collective_cost.find_collective(module, run.computation, i, mesh)
  work, moved = flops(module, run.computation, i), traffic(module, run.computation, i)
  busy, kernel = None, kernel_cost(i, moved, chip, schedules)
  if collective:
    each, moved = collective_cost.seconds(collective, chip, slice_, chips), collective.bytes
  elif is_free(i) or (step and step.follows):
    each = 0.0
  elif _prefetches(module, i):
    each, busy = 0.0, moved / 2 / chip.hbm_bandwidth
  elif kernel:
    each = kernel.seconds
  elif i.cycles is not None and chip.clock_hz:
    each = i.cycles / chip.clock_hz
  else:
    each = max(moved / chip.hbm_bandwidth, work / chip.bf16_flops)
  return OperationCost(
    name=i.name,
    opcode=i.opcode,
    op_name=i.op_name,
    kind=COLLECTIVE if collective else _kind(module, run.computation, i, work),
    count=run.times,
    seconds=each * run.times,
    busy_seconds=(each if busy is None else busy) * run.times,
    exposed_seconds=each * run.times,
    bytes=moved,
    flops=work,
    estimated=i.cycles is not None,
    in_layer_loop=False,
    collective=collective,
    functions=module.functions(i),
    step=step,
    kernel=kernel,
  )


def _prefetches(module: Module, i: Instruction) -> bool:
  """Return whether an instruction starts an async copy or slice into on-chip memory."""
  if i.phase != 'start':
    return False
  body = module.called(i)
  runs = body.instructions if body else (i,)
  only_copies = all(r.operation in (*_COPIES, *_NAMES_ONLY) for r in runs)
  return only_copies and all(s.on_chip for s in i.results)


def _kind(module: Module, computation: Computation, i: Instruction, work: int) -> str:
  # A fusion has the op_name of its root; the op_name of a product in the fusion is more useful.
  product = next((p for p in module.inside(i) if p.opcode in ('dot', 'convolution')), i)
  if any(_ATTENDS.search(f) for f in (*module.functions(product), *module.functions(i))):
    return ATTENTION
  if work:
    return MATMUL
  inside = [p for p in module.inside(i) if p.opcode not in (*_NAMES_ONLY, 'fusion')]
  if not inside or any(p.operation not in (*_COPIES, *_RELAYOUTS) for p in inside):
    return OTHER
  return RELAYOUT if any(_reorders(module, computation, p) for p in inside) else COPY


def _reorders(module: Module, computation: Computation, i: Instruction) -> bool:
  """Return whether an instruction moves bytes into another layout."""
  if i.opcode != 'copy':
    return i.opcode in _RELAYOUTS
  before = module.home(i, computation)[i.operands[0]]
  return relays(before.shapes[0], i.shapes[0])
