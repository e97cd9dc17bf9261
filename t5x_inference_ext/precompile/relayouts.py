"""Weights and KV caches that a program lays out anew in HBM: the copies that a stored layout should make needless.

Weights and caches are followed from the program's parameters, and caches that it makes itself from its results, through
loops, slices, gathers and elementwise work. What is computed from them (a product, a reduction, a looked-up row) is
followed no further.
"""

import collections
import dataclasses

from t5x_inference_ext.precompile.hlo import Computation, Instruction, Module
from t5x_inference_ext.precompile.shapes import HBM, ArrayShape
from t5x_inference_ext.precompile.work import in_place, is_free

# Results that carry what their operands held, moved or converted.
_MOVES = frozenset(
  (
    'bitcast',
    'copy',
    'transpose',
    'reshape',
    'slice',
    'dynamic-slice',
    'convert',
    'bitcast-convert',
    'pad',
    'concatenate',
    'reverse',
    'optimization-barrier',
    'opt-barrier',
    'copy-done',
    'all-gather',
    'all-to-all',
    'collective-permute',
    'dynamic-update-slice',
    'select',
    'multiply',
    'divide',
    'add',
    'subtract',
    'negate',
    'maximum',
    'minimum',
    'clamp',
  )
)
_ARITHMETIC = frozenset(('multiply', 'divide', 'add', 'subtract', 'maximum', 'minimum'))
_MATERIALISES = frozenset(
  (
    'fusion',
    'copy',
    'transpose',
    'reshape',
    'slice',
    'dynamic-slice',
    'convert',
    'bitcast-convert',
    'pad',
    'concatenate',
    'reverse',
    'select',
    'multiply',
  )
)

_CUTS = frozenset(('copy', 'slice', 'dynamic-slice', 'pad'))
_MOVED_WHOLE = _CUTS | {'bitcast', 'fusion'}

# What a value carries: names of weights and caches; of a tuple, one set per element.
_Carried = frozenset | tuple


@dataclasses.dataclass(frozen=True)
class WeightCopy:
  """An instruction that writes a weight or a cache, or a slice of one, to HBM again.

  Attributes:
    name: the instruction; `computation` is where it stands.
    sources: the parameters that it comes from, as the program names them.
    result: what it writes.
    relaid: whether the order of dimensions, the tiles or the element type changes; a mere slice does not.
  """

  name: str
  computation: str
  sources: tuple[str, ...]
  result: ArrayShape
  relaid: bool


def weight_copies(module: Module, smallest: int = 2**18) -> list[WeightCopy]:
  """Every executed instruction that writes at least `smallest` bytes of a weight or cache to HBM again.

  Not among them: what goes to on-chip memory, asynchronous copies, what a collective delivers, in-place updates.
  """
  flow = _Flow(module, smallest)
  flow.run(module.entry, [flow.parameter(p) for p in module.entry.parameters])
  flow.accumulators = _made_caches(module, smallest)
  if flow.accumulators:
    flow.run(module.entry, [flow.parameter(p) for p in module.entry.parameters])
  found = []
  for name in flow.executed:
    computation = module.computations[name]
    for i in computation.instructions:
      if i.opcode not in _MATERIALISES or in_place(module, i):
        continue
      carried = flow.carried[name, i.name]
      parts = carried if isinstance(carried, tuple) else (carried,)
      for shape, sources in zip(i.shapes, parts):
        if sources and shape.space == HBM and shape.bytes >= smallest:
          found.append(
            WeightCopy(i.name, name, tuple(sorted(sources)), shape, _relays(module, computation, i))
          )
          break
  return found


