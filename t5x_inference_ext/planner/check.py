"""Comparison of a plan's predicted time and memory with its compiled programs.

The compiler's side (precompile, which imports the engine) is imported only when a plan is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import typing

import jax

from t5x_inference_ext.errors import RequestError, UserError
from t5x_inference_ext.planner.costs import PassCost, cost
from t5x_inference_ext.planner.memory import PlannedMemory, memory
from t5x_inference_ext.planner.request import Plan
from t5x_inference_ext.planner.text import table, wrap
from t5x_inference_ext.text_format import binary_bytes, seconds_text

if typing.TYPE_CHECKING:
  from t5x_inference_ext.precompile.analysis import Answer
  from t5x_inference_ext.precompile.estimate import Estimate, OperationCost
  from t5x_inference_ext.precompile.memory import CompiledMemory

COLLECTIVES_ROW = 'collectives'
# Name of the row of overlapped time: of collectives, and in a compiled program also of copies.
HIDDEN_ROW = 'hidden, less waits for prefetches'
# The compiled total as corrected by precompile.calibration, beside the prediction at fitted
# efficiency.
CALIBRATED_ROW = 'all, compiled one calibrated'
# Row -> (kinds of compiled operations, predicted parts). Compiled products include reading their
# weights.
GROUPS = {
  'products and weights': (('matmul',), ('matmuls', 'logits', 'weight load')),
  'attention and cache': (('attention',), ('attention', 'softmax', 'cache load')),
  COLLECTIVES_ROW: (('collective',), ('activations moved', 'weights moved')),
  'copies and others': (('copy', 'relayout', 'other'), ('elementwise', 'launches')),
}


@dataclasses.dataclass(frozen=True)
class CheckRow:
  """One part of a phase, predicted and compiled.

  Attributes:
    name: A key of GROUPS, or the quantity that is compared.
    unit: 's' or 'bytes'.
    predicted: The planner's value, at the plan's efficiency.
    at_full_rate: The planner's value in the convention 'compiled', at the chip's peak rates; equal
      to `predicted` for bytes.
    compiled: The compiler's estimate, which is also at peak rates.
  """

  name: str
  unit: str
  predicted: float
  at_full_rate: float
  compiled: float


@dataclasses.dataclass(frozen=True)
class Checked:
  """A phase: predicted, and compiled.

  Attributes:
    cost: Predicted cost with a full cache, because a compiled program attends to the whole cache.
    answer: Result of compilation; None if it failed.
    rows: The compared parts; empty if the program failed or does not fit.
    problem: The reason why `rows` is empty, else ''.
  """

  cost: PassCost
  answer: Answer | None
  rows: tuple[CheckRow, ...]
  problem: str = ''


def check_plan(plan: Plan, say: Callable[[str], None] = lambda text: None) -> tuple[Checked, ...]:
  """Compile the phases of a plan, and compare them with its predictions.

  Args:
    plan: The plan.
    say: Takes a line of progress for each program.

  Raises:
    UserError: Programs can't be compiled here for the machine; see precompile.analysis.analyze.
  """
  refuse_unchecked(plan)
  return tuple(_checked(plan, phase, say) for phase in plan.phases)


def refuse_unchecked(plan: Plan) -> None:
  """Raise UserError for a plan that can't be checked: the TPU compiler compiles only for TPUs."""
  if not plan.machine.chip.torus:
    raise UserError(
      f'--check compiles with the TPU compiler, and {plan.machine} is not a TPU slice: plan '
      'without --check'
    )


