"""The sweep and the figures."""

import csv
import dataclasses
import importlib.util
import io
import random

import pytest

from benchmarks.planner_figures import FIGURE_3_MODEL, measured_points, table_1_points
from t5x_inference_ext import config
from t5x_inference_ext.errors import RequestError, UserError
from t5x_inference_ext.planner import figures
from t5x_inference_ext.planner.choose import choose
from t5x_inference_ext.planner.costs import PARTS
from t5x_inference_ext.planner.drawing import PublishedPoint
from t5x_inference_ext.planner.figure_data import feedforward_bytes, switch_points
from t5x_inference_ext.planner.machine import Machine
from t5x_inference_ext.planner.request import PlanRequest
from t5x_inference_ext.planner.sweep import csv_text, front, sweep

MODEL = config.preset('palm_8b')
MACHINES = [Machine.parse(name) for name in ('v4:2x2x1', 'v4:2x2x2')]

needs_matplotlib = pytest.mark.skipif(
  importlib.util.find_spec('matplotlib') is None,
  reason='matplotlib is not installed (extra `plots`)',
)


@pytest.fixture(scope='module')
def points():
  found = sweep(PlanRequest(MODEL, 1, 256, 16), MACHINES, (1, 16, 4096), ('int8', 'bfloat16'))
  assert len(found) > 16
  return found


def test_points_of_both_phases_for_all_that_fits(points):
  asked = {(p.phase, p.request.weights, str(p.cost.case.machine), p.request.batch) for p in points}
  assert len(asked) == len(points) and {a[0] for a in asked} == {'prefill', 'decode'}
  # All of 4 and 8 chips, but for the largest prefill.
  assert {a[1:] for a in asked if a[0] == 'decode' and a[3] < 4096} == {
    (w, str(m), b) for w in ('int8', 'bfloat16') for m in MACHINES for b in (1, 16)
  }


def test_the_front_is_what_no_point_beats(points):
  for p in points:
    rivals = [
      q
      for q in points
      if q.phase == p.phase and q.request.weights == p.request.weights and q is not p
    ]
    beaten = any(
      q.seconds <= p.seconds and q.chip_seconds_per_token <= p.chip_seconds_per_token
      for q in rivals
    )
    assert p.on_front != beaten


def test_the_front_does_not_depend_on_the_order(points):
  some = [p for p in points if p.phase == 'decode' and p.request.weights == 'int8']
  shuffled = some[:]
  random.Random(0).shuffle(shuffled)
  assert front(shuffled) == front(some)


def test_a_point_is_the_fastest_layout(points):
  p = next(p for p in points if p.phase == 'decode' and p.request.batch == 16)
  plan = choose(p.request, [p.cost.case.machine]).plan
  assert p.seconds <= plan.decode.seconds  # it need not share weights with a prefill
  assert p.chip_seconds_per_token == pytest.approx(p.cost.case.machine.chips * p.seconds / 16)


def test_csv(points):
  rows = list(csv.DictReader(io.StringIO(csv_text(points))))
  assert ' '.join(rows[0]) == (
    'phase weights machine chips batch rows mesh layout seconds chip_seconds_per_token mfu limit '
    'pareto'
  )
  assert len(rows) == len(points)
  for row, p in zip(rows, points):
    assert float(row['seconds']) == pytest.approx(p.seconds, rel=1e-5) and row['pareto'] == str(
      int(p.on_front)
    )
    assert row['layout'] == str(p.cost.case.layout) and int(row['batch']) == p.request.batch