class _Flow:
  """Follows weights and caches through a module: `carried` by (computation, instruction) of what it has run."""

  def __init__(self, module: Module, smallest: int):
    self.module, self.smallest = module, smallest
    self.carried: dict[tuple[str, str], _Carried] = {}
    self.executed: dict[str, None] = {}
    self.accumulators: dict[tuple[str, int], str] = {}

  def parameter(self, i: Instruction) -> _Carried:
    if i.parts:
      return tuple(frozenset() for _ in i.parts)
    # Tokens, lengths and the like are no weights.
    counts = i.shapes[0].dtype in ('s32', 'u32', 's64', 'u64', 'pred')
    return frozenset() if counts or i.bytes < self.smallest else frozenset([i.op_name or i.name])

  def run(self, computation: Computation, given: list[_Carried], fused: bool = False) -> _Carried:
    if not fused:
      self.executed[computation.name] = None
    here: dict[str, _Carried] = {}
    for i in computation.instructions:
      here[i.name] = (
        given[int(i.argument)]
        if i.opcode == 'parameter'
        else self._result(computation, i, here, fused)
      )
      self.carried[computation.name, i.name] = here[i.name]
    return here[computation.root.name]

  def _result(self, computation, i, here, fused) -> _Carried:
    operands = [here[o] for o in i.operands]
    if i.opcode == 'tuple':
      return tuple(_flat(o) for o in operands)
    if i.opcode == 'get-tuple-element':
      index = int(i.attribute('index'))
      return operands[0][index] if isinstance(operands[0], tuple) else operands[0]
    if i.opcode == 'while':
      return self._loop(i, operands[0])
    if i.opcode == 'fusion' or i.phase == 'start' and self.module.called(i) and operands:
      return self.run(self.module.called(i), operands, fused=True)
    if i.phase == 'update' and len(operands) > 1:  # it brings what the start had not yet
      return self.run(self.module.called(computation[i.operands[0]]), operands[1:], fused=True)
    if i.opcode == 'call':
      return self.run(self.module.called(i, 'to_apply'), operands)
    if i.opcode == 'conditional':
      branches = [name for role, name in i.called if role == 'branch']
      return _union(
        [self.run(self.module.computations[b], [o]) for b, o in zip(branches, operands[1:])]
      )
    if i.phase in ('start', 'done', 'update'):
      # A start's result holds its operands, its results and contexts: whichever is asked for.
      return frozenset().union(*map(_flat, operands))
    if i.opcode == 'dynamic-update-slice':
      return _flat(operands[0])
    if i.opcode == 'custom-call' and (in_place(self.module, i) or is_free(i)):
      return frozenset().union(*map(_flat, operands))
    if i.opcode not in _MOVES:
      return frozenset()
    if i.opcode in _ARITHMETIC and not self._scales(computation, i, operands):
      return frozenset()
    return frozenset().union(*map(_flat, operands))

  def _scales(self, computation, i, operands) -> bool:
    """Whether elementwise work only rescales a weight: what it meets is a constant, or spread out over it."""
    return all(o or _spread(computation, name) for o, name in zip(map(_flat, operands), i.operands))

  def _loop(self, i, state) -> _Carried:
    body = self.module.called(i, 'body')
    state = list(state) if isinstance(state, tuple) else [state] * len(i.parts)
    for n in range(len(state)):
      if (i.name, n) in self.accumulators:
        state[n] = _flat(state[n]) | {self.accumulators[i.name, n]}
    # Until it settles: each turn may carry on what the one before left.
    for _ in range(len(state) + 1):
      after = self.run(body, [tuple(state)])
      after = after if isinstance(after, tuple) else (after,) * len(state)
      merged = [_flat(a) | _flat(b) for a, b in zip(state, after)]
      if merged == state:
        break
      state = merged
    return tuple(state)


def _made_caches(module: Module, smallest: int) -> dict[tuple[str, int], str]:
  """(loop, element of its state) -> name, of large results of the program that a loop fills slice by slice."""
  found = {}
  root = module.entry.root
  for number, name in enumerate(root.operands if root.opcode == 'tuple' else [root.name]):
    todo, seen = collections.deque([name]), set()
    while todo:
      i = module.entry[todo.popleft()]
      if i.name in seen:
        continue
      seen.add(i.name)
      if i.opcode == 'get-tuple-element' and module.entry[i.operands[0]].opcode == 'while':
        loop, index = module.entry[i.operands[0]], int(i.attribute('index'))
        if i.bytes >= smallest and _filled(module, loop, index):
          found[loop.name, index] = f'result {number}'
      elif i.opcode in _MOVES or i.opcode in ('fusion', 'get-tuple-element', 'copy-start'):
        todo.extend(i.operands)
  return found


