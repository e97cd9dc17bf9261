"""The efficiencies: those that the fit finds, from Table 2 alone."""

import dataclasses

import pytest

from benchmarks import planner_fit
from benchmarks.planner_table_2 import TABLE_2
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.planner.costs import cost
from t5x_inference_ext.planner.efficiency import FITTED, IDEAL, Efficiency
from t5x_inference_ext.planner.network import CONVENTIONS


@pytest.fixture(scope='module', params=CONVENTIONS)
def fitted(request):
  return planner_fit.fit(request.param)


def test_the_efficiencies_are_those_of_the_fit(fitted):
  assert fitted.efficiency == FITTED[fitted.convention]


def test_there_are_three_and_they_are_shares():
  for efficiency in FITTED.values():
    values = dataclasses.astuple(efficiency)
    assert len(values) == 3 and all(0 < v < 1 for v in values)


def test_no_better_efficiencies_are_near(fitted):
  def loss(e):
    return sum(((cost(c.case, fitted.convention, e).seconds / c.seconds) - 1) ** 2 for c in TABLE_2)

  least = loss(fitted.efficiency)
  for field in dataclasses.fields(Efficiency):
    for step in (-0.05, 0.05):
      other = dataclasses.replace(
        fitted.efficiency, **{field.name: getattr(fitted.efficiency, field.name) + step}
      )
      assert loss(other) > least


def test_errors_are_small_and_said(fitted):
  assert max(map(abs, fitted.errors)) < 0.05
  assert len(fitted.left_out) == len(fitted.errors) == 4
  text = planner_fit.fit_text(fitted)
  for column, error, left_out in zip(TABLE_2, fitted.errors, fitted.left_out):
    line = next(line for line in text.splitlines() if column.name in line)
    assert f'{error:+.1%}' in line and f'{left_out:+.1%}' in line


def test_on_the_torus_a_column_is_predicted_from_the_other_three(fitted):
  if fitted.convention == 'torus':
    assert max(map(abs, fitted.left_out)) < 0.15


def test_the_search_finds_a_known_answer():
  wanted = Efficiency(0.71, 0.345, 1.0)
  found = planner_fit.search(
    lambda e: sum((a - b) ** 2 for a, b in zip(dataclasses.astuple(e), dataclasses.astuple(wanted)))
  )
  assert found == wanted


@pytest.mark.parametrize('value', [0, -0.1, 1.01, float('nan')])
def test_what_is_no_efficiency_is_refused(value):
  with pytest.raises(RequestError, match='memory must be above 0 and at most 1'):
    Efficiency(memory=value)


def test_the_rates_of_the_hardware_are_the_ideal():
  assert dataclasses.astuple(IDEAL) == (1, 1, 1)
