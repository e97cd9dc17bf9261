"""A compiled program: computations, and their instructions in the order of the schedule."""

from collections.abc import Iterator
import dataclasses
import functools
import re

from t5x_inference_ext.precompile.shapes import ArrayShape, HloError


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: str. Name, unique within the computation.
    opcode: str. The opcode, such as 'fusion' or 'copy-start'.
    shapes: tuple of ArrayShape. The arrays of the result. Nested tuples are flattened.
    parts: tuple of int. Number of arrays in each element of a result tuple; () for an array.
    operands: tuple of str. Names of instructions of the same computation.
    argument: str. Text between the parentheses, such as a parameter's number or a constant's value.
    called: tuple of (role, computation name). Roles are 'body', 'condition', 'calls', 'to_apply',
      'branch' and, for a custom call, 'custom'.
    attributes: str. Text after the operands.
    cycles: int or None. The cycles that the compiler estimates.
    op_name: str. Name of the JAX operation that the instruction comes from, or ''.
    frame: int. Number of the stack frame in the user's program (Module.functions), or 0.
    is_root: bool. Whether the instruction's result is the computation's result.
  """

  name: str
  opcode: str
  shapes: tuple[ArrayShape, ...]
  parts: tuple[int, ...]
  operands: tuple[str, ...]
  argument: str
  called: tuple[tuple[str, str], ...]
  attributes: str
  cycles: int | None
  op_name: str
  frame: int
  is_root: bool

  @property
  def bytes(self) -> int:
    return sum(s.bytes for s in self.shapes)

  @property
  def phase(self) -> str:
    """'start', 'update' or 'done' for an asynchronous operation, else ''."""
    head, _, tail = self.opcode.rpartition('-')
    return tail if head and tail in ('start', 'update', 'done') else ''

  @property
  def operation(self) -> str:
    """The opcode without its phase, such as 'copy' for copy-start."""
    return self.opcode.removesuffix(f'-{self.phase}') if self.phase else self.opcode

  @property
  def results(self) -> tuple[ArrayShape, ...]:
    """The result arrays, without the operands and contexts that an async start also returns."""
    if self.phase != 'start':
      return self.shapes
    return self.element(0 if self.opcode == 'copy-start' else min(1, len(self.parts) - 1))

  def call(self, role: str) -> str | None:
    """Return the name of the computation called in a role, or None."""
    return next((name for r, name in self.called if r == role), None)

  @property
  def branches(self) -> tuple[str, ...]:
    """Names of a conditional's branches, which are computations."""
    return tuple(name for role, name in self.called if role == 'branch')

  def element(self, index: int) -> tuple[ArrayShape, ...]:
    """Return the arrays in one element of the result tuple."""
    first = sum(self.parts[:index])
    return self.shapes[first : first + self.parts[index]]

  def attribute(self, name: str) -> str:
    """Return the value of attribute `name`, a bare word or the inside of braces; '' if missing."""
    found = re.search(rf'(?:^|[ ,]){name}=([^ ,]*)', self.attributes)
    if not found:
      return ''
    rest = self.attributes[found.start(1) :]
    return rest[1 : closing_bracket(rest, 0) - 1] if rest.startswith('{') else found[1]

  def numbers(self, name: str) -> list[int]:
    """Return the integers of an attribute such as `dimensions={0,2}`; [] if it is missing."""
    return [int(number) for number in self.attribute(name).split(',') if number]


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions in the order in which they run."""

  name: str
  instructions: tuple[Instruction, ...]

  @functools.cached_property
  def by_name(self) -> dict[str, Instruction]:
    return {i.name: i for i in self.instructions}

  @functools.cached_property
  def users(self) -> dict[str, tuple[Instruction, ...]]:
    """Name of an instruction -> the instructions that read its result."""
    users: dict[str, list[Instruction]] = {i.name: [] for i in self.instructions}
    for instruction in self.instructions:
      for operand in dict.fromkeys(instruction.operands):
        users[operand].append(instruction)
    return {name: tuple(found) for name, found in users.items()}

  @property
  def root(self) -> Instruction:
    return next((i for i in self.instructions if i.is_root), self.instructions[-1])

  @property
  def roots(self) -> list[Instruction]:
    """The instructions that produce the results: the root, or the elements of a root tuple."""
    return self.operands(self.root) if self.root.opcode == 'tuple' else [self.root]

  @functools.cached_property
  def parameters(self) -> tuple[Instruction, ...]:
    """The parameters in order of their number."""
    found = (i for i in self.instructions if i.opcode == 'parameter')
    return tuple(sorted(found, key=lambda i: int(i.argument)))

  def __getitem__(self, name: str) -> Instruction:
    return self.by_name[name]

  def operands(self, instruction: Instruction) -> list[Instruction]:
    return [self.by_name[o] for o in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program.

  Attributes:
    computations: dict. Name -> computation.
    entry: Computation. The computation that the program starts with.
    partitions: int. Number of devices that run the program together.
    frames: dict. Number of a stack frame -> (function, number of the calling frame or 0).
  """

  computations: dict[str, Computation]
  entry: Computation
  partitions: int
  frames: dict[int, tuple[str, int]]

  def called(self, instruction: Instruction, role: str = 'calls') -> Computation | None:
    """Return the computation that an instruction calls in a role, or None."""
    name = instruction.call(role)
    return self.computations[name] if name else None

  def body(self, instruction: Instruction, role: str = 'calls') -> Computation:
    """Return the computation that an instruction calls; one must exist, as for a fusion or loop.

    Raises:
      HloError: The instruction calls no computation in this role.
    """
    found = self.called(instruction, role)
    if found is None:
      raise HloError(f'{instruction.opcode} {instruction.name} names no computation in {role}=')
    return found

  def functions(self, instruction: Instruction) -> tuple[str, ...]:
    """Return the user program's functions around an instruction, innermost first."""
    found: list[str] = []
    frame = instruction.frame
    while frame in self.frames and len(found) < 100:
      function, frame = self.frames[frame]
      found.append(function)
    return tuple(found)

  def inside(self, instruction: Instruction) -> Iterator[Instruction]:
    """Yield an instruction, and those inside it if it is a fusion or an async operation."""
    yield instruction
    if body := self.called(instruction):
      for inner in body.instructions:
        yield from self.inside(inner)

  def home(self, instruction: Instruction, likely: Computation) -> Computation:
    """Return the computation that contains an instruction; search `likely` first."""
    candidates = (likely, *self.computations.values())
    return next(c for c in candidates if c.by_name.get(instruction.name) is instruction)


def closing_bracket(text: str, start: int) -> int:
  """Return the position after the bracket that closes the one at `start`."""
  depth = 0
  quoted = False
  for n in range(start, len(text)):
    letter = text[n]
    if letter == '"' and text[n - 1] != '\\':
      quoted = not quoted
    elif not quoted:
      depth += (letter in '([{') - (letter in ')]}')
      if not depth:
        return n + 1
  raise HloError(f'a bracket is not closed: {text[start : start + 200]}')