def _checked(plan: Plan, planned: PassCost, say: Callable[[str], None]) -> Checked:
  from t5x_inference_ext.precompile.analysis import analyze
  from t5x_inference_ext.precompile.program import Program

  case, request = planned.case, plan.request
  positions = max(request.context, case.padded)
  in_prefill = case.phase == 'prefill'
  if not in_prefill:
    case = dataclasses.replace(case, context=positions)
  predicted = cost(case, request.convention, planned.efficiency)
  try:
    answer = analyze(
      request.config,
      request.weights,
      str(plan.machine),
      case.phase,
      plan.rows,
      positions,
      layout=str(case.layout),
      other_layout=plan.layouts[1 if in_prefill else 0],
      mesh=plan.mesh_text,
      cache=request.cache,
      prompt=case.padded if in_prefill else None,
      say=say,
    )
  except (RequestError, jax.errors.JaxRuntimeError) as e:
    # The compiler can't print some programs as the text that precompile reads.
    return Checked(predicted, None, (), f'the compiler failed: {str(e).splitlines()[0]}')
  if not answer.fits:
    problem = 'it does not fit; python -m t5x_inference_ext.precompile says by how much'
    return Checked(predicted, answer, (), problem)
  # Prefill also writes the whole cache, in decode's sharding.
  cache = memory(plan.decode.case, positions).cache
  held = dataclasses.replace(memory(case, positions), cache=cache)
  estimate, program = answer.estimate, answer.program
  assert estimate is not None and isinstance(program, Program)  # it fits
  rows = (*_time_rows(predicted, estimate), *_byte_rows(predicted, estimate, program.memory, held))
  return Checked(predicted, answer, rows)


def _time_rows(predicted: PassCost, compiled: Estimate) -> Iterator[CheckRow]:
  ideal, by_kind = cost(predicted.case, 'compiled'), compiled.by_kind
  for name, (kinds, parts) in GROUPS.items():
    # Overlapped time is not in the predicted parts, but is in the compiler's serial estimate: add
    # it.
    ours, at_full_rate = (
      sum(c.parts[part] for part in parts) + (c.hidden_seconds if name == COLLECTIVES_ROW else 0)
      for c in (predicted, ideal)
    )
    yield CheckRow(name, 's', ours, at_full_rate, sum(by_kind.get(kind, 0.0) for kind in kinds))
  yield CheckRow(
    HIDDEN_ROW,
    's',
    predicted.hidden_seconds,
    ideal.hidden_seconds,
    compiled.serial_seconds - compiled.overlapped_seconds,
  )
  yield CheckRow(
    'all, hidden time left out', 's', predicted.seconds, ideal.seconds, compiled.overlapped_seconds
  )
  if calibrated := compiled.calibrated:
    yield CheckRow(
      CALIBRATED_ROW, 's', predicted.seconds, ideal.seconds, calibrated.overlapped_seconds
    )


def _byte_rows(
  predicted: PassCost, estimate: Estimate, compiled: CompiledMemory, held: PlannedMemory
) -> Iterator[CheckRow]:
  moved = sum(c.count * c.collective.moved for c in predicted.collectives)
  sent = sent_bytes(estimate.costs)
  for name, planned_bytes, compiled_bytes in (
    ('sent by a chip', moved, sent),
    ('weights held', held.weights, compiled.weights),
    ('cache held', held.cache, compiled.cache),
    ('temporaries', held.working, compiled.temporaries),
  ):
    yield CheckRow(name, 'bytes', planned_bytes, planned_bytes, compiled_bytes)


def sent_bytes(costs: Iterable[OperationCost]) -> float:
  """Return the bytes that a chip sends in a compiled program.

  They are counted as sharding.collective.Collective counts them.
  """
  total = 0.0
  for c in costs:
    if c.collective is not None and c.collective.kind == 'collective-permute':
      total += c.count * c.bytes
    elif c.collective is not None:
      kind, shards = c.collective.kind, c.collective.size
      total += c.count * c.bytes * ((shards - 1) / shards * (2 if kind == 'all-reduce' else 1))
  return total


def check_text(checked: Iterable[Checked]) -> str:
  """Return the comparison as text, with a table for each phase."""
  lines = []
  for each in checked:
    case = each.cost.case
    lines.append(f'check of {case.phase} in {case.layout} on {case.mesh_text}:')
    if each.problem:
      lines += wrap(f'  {each.problem}', '  ')
      continue
    rows = [('', 'predicted', 'at full rate', 'compiled')]
    for row in each.rows:
      show = binary_bytes if row.unit == 'bytes' else seconds_text
      rows.append((row.name, show(row.predicted), show(row.at_full_rate), show(row.compiled)))
    lines += table(rows, indent='  ')
  lines.append(
    "compiled: the compiler's estimate, at full rate; hidden: overlapped (docs/precompile.md)"
  )
  return '\n'.join(lines)
