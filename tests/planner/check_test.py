"""A plan's programs compiled: predicted beside compiled."""

import dataclasses
import json

import jax
import pytest

from t5x_inference_ext import config
from t5x_inference_ext.commands import plan as command
from t5x_inference_ext.planner.check import GROUPS, HIDDEN_ROW, check_plan, check_text
from t5x_inference_ext.planner.choose import choose
from t5x_inference_ext.planner.machine import Machine
from t5x_inference_ext.planner.request import PlanRequest
from t5x_inference_ext.precompile import analysis

pytestmark = pytest.mark.libtpu


@pytest.fixture(scope='module')
def checked():
  model = config.preset('palm_tiny', num_layers=9)
  found = check_plan(choose(PlanRequest(model, 64, 96, 32), [Machine.parse('v4:2x2x2')]).plan)
  assert [c.cost.case.phase for c in found] == ['prefill', 'decode']
  return found


def test_bytes_held_are_those_of_the_program(checked):
  for phase in checked:
    rows = {row.name: row for row in phase.rows}
    assert phase.answer.fits
    for name in ('weights held', 'cache held'):
      assert rows[name].predicted == pytest.approx(rows[name].compiled, rel=0.02)


def test_parts_are_summed_alike(checked):
  for phase in checked:
    rows = {row.name: row for row in phase.rows}
    groups = [rows[name] for name in GROUPS]
    hidden = rows[HIDDEN_ROW]
    for which in ('predicted', 'at_full_rate', 'compiled'):
      assert sum(getattr(row, which) for row in groups) - getattr(hidden, which) == pytest.approx(
        getattr(rows['all, hidden time left out'], which)
      )
      assert rows['sent by a chip'].predicted > 0
  assert [phase.cost.case.context for phase in checked] == [96, 128]


def test_decode_sends_what_was_predicted(checked):
  row = next(row for row in checked[1].rows if row.name == 'sent by a chip')
  assert row.compiled == pytest.approx(row.predicted, rel=0.5)


def test_the_table_shows_both(checked):
  shown = check_text(checked)
  for phase in checked:
    assert f'check of {phase.cost.case.phase} in {phase.cost.case.layout} on' in shown
  assert shown.count('copies and others') == 2 and 'at full rate' in shown
  held = [line for line in shown.splitlines() if 'weights held' in line]
  assert len(held) == 2 and not any('GiB' in line for line in held)  # 0.00, that would be


def test_the_command_prints_and_writes_it(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  path = tmp_path / 'plan.json'
  assert (
    command.run(
      [
        'plan',
        '--model=palm_tiny',
        '--slice=v4:2x2x1',
        '--batch=8',
        '--input_length=48',
        '--output_length=16',
        '--check',
        f'--json={path}',
      ]
    )
    == 0
  )
  out, err = capsys.readouterr()
  assert 'check of prefill in ' in out and 'compiling decode in ' in err
  data = json.loads(path.read_text())
  assert [c['phase'] for c in data['check']] == ['prefill', 'decode'] and all(
    c['rows'] for c in data['check']
  )


def test_what_the_compiler_can_not_do_is_said(monkeypatch):
  def fail(*unused_arguments, **unused_options):
    raise jax.errors.JaxRuntimeError('INTERNAL: no text\nand more')

  monkeypatch.setattr(analysis, 'analyze', fail)
  plan = choose(
    PlanRequest(config.preset('palm_tiny'), 8, 48, 16), [Machine.parse('v4:2x2x1')]
  ).plan
  found = check_plan(plan)
  assert [c.rows for c in found] == [
    (),
    (),
  ] and 'the compiler failed: INTERNAL: no text' in check_text(found)


def test_a_program_that_does_not_fit_after_all(checked, monkeypatch):
  answer = dataclasses.replace(checked[0].answer, program=None, estimate=None)
  monkeypatch.setattr(analysis, 'analyze', lambda *unused_arguments, **unused_options: answer)
  plan = choose(
    PlanRequest(config.preset('palm_tiny'), 8, 48, 16), [Machine.parse('v4:2x2x1')]
  ).plan
  assert 'it does not fit' in check_text(check_plan(plan))
