"""What came out of a compilation, for people and as JSON: memory, time by operation, collectives, and the bounds."""

import collections
from collections.abc import Iterable, Sequence
import dataclasses
import textwrap
from typing import Any

from t5x_inference_ext import hardware
from t5x_inference_ext.precompile.analysis import Answer
from t5x_inference_ext.precompile.estimate import (
  COLLECTIVE,
  COPY,
  MATMUL,
  RELAYOUT,
  Estimate,
  OperationCost,
)
from t5x_inference_ext.precompile.fit import Shortage
from t5x_inference_ext.precompile.program import Program
from t5x_inference_ext.sharding.explain_text import bytes_text
from t5x_inference_ext.sharding.mesh import mesh_links, mesh_text

LONGEST = 8  # rows of operations in the text; JSON has all


@dataclasses.dataclass(frozen=True)
class TimeBounds:
  """What no program on this slice can be faster than, in seconds.

  Attributes:
    flops: 2 N for each token (N parameters), at the chips' bf16 peak.
    weights: each chip reads its weights once, at its memory's bandwidth.
    memory: its weights and its cache.
  """

  flops: float
  weights: float
  memory: float


def bounds(answer: Answer) -> TimeBounds:
  """Of a program that fits."""
  chip, program, case = hardware.chip(answer.slice.kind), answer.program, answer.case
  work = 2 * case.config.num_params * case.tokens / answer.slice.chips
  weights = program.memory.weights / chip.hbm_bandwidth
  return TimeBounds(
    work / chip.bf16_flops, weights, weights + program.memory.cache / chip.hbm_bandwidth
  )


def report_text(answer: Answer) -> str:
  """The report, one screen."""
  lines = [*_heading(answer), *_tried(answer)]
  if answer.fits:
    lines += [
      *_memory(answer.program),
      *_time(answer),
      *_operations(answer.estimate),
      *_collectives(answer.estimate),
      *_remarks(answer),
    ]
  else:
    lines += _shortage(answer)
  return '\n'.join(lines)


def _heading(answer: Answer) -> Iterable[str]:
  case, slice_ = answer.case, answer.slice
  prefill, decode = case.layouts
  yield from _wrap(f'model:  {case.config}', '        ')
  what = f'B {case.batch}, S {case.context}' + (
    f', T {case.length}' if case.phase not in ('decode', 'slots') else ''
  )
  other = {
    'prefill': f'cache for decode in {decode}',
    'decode': f'weights shared with prefill in {prefill}',
    'generate': f'decode in {decode}, {case.max_new_tokens} new tokens',
    'extend': 'a chunk, on a cache in the same',
    'slots': f'slot refill, prompts in {prefill}',
    'admit': f'a prompt from {prefill} into its slot',
  }[case.phase]
  yield from _wrap(
    f'phase:  {case.phase} in {case.layout} ({other}); {what}; {case.weights} weights, {case.dtype} '
    f'activations, {case.cache_dtype} cache',
    '        ',
  )
  mesh = ''
  if answer.fits:
    shape = answer.program.mesh.shape
    links = ', '.join(
      f'{a} {link}' for a, link in (mesh_links(answer.program.mesh) or {}).items() if shape[a] > 1
    )
    mesh = f', mesh {mesh_text(answer.program.mesh)}' + (f' ({links})' if links else '')
  compiled = f'; compiled in {answer.program.seconds:.1f} s' if answer.fits else ''
  yield f'slice:  {slice_}, {slice_.chips} chips{mesh}{compiled}'


def _tried(answer: Answer) -> Iterable[str]:
  if not answer.tried:
    return
  results = [
    f'{t.layout} {_ms(t.seconds)}' if t.seconds is not None else f'{t.layout} {_reason(t.reason)}'
    for t in answer.tried
  ]
  chosen = 'least estimated time' if answer.fits else 'nearest to fitting'
  loops = (
    ', as loops over the layers'
    if any(t.stacked for t in answer.tried) and not answer.case.stacked
    else ''
  )
  yield from _wrap(
    f'layout: none given; {answer.case.layout} has the {chosen} of {"; ".join(results)}{loops}',
    '        ',
  )


def _reason(reason: str) -> str:
  return reason if reason == 'does not fit' else f"can't be used here ({reason.partition(':')[0]})"


def _memory(program: Program) -> Iterable[str]:
  m = program.memory
  yield ''
  yield (
    f'fits: {_gib(m.needed)} of {_gib(m.available)} GiB on each chip ({m.needed / m.available:.0%}): '
    f'weights {_gib(m.weights)}, cache {_gib(m.cache)}, temporaries {_gib(m.temporaries)}, code and rest '
    f'{_gib(m.other)}'
  )


