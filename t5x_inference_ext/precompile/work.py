"""Bytes and FLOPs of instructions for which the compiler gives no cycles."""

from collections.abc import Sequence
import math
import re

from t5x_inference_ext.precompile.hlo import Computation, Instruction, Module
from t5x_inference_ext.precompile.shapes import HloError

# Opcodes that take no time: names of values, reserved memory, and calls, whose time is counted in
# the computations that they call.
_NAMES = {'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast'}
_IDS = {'partition-id', 'replica-id'}
_ORDERING = {'after-all', 'add-dependency', 'optimization-barrier', 'opt-barrier'}
_CALLERS = {'while', 'call', 'conditional'}
FREE = frozenset(_NAMES | _IDS | _ORDERING | _CALLERS)
# Custom calls that take no time.
_FREE_CALLS = re.compile(
  '"(AllocateBuffer|AssumeGatherIndicesInBound|ConcatBitcast|GatherScatterIndicesBitpacked)"'
)
_SLICING = ('dynamic-slice', 'slice', 'gather')
_UPDATING = ('dynamic-update-slice', 'scatter')
# A Pallas kernel's FLOPs and bytes are read from its author's CostEstimate.
_KERNEL_FLOPS = re.compile(r'"?\bflops"?:\s*"?(\d+)')
_KERNEL_BYTES = re.compile(r'"?\bbytes_accessed"?:\s*"?(\d+)')
_WINDOW = re.compile(r'(\w+)=([0-9x_-]+)')


def is_free(instruction: Instruction) -> bool:
  """Return whether an instruction takes no time."""
  return instruction.opcode in FREE or (
    instruction.opcode == 'custom-call' and bool(_FREE_CALLS.search(instruction.attributes))
  )


def flops(module: Module, computation: Computation, instruction: Instruction) -> int:
  """Return the FLOPs of an instruction's matrix products, including those inside fusions.

  A multiplication with its addition counts 2. Elementwise operations count 0.
  """
  i = instruction
  if i.opcode == 'dot':
    left = computation[i.operands[0]].shapes[0]
    contracted = math.prod(left.dims[d] for d in i.numbers('lhs_contracting_dims'))
    return 2 * i.shapes[0].elements * contracted
  if i.opcode == 'convolution':
    return _convolution_flops(computation, i)
  if i.opcode == 'custom-call':
    said = _KERNEL_FLOPS.search(i.attributes)
    return int(said[1]) if said else 0
  body = module.called(i)
  return sum(flops(module, body, inner) for inner in body.instructions) if body else 0


def traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
  """Return the bytes that an instruction reads and writes.

  For a slice, only the result's bytes are counted as read; for an in-place update, only the
  update's bytes.
  """
  i = instruction
  if is_free(i) or i.phase == 'done':
    return 0
  operands = computation.operands(i)
  if i.phase == 'start' and (body := module.called(i)):
    return _traffic_of_all(module, body)
  written = sum(s.bytes for s in i.results)
  if i.operation in _SLICING:
    return 2 * written + sum(o.bytes for o in operands[1:])
  if i.operation == 'dynamic-update-slice':
    return 2 * operands[1].bytes
  if i.opcode == 'scatter':
    # The operands of a scatter are arrays, then indices, then one update for each array.
    indices = len(operands) // 2
    return operands[indices].bytes + 2 * sum(o.bytes for o in operands[indices + 1 :])
  if i.opcode == 'fusion':
    body = module.body(i)
    return sum(_read(module, body, p) for p in body.parameters) + _written(module, body)
  if i.opcode == 'custom-call':
    said = _KERNEL_BYTES.search(i.attributes)
    if said and int(said[1]):
      return int(said[1])
    if body := module.called(i, 'custom'):
      return _traffic_of_all(module, body)
  return sum(o.bytes for o in operands) + written


def _traffic_of_all(module: Module, body: Computation) -> int:
  """Return the total traffic, in bytes, of the instructions of an asynchronous computation.

  The computation may call another one, as it does for work on a SparseCore.
  """
  total = 0
  for i in body.instructions:
    if i.opcode == 'call':
      total += _traffic_of_all(module, module.body(i, 'to_apply'))
    else:
      total += traffic(module, body, i)
  return total


def in_place(module: Module, instruction: Instruction) -> bool:
  """Return whether the result shares an operand's memory (in-place update or declared alias)."""
  if instruction.opcode in _UPDATING or 'output_to_operand_aliasing=' in instruction.attributes:
    return True
  if instruction.opcode != 'fusion':
    return False
  body = module.body(instruction)
  return all(_updates(module, body, root) for root in body.roots)


