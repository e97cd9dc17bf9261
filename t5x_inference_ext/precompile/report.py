"""The report of a compilation as text: memory, time by operation, collectives, bounds."""

from collections.abc import Iterator, Sequence
import textwrap

from t5x_inference_ext.precompile.analysis import Answer, Tried
from t5x_inference_ext.precompile.estimate import Estimate
from t5x_inference_ext.precompile.fit import Shortage
from t5x_inference_ext.precompile.kernel_cost import READ_RATE
from t5x_inference_ext.precompile.operations import COLLECTIVE, COPY, RELAYOUT, OperationCost
from t5x_inference_ext.precompile.program import Program
from t5x_inference_ext.precompile.summary import collective_rows, grouped_operations, time_bounds
from t5x_inference_ext.sharding.mesh import mesh_links, mesh_text
from t5x_inference_ext.text_format import binary_bytes, gib, microseconds, milliseconds

LONGEST = 8  # rows of operations in the text; the JSON report has all
_COLUMNS = 120


def report_text(answer: Answer) -> str:
  """Return the report."""
  lines = [*_heading(answer), *_tried(answer)]
  if isinstance(answer.program, Shortage):
    lines += _shortage(answer, answer.program)
  else:
    program, found = answer.compiled
    lines += [
      *_memory(program),
      *_time(answer),
      *_operations(found),
      *_collectives(found),
      *_kernels(found),
      *_remarks(answer),
    ]
  return '\n'.join(lines)


def _heading(answer: Answer) -> Iterator[str]:
  case, slice_ = answer.case, answer.slice
  prefill, decode = case.layouts
  yield from _wrap(f'model:  {case.config}', '        ')
  beside = case.kind.beside.format(prefill=prefill, decode=decode, new_tokens=case.max_new_tokens)
  length = '' if case.kind.one_token else f', T {case.length}'
  yield from _wrap(
    f'phase:  {case.phase} in {case.layout} ({beside}); B {case.batch}, S {case.context}{length}; '
    f'{case.weights} weights, {case.dtype} activations, {case.cache_dtype} cache',
    '        ',
  )
  line = f'slice:  {slice_}, {slice_.chips} chips'
  if isinstance(answer.program, Program):
    mesh = answer.program.mesh
    links = mesh_links(mesh) or {}
    link_rates = ', '.join(f'{axis} {link}' for axis, link in links.items() if mesh.shape[axis] > 1)
    line += f', mesh {mesh_text(mesh)}' + (f' ({link_rates})' if link_rates else '')
    line += f'; compiled in {answer.program.seconds:.1f} s'
  yield line


def _tried(answer: Answer) -> Iterator[str]:
  if not answer.tried:
    return
  results = '; '.join(map(_result, answer.tried))
  chosen = 'has the smallest estimated time' if answer.fits else 'is the nearest to fitting'
  few = any(t.from_few_layers for t in answer.tried)
  yield from _wrap(
    f'layout: none given; {answer.case.layout} {chosen} of {results}'
    + (', extrapolated from a few layers' if few else ''),
    '        ',
  )


def _result(tried: Tried) -> str:
  if tried.seconds is not None:
    return f'{tried.layout} {milliseconds(tried.seconds)}'
  if tried.reason == 'does not fit':
    return f'{tried.layout} (does not fit)'
  return f"{tried.layout} (can't be used here: {tried.reason.partition(':')[0]})"


def _memory(program: Program) -> Iterator[str]:
  m = program.memory
  yield ''
  of = ''
  if m.available:
    fits = m.needed <= m.available
    share = f'{m.needed / m.available:.0%}' if fits else 'above 100%: an error of the count'
    of = f' of {gib(m.available)} GiB on each chip ({share})'
  yield (
    f'fits: {gib(m.needed)}{of}: weights {gib(m.weights)}, cache {gib(m.cache)}, temporaries '
    f'{gib(m.temporaries)}, code and rest {gib(m.other)}'
  )


def _time(answer: Answer) -> Iterator[str]:
  case, (_, found), limits = answer.case, answer.compiled, time_bounds(answer)
  serial, overlapped = found.serial_seconds, found.overlapped_seconds
  yield ''
  if case.phase == 'generate':  # no estimate: the number of steps is known only at run time
    yield (
      f'time: {milliseconds(serial)} for the prefill and one decode step, with nothing overlapped; '
      '--phase=decode gives the time of each step'
    )
    return
  once = ''
  if case.phase == 'slots':
    rest = milliseconds(serial - found.turn_seconds[0])
    serial, overlapped = found.turn_seconds
    once = f'; in addition, each call takes {rest} once'
  time = (
    f'time: {milliseconds(serial)} a {case.kind.unit} with nothing overlapped, '
    f'{milliseconds(overlapped)} with what the schedule overlaps{once}'
  )
  if case.phase == 'admit':  # inserting only moves data, so no bound applies
    yield time
    return
  yield f'{time}; {_between(case.tokens, serial, overlapped, ",.0f")} tokens/s'
  yield from _wrap(_calibrated(answer), '  ')
  for name, bound, what in (
    ('FLOP bound (2N a token, bf16 peak):', limits.flops, ' of the time: the MFU'),
    ('weight-load bound (each read once):', limits.weights, ' of the time'),
    ('weights and cache read once:', limits.memory, ' of the time'),
  ):
    line = f'  {name:36}{milliseconds(bound):>11}, '
    if bound > min(serial, overlapped):
      yield f'{line}above the estimated time: an error of the estimate'
    else:
      yield line + _between(bound, serial, overlapped, '.1%') + what


