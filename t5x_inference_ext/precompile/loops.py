"""How often each instruction of a compiled program runs: loops multiply by their trip counts."""

from collections.abc import Iterator
import dataclasses
import re

from t5x_inference_ext.precompile.hlo import Computation, Instruction, Module

_KNOWN = re.compile(r'"known_trip_count":\{"n":"?(\d+)"?\}')
_SAME_VALUE = ('copy', 'bitcast', 'reshape', 'convert', 'broadcast', 'copy-done', 'bitcast-convert')
_TURNED = {'LT': 'GT', 'GT': 'LT', 'LE': 'GE', 'GE': 'LE', 'NE': 'NE', 'EQ': 'EQ'}


@dataclasses.dataclass(frozen=True)
class Executed:
  """An instruction and how often one run of the program executes it.

  Attributes:
    times: a loop of unknown length counts once.
    loops: the while instructions around it, the outermost first.
    branches: (conditional, branch) around it: of each conditional one branch runs.
  """

  instruction: Instruction
  computation: Computation
  times: int
  loops: tuple[str, ...]
  branches: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class _Value:
  """A scalar: an element of the loop's state, or nothing (None), plus a constant."""

  element: int | None
  constant: int


def executed(module: Module) -> tuple[list[Executed], list[str]]:
  """Every instruction that runs by itself (not those inside fusions), in order; and the loops of unknown length."""
  unknown = []

  def run(computation, times, loops, branches, outer) -> Iterator[Executed]:
    for i in computation.instructions:
      yield Executed(i, computation, times, loops, branches)
      if i.opcode == 'while':
        trips = trip_count(module, computation, i, outer)
        if trips is None and i.name not in unknown:
          unknown.append(i.name)
        here = ((computation, i), *outer)
        for role in ('condition', 'body'):
          yield from run(
            module.called(i, role),
            times * (1 if trips is None else trips),
            (*loops, i.name),
            branches,
            here,
          )
      elif i.opcode == 'call':
        yield from run(module.called(i, 'to_apply'), times, loops, branches, ())
      elif i.opcode == 'conditional':
        for n, name in enumerate(name for role, name in i.called if role == 'branch'):
          yield from run(module.computations[name], times, loops, (*branches, (i.name, n)), ())

  return list(run(module.entry, 1, (), (), ())), unknown


def trip_count(
  module: Module,
  computation: Computation,
  loop: Instruction,
  outer: tuple[tuple[Computation, Instruction], ...] = (),
) -> int | None:
  """How often a while instruction turns, or None where the text does not tell.

  As the compiler noted it, else from the condition: it compares one element of the state, which starts at a constant
  and which the body moves by a constant, with another constant.

  Args:
    computation: where the loop stands.
    outer: the loops around it with their computations, the innermost first: constants may come in through their state.
  """
  if known := _KNOWN.search(loop.attributes):
    return int(known[1])
  condition, body = module.called(loop, 'condition'), module.called(loop, 'body')
  compare = _comparison(module, [(condition, None)], condition.root.name)
  if compare is None:
    return None
  direction, left, right = compare
  if left is None or right is None:
    return None
  counters = [v for v in (left, right) if v.element is not None and _step(module, body, v.element)]
  if len(counters) != 1:
    return None
  counter = counters[0]
  if counter is right:
    direction, left, right = _TURNED[direction], right, left
  step = _step(module, body, counter.element)
  bound = _start(module, computation, loop, right, outer)
  start = _start(module, computation, loop, counter, outer)
  if bound is None or start is None:
    return None
  distance = bound - start
  if direction in ('LE', 'GE'):
    distance += 1 if direction == 'LE' else -1
  if direction == 'EQ' or (direction in ('LT', 'LE')) != (step > 0) and direction != 'NE':
    return None
  if direction == 'NE' and (distance % step or distance // step < 0):
    return None
  return max(0, -(-distance // step))


def _comparison(module, stack, name):
  """(direction, left, right) of a condition's root, or None."""
  i = stack[-1][0][name]
  if i.opcode == 'fusion':
    inner = module.called(i)
    return _comparison(module, [*stack, (inner, i)], inner.root.name)
  if i.opcode in ('bitcast', 'copy'):
    return _comparison(module, stack, i.operands[0])
  if i.opcode != 'compare':
    return None
  return i.attribute('direction'), *(_value(module, stack, o) for o in i.operands)


def _value(module, stack, name) -> _Value | None:
  """A scalar's value in the innermost computation of the stack, or None where it is no element and no constant.

  Args:
    stack: [(computation, the fusion of the computation before it that calls it)], the innermost last. The parameter of
      the outermost is the loop's state.
  """
  where, fusion = stack[-1]
  i = where[name]
  if i.opcode == 'constant':
    text = i.argument.strip('{} ')
    return _Value(None, int(text)) if re.fullmatch(r'-?\d+', text) else None
  if i.opcode == 'get-tuple-element':
    inner = where[i.operands[0]]
    return (
      _Value(int(i.attribute('index')), 0)
      if inner.opcode == 'parameter' and len(stack) == 1
      else None
    )
  if i.opcode == 'parameter' and len(stack) > 1:
    return _value(module, stack[:-1], fusion.operands[int(i.argument)])
  if i.opcode in _SAME_VALUE:
    return _value(module, stack, i.operands[0])
  if i.opcode == 'copy-start':
    return _value(module, stack, i.operands[0])
  if i.opcode == 'fusion' and not i.parts:
    inner = module.called(i)
    return _value(module, [*stack, (inner, i)], inner.root.name)
  if i.opcode in ('add', 'subtract'):
    a, b = (_value(module, stack, o) for o in i.operands)
    if a is None or b is None or (a.element is not None and b.element is not None):
      return None
    if i.opcode == 'subtract':
      return None if b.element is not None else _Value(a.element, a.constant - b.constant)
    return _Value(a.element if a.element is not None else b.element, a.constant + b.constant)
  return None


def _step(module, body, element) -> int:
  """By how much a turn of the body moves an element of the state: 0 for one it leaves alone or moves unpredictably."""
  if body.root.opcode != 'tuple':
    return 0
  value = _value(module, [(body, None)], body.root.operands[element])
  return value.constant if value and value.element == element else 0


def _start(module, computation, loop, value, outer) -> int | None:
  """The number that an element plus a constant has when the loop starts."""
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
  if not outer or _moves(module, computation, found.element):
    return None
  (around, enclosing), *rest = outer
  start = _start(module, around, enclosing, found, tuple(rest))
  return None if start is None else start + value.constant


def _moves(module, body, element) -> bool:
  """Whether a loop's body gives an element of its state another value."""
  if body.root.opcode != 'tuple':
    return True
  value = _value(module, [(body, None)], body.root.operands[element])
  return value != _Value(element, 0)
