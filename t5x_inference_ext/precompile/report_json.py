"""The report of a compilation as JSON: all numbers, in seconds and bytes of one chip."""

import dataclasses
from typing import Any

from t5x_inference_ext.precompile.analysis import Answer
from t5x_inference_ext.precompile.fit import Shortage
from t5x_inference_ext.precompile.operations import OperationCost
from t5x_inference_ext.precompile.relayouts import WeightCopy
from t5x_inference_ext.precompile.summary import collective_rows, time_bounds
from t5x_inference_ext.sharding.mesh import mesh_links

_OPERATION = (
  *('name', 'opcode', 'kind', 'count'),
  *('seconds', 'hidden_seconds', 'bytes', 'flops', 'estimated'),
)
_SHORTAGE = ('needed', 'available', 'weights', 'cache')


def report_dict(answer: Answer) -> dict[str, Any]:
  """Return the report, JSON-ready."""
  report = {
    'fits': answer.fits,
    'slice': str(answer.slice),
    'chips': answer.slice.chips,
    'case': answer.case.to_dict(),
    'tried': [dataclasses.asdict(t) for t in answer.tried],
  }
  if isinstance(answer.program, Shortage):
    return {**report, **_shortage(answer, answer.program)}
  (program, found), bounds = answer.compiled, time_bounds(answer)
  seconds = {'serial': found.serial_seconds, 'overlapped': found.overlapped_seconds}

  def shares(bound: float) -> dict[str, float]:
    return {name: bound / time for name, time in seconds.items()}

  step = {}
  if answer.case.phase == 'slots':
    step = {'step': dict(zip(('serial', 'overlapped'), found.turn_seconds))}
  return {
    **report,
    'mesh': dict(program.mesh.shape),
    'links': mesh_links(program.mesh),
    'compile_seconds': program.seconds,
    'memory': {**dataclasses.asdict(program.memory), 'needed': program.memory.needed},
    'seconds': {**seconds, 'by_kind': found.by_kind, **step},
    'calibrated': found.calibrated and dataclasses.asdict(found.calibrated),
    'tokens': answer.case.tokens,
    'bounds': dataclasses.asdict(bounds),
    'mfu': shares(bounds.flops),
    'share_of_weight_bound': shares(bounds.weights),
    'collectives': collective_rows(found),
    'kernels': [
      {'count': c.count, **dataclasses.asdict(c.kernel)} for c in found.costs if c.kernel
    ],
    'operations': [_operation(c) for c in found.costs if c.seconds],
    'relayouts': [_relayout(w) for w in found.offending_relayouts],
    'unknown_loops': list(found.unknown_loops),
  }


def _shortage(answer: Answer, s: Shortage) -> dict[str, Any]:
  return {
    'memory': {name: getattr(s, name) for name in _SHORTAGE},
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


def _operation(c: OperationCost) -> dict[str, Any]:
  return {**{name: getattr(c, name) for name in _OPERATION}, 'from': c.op_name}


def _relayout(w: WeightCopy) -> dict[str, Any]:
  return {
    'name': w.name,
    'computation': w.computation,
    'sources': list(w.sources),
    'result': str(w.result),
    'bytes': w.result.bytes,
  }
