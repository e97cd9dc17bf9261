"""The printed tables: each number is the plan's own, in the unit that the heading names."""

import dataclasses
import re

import pytest

from t5x_inference_ext import config
from t5x_inference_ext.planner.choose import choose
from t5x_inference_ext.planner.machine import Machine
from t5x_inference_ext.planner.report import plan_text
from t5x_inference_ext.planner.request import PlanRequest

SECONDS = {'s': 1, 'ms': 1e-3, 'us': 1e-6}


@pytest.fixture(scope='module')
def choice():
  machines = [Machine.parse(name) for name in ('v4:4x4x4', 'v4:4x4x8')]
  return choose(PlanRequest(config.preset('palm_540b'), 64), machines)


def cells(text: str, first: str) -> list[list[str]]:
  """The cells of the lines that begin with `first`; two spaces or more part them."""
  lines = [line.strip() for line in text.splitlines() if line.strip().startswith(first)]
  return [re.split(' {2,}', line) for line in lines]


def seconds(text: str) -> float:
  number, unit = text.split()
  return float(number) * SECONDS[unit]


def test_the_ranked_pairs(choice):
  found = [row for row in cells(plan_text(choice), '') if len(row) == 12][1:]
  assert len(found) == 12 < len(choice.ranked)
  for row, plan in zip(found, choice.ranked):
    assert tuple(row[:4]) == (*plan.layouts, plan.mesh_text, '64')
    assert seconds(row[4]) == pytest.approx(plan.seconds, rel=1e-3)
    for i, phase in ((5, plan.prefill), (8, plan.decode)):
      assert seconds(row[i]) == pytest.approx(phase.seconds, rel=1e-3)
      assert row[i + 1] == f'{round(100 * plan.mfu_of(phase))}%' and row[i + 2] == phase.limit
    assert float(row[11]) * 1024**3 == pytest.approx(plan.memory.needed, abs=0.06 * 1024**3)
    assert plan.memory.needed > 1024**3


def test_how_many_plans_the_table_leaves_to_the_json(choice):
  every = len(choice.ranked)
  assert 'more are in the JSON' not in plan_text(choice, rows=every)
  assert ' best mesh. 2 more are in the JSON.' in plan_text(choice, rows=every - 2)


def test_a_layout_that_nobody_measured_is_named(choice):
  """Weights gathered over some axes alone; the fastest plan without is named beside."""
  partly = next(p for p in choice.ranked if p.prefill.case.gathers_partly)
  assert partly.layouts[0].startswith(('wg_x/', 'wg_xy/'))
  other = next(p for p in choice.ranked if not p.prefill.case.gathers_partly)
  text = ' '.join(plan_text(dataclasses.replace(choice, plan=partly)).split())
  names = ' and '.join(c.case.layout_text for c in other.phases)
  assert f'have not been published. The fastest without: {names} on {other.mesh_text}, ' in text
  assert 'have not been published' not in plan_text(dataclasses.replace(choice, plan=other))


def test_where_the_time_goes(choice):
  text, plan = plan_text(choice), choice.plan
  for part in ('matmuls', 'weight load', 'activations moved'):
    ((_, *row),) = cells(text, part)
    for i, phase in enumerate((plan.prefill, plan.decode)):
      assert seconds(row[2 * i]) == pytest.approx(phase.parts[part], rel=0.01)
      assert float(row[2 * i + 1][:-1]) == pytest.approx(
        100 * phase.parts[part] / phase.seconds, abs=0.6
      )
  ((_, *costs),) = cells(text, 'chip-ms a token')
  found = [float(cost) for cost in costs[:2]]
  assert found == pytest.approx(
    [1e3 * plan.cost_of(p) for p in (plan.prefill, plan.decode)], rel=1e-3
  )
  total = re.search(r'share of the prefill: ([\d.]+)\)', costs[-1])
  assert float(total[1]) == pytest.approx(1e3 * plan.chip_seconds_per_token, rel=1e-3)


def test_the_other_machines(choice):
  (row,) = cells(plan_text(choice), 'v4:4x4x')[-1:]
  (other,) = choice.others
  assert row[:2] == [str(other.machine), '64']
  assert seconds(row[3]) == pytest.approx(other.seconds, rel=1e-3)
  assert seconds(row[4]) == pytest.approx(other.decode.seconds, rel=1e-3)
  assert float(row[5]) == pytest.approx(other.tokens_per_second, rel=1e-2)
  assert float(row[6]) == pytest.approx(1e3 * other.chip_seconds_per_token, rel=1e-3)
