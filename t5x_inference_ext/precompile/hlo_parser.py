"""Parser for the text of a compiled program, `compiled.as_text()`.

A scheduled module lists each computation's instructions in the order in which they run. The TPU
compiler annotates fusions, copies and convolutions with the cycles that it expects
(`estimated_cycles`), and every array with its layout: dimensions from minor to major, tiles, and
memory space.
"""

import re

from t5x_inference_ext.precompile.hlo import Computation, Instruction, Module, closing_bracket
from t5x_inference_ext.precompile.shapes import HloError, parse_result

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
_KERNEL_METADATA = re.compile(r'kernel_metadata=\{[^}]*\}')  # JSON on several lines
_FRAME = re.compile(r'\bstack_frame_id=(\d+)')
_TABLE_ROW = re.compile(r'^(\d+) (?:"(.*)"|\{(.*)\})$')

# A table in a module's header: number -> text, or number -> fields.
_Tables = dict[str, dict[int, str | dict[str, str]]]


def parse_hlo(text: str) -> Module:
  """Parse the text of a compiled program.

  Args:
    text: str. `compiled.as_text()`.

  Raises:
    HloError: There is no entry computation, or a line is not an instruction.
  """
  computations: dict[str, Computation] = {}
  name, entry, table = None, None, ''
  lines: list[str] = []
  tables: _Tables = {}
  for line in _KERNEL_METADATA.sub(_on_one_line, text).splitlines():
    if name is not None:
      if line.startswith('}'):
        computations[name] = Computation(name, tuple(map(_instruction, lines)))
        name = None
      elif line.strip():
        lines.append(line)
    elif match := _COMPUTATION.match(line):
      name, lines, table = match[2], [], ''
      entry = name if match[1] else entry
    elif match := _TABLE_ROW.match(line):
      row = match[2] if match[2] is not None else dict(re.findall(r'(\w+)=(\d+)', match[3]))
      tables.setdefault(table, {})[int(match[1])] = row
    else:
      table = line.strip()
  if entry is None:
    raise HloError(
      'this is not a compiled program: it has no ENTRY computation (pass compiled.as_text())'
    )
  partitions = re.search(r'\bnum_partitions=(\d+)', text)
  frames = _frames(tables)
  return Module(computations, computations[entry], int(partitions[1]) if partitions else 1, frames)


def _on_one_line(metadata: re.Match[str]) -> str:
  return ''.join(metadata[0].splitlines())


def _frames(tables: _Tables) -> dict[int, tuple[str, int]]:
  """Return number of a stack frame -> (function, number of the calling frame or 0)."""

  def field(table: str, number: int, name: str, default: int = 0) -> int:
    row = tables.get(table, {}).get(number)
    return int(row.get(name, default)) if isinstance(row, dict) else default

  found = {}
  for number in tables.get('StackFrames', {}):
    location = field('StackFrames', number, 'file_location_id')
    function = field('FileLocations', location, 'function_name_id')
    name = tables.get('FunctionNames', {}).get(function, '')
    # The table stores the caller's number plus 1; 0 means that there is no caller.
    found[number] = (str(name), field('StackFrames', number, 'parent_frame_id', 1) - 1)
  return found


def _instruction(line: str) -> Instruction:
  head = _INSTRUCTION.match(line)
  if not head:
    raise HloError(f'not an instruction of a compiled program: {line.strip()[:200]}')
  rest = line[head.end() :]
  end = closing_bracket(rest, 0) if rest.startswith('(') else rest.index(' ')
  result, rest = rest[:end], rest[end:].lstrip()
  opcode = rest.partition('(')[0]
  end = closing_bracket(rest, len(opcode))
  argument, attributes = rest[len(opcode) + 1 : end - 1], rest[end:].lstrip(', ')
  shapes, parts = parse_result(result)
  constant = opcode in ('constant', 'parameter')
  cycles, op_name, frame = (p.search(attributes) for p in (_CYCLES, _OP_NAME, _FRAME))
  return Instruction(
    name=head[2],
    opcode=opcode,
    shapes=shapes,
    parts=parts,
    operands=() if constant else tuple(_NAME.findall(argument)),
    argument=argument,
    called=_calls(attributes),
    attributes=attributes,
    cycles=int(cycles[1]) if cycles and int(cycles[1]) < _UNKNOWN_CYCLES else None,
    op_name=op_name[1].replace("\\'", "'") if op_name else '',
    frame=int(frame[1]) if frame else 0,
    is_root=bool(head[1]),
  )


def _calls(attributes: str) -> tuple[tuple[str, str], ...]:
  """Return (role, computation name) for every computation that an instruction names."""
  called = [
    ('branch' if role.endswith('_computation') else role, name)
    for role, name in _CALLED.findall(attributes)
  ]
  if branches := _BRANCHES.search(attributes):
    called += [('branch', name) for name in re.findall(r'[\w.-]+', branches[1])]
  called += [('custom', name) for name in _CALLED_BY_CUSTOM_CALL.findall(attributes)]
  return tuple(called)
