"""How often each instruction of a compiled program runs, computed from loops' trip counts."""

from collections.abc import Iterator
import dataclasses
import re

from t5x_inference_ext.precompile.hlo import Computation, Instruction, Module

_KNOWN = re.compile(r'"known_trip_count":\{"n":"?(\d+)"?\}')
# Operations whose result has the value of their first operand.
_SAME_VALUE = ('copy', 'bitcast', 'reshape', 'convert', 'broadcast', 'bitcast-convert')
# Direction of a comparison -> direction after swapping its sides: a < b is b > a.
_TURNED = {'LT': 'GT', 'GT': 'LT', 'LE': 'GE', 'GE': 'LE', 'NE': 'NE', 'EQ': 'EQ'}

# (computation that contains a loop, the loop's while instruction)
_Loop = tuple[Computation, Instruction]
# Nested computations, innermost last, each with the fusion that calls it. The first has no fusion;
# its parameter is the loop's state.
_Stack = list[tuple[Computation, Instruction | None]]


@dataclasses.dataclass(frozen=True)
class Executed:
  """An instruction, and the number of times that one run of the program executes it.

  Attributes:
    instruction: Instruction. The instruction.
    computation: Computation. The computation that contains it.
    times: int. Number of executions; a loop of unknown length counts as one turn.
    loops: tuple of str. The while instructions around it, outermost first.
    branches: tuple of (conditional, branch number). The branches that contain it. Only one branch
      of each conditional runs.
  """

  instruction: Instruction
  computation: Computation
  times: int
  loops: tuple[str, ...]
  branches: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class _Value:
  """A scalar: element number `element` of the loop's state (None: no element), plus a constant."""

  element: int | None
  constant: int


def executed(module: Module) -> tuple[list[Executed], list[str]]:
  """Return all instructions that run by themselves, in order, and the loops of unknown length.

  Instructions inside a fusion are not listed, only the fusion.
  """
  unknown: list[str] = []

  def run(
    computation: Computation,
    times: int,
    loops: tuple[str, ...],
    branches: tuple[tuple[str, int], ...],
    outer: tuple[_Loop, ...],
  ) -> Iterator[Executed]:
    for i in computation.instructions:
      yield Executed(i, computation, times, loops, branches)
      if i.opcode == 'while':
        trips = trip_count(module, computation, i, outer)
        if trips is None and i.name not in unknown:
          unknown.append(i.name)
        turns = times * (1 if trips is None else trips)
        for role in ('condition', 'body'):
          inner = module.body(i, role)
          yield from run(inner, turns, (*loops, i.name), branches, ((computation, i), *outer))
      elif i.opcode == 'call':
        yield from run(module.body(i, 'to_apply'), times, loops, branches, ())
      elif i.opcode == 'conditional':
        for n, name in enumerate(i.branches):
          yield from run(module.computations[name], times, loops, (*branches, (i.name, n)), ())

  return list(run(module.entry, 1, (), (), ())), unknown


def trip_count(
  module: Module, computation: Computation, loop: Instruction, outer: tuple[_Loop, ...] = ()
) -> int | None:
  """Return the number of turns of a while instruction, or None if the text does not determine it.

  The number is taken from the compiler's annotation, if there is one. Otherwise it is derived from
  the condition, if the condition compares an element of the state with a constant, and if this
  element starts at a constant and changes by a constant in every turn.

  Args:
    module: Module. The program.
    computation: Computation. The computation that contains the loop.
    loop: Instruction. The while instruction.
    outer: tuple of (computation, loop). The loops around it, innermost first. Their states may pass
      constants to this loop.
  """
  if known := _KNOWN.search(loop.attributes):
    return int(known[1])
  condition, body = module.body(loop, 'condition'), module.body(loop, 'body')
  compare = _comparison(module, [(condition, None)], condition.root.name)
  if compare is None:
    return None
  direction, left, right = compare
  moving = [_moves_by(module, body, value) for value in (left, right)]
  if bool(moving[0]) == bool(moving[1]):
    return None
  if moving[1]:
    direction, left, right = _TURNED[direction], right, left
  start = _start(module, computation, loop, left, outer)
  bound = _start(module, computation, loop, right, outer)
  if start is None or bound is None:
    return None
  return _turns(direction, bound - start, moving[0] or moving[1])