def _updates(module: Module, body: Computation, i: Instruction) -> bool:
  while i.opcode in ('bitcast', 'get-tuple-element'):
    i = body[i.operands[0]]
  return in_place(module, i) if i.opcode == 'fusion' else i.opcode in _UPDATING


def _read(
  module: Module,
  body: Computation,
  value: Instruction,
  around: Sequence[tuple[Computation, Instruction]] = (),
) -> int:
  """Return how many bytes of `value` the instructions of a fused computation read.

  Args:
    module: Module. The program.
    body: Computation. The fused computation.
    value: Instruction. The value, an instruction of `body`.
    around: sequence of (computation, fusion). The fusions around `body`, innermost last.
  """
  total = 0
  if value is body.root:
    if not around:
      return value.bytes
    (outside, fusion), rest = around[-1], around[:-1]
    total += _read(module, outside, fusion, rest)
  for user in body.users[value.name]:
    first = user.operands[0] == value.name
    if first and user.opcode in _SLICING:
      total += user.bytes
    elif (
      user.opcode in ('bitcast', 'get-tuple-element', 'copy')
      or user.opcode == 'custom-call'
      and is_free(user)
    ):
      total += _read(module, body, user, around)
    elif user.opcode == 'fusion':
      inner = module.body(user)
      for parameter, operand in zip(inner.parameters, user.operands):
        if operand == value.name:
          total += _read(module, inner, parameter, (*around, (body, user)))
    elif user.opcode != 'tuple' and not (first and user.opcode in _UPDATING):
      return value.bytes
  return min(total, value.bytes)


def _written(module: Module, body: Computation) -> int:
  """Return the bytes that a fused computation writes."""
  total = 0
  for i in body.roots:
    while i.opcode == 'bitcast':
      i = body[i.operands[0]]
    if i.opcode == 'dynamic-update-slice':
      total += body[i.operands[1]].bytes
    elif i.opcode == 'fusion':
      total += _written(module, module.body(i))
    elif i.opcode != 'parameter':
      total += i.bytes
  return total


def _convolution_flops(computation: Computation, i: Instruction) -> int:
  """Return the FLOPs of a convolution: 2 for each product of an input and a weight.

  Products with padding or with dilation gaps are not counted.
  """
  left, right = (o.shapes[0] for o in computation.operands(i)[:2])
  result = i.shapes[0]
  inputs, kernel, outputs = re.split('_|->', i.attribute('dim_labels'))
  window = dict(_WINDOW.findall(i.attribute('window')))
  spatial = sorted(c for c in kernel if c.isdigit())

  def field(name: str, default: str) -> list[str]:
    return window[name].split('x') if name in window else [default] * len(spatial)

  meetings = 1
  for digit, size, stride, pad, dilate, spread in zip(
    spatial,
    field('size', '1'),
    field('stride', '1'),
    field('pad', '0_0'),
    field('lhs_dilate', '1'),
    field('rhs_dilate', '1'),
  ):
    low = re.match(r'-?\d+', pad)
    if low is None:
      raise HloError(f'the window of {i.name} has padding in an unknown form: {pad}')
    meetings *= _meetings(
      left.dims[inputs.index(digit)],
      result.dims[outputs.index(digit)],
      *map(int, (size, stride, low[0], dilate, spread)),
    )
  per_meeting = math.prod(result.dims[outputs.index(c)] for c in 'bf')
  groups = int(i.attribute('batch_group_count') or 1)
  return 2 * meetings * per_meeting * right.dims[kernel.index('i')] // max(groups, 1)


def _meetings(
  length: int, outputs: int, size: int, stride: int, low: int, dilate: int, spread: int
) -> int:
  """Count the (output, weight) pairs, in one window dimension, that use an input element.

  Args:
    length: int. Positions of the input.
    outputs: int. Positions of the result.
    size: int. Weights of the window.
    stride: int. Distance between windows.
    low: int. Padding before the input.
    dilate: int. Distance between inputs (lhs_dilate).
    spread: int. Distance between weights (rhs_dilate).
  """
  if size == stride == dilate == 1 and not low:
    return outputs
  count = 0
  for output in range(outputs):
    for weight in range(size):
      place = output * stride - low + weight * spread
      count += place >= 0 and place % dilate == 0 and place // dilate < length
  return count