@needs_matplotlib
def test_figures_are_drawn_and_the_same_again(points, tmp_path):
  choice = choose(PlanRequest(MODEL, 16, 256, 16), [MACHINES[1]])

  def draw(directory):
    directory.mkdir()
    figures.pareto(str(directory / 'pareto.svg'), points)
    figures.communication(str(directory / 'communication.svg'), FIGURE_3_MODEL, (4, 4, 4))
    figures.contexts(str(directory / 'context.svg'), MODEL, MACHINES[1], (2, 2, 2))
    figures.time_parts(str(directory / 'parts.svg'), choice.ranked[:4])
    return {path.name: path.read_bytes() for path in directory.iterdir()}

  first, second = draw(tmp_path / 'a'), draw(tmp_path / 'b')
  assert first == second and len(first) == 4
  for words in (
    b'int8 weights',
    b'4 chips, 1',
    b'palm_8b: 256 tokens in, 16 out, v4',
    b'n chips, B',
  ):
    assert words in first['pareto.svg']
  for words in (b'wg_xyz', b'16,384', b'65,536', b'786,432'):
    assert words in first['communication.svg']
  assert b'multiquery by batch' in first['context.svg'] and b'palm_8b' in first['context.svg']
  assert b'weight load' in first['parts.svg'] and b'out, v4:2x2x2, batch 16' in first['parts.svg']
  for name in ('pareto.svg', 'parts.svg'):
    assert b'only gathering of weights overlaps' in first[name]
    assert b'bfloat16 cache' in first[name]
  assert b'64 chips as 4x4x4' in first['communication.svg']


@pytest.fixture
def drawn(monkeypatch):
  """The figures that a test draws, in order; none is written."""
  from matplotlib.figure import Figure

  found: list[Figure] = []
  monkeypatch.setattr(Figure, 'savefig', lambda figure, *_, **__: found.append(figure))
  return found


@needs_matplotlib
def test_the_lines_of_the_pareto_figure_are_the_points(points, drawn):
  figures.pareto('pareto.svg', points)
  assert [axes.get_xlabel() for axes in drawn[0].axes] == [
    'decode: a step (ms)',
    'prefill: all prompts (ms)',
  ]
  for axes, phase in zip(drawn[0].axes, ('decode', 'prefill')):
    lines = {line.get_label(): line for line in axes.lines}
    for weights in ('int8', 'bfloat16'):
      some = [p for p in points if (p.phase, p.request.weights) == (phase, weights)]
      best = [p for p in some if p.on_front]
      line = lines[f'palm_8b, {weights} weights']
      assert list(line.get_xdata()) == [1000 * p.seconds for p in best] and best
      assert list(line.get_ydata()) == [1000 * p.chip_seconds_per_token for p in best]


@needs_matplotlib
def test_the_lines_of_the_communication_figure_are_the_bytes(drawn):
  figures.communication('communication.svg', FIGURE_3_MODEL, (4, 4, 4))
  lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
  for name in ('ws_2d', 'wg_xyz'):
    tokens = list(lines[name].get_xdata())
    assert tokens == [2**i for i in range(6, 22)]
    assert list(lines[name].get_ydata()) == [
      feedforward_bytes(FIGURE_3_MODEL, (4, 4, 4), name, t) / 1e9 for t in tokens
    ]


@needs_matplotlib
def test_the_bars_of_the_figure_of_parts_are_the_seconds(drawn):
  plans = choose(PlanRequest(MODEL, 16, 256, 16), [MACHINES[1]]).ranked[:4]
  figures.time_parts('parts.svg', plans)
  assert [axes.get_title() for axes in drawn[0].axes] == ['prefill', 'a decode step']
  for axes, phase in zip(drawn[0].axes, ('prefill', 'decode')):
    costs = [getattr(plan, phase) for plan in plans]
    bars = {bar.get_label(): bar for bar in axes.containers}
    for part in PARTS:
      widths = [patch.get_width() for patch in bars[part]]
      assert widths == pytest.approx([c.parts[part] for c in costs], abs=1e-12)
    ends = [patch.get_x() + patch.get_width() for patch in bars[PARTS[-1]]]
    assert ends == pytest.approx([c.seconds for c in costs])
  assert [label.get_text().split('\n')[0] for label in drawn[0].axes[0].get_yticklabels()] == [
    ' and '.join(plan.layouts) for plan in plans
  ]