def _time(answer: Answer) -> Iterable[str]:
  found, limits = answer.estimate, bounds(answer)
  serial, overlapped = found.serial_seconds, found.overlapped_seconds
  if answer.case.phase == 'generate':  # of how many steps, only the run will tell
    yield ''
    yield (
      f'time: {_ms(serial)} for the prefill and one decode step, with nothing overlapped; --phase=decode tells what '
      'each step takes'
    )
    return
  once = ''
  if answer.case.phase == 'slots':
    once = f', and {_ms(serial - found.turn_seconds[0])} once for all steps between two looks at what came out'
    serial, overlapped = found.turn_seconds
  unit = {'prefill': 'prefill', 'extend': 'chunk', 'admit': 'prompt'}.get(answer.case.phase, 'step')

  def between(form, value):  # of both estimates, once where they are the same
    low, high = form(value(serial)), form(value(overlapped))
    return low if low == high else f'{low} to {high}'

  def share(seconds):
    return between('{:.1%}'.format, lambda time: seconds / time)

  yield ''
  time = f'time: {_ms(serial)} a {unit} with nothing overlapped, {_ms(overlapped)} with what the schedule overlaps{once}'
  if answer.case.phase == 'admit':  # moves what there is
    yield time
    return
  yield f'{time}; {between("{:,.0f}".format, lambda time: answer.case.tokens / time)} tokens/s'
  yield f'  FLOP bound (2N a token, bf16 peak):  {_ms(limits.flops):>10}, {share(limits.flops)} of the time: the MFU'
  yield f'  weight-load bound (each read once): {_ms(limits.weights):>10}, {share(limits.weights)}'
  yield f'  weights and cache read once:        {_ms(limits.memory):>10}, {share(limits.memory)}'


def _operations(found: Estimate) -> Iterable[str]:
  total = found.serial_seconds
  yield ''
  kinds = ', '.join(
    f'{kind} {_ms(seconds)} ({seconds / total:.0%})'
    for kind, seconds in found.by_kind.items()
    if seconds
  )
  yield from _wrap(f'where it goes: {kinds}', '  ')
  yield '  the longest operations: (* not estimated by the compiler: its bytes and FLOPs at full rate)'
  for group in _grouped(c for c in found.costs if c.kind != COLLECTIVE)[:LONGEST]:
    c = group[0]
    seconds = sum(g.seconds for g in group)
    more = f' and {len(group) - 1} alike' if len(group) > 1 else ''
    yield (
      f'  {_ms(seconds):>10} {seconds / total:4.0%}  {c.kind:9} {sum(g.count for g in group):5} x '
      f'{_us(seconds / max(sum(g.count for g in group), 1)):>9}{" " if c.estimated else "*"} {_origin(c)}{more}'
    )


def _grouped(costs: Iterable[OperationCost]) -> list[list[OperationCost]]:
  """Operations that come from one place of the program and are of a kind, products each alone; the longest first."""
  groups = collections.defaultdict(list)
  for c in costs:
    if c.seconds:
      groups[
        c.kind, c.name if c.kind == MATMUL else c.op_name or c.name, c.count, c.estimated
      ].append(c)
  return sorted(groups.values(), key=lambda group: -sum(c.seconds for c in group))


def _origin(c: OperationCost) -> str:
  """Where an operation comes from: the function of the package, else what the compiler calls it."""
  function = c.functions[0] if c.functions else ''
  tail = '/'.join(c.op_name.split('/')[-2:]) if c.op_name else ''
  return ' '.join(
    filter(None, [c.name, f'in {function}' if function else '', f'({tail})' if tail else ''])
  )[:56]


def _collectives(found: Estimate) -> Iterable[str]:
  rows = _collective_rows(found)
  if not rows:
    return
  yield '  collectives: over mesh axes, bytes of one on each chip, time at link speed, of it hidden behind compute'
  for row in rows:
    yield (
      f'  {_ms(row["seconds"]):>10} {row["seconds"] / found.serial_seconds:4.0%}  {row["kind"]:18} '
      f'{"".join(row["axes"]) or "-":4} {row["count"]:5} x {bytes_text(row["bytes"]):>10} '
      f'{_us(row["seconds"] / max(row["count"], 1)):>9}, {_ms(row["hidden_seconds"])} hidden'
    )


def _collective_rows(found: Estimate) -> list[dict[str, Any]]:
  """One row for each kind, axes and size, the longest first."""
  rows = {}
  for c in found.costs:
    if c.collective:
      key = c.collective.kind, c.collective.axes, c.collective.bytes, c.collective.size
      row = rows.setdefault(
        key,
        dict(
          kind=key[0],
          axes=list(key[1]),
          bytes=key[2],
          devices=key[3],
          count=0,
          seconds=0.0,
          hidden_seconds=0.0,
        ),
      )
      row['count'] += c.count
      row['seconds'] += c.seconds
      row['hidden_seconds'] += c.hidden_seconds
  return sorted(rows.values(), key=lambda row: -row['seconds'])