def _calibrated(answer: Answer) -> str:
  """Return the text of the time corrected by category, or of the reason why there is none."""
  found = answer.compiled[1].calibrated
  if found is None:
    return f'  calibrated: no program was measured on {answer.slice.kind}'
  low, high = (f'{share:+.0%}' for share in found.spread)
  serial, overlapped = map(milliseconds, (found.serial_seconds, found.overlapped_seconds))
  whole = ' for the whole call' if answer.case.phase == 'slots' else ''
  return (
    f'  calibrated by category: {serial}, {overlapped} overlapped{whole}; {low} to {high} of what '
    f'was measured, in {found.source}'
  )


def _between(value: float, serial: float, overlapped: float, form: str) -> str:
  """Return the text of a value divided by each time: one number if both are equal as text."""
  low, high = f'{value / serial:{form}}', f'{value / overlapped:{form}}'
  return low if low == high else f'{low} to {high}'


def _operations(found: Estimate) -> Iterator[str]:
  total = found.serial_seconds
  yield ''
  kinds = ', '.join(
    f'{kind} {milliseconds(seconds)} ({seconds / total:.0%})'
    for kind, seconds in found.by_kind.items()
    if seconds
  )
  yield from _wrap(f'where it goes: {kinds}', '  ')
  yield '  the longest operations: (* not estimated by the compiler: bytes and FLOPs at full rate)'
  for group in grouped_operations(c for c in found.costs if c.kind != COLLECTIVE)[:LONGEST]:
    first, count = group[0], sum(c.count for c in group)
    seconds = sum(c.seconds for c in group)
    yield (
      f'  {milliseconds(seconds):>10} {seconds / total:4.0%}  {first.kind:9} {count:5} x '
      f'{microseconds(seconds / max(count, 1)):>9}{" " if first.is_priced else "*"} '
      f'{_origin(first)}{f" and {len(group) - 1} alike" if len(group) > 1 else ""}'
    )


def _origin(c: OperationCost) -> str:
  """Return where an operation comes from: its name, function and JAX operation."""
  function = f' in {c.functions[0]}' if c.functions and c.functions[0] else ''
  tail = f' ({"/".join(c.op_name.split("/")[-2:])})' if c.op_name else ''
  return f'{c.name}{function}{tail}'[:56]


def _collectives(found: Estimate) -> Iterator[str]:
  rows = collective_rows(found)
  if rows:
    yield (
      '  collectives: over mesh axes, bytes of one on each chip, time at link speed, of which '
      'hidden behind compute'
    )
  for row in rows:
    count, seconds = row['count'], row['seconds']
    yield (
      f'  {milliseconds(seconds):>10} {seconds / found.serial_seconds:4.0%}  {row["kind"]:18} '
      f'{"".join(row["axes"]) or "-":4} {count:5} x {binary_bytes(row["bytes"]):>10} '
      f'{microseconds(seconds / max(count, 1)):>9}, {milliseconds(row["hidden_seconds"])} hidden'
    )


def _kernels(found: Estimate) -> Iterator[str]:
  kernels = [c for c in found.costs if c.kernel]
  if kernels:
    yield f'  kernels: the longer of their schedule and their memory traffic at {READ_RATE:.0%}'
  for group in grouped_operations(kernels):
    kernel, count = group[0].kernel, sum(c.count for c in group)
    assert kernel is not None
    schedule = 'schedule not known: a claim'
    if kernel.schedule_seconds is not None:
      schedule = f'schedule {microseconds(kernel.schedule_seconds)}'
    seconds = sum(c.seconds for c in group)
    yield (
      f'  {milliseconds(seconds):>10} {seconds / found.serial_seconds:4.0%}  {kernel.name} '
      f'{count} x {microseconds(kernel.seconds)}: {schedule}, memory '
      f'{microseconds(kernel.memory_seconds)}'
    )


def _remarks(answer: Answer) -> Iterator[str]:
  _, found = answer.compiled
  moved = sum(c.seconds for c in found.costs if c.kind in (COPY, RELAYOUT))
  yield ''
  yield (
    f'copies and layout changes: {milliseconds(moved)}, {moved / found.serial_seconds:.1%}; '
    f'weights and caches copied to another layout in HBM: '
    f'{len(found.offending_relayouts) or "none"}'
  )
  for copy in found.offending_relayouts:
    yield from _wrap(
      f'  ! {copy.name} writes {", ".join(copy.sources)} again, as {copy.result} '
      f'({binary_bytes(copy.result.bytes)})',
      '    ',
    )
  # The loop of 'slots' has no fixed number of steps; the times above are for one step.
  for loop in found.unknown_loops[answer.case.phase == 'slots' :]:
    yield (
      f'  ! the trip count of loop {loop} is not in the program: it counts once, so the '
      'times above are too short'
    )


def _shortage(answer: Answer, s: Shortage) -> Iterator[str]:
  yield ''
  needed = f'{gib(s.needed)} GiB are needed' if s.needed else 'more is needed than is available'
  rest = f', the rest {gib(s.needed - s.weights - s.cache)}' if s.needed else ''
  yield (
    f'does not fit: {needed} on each chip and {gib(s.available)} GiB are available: weights '
    f'{gib(s.weights)}, cache {gib(s.cache)}{rest}'
  )
  yield from _wrap(f'  {s.message}', '  ')
  yield ''
  if not answer.alternatives:
    yield 'no other layout, smaller batch or larger slice that was tried fits'
  for a in answer.alternatives:
    case, m = a.program.case, a.program.memory
    value = {'layout': case.layout, 'batch': case.batch, 'slice': a.slice}[a.change]
    of = f' of {gib(m.available)}' if m.available else ''
    yield f'would fit: --{a.change}={value}, {gib(m.needed)}{of} GiB (compiled)'


def _wrap(line: str, indent: str) -> Sequence[str]:
  return textwrap.wrap(
    line, _COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
  )
