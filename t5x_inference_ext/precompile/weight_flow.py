"""Flow of weights: finds the values of a program that hold weights or KV caches, or parts of them.

Weights and caches are followed from the program's parameters (a cache that the program makes: from
the program's results) through loops, slices, gathers and elementwise operations. Values computed
from weights or caches (a product, a reduction, a looked-up row) are not followed.
"""

import collections
from collections.abc import Iterable, Sequence

from t5x_inference_ext.precompile.hlo import Computation, Instruction, Module
from t5x_inference_ext.precompile.work import in_place, is_free

# Opcodes whose results are their operands' values, moved or converted.
_RESHAPES = {'transpose', 'reshape', 'convert', 'bitcast-convert', 'reverse'}
_CUTS = {'copy', 'slice', 'dynamic-slice', 'pad', 'concatenate'}
REARRANGES = frozenset(_RESHAPES | _CUTS)
_ARITHMETIC = {'multiply', 'divide', 'add', 'subtract', 'maximum', 'minimum'}
_ELEMENTWISE = _ARITHMETIC | {'select', 'negate', 'clamp'}
_GATHERS = {'all-gather', 'all-to-all', 'collective-permute'}
_RENAMES = {'bitcast', 'optimization-barrier', 'opt-barrier', 'copy-done'}
_MOVES = REARRANGES | _ELEMENTWISE | _GATHERS | _RENAMES | {'dynamic-update-slice'}
# Element types of integers such as tokens and lengths, which are not weights.
_COUNTS = ('s32', 'u32', 's64', 'u64', 'pred')

# Names of the weights and caches that a value holds; for a tuple, one set per element.
Sources = frozenset[str]
Carried = Sources | tuple[Sources, ...]
_NOTHING: Sources = frozenset()


def follow_weights(module: Module, smallest: int) -> 'WeightFlow':
  """Return the weights and caches that each value of a program holds.

  Args:
    module: Module. The program.
    smallest: int. Ignore parameters and results with fewer bytes.
  """
  flow = WeightFlow(module, smallest)
  flow.run_entry()
  flow.accumulators = _made_caches(module, smallest)
  if flow.accumulators:
    flow.run_entry()
  return flow


class WeightFlow:
  """The weights and caches in the values of a module.

  Attributes:
    carried: dict. (computation, instruction) -> names of the weights and caches in its result.
    executed: dict. Keys: names of computations that run by themselves, not inside a fusion.
    accumulators: dict. (loop, element of its state) -> name of a result that the loop fills.
  """

  def __init__(self, module: Module, smallest: int) -> None:
    self.module, self.smallest = module, smallest
    self.carried: dict[tuple[str, str], Carried] = {}
    self.executed: dict[str, None] = {}
    self.accumulators: dict[tuple[str, int], str] = {}

  def run_entry(self) -> None:
    """Follow the program's parameters to its results."""
    entry = self.module.entry
    self._run(entry, [self._parameter(p) for p in entry.parameters])

  def _parameter(self, i: Instruction) -> Carried:
    if i.parts:
      return (_NOTHING,) * len(i.parts)
    if i.shapes[0].dtype in _COUNTS or i.bytes < self.smallest:
      return _NOTHING
    return frozenset([i.op_name or i.name])

  def _run(
    self, computation: Computation, given: Sequence[Carried], fused: bool = False
  ) -> Carried:
    """Follow values through a computation; return the weights and caches in its root.

    Args:
      computation: Computation. The computation to follow.
      given: sequence of Carried. Weights and caches in each parameter.
      fused: bool. Whether the computation runs as a part of one instruction.
    """
    if not fused:
      self.executed[computation.name] = None
    here: dict[str, Carried] = {}
    for i in computation.instructions:
      if i.opcode == 'parameter':
        here[i.name] = given[int(i.argument)]
      else:
        here[i.name] = self._result(computation, i, [here[o] for o in i.operands])
      self.carried[computation.name, i.name] = here[i.name]
    return here[computation.root.name]

  def _result(self, computation: Computation, i: Instruction, operands: list[Carried]) -> Carried:
    module = self.module
    if i.opcode == 'tuple':
      return tuple(map(_flat, operands))
    if i.opcode == 'get-tuple-element':
      held = operands[0]
      return held[int(i.attribute('index'))] if isinstance(held, tuple) else held
    if i.opcode == 'while':
      return self._loop(i, operands[0])
    if i.opcode == 'fusion' or (i.phase == 'start' and module.called(i) and operands):
      return self._run(module.body(i), operands, fused=True)
    if i.phase == 'update' and len(operands) > 1:  # an update may have operands of its own
      return self._run(module.body(computation[i.operands[0]]), operands[1:], fused=True)
    if i.opcode == 'call':
      return self._run(module.body(i, 'to_apply'), operands)
    if i.opcode == 'conditional':
      branches = (module.computations[name] for name in i.branches)
      return _either([self._run(b, [o]) for b, o in zip(branches, operands[1:])])
    if i.phase:
      # The result of a start is a tuple of operands, results and contexts; later instructions may
      # read any of them.
      return _union(operands)
    if i.opcode == 'dynamic-update-slice':
      return _flat(operands[0])
    if i.opcode == 'custom-call':
      return _union(operands) if in_place(module, i) or is_free(i) else _NOTHING
    if i.opcode not in _MOVES:
      return _NOTHING
    if i.opcode in _ARITHMETIC and not _rescales(computation, i, operands):
      return _NOTHING
    return _union(operands)

  def _loop(self, loop: Instruction, given: Carried) -> Carried:
    body = self.module.body(loop, 'body')
    state = list(given) if isinstance(given, tuple) else [given] * len(loop.parts)
    for n in range(len(state)):
      if (loop.name, n) in self.accumulators:
        state[n] |= {self.accumulators[loop.name, n]}
    # Repeat until nothing changes: each turn of the loop may pass on values of the previous turn.
    for _ in range(len(state) + 1):
      after = self._run(body, [tuple(state)])
      after = after if isinstance(after, tuple) else (after,) * len(state)
      merged = [a | b for a, b in zip(state, after)]
      if merged == state:
        break
      state = merged
    return tuple(state)