@needs_matplotlib
def test_a_figure_of_a_model_with_several_key_heads(tmp_path):
  model = dataclasses.replace(config.preset('palm_8b'), num_kv_heads=8)
  figures.contexts(str(tmp_path / 'context.png'), model, MACHINES[1], (2, 2, 2))
  assert (tmp_path / 'context.png').read_bytes().startswith(b'\x89PNG')


@needs_matplotlib
@pytest.mark.parametrize(
  'name,words', [('f.jpg', 'figures are written as .svg or .png'), ('no/f.svg', "can't write")]
)
def test_a_figure_that_can_not_be_written(tmp_path, name, words):
  with pytest.raises(RequestError, match=words):
    figures.communication(str(tmp_path / name), FIGURE_3_MODEL, (4, 4, 4))


def test_without_matplotlib_what_to_install_is_said(monkeypatch, tmp_path):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"pip install 't5x_inference_ext\[plots\]'"):
    figures.communication(str(tmp_path / 'f.svg'), FIGURE_3_MODEL, (4, 4, 4))


def test_switch_points_are_where_bytes_are_equal():
  model = dataclasses.replace(FIGURE_3_MODEL, d_model=8192, d_ff=16384)
  points = switch_points(model, (4, 4, 2))
  names = [points[0][1], *(above for _, _, above in points)]
  assert names == ['ws_2d', 'wg_x', 'wg_xy', 'wg_xyz']
  assert [below for _, below, _ in points] == names[:-1]
  for tokens, below, above in points:
    near = round(tokens / 32) * 32
    before, after = (feedforward_bytes(model, (4, 4, 2), name, near) for name in (below, above))
    assert before == pytest.approx(after, rel=32 / near)


@needs_matplotlib
def test_published_points_are_drawn_beside(points, drawn):
  published = [
    PublishedPoint('decode', 'one', 12.5, 3.0),
    PublishedPoint('prefill', 'two', 80.0, 9.0),
  ]
  figures.pareto('pareto.svg', points, published, 'somebody')
  for axes, point in zip(drawn[0].axes, published):
    (stars,) = (line for line in axes.lines if line.get_label() == 'somebody')
    assert (stars.get_xdata()[0], stars.get_ydata()[0]) == (point.x, point.y)
    assert point.name in [text.get_text() for text in axes.texts]


def test_the_papers_points_are_those_of_its_tables():
  """Costs of Table 2 are the paper's own: chips times seconds over tokens."""
  low, step, _, high, *others = measured_points()
  assert (low.panel, low.x, low.y) == ('prefill', 290, pytest.approx(64 * 290 / 2048))
  assert (step.panel, step.x, step.y) == ('decode', 28.5, 28.5)  # of two, the text's
  assert (high.panel, high.y) == ('decode', pytest.approx(64 * 6000 / 64 / 512))
  assert [p.x for p in others] == pytest.approx(
    [36.9, 160, 730 / 64, 20200, 5100 / 64, 20000, 28300]
  )
  assert others[2].name == 'int8, 16 chips, 32'
  assert [(p.x, p.y) for p in table_1_points()][-2:] == [(128, 43_000), (512, 10_700)]


@needs_matplotlib
def test_models_have_lines_of_their_own_in_one_figure(points, drawn):
  """Each has a front of its own; one legend names them all."""
  small = dataclasses.replace(MODEL, num_layers=8)
  machine = [Machine.parse('v4:2x2x1')]
  others = sweep(PlanRequest(small, 1, 256, 16), machine, (1, 16), ('int8',))
  figures.pareto('pareto.svg', [*points, *others])
  names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
  assert names == [
    'palm_8b, int8 weights',
    'palm_8b, bfloat16 weights',
    'd_model 4096, d_ff 16384, int8 weights',
  ]
  for axes, phase in zip(drawn[0].axes, ('decode', 'prefill')):
    line = next(line for line in axes.lines if line.get_label() == names[-1])
    best = [p for p in others if p.phase == phase and p.on_front]
    assert list(line.get_xdata()) == [1000 * p.seconds for p in best] and best