def _turns(direction: str, distance: int, step: int) -> int | None:
  """Return how many turns a counter takes to a bound `distance` away, in steps of `step`."""
  if direction == 'EQ':
    return None
  if direction == 'NE':
    return distance // step if distance % step == 0 and distance // step >= 0 else None
  if (direction in ('LT', 'LE')) != (step > 0):
    return None  # the counter moves away from its bound
  distance += {'LE': 1, 'GE': -1}.get(direction, 0)
  return max(0, -(-distance // step))


def _comparison(module: Module, stack: _Stack, name: str) -> tuple[str, _Value, _Value] | None:
  """Return (direction, left, right) of the comparison at a condition's root, or None."""
  i = stack[-1][0][name]
  if i.opcode == 'fusion':
    inner = module.body(i)
    return _comparison(module, [*stack, (inner, i)], inner.root.name)
  if i.opcode in ('bitcast', 'copy'):
    return _comparison(module, stack, i.operands[0])
  if i.opcode != 'compare':
    return None
  left, right = (_value(module, stack, o) for o in i.operands)
  return None if left is None or right is None else (i.attribute('direction'), left, right)


def _value(module: Module, stack: _Stack, name: str) -> _Value | None:
  """Return the scalar that `name` refers to in the innermost computation.

  Return None unless the scalar is an element of the loop's state plus a constant, or a constant.
  """
  where, fusion = stack[-1]
  i = where[name]
  if i.opcode == 'constant':
    text = i.argument.strip('{} ')
    return _Value(None, int(text)) if re.fullmatch(r'-?\d+', text) else None
  if i.opcode == 'get-tuple-element':
    is_state = where[i.operands[0]].opcode == 'parameter' and len(stack) == 1
    return _Value(int(i.attribute('index')), 0) if is_state else None
  if i.opcode == 'parameter' and fusion is not None:
    return _value(module, stack[:-1], fusion.operands[int(i.argument)])
  if i.operation in _SAME_VALUE:
    return _value(module, stack, i.operands[0])
  if i.opcode == 'fusion' and not i.parts:
    inner = module.body(i)
    return _value(module, [*stack, (inner, i)], inner.root.name)
  if i.opcode in ('add', 'subtract'):
    return _sum(i.opcode, *(_value(module, stack, o) for o in i.operands))
  return None


def _sum(opcode: str, a: _Value | None, b: _Value | None) -> _Value | None:
  if a is None or b is None:
    return None
  if opcode == 'subtract':
    return None if b.element is not None else _Value(a.element, a.constant - b.constant)
  if a.element is not None and b.element is not None:
    return None
  return _Value(a.element if a.element is not None else b.element, a.constant + b.constant)


def _after_turn(module: Module, body: Computation, element: int) -> _Value | None:
  """Return the value of a state element after one turn of the loop's body, or None if unknown."""
  if body.root.opcode != 'tuple':
    return None
  return _value(module, [(body, None)], body.root.operands[element])


def _moves_by(module: Module, body: Computation, value: _Value) -> int:
  """Return the change of a value in one turn; 0 if it is constant or can't be predicted."""
  if value.element is None:
    return 0
  after = _after_turn(module, body, value.element)
  return after.constant if after and after.element == value.element else 0


def _start(
  module: Module,
  computation: Computation,
  loop: Instruction,
  value: _Value,
  outer: tuple[_Loop, ...],
) -> int | None:
  """Return the number that a value has when the loop starts, or None if unknown."""
  if value.element is None:
    return value.constant
  state = computation[loop.operands[0]]
  if state.opcode != 'tuple':
    return None
  found = _value(module, [(computation, None)], state.operands[value.element])
  if found is None:
    return None
  if found.element is None:
    return found.constant + value.constant
  # The value comes from the surrounding loop's state. That loop must leave the value unchanged.
  if not outer or _after_turn(module, computation, found.element) != _Value(found.element, 0):
    return None
  (around, enclosing), *rest = outer
  start = _start(module, around, enclosing, found, tuple(rest))
  return None if start is None else start + value.constant
