"""The text of a compiled program, `compiled.as_text()`: its computations and instructions in the order of the schedule.

A scheduled module lists each computation's instructions as they run. The TPU compiler adds to fusions, copies and
convolutions the cycles that it expects (`estimated_cycles`), and to every array its layout: the dimensions from minor
to major, the tiles, and the memory it lives in (0 is HBM, 5 the host's, others are on chip).
"""

from collections.abc import Iterator
import dataclasses
import functools
import re

from t5x_inference_ext.precompile.shapes import ArrayShape, HloError, parse_result

_NAME = re.compile(r'%([\w.-]+)')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{\s*$')
_INSTRUCTION = re.compile(r'^\s*(ROOT )?%?([\w.-]+) = ')
_CALLED = re.compile(
  r'\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)'
)
_BRANCHES = re.compile(r'\bbranch_computations=\{([^}]*)\}')
_CALLED_BY_CUSTOM_CALL = re.compile(r'\bcalled_computations=\{%?([\w.-]+)\}')
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_UNKNOWN_CYCLES = 2**63 - 1
_OP_NAME = re.compile(r'metadata=\{[^}]*?op_name="((?:[^"\\]|\\.)*)"')
_FRAME = re.compile(r'\bstack_frame_id=(\d+)')
_TABLE_ROW = re.compile(r'^(\d+) (?:"(.*)"|\{(.*)\})$')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    shapes: the result's arrays; those of nested tuples in one row.
    parts: of a tuple, how many arrays each of its elements has; () of an array.
    operands: names of instructions of the same computation.
    argument: the text between the parentheses, for what has no operands: a parameter's number, a constant's value.
    called: (role, computation), role one of body, condition, calls, to_apply, branch; of a custom call 'custom'.
    attributes: the text after the operands.
    cycles: the compiler's estimate, or None.
    frame: where in the user's program it comes from (Module.functions), or 0.
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
    """The opcode without its phase: 'copy' of copy-start."""
    return self.opcode.removesuffix(f'-{self.phase}') if self.phase else self.opcode

  @property
  def results(self) -> tuple[ArrayShape, ...]:
    """The arrays that come out: of an asynchronous start, without the operands and contexts that it holds."""
    if self.phase != 'start':
      return self.shapes
    return self.element(0 if self.opcode == 'copy-start' else min(1, len(self.parts) - 1))

  def call(self, role: str) -> str | None:
    return next((name for r, name in self.called if r == role), None)

  def element(self, index: int) -> tuple[ArrayShape, ...]:
    """The arrays of a tuple's element."""
    first = sum(self.parts[:index])
    return self.shapes[first : first + self.parts[index]]

  def attribute(self, name: str) -> str | None:
    """The text of `name=...`, a bare word or what stands in its outer braces; None where there is none."""
    found = re.search(rf'(?:^|[ ,]){name}=', self.attributes)
    if not found:
      return None
    rest = self.attributes[found.end() :]
    return rest[1 : _closing(rest, 0) - 1] if rest.startswith('{') else re.match(r'[^ ,]*', rest)[0]


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions in the order in which they run."""

  name: str
  instructions: tuple[Instruction, ...]

  @functools.cached_property
  def by_name(self) -> dict[str, Instruction]:
    return {i.name: i for i in self.instructions}

  @functools.cached_property
  def position(self) -> dict[str, int]:
    return {i.name: n for n, i in enumerate(self.instructions)}

  @functools.cached_property
  def users(self) -> dict[str, tuple[Instruction, ...]]:
    """Name -> the instructions that read it."""
    users = {i.name: [] for i in self.instructions}
    for instruction in self.instructions:
      for operand in dict.fromkeys(instruction.operands):
        users[operand].append(instruction)
    return {name: tuple(found) for name, found in users.items()}

  @property
  def root(self) -> Instruction:
    return next((i for i in self.instructions if i.is_root), self.instructions[-1])

  @functools.cached_property
  def parameters(self) -> tuple[Instruction, ...]:
    """In the order of their numbers."""
    return tuple(
      sorted(
        (i for i in self.instructions if i.opcode == 'parameter'), key=lambda i: int(i.argument)
      )
    )

  def __getitem__(self, name: str) -> Instruction:
    return self.by_name[name]

  def operands(self, instruction: Instruction) -> list[Instruction]:
    return [self.by_name[o] for o in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program.

  Attributes:
    partitions: the devices that run it together.
    frames: stack frame -> (function, file, the frame that called it, or 0).
  """

  computations: dict[str, Computation]
  entry: Computation
  partitions: int
  frames: dict[int, tuple[str, str, int]]

  def called(self, instruction: Instruction, role: str = 'calls') -> Computation | None:
    name = instruction.call(role)
    return self.computations[name] if name else None

  def functions(self, instruction: Instruction) -> tuple[str, ...]:
    """The functions of the user's program that the instruction comes from, the innermost first."""
    found, frame = [], instruction.frame
    while frame in self.frames and len(found) < 100:
      function, _, frame = self.frames[frame]
      found.append(function)
    return tuple(found)

  def inside(self, instruction: Instruction) -> Iterator[Instruction]:
    """The instruction, and those of the computations that it runs as one: a fusion's, an asynchronous operation's."""
    yield instruction
    if body := self.called(instruction):
      for inner in body.instructions:
        yield from self.inside(inner)


def parse_hlo(text: str) -> Module:
  """Reads compiled.as_text().

  Raises:
    HloError: no entry computation, or a line that is no instruction.
  """
  computations, name, lines, entry, tables, table = {}, None, [], None, {}, None
  for line in text.splitlines():
    if name is not None:
      if line.startswith('}'):
        computations[name] = Computation(name, tuple(_instruction(each) for each in lines))
        name = None
      elif line.strip():
        lines.append(line)
    elif match := _COMPUTATION.match(line):
      name, lines, table = match[2], [], None
      entry = name if match[1] else entry
    elif match := _TABLE_ROW.match(line):
      tables.setdefault(table, {})[int(match[1])] = (
        match[2] if match[2] is not None else dict(re.findall(r'(\w+)=(\d+)', match[3]))
      )
    else:
      table = line.strip() or None
  if entry is None:
    raise HloError(
      'this is no compiled program: it has no ENTRY computation (pass compiled.as_text())'
    )
  partitions = re.search(r'\bnum_partitions=(\d+)', text)
  return Module(
    computations, computations[entry], int(partitions[1]) if partitions else 1, _frames(tables)
  )


def _frames(tables: dict[str, dict]) -> dict[int, tuple[str, str, int]]:
  names, files = tables.get('FunctionNames', {}), tables.get('FileNames', {})
  locations, found = tables.get('FileLocations', {}), {}
  for number, row in tables.get('StackFrames', {}).items():
    place = locations.get(int(row.get('file_location_id', 0)), {})
    # The table writes the caller's number plus 1, so that the outermost frame has a number to write.
    found[number] = (
      names.get(int(place.get('function_name_id', 0)), ''),
      files.get(int(place.get('file_name_id', 0)), ''),
      int(row.get('parent_frame_id', 1)) - 1,
    )
  return found


def _instruction(line: str) -> Instruction:
  head = _INSTRUCTION.match(line)
  if not head:
    raise HloError(f'not an instruction of a compiled program: {line.strip()[:200]}')
  rest = line[head.end() :]
  end = _closing(rest, 0) if rest.startswith('(') else rest.index(' ')
  result, rest = rest[:end], rest[end:].lstrip()
  opcode, _, _ = rest.partition('(')
  end = _closing(rest, len(opcode))
  argument, attributes = rest[len(opcode) + 1 : end - 1], rest[end:].lstrip(', ')
  shapes, parts = parse_result(result)
  constant = opcode in ('constant', 'parameter')
  called = [(role, name) for role, name in _CALLED.findall(attributes)]
  if branches := _BRANCHES.search(attributes):
    called += [('branch', name) for name in re.findall(r'[\w.-]+', branches[1])]
  called += [('custom', name) for name in _CALLED_BY_CUSTOM_CALL.findall(attributes)]
  called = [('branch' if role.endswith('_computation') else role, name) for role, name in called]
  cycles, op_name, frame = (p.search(attributes) for p in (_CYCLES, _OP_NAME, _FRAME))
  return Instruction(
    name=head[2],
    opcode=opcode,
    shapes=shapes,
    parts=parts,
    operands=() if constant else tuple(_NAME.findall(argument)),
    argument=argument,
    called=tuple(called),
    attributes=attributes,
    cycles=int(cycles[1]) if cycles and int(cycles[1]) < _UNKNOWN_CYCLES else None,
    op_name=op_name[1].replace("\\'", "'") if op_name else '',
    frame=int(frame[1]) if frame else 0,
    is_root=bool(head[1]),
  )


def _closing(text: str, start: int) -> int:
  """The place after the bracket that closes the one at `start`."""
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
