"""What an instruction reads, writes and multiplies: for those that the compiler puts no cycles on."""

import math
import re

from t5x_inference_ext.precompile.hlo import Computation, Instruction, Module

# They compute nothing: names for values, or memory set aside.
FREE = frozenset(
  (
    'parameter',
    'constant',
    'get-tuple-element',
    'tuple',
    'bitcast',
    'partition-id',
    'replica-id',
    'after-all',
    'add-dependency',
    'optimization-barrier',
    'opt-barrier',
    'while',
    'call',
    'conditional',
  )
)
_FREE_CALLS = (
  'AllocateBuffer',
  'AssumeGatherIndicesInBound',
  'ConcatBitcast',
  'GatherScatterIndicesBitpacked',
)
_SLICING = ('dynamic-slice', 'slice', 'gather')
# A hand-written kernel says what it does where its author said so.
_KERNEL_FLOPS = re.compile(r'"?\bflops"?:\s*"?(\d+)')
_KERNEL_BYTES = re.compile(r'"?\bbytes_accessed"?:\s*"?(\d+)')
_WINDOW = re.compile(r'(\w+)=([0-9x_-]+)')


def is_free(instruction: Instruction) -> bool:
  """Whether it runs nothing."""
  return instruction.opcode in FREE or (
    instruction.opcode == 'custom-call'
    and any(f'"{t}"' in instruction.attributes for t in _FREE_CALLS)
  )


def flops(module: Module, computation: Computation, instruction: Instruction) -> int:
  """2 per multiplication of its matrix products, those inside fusions included; elementwise work counts nothing."""
  i = instruction
  if i.opcode == 'dot':
    left = computation[i.operands[0]].shapes[0]
    contracted = [int(d) for d in (i.attribute('lhs_contracting_dims') or '').split(',') if d]
    return 2 * i.shapes[0].elements * math.prod(left.dims[d] for d in contracted)
  if i.opcode == 'convolution':
    return _convolution_flops(computation, i)
  if i.opcode == 'custom-call':
    said = _KERNEL_FLOPS.search(i.attributes)
    return int(said[1]) if said else 0
  body = module.called(i)
  return sum(flops(module, body, inner) for inner in body.instructions) if body else 0


def traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
  """Bytes read and written. A slice reads its result alone, an in-place update reads and writes the update alone."""
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
    # Operands, then indices, then as many updates as operands.
    return operands[len(operands) // 2].bytes + 2 * sum(
      o.bytes for o in operands[len(operands) // 2 + 1 :]
    )
  if i.opcode == 'fusion':
    body = module.called(i)
    read = sum(_read(module, body, p) for p in body.parameters)
    return read + _written(module, body)
  if i.opcode == 'custom-call' and (said := _KERNEL_BYTES.search(i.attributes)) and int(said[1]):
    return int(said[1])
  if i.opcode == 'custom-call' and (body := module.called(i, 'custom')):
    return _traffic_of_all(module, body)
  return sum(o.bytes for o in operands) + written


def _traffic_of_all(module, body) -> int:
  """Of all that an asynchronous computation runs. It may be called in it, as what is left to a sparse core is."""
  return sum(
    _traffic_of_all(module, module.called(i, 'to_apply'))
    if i.opcode == 'call'
    else traffic(module, body, i)
    for i in body.instructions
  )


def in_place(module: Module, instruction: Instruction) -> bool:
  """Whether the result is an operand's own memory: an update of a slice of it, or a declared alias."""
  i = instruction
  if (
    i.opcode in ('dynamic-update-slice', 'scatter') or 'output_to_operand_aliasing=' in i.attributes
  ):
    return True
  body = module.called(i) if i.opcode == 'fusion' else None
  return bool(body) and all(_updates(module, body, root) for root in roots(body))


def roots(body: Computation) -> list[Instruction]:
  """What a fused computation returns: its root, or each element of the tuple that it is."""
  return body.operands(body.root) if body.root.opcode == 'tuple' else [body.root]


def _updates(module, body, i):
  while i.opcode in ('bitcast', 'get-tuple-element'):
    i = body[i.operands[0]]
  return (
    in_place(module, i) if i.opcode == 'fusion' else i.opcode in ('dynamic-update-slice', 'scatter')
  )


def _read(module, body, value, around=()) -> int:
  """Bytes of a value of a fused computation that its users read: slices of it, or all of it.

  Args:
    around: (computation, fusion) of the fusions that this computation is nested in, the innermost last.
  """
  total = 0
  if value is body.root:
    if not around:
      return value.bytes
    total += _read(module, *around[-1], around[:-1])
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
      inner = module.called(user)
      total += sum(
        _read(module, inner, p, (*around, (body, user)))
        for p, o in zip(inner.parameters, user.operands)
        if o == value.name
      )
    elif user.opcode != 'tuple' and not (
      first and user.opcode in ('dynamic-update-slice', 'scatter')
    ):
      return value.bytes
  return min(total, value.bytes)


def _written(module, body) -> int:
  total = 0
  for i in roots(body):
    while i.opcode == 'bitcast':
      i = body[i.operands[0]]
    if i.opcode == 'dynamic-update-slice':
      total += body[i.operands[1]].bytes
    elif i.opcode == 'fusion':
      total += _written(module, module.called(i))
    elif i.opcode != 'parameter':
      total += i.bytes
  return total


def _convolution_flops(computation, i) -> int:
  """As a product: for each element of the result, the inputs that meet a weight. Padding and gaps multiply nothing."""
  left, right = (o.shapes[0] for o in computation.operands(i)[:2])
  inputs, kernel, result = re.split('_|->', i.attribute('dim_labels'))
  window = dict(_WINDOW.findall(i.attribute('window') or ''))
  spatial = sorted(c for c in kernel if c.isdigit())

  def each(name, default):
    return window[name].split('x') if name in window else [default] * len(spatial)

  meetings = 1
  for n, (digit, size, stride, pad, dilate, spread) in enumerate(
    zip(
      spatial,
      each('size', '1'),
      each('stride', '1'),
      each('pad', '0_0'),
      each('lhs_dilate', '1'),
      each('rhs_dilate', '1'),
    )
  ):
    length, low = left.dims[inputs.index(digit)], int(re.match(r'-?\d+', pad)[0])
    outputs = i.shapes[0].dims[result.index(digit)]
    stride, dilate, spread, size = int(stride), int(dilate), int(spread), int(size)
    if size == 1 and stride == 1 and dilate == 1 and not low:
      meetings *= outputs
      continue
    count = 0
    for out in range(outputs):
      first = out * stride - low
      # Positions first + k spread that are multiples of `dilate` inside the input.
      count += sum(
        1
        for k in range(size)
        if (place := first + k * spread) >= 0 and place % dilate == 0 and place // dilate < length
      )
    meetings *= count
  batch = i.shapes[0].dims[result.index('b')]
  features = i.shapes[0].dims[result.index('f')]
  groups = int(i.attribute('batch_group_count') or 1)
  return (
    2 * meetings * batch * features * right.dims[kernel.index('i')] // (groups if groups > 1 else 1)
  )
