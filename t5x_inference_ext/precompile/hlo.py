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
    name: str. Unique in its computation.
    opcode: str. Such as 'fusion' or 'copy-start'.
    shapes: tuple of ArrayShape. The arrays of the result; those of nested tuples in one row.
    parts: tuple of int. How many arrays each element of a result tuple has; () for an array.
    operands: tuple of str. Names of instructions of the same computation.
    argument: str. The text between the parentheses: a parameter's number, a constant's value.
    called: tuple of (role, computation name). Roles are body, condition, calls, to_apply, branch,
      and for a custom call 'custom'.
    attributes: str. The text after the operands.
    cycles: int or None. The compiler's estimate.
    op_name: str. The name of the JAX operation that it comes from, or ''.
    frame: int. The stack frame in the user's program (Module.functions), or 0.
    is_root: bool. Whether its result is that of the computation.
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
    """'start', 'update' or 'done' of an asynchronous operation, else ''."""
    head, _, tail = self.opcode.rpartition('-')
    return tail if head and tail in ('start', 'update', 'done') else ''

  @property
  def operation(self) -> str:
    """The opcode without its phase: 'copy' for copy-start."""
    return self.opcode.removesuffix(f'-{self.phase}') if self.phase else self.opcode

  @property
  def results(self) -> tuple[ArrayShape, ...]:
    """The arrays that come out, without operands and contexts that an async start holds."""
    if self.phase != 'start':
      return self.shapes
    return self.element(0 if self.opcode == 'copy-start' else min(1, len(self.parts) - 1))

  def call(self, role: str) -> str | None:
    """Return the name of the computation that is called in a role, or None."""
    return next((name for r, name in self.called if r == role), None)

  @property
  def branches(self) -> tuple[str, ...]:
    """Names of the computations of which a conditional runs one."""
    return tuple(name for role, name in self.called if role == 'branch')

  def element(self, index: int) -> tuple[ArrayShape, ...]:
    """Return the arrays of one element of the result tuple."""
    first = sum(self.parts[:index])
    return self.shapes[first : first + self.parts[index]]

  def attribute(self, name: str) -> str:
    """Return the text of `name=...`, a bare word or the inside of braces; '' if there is none."""
    found = re.search(rf'(?:^|[ ,]){name}=([^ ,]*)', self.attributes)
    if not found:
      return ''
    rest = self.attributes[found.start(1) :]
    return rest[1 : closing_bracket(rest, 0) - 1] if rest.startswith('{') else found[1]

  def numbers(self, name: str) -> list[int]:
    """Return the integers of an attribute such as `dimensions={0,2}`; [] where there is none."""
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
    """The instructions that give the results: the root, or the elements of a root tuple."""
    return self.operands(self.root) if self.root.opcode == 'tuple' else [self.root]

  @functools.cached_property
  def parameters(self) -> tuple[Instruction, ...]:
    """The parameters by their number."""
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
    entry: Computation. The one that the program starts with.
    partitions: int. The number of devices that run it together.
    frames: dict. Stack frame -> (function, the calling frame or 0).
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
    """Return the computation that an instruction must call: a fusion's, a loop's.

    Raises:
      HloError: the instruction calls none in this role.
    """
    found = self.called(instruction, role)
    if found is None:
      raise HloError(f'{instruction.opcode} {instruction.name} names no computation in {role}=')
    return found

  def functions(self, instruction: Instruction) -> tuple[str, ...]:
    """Return the functions of the user's program around an instruction, the innermost first."""
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
    """Return the computation that an instruction stands in, which may be `likely`."""
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
  raise HloError(f'a bracket that never closes: {text[start : start + 200]}')
