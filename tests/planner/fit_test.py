"""The efficiencies: those that the fit finds, from Table 2 alone."""

import dataclasses

import pytest

from benchmarks import planner_fit
from benchmarks.planner_table_2 import TABLE_2
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.hardware import CHIPS, GPU_LAYER_LATENCY
from t5x_inference_ext.planner.costs import cost
from t5x_inference_ext.planner.efficiency import FITTED, IDEAL, Efficiency


@pytest.fixture(scope='module', params=planner_fit.FREE)
def fitted(request):
  return planner_fit.fit(request.param)


def test_the_efficiencies_are_those_of_the_fit(fitted):
  assert fitted.efficiency == FITTED[fitted.convention]


def test_few_numbers_are_fitted_and_the_others_are_full_rates():
  assert sum(map(len, planner_fit.FREE.values())) == 5
  for convention, efficiency in FITTED.items():
    free = planner_fit.FREE.get(convention, ())
    values = dataclasses.asdict(efficiency)
    assert len(values) == 3 and all((v < 1) == (n in free) for n, v in values.items())


def test_no_better_efficiencies_are_near(fitted):
  def loss(e):
    return sum(((cost(c.case, fitted.convention, e).seconds / c.seconds) - 1) ** 2 for c in TABLE_2)

  least = loss(fitted.efficiency)
  for name in planner_fit.FREE[fitted.convention]:
    for step in (-0.05, 0.05):
      other = dataclasses.replace(
        fitted.efficiency, **{name: getattr(fitted.efficiency, name) + step}
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
    assert max(map(abs, fitted.left_out)) < 0.08


def test_the_search_finds_a_known_answer():
  wanted = Efficiency(0.71, 0.345, 1.0)

  def loss(e):
    return sum((a - b) ** 2 for a, b in zip(dataclasses.astuple(e), dataclasses.astuple(wanted)))

  names = [f.name for f in dataclasses.fields(Efficiency)]
  assert planner_fit.search(loss, names) == wanted
  assert planner_fit.search(loss, names[:2]) == wanted  # the third is 1


def test_the_launches_of_a_layer_are_those_of_the_fit():
  found = planner_fit.fit_layer_latency()
  assert found.seconds == pytest.approx(GPU_LAYER_LATENCY)
  assert len(found.errors) == 14 and max(map(abs, found.left_out)) < 0.08
  assert {chip.layer_latency for chip in CHIPS.values()} == {0, GPU_LAYER_LATENCY}


@pytest.mark.parametrize('value', [0, -0.1, 1.01, float('nan')])
def test_what_is_no_efficiency_is_refused(value):
  with pytest.raises(RequestError, match='memory must be above 0 and at most 1'):
    Efficiency(memory=value)


def test_the_rates_of_the_hardware_are_the_ideal():
  assert dataclasses.astuple(IDEAL) == (1, 1, 1)