def _rescales(computation: Computation, i: Instruction, operands: Iterable[Carried]) -> bool:
  """Return whether arithmetic only rescales a weight: by a constant or by a broadcast value."""
  return all(_flat(o) or _spread(computation, name) for o, name in zip(operands, i.operands))


def _spread(computation: Computation, name: str) -> bool:
  i = computation[name]
  while i.opcode in ('convert', 'bitcast', 'copy'):
    i = computation[i.operands[0]]
  return i.opcode in ('broadcast', 'constant')


def _made_caches(module: Module, smallest: int) -> dict[tuple[str, int], str]:
  """Return (loop, element of its state) -> name, for large results that a loop fills in place."""
  found = {}
  entry = module.entry
  for number, result in enumerate(entry.roots):
    todo, seen = collections.deque([result.name]), set()
    while todo:
      i = entry[todo.popleft()]
      if i.name in seen:
        continue
      seen.add(i.name)
      if i.opcode == 'get-tuple-element' and entry[i.operands[0]].opcode == 'while':
        loop, index = entry[i.operands[0]], int(i.attribute('index'))
        if i.bytes >= smallest and _filled(module, loop, index):
          found[loop.name, index] = f'result {number}'
      elif i.opcode in _MOVES or i.opcode in ('fusion', 'get-tuple-element', 'copy-start'):
        todo.extend(i.operands)
  return found


def _filled(module: Module, loop: Instruction, index: int) -> bool:
  """Return whether a loop's body updates an element of its state in place."""
  body = module.body(loop, 'body')
  if body.root.opcode != 'tuple':
    return False
  i = body[body.root.operands[index]]
  while i.opcode in ('get-tuple-element', 'bitcast', 'copy'):
    i = body[i.operands[0]]
  return in_place(module, i)


def flat_sources(carried: Carried) -> list[Sources]:
  """Return the weights and caches in each array of a value."""
  return list(carried) if isinstance(carried, tuple) else [carried]


def _flat(carried: Carried) -> Sources:
  return _NOTHING.union(*flat_sources(carried))


def _union(values: Iterable[Carried]) -> Sources:
  return _NOTHING.union(*map(_flat, values))


def _either(values: Sequence[Carried]) -> Carried:
  """Return the union, per element, of the weights and caches in values of equal structure."""
  tuples = [v for v in values if isinstance(v, tuple)]
  if len(tuples) < len(values):
    return _union(values)
  return tuple(_NOTHING.union(*parts) for parts in zip(*tuples))
