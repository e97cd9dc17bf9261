"""A choice and the plans that it was made from, as JSON.

Units are seconds, bytes, FLOPs and chip-seconds. Values are for one chip and one pass.
"""

from collections.abc import Sequence
import dataclasses
import json
from typing import Any

from t5x_inference_ext.planner.check import Checked
from t5x_inference_ext.planner.choose import Choice
from t5x_inference_ext.planner.costs import PassCost
from t5x_inference_ext.planner.drafts import CheckingStep, drafts_dict
from t5x_inference_ext.planner.report import paper_convention, why
from t5x_inference_ext.planner.request import Plan


def choice_dict(
  choice: Choice, checked: Sequence[Checked] = (), steps: Sequence[CheckingStep] = ()
) -> dict[str, Any]:
  """Return every number of a choice and of its compiled phases, JSON-ready.

  Args:
    choice: The choice.
    checked: Its compiled phases.
    steps: Its steps that check drafts.
  """
  r, machine = choice.plan.request, choice.plan.machine
  return {
    'model': r.config.to_dict(),
    'parameters': r.config.num_params,
    'slice': str(machine),
    'chips': machine.chips,
    'chip': dataclasses.asdict(machine.chip),
    'batch': r.batch,
    'input_length': r.input_length,
    'output_length': r.output_length,
    'weights': r.weights,
    'cache': r.cache,
    'phase': r.phase,
    'objective': choice.objective,
    'latency_target': choice.target,
    'convention': r.convention,
    'efficiency': dataclasses.asdict(choice.plan.decode.efficiency),
    'why': why(choice, in_json=True),
    'paper_convention': paper_convention(choice),
    'plan': plan_dict(choice.plan),
    'ranked': [plan_dict(p) for p in choice.ranked],
    'others': [plan_dict(p) for p in choice.others],
    'check': [
      {
        'phase': c.cost.case.phase,
        'fits': c.answer and c.answer.fits,
        'problem': c.problem,
        'rows': [dataclasses.asdict(row) for row in c.rows],
      }
      for c in checked
    ],
    **({'drafts': drafts_dict(steps)} if steps else {}),
  }


def plan_dict(plan: Plan) -> dict[str, Any]:
  """Return every number of a plan, JSON-ready."""
  return {
    'slice': str(plan.machine),
    'mesh': plan.mesh_text,
    'batch': plan.request.batch,
    'rows': plan.rows,
    'prefill_layout': plan.layouts[0],
    'decode_layout': plan.layouts[1],
    'fits': plan.fits,
    'seconds': plan.seconds,
    'tokens_per_second': plan.tokens_per_second,
    'chip_seconds_per_token': plan.chip_seconds_per_token,
    'prefill': phase_dict(plan, plan.prefill),
    'decode': phase_dict(plan, plan.decode),
  }


def phase_dict(plan: Plan, cost: PassCost) -> dict[str, Any]:
  """Return every number of one phase of a plan, JSON-ready."""
  held = plan.memories[cost.case.phase]
  return {
    'layout': str(cost.case.layout),
    'layout_text': cost.case.layout_text,
    'seconds': cost.seconds,
    'parts': cost.parts,
    'limit': cost.limit,
    'limits': cost.limits,
    'hidden_seconds': cost.hidden_seconds,
    'mfu': plan.mfu_of(cost),
    'chip_seconds_per_token': plan.cost_of(cost),
    'context': cost.case.context,
    'length': cost.case.length,
    'work': dataclasses.asdict(cost.work),
    'memory': {**dataclasses.asdict(held), 'needed': held.needed},
    'collectives': [
      {
        'name': c.collective.name,
        'kind': c.collective.kind,
        'axes': ''.join(c.collective.axes),
        'devices': c.collective.shards,
        'bytes': c.collective.bytes,
        'moved': c.collective.moved,
        'count': c.count,
        'seconds': c.seconds,
        'of_weights': c.collective.of_weights,
      }
      for c in cost.collectives
    ],
  }


def plan_json(
  choice: Choice, checked: Sequence[Checked] = (), steps: Sequence[CheckingStep] = ()
) -> str:
  """Return a choice as the text of a JSON file; see choice_dict for the arguments."""
  return json.dumps(choice_dict(choice, checked, steps), indent=2) + '\n'
