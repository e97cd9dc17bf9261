"""The paper's own figures, computed by the planner's public functions."""

import dataclasses

import pytest

from benchmarks.planner_figures import FIGURE_3_MODEL
from benchmarks.planner_table_2 import TABLE_2
from t5x_inference_ext import config
from t5x_inference_ext.planner import figure_data, search
from t5x_inference_ext.planner.costs import cost, mfu
from t5x_inference_ext.planner.machine import Machine
from t5x_inference_ext.planner.request import PlanRequest
from t5x_inference_ext.sharding.layout import Layout

V4_64 = Machine.parse('v4:4x4x4')
PALM = config.preset('palm_540b')

# Figure 3: tokens -> GB of ws_2d, wg_x, wg_xy, wg_xyz.
FIGURE_3 = {
  2048: (0.0671, 0.3020, 1.0821, 4.2950),
  16384: (0.5369, 0.5369, 1.1409, 4.2950),
  65536: (2.147, 1.342, 1.342, 4.2950),
  262144: (8.590, 4.563, 2.147, 4.2950),
  1048576: (34.36, 17.45, 5.369, 4.2950),
}
# Table 1: (row, batch) -> positions.
TABLE_1 = {
  ('multihead', 128): 1320,
  ('multihead', 512): 330,
  ('multiquery by heads', 128): 660,
  ('multiquery by heads', 512): 165,
  ('multiquery by batch', 128): 43000,
  ('multiquery by batch', 512): 10700,
}


@pytest.mark.parametrize('tokens', FIGURE_3)
def test_figure_3(tokens):
  found = [
    figure_data.feedforward_bytes(FIGURE_3_MODEL, (4, 4, 4), name, tokens) / 1e9
    for name in figure_data.FEEDFORWARD_LAYOUTS
  ]
  assert found == [pytest.approx(value, rel=5e-4) for value in FIGURE_3[tokens]]


def test_figure_3_changes_layout_at_three_points():
  points = figure_data.switch_points(FIGURE_3_MODEL, (4, 4, 4))
  assert points == [(16384, 'ws_2d', 'wg_x'), (65536, 'wg_x', 'wg_xy'), (786432, 'wg_xy', 'wg_xyz')]


@pytest.mark.parametrize('name,batch', TABLE_1)
def test_table_1(name, batch):
  row = next(row for row in figure_data.context_rows(PALM) if row.name == name)
  assert row.config.d_head == (128 if name == 'multihead' else 256)
  found = figure_data.longest_context(row.config, V4_64, (4, 4, 4), row.layout, batch)
  assert found == pytest.approx(TABLE_1[name, batch], rel=0.02)


@pytest.mark.parametrize('column', TABLE_2, ids=lambda c: c.name)
def test_every_mfu_of_table_2_follows_from_its_latency(column):
  tokens = column.batch * column.length
  # With the 540e9 parameters that the paper counts.
  assert mfu(540e9, tokens, V4_64, column.seconds) == pytest.approx(column.mfu, abs=0.01)


@pytest.mark.parametrize(
  'name,billions',
  [('palm_8b', 8.63), ('palm_62b', 62.50), ('palm_540b', 540.36), ('megatron_530b', 529.5)],
)
def test_parameters(name, billions):
  assert config.preset(name).num_params == pytest.approx(billions * 1e9, rel=1e-3)


def _costs(column, mesh, convention):
  """Return the costs of all layouts for the rows of a column of Table 2."""
  length = 2048 if column.phase == 'prefill' else 2016  # decode steps then see 2048 in the middle
  request = PlanRequest(
    PALM, column.batch, length, 64, weights=column.weights, convention=convention
  )
  return search.phase_costs(request, V4_64, mesh, column.phase, column.batch)


@pytest.mark.parametrize('column', TABLE_2, ids=lambda c: c.name)
def test_in_the_papers_convention_its_layouts_are_the_best(column):
  """Meshes are of whole axes: half an axis does not have the links of a whole one."""
  meshes = search.meshes(PlanRequest(PALM, column.batch, convention='paper'), V4_64)
  assert (2, 8, 4) not in meshes and (2, 8, 4) in V4_64.meshes(PALM)
  found = [c for mesh in meshes for c in _costs(column, mesh, 'paper')]
  best = min(found, key=lambda c: c.seconds)
  assert str(best.case.layout) == column.layout
  # Weights are gathered over all axes in every mesh alike.
  assert best.case.mesh == (4, 4, 4) or column.layout == 'wg_xyz/batch'


@pytest.mark.parametrize('column', TABLE_2, ids=lambda c: c.name)
def test_on_the_torus_its_layouts_are_the_best(column):
  """Attention aside: whether it splits heads or batch is within 2% in the prefill of one row."""
  request = PlanRequest(PALM, column.batch)
  found = [c for mesh in search.meshes(request, V4_64) for c in _costs(column, mesh, 'torus')]
  best = min(found, key=lambda c: c.seconds)
  assert best.case.layout.feedforward == Layout.parse(column.layout).feedforward
  same = [c for c in _costs(column, (4, 4, 4), 'torus') if str(c.case.layout) == column.layout]
  assert len(same) == 1 and same[0].seconds <= 1.02 * best.seconds


def test_two_dimensions_win_on_both_networks_with_more_chips():
  machine = Machine.parse('v4:8x8x8')
  for convention in ('paper', 'torus'):
    request = PlanRequest(PALM, 512, 2016, 64, convention=convention)
    found = search.phase_costs(request, machine, (8, 8, 8), 'decode', 512)
    assert str(found[0].case.layout) == 'ws_2d/batch'


def test_decoding_in_series_takes_longer_than_in_parallel():
  """Section 3.4: 14% more for a decode step of 512 rows."""
  column = TABLE_2[3]
  serial = dataclasses.replace(column.case, config=dataclasses.replace(PALM, block='serial'))
  assert 0.05 < cost(serial).seconds / cost(column.case).seconds - 1 < 0.25