def _remarks(answer: Answer) -> Iterable[str]:
  found = answer.estimate
  moved = sum(c.seconds for c in found.costs if c.kind in (COPY, RELAYOUT))
  yield ''
  yield (
    f'copies and layout changes: {_ms(moved)}, {moved / found.serial_seconds:.1%}; '
    f'weights and caches laid out anew in HBM: {len(found.offending_relayouts) or "none"}'
  )
  for copy in found.offending_relayouts:
    yield from _wrap(
      f'  ! {copy.name} writes {", ".join(copy.sources)} again, as {copy.result} '
      f'({bytes_text(copy.result.bytes)})',
      '    ',
    )
  # That of the steps of slots is known to be: the times above are of one.
  for loop in found.unknown_loops[answer.case.phase == 'slots' :]:
    yield f'  ! the loop {loop} does not tell how often it turns: it counts once, and the times above are too short'


def _shortage(answer: Answer) -> Iterable[str]:
  s: Shortage = answer.program
  yield ''
  needed = f'{_gib(s.needed)} GiB are needed' if s.needed else 'more is needed than there is'
  yield (
    f'does not fit: {needed} on each chip and {_gib(s.available)} GiB are available: weights {_gib(s.weights)}, '
    f'cache {_gib(s.cache)}'
    + (f', the rest {_gib(s.needed - s.weights - s.cache)}' if s.needed else '')
  )
  yield from _wrap(f'  {s.message}', '  ')
  yield ''
  if not answer.alternatives:
    yield 'no other layout, smaller batch or larger slice that was tried would do'
  for a in answer.alternatives:
    case, m = a.program.case, a.program.memory
    what = {
      'layout': f'--layout={case.layout}',
      'batch': f'--batch={case.batch}',
      'slice': f'--slice={a.slice}',
    }[a.change]
    yield f'would fit: {what}, {_gib(m.needed)} of {_gib(m.available)} GiB (compiled)'


def report_dict(answer: Answer) -> dict[str, Any]:
  """The report, JSON-ready: seconds and bytes, of one chip."""
  report = {
    'fits': answer.fits,
    'slice': str(answer.slice),
    'chips': answer.slice.chips,
    'case': answer.case.to_dict(),
    'tried': [dataclasses.asdict(t) for t in answer.tried],
  }
  if not answer.fits:
    s: Shortage = answer.program
    return {
      **report,
      'memory': {
        'needed': s.needed,
        'available': s.available,
        'weights': s.weights,
        'cache': s.cache,
      },
      'message': s.message,
      'alternatives': [
        {
          'change': a.change,
          'layout': str(a.program.case.layout),
          'batch': a.program.case.batch,
          'slice': str(a.slice),
          'needed': a.program.memory.needed,
        }
        for a in answer.alternatives
      ],
    }
  found, limits, program = answer.estimate, bounds(answer), answer.program
  serial, overlapped, step = found.serial_seconds, found.overlapped_seconds, {}
  if answer.case.phase == 'slots':
    step = {'step': dict(zip(('serial', 'overlapped'), found.turn_seconds))}
  return {
    **report,
    'mesh': dict(program.mesh.shape),
    'links': mesh_links(program.mesh),
    'compile_seconds': program.seconds,
    'memory': {**dataclasses.asdict(program.memory), 'needed': program.memory.needed},
    'seconds': {'serial': serial, 'overlapped': overlapped, 'by_kind': found.by_kind, **step},
    'tokens': answer.case.tokens,
    'bounds': dataclasses.asdict(limits),
    'mfu': {'serial': limits.flops / serial, 'overlapped': limits.flops / overlapped},
    'share_of_weight_bound': {
      'serial': limits.weights / serial,
      'overlapped': limits.weights / overlapped,
    },
    'collectives': _collective_rows(found),
    'operations': [
      {
        'name': c.name,
        'opcode': c.opcode,
        'kind': c.kind,
        'count': c.count,
        'seconds': c.seconds,
        'hidden_seconds': c.hidden_seconds,
        'bytes': c.bytes,
        'flops': c.flops,
        'estimated': c.estimated,
        'from': c.op_name,
      }
      for c in found.costs
      if c.seconds
    ],
    'relayouts': [
      {
        'name': w.name,
        'computation': w.computation,
        'sources': list(w.sources),
        'result': str(w.result),
        'bytes': w.result.bytes,
      }
      for w in found.offending_relayouts
    ],
    'unknown_loops': list(found.unknown_loops),
  }


def _wrap(line: str, indent: str) -> Sequence[str]:
  return textwrap.wrap(
    line, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
  )


def _gib(count: int) -> str:
  return f'{count / 2**30:.2f}'


def _ms(seconds: float) -> str:
  return f'{seconds * 1e3:.2f} ms' if seconds < 10 else f'{seconds:.1f} s'


def _us(seconds: float) -> str:
  return f'{seconds * 1e6:.1f} us'
