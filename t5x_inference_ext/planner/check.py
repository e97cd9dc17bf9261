"""The plan's two programs compiled for its slice, and what was predicted beside what came out, part by part."""

from collections.abc import Callable, Iterable
import dataclasses
import textwrap
from typing import Any

import jax

from t5x_inference_ext.errors import RequestError, UserError
from t5x_inference_ext.planner.costs import PassCost, cost
from t5x_inference_ext.planner.efficiency import IDEAL
from t5x_inference_ext.planner.memory import PlannedMemory, memory
from t5x_inference_ext.planner.report import time_text
from t5x_inference_ext.planner.request import Plan
from t5x_inference_ext.precompile.analysis import Answer, analyze
from t5x_inference_ext.sharding.explain_text import bytes_text

COLLECTIVES_ROW = 'collectives'
# What the compiler's kinds of operations hold -> the parts that predict them. Its products read weights as they go.
GROUPS = {
  'products and weights': (('matmul',), ('matmuls', 'logits', 'weight load')),
  'attention and cache': (('attention',), ('attention', 'cache load')),
  COLLECTIVES_ROW: (('collective',), ('activations moved', 'weights moved')),
  'copies and the rest': (('copy', 'relayout', 'other'), ()),
}


@dataclasses.dataclass(frozen=True)
class CheckRow:
  """One part.

  Attributes:
    name: a key of GROUPS, 'all', or what is counted.
    unit: 's' or 'bytes'.
    predicted: with the efficiencies; of bytes, those.
    at_full_rate: without them.
    compiled: by the compiler's estimate, which knows no efficiencies either.
  """

  name: str
  unit: str
  predicted: float
  at_full_rate: float
  compiled: float


@dataclasses.dataclass(frozen=True)
class Checked:
  """A phase.

  Attributes:
    cost: predicted, with the whole cache: what a program attends to.
    answer: the compiler's; None where it failed.
    rows: both; none where there is nothing to compare.
    problem: why there are none; '' where there are some.
  """

  cost: PassCost
  answer: Answer | None
  rows: tuple[CheckRow, ...]
  problem: str = ''


def check_plan(plan: Plan, say: Callable[[str], None] = lambda text: None) -> tuple[Checked, ...]:
  """Compiles the phases of a plan.

  Raises:
    UserError: a machine that programs can't be compiled for here; see precompile.analysis.analyze.
  """
  refuse(plan)
  return tuple(_checked(plan, phase, say) for phase in plan.phases)


def refuse(plan: Plan) -> None:
  """Raises UserError for a plan that can't be checked."""
  if not plan.machine.chip.torus:
    raise UserError(
      f'--check compiles with the TPU compiler, and {plan.machine} is no TPU slice: plan without --check'
    )


def _checked(plan: Plan, planned: PassCost, say) -> Checked:
  case, request = planned.case, plan.request
  positions = max(request.context, case.padded)
  if case.phase == 'decode':
    case = dataclasses.replace(case, context=positions)
  found = cost(case, request.convention, planned.efficiency)
  try:
    answer = analyze(
      request.config,
      request.weights,
      str(plan.machine),
      case.phase,
      plan.rows,
      positions,
      layout=str(case.layout),
      other_layout=plan.layouts[case.phase == 'prefill'],
      mesh=plan.mesh_text,
      cache=request.cache,
      prompt=case.padded if case.phase == 'prefill' else None,
      say=say,
    )
  except (
    RequestError,
    jax.errors.JaxRuntimeError,
  ) as e:  # of some programs it can't write the text that is read here
    return Checked(found, None, (), f'the compiler failed: {str(e).splitlines()[0]}')
  if not answer.fits:
    return Checked(
      found,
      answer,
      (),
      'it does not fit; python -m t5x_inference_ext.precompile says what is missing',
    )
  # Prefill, too, hands the cache over as decode has it.
  held = dataclasses.replace(
    memory(case, positions), cache=memory(plan.decode.case, positions).cache
  )
  return Checked(found, answer, tuple(_rows(found, answer, held)))


def _rows(found: PassCost, answer: Answer, held: PlannedMemory) -> Iterable[CheckRow]:
  ideal, kinds = found.at(IDEAL), answer.estimate.by_kind
  hidden = [
    found.hidden_seconds,
    ideal.hidden_seconds,
    sum(c.hidden_seconds for c in answer.estimate.costs),
  ]
  for name, (compiled, parts) in GROUPS.items():
    values = [sum(c.parts[p] for p in parts) for c in (found, ideal)] + [
      sum(kinds.get(kind, 0.0) for kind in compiled)
    ]
    if (
      name == COLLECTIVES_ROW
    ):  # of these the parts leave out what is hidden, and the compiler's serial estimate does not
      values[0] += hidden[0]
      values[1] += hidden[1]
    yield CheckRow(name, 's', *values)
  yield CheckRow(f'of {COLLECTIVES_ROW}, hidden', 's', *hidden)
  yield CheckRow(
    'all, but what is hidden', 's', found.seconds, ideal.seconds, answer.estimate.overlapped_seconds
  )
  moved = sum(c.count * c.move.moved for c in found.collectives)
  yield CheckRow(
    'sent by a chip',
    'bytes',
    moved,
    moved,
    sum(_sent(c) for c in answer.estimate.costs if c.collective),
  )
  compiled = answer.program.memory
  for name in ('weights', 'cache'):
    yield CheckRow(
      f'{name} held', 'bytes', getattr(held, name), getattr(held, name), getattr(compiled, name)
    )
  yield CheckRow('temporaries', 'bytes', held.working, held.working, compiled.temporaries)


def _sent(c: Any) -> float:
  """Bytes that a chip sends in all runs of a collective, as sharding.collective.Collective counts them."""
  if c.collective.kind == 'collective-permute':
    return c.count * c.bytes
  share = (
    (c.collective.size - 1) / c.collective.size * (2 if c.collective.kind == 'all-reduce' else 1)
  )
  return c.count * c.bytes * share


def check_text(checked: Iterable[Checked]) -> str:
  """Tables."""
  lines = []
  for each in checked:
    case = each.cost.case
    lines.append(f'check of {case.phase} in {case.layout} on {"x".join(map(str, case.mesh))}:')
    if each.problem:
      lines += textwrap.wrap(f'  {each.problem}', 120, subsequent_indent='  ')
      continue
    lines.append(f'  {"":24}{"predicted":>13}{"at full rate":>14}{"compiled":>13}')
    for row in each.rows:
      lines.append(
        f'  {row.name:24}{_show(row.predicted, row):>13}{_show(row.at_full_rate, row):>14}'
        f'{_show(row.compiled, row):>13}'
      )
  lines.append(
    "compiled: the compiler's estimate, at full rate; hidden: by its schedule (docs/precompile.md)"
  )
  return '\n'.join(lines)


def _show(value: float, row: CheckRow) -> str:
  return bytes_text(round(value)) if row.unit == 'bytes' else time_text(value)