def _filled(module, loop, index) -> bool:
  """Whether a turn of the loop updates the element in place."""
  body = module.called(loop, 'body')
  if body.root.opcode != 'tuple':
    return False
  i = body[body.root.operands[index]]
  while i.opcode in ('get-tuple-element', 'bitcast', 'copy'):
    i = body[i.operands[0]]
  return in_place(module, i)


def _relays(module: Module, computation: Computation, i: Instruction) -> bool:
  """Whether an instruction changes how its operand lies or what its elements are."""
  if i.opcode == 'fusion':
    body = module.called(i)
    if any(_changes(module, body, inner) for inner in body.instructions):
      return True
    # What a fusion cuts and copies on the way is nowhere in memory: its ends count.
    ends = [body[o] for o in body.root.operands] if body.root.opcode == 'tuple' else [body.root]
    return any(
      relays(_origin(body, end).shapes[0], end.shapes[0])
      for end in ends
      if end.opcode in _MOVED_WHOLE
    )
  return _changes(module, computation, i) or (
    i.opcode in _CUTS and relays(computation.operands(i)[0].shapes[0], i.shapes[0])
  )


def _changes(module: Module, computation: Computation, i: Instruction) -> bool:
  """Whether it, or what a fusion in a fusion runs, reorders or converts elements."""
  if i.opcode == 'fusion':
    body = module.called(i)
    return any(_changes(module, body, inner) for inner in body.instructions)
  if i.opcode in ('convert', 'reshape', 'bitcast-convert', 'reverse'):
    return i.shapes[0].elements > 1
  if i.opcode == 'transpose':
    before, after = computation.operands(i)[0].shapes[0], i.shapes[0]
    moved = [int(d) for d in i.attribute('dimensions').split(',')]
    return tuple(moved[d] for d in after.order) != before.order
  return False


def _origin(body: Computation, i: Instruction) -> Instruction:
  """What an instruction of a fusion has cut and copied."""
  while i.opcode in _MOVED_WHOLE:
    i = body.operands(i)[0]
  return i


def relays(before: ArrayShape, after: ArrayShape) -> bool:
  """Whether two arrays lie differently: another order of dimensions, or, where sizes are equal, other tiles.

  Dimensions of one element don't count; where one array has fewer dimensions, it is the first that it lacks.
  """
  if len(before.dims) == len(after.dims):
    wide = [d for d in after.minor_to_major if before.dims[d] != 1 and after.dims[d] != 1]
    return [d for d in before.minor_to_major if d in wide] != wide or (
      before.dims == after.dims and before.tiles != after.tiles
    )
  orders, sizes = (
    [_order(before), _order(after)],
    [[n for n in shape.dims if n != 1] for shape in (before, after)],
  )
  few = min(map(len, orders))
  first, second = ([d for d in order if d < few] for order in orders)
  return first != second or sizes[0][-2:] == sizes[1][-2:] and before.tiles != after.tiles


def _order(shape: ArrayShape) -> list[int]:
  """Its dimensions of more than one element from the fastest, each counted from the last."""
  wide = [d for d, n in enumerate(shape.dims) if n != 1]
  return [len(wide) - 1 - wide.index(d) for d in shape.minor_to_major if shape.dims[d] != 1]


def _spread(computation, name) -> bool:
  i = computation[name]
  while i.opcode in ('convert', 'bitcast', 'copy'):
    i = computation[i.operands[0]]
  return i.opcode in ('broadcast', 'constant')


def _flat(carried: _Carried) -> frozenset:
  return frozenset().union(*map(_flat, carried)) if isinstance(carried, tuple) else carried


def _union(values: list[_Carried]) -> _Carried:
  if all(isinstance(v, tuple) for v in values):
    return tuple(frozenset().union(*map(_flat, parts)) for parts in zip(*values))
  return frozenset().union(*map(_flat, values))
