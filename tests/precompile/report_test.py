"""The report follows from the compiled program, the chip and the model."""

import dataclasses
import json
import re

import pytest

from t5x_inference_ext import hardware
from t5x_inference_ext.config import preset
from t5x_inference_ext.errors import MeshError, RequestError, UserError
from t5x_inference_ext.precompile import analysis, fit
from t5x_inference_ext.precompile.analysis import Answer, analyze
from t5x_inference_ext.precompile.fit import Alternative, Shortage
from t5x_inference_ext.precompile.memory import CompiledMemory
from t5x_inference_ext.precompile.phases import COMPILE_PHASES
from t5x_inference_ext.precompile.report import report_text
from t5x_inference_ext.precompile.report_json import report_dict
from t5x_inference_ext.precompile.summary import time_bounds

SMALL = preset('palm_tiny', num_layers=10)
GIB = 2**30


def _only(monkeypatch, layouts: tuple[str, ...]) -> None:
  """Make these layouts the candidates for decode."""
  phase = dataclasses.replace(COMPILE_PHASES['decode'], layouts=layouts)
  monkeypatch.setitem(COMPILE_PHASES, 'decode', phase)


@pytest.fixture(scope='module')
def answer() -> Answer:
  return analyze(
    SMALL,
    'int8',
    'v4:2x2x1',
    'decode',
    8,
    128,
    layout='ws_2d/batch',
    mesh='2x2x1',
    scan_layers=True,
  )


@pytest.fixture(scope='module')
def shortage(answer) -> Answer:
  case = dataclasses.replace(answer.case, batch=4096)
  program = dataclasses.replace(
    answer.program, memory=CompiledMemory(GIB, 2 * GIB, 0, GIB, 30 * GIB)
  )
  return Answer(
    answer.slice,
    Shortage(
      case, answer.slice, 45 * GIB, 30 * GIB, 4 * GIB, 11 * GIB, 'RESOURCE_EXHAUSTED: too much'
    ),
    None,
    (),
    (Alternative('batch', answer.slice, program), Alternative('layout', answer.slice, program)),
  )


@pytest.mark.libtpu
def test_the_bounds_follow_from_the_chip(answer):
  chip, found = hardware.chip('v4'), time_bounds(answer)
  assert found.flops == pytest.approx(2 * SMALL.num_params * 8 / 4 / chip.bf16_flops)
  assert found.weights == pytest.approx(answer.program.memory.weights / chip.hbm_bandwidth)
  assert found.memory > found.weights


@pytest.mark.libtpu
def test_the_text_has_everything_in_one_screen(answer):
  text = report_text(answer)
  for words in (
    'model:  10 layers',
    'phase:  decode in ws_2d/batch',
    'v4:2x2x1, 4 chips, mesh',
    'fits: 0.0',
    'of 30.75 GiB',
    'weights 0.00, cache 0.00, temporaries',
    'with nothing overlapped',
    'with what the schedule overlaps',
    'calibrated by category: ',
    'the MFU',
    'weight-load bound',
    'FLOP bound',
    'where it goes: ',
    'collectives: over mesh axes',
    'copies and layout changes: ',
  ):
    assert words in text, words
  lines = text.splitlines()
  assert len(lines) < 60 and max(map(len, lines)) <= 120


def _faster(answer: Answer, factor: float) -> Answer:
  """Return the answer with an estimate that is too short."""
  costs = tuple(
    dataclasses.replace(c, seconds=c.seconds / factor, exposed_seconds=c.seconds / factor)
    for c in answer.estimate.costs
  )
  return dataclasses.replace(answer, estimate=dataclasses.replace(answer.estimate, costs=costs))


@pytest.mark.libtpu
def test_an_estimate_below_a_bound_is_called_an_error(answer):
  """No share of a bound is above 100%: the estimate is wrong then, and the report says so."""
  right = report_text(answer)
  assert 'error of the estimate' not in right and right.count('% of the time') == 3
  limits = time_bounds(answer)
  below_memory = 2 * answer.estimate.serial_seconds / limits.memory
  below_all = 2 * answer.estimate.serial_seconds / min(limits.flops, limits.weights)
  for factor, errors in ((below_memory, 1), (below_all, 3)):
    text = report_text(_faster(answer, factor))
    assert text.count('above the estimated time: an error of the estimate') >= errors
    shares = [float(share) for share in re.findall(r'([0-9.]+)%', text)]
    assert shares and max(shares) <= 100
  # JSON keeps the figures as they are.
  assert report_dict(_faster(answer, below_all))['mfu']['serial'] > 1


@pytest.mark.libtpu
def test_more_memory_than_there_is_has_no_share(answer):
  memory = dataclasses.replace(answer.program.memory, available=answer.program.memory.needed - 1)
  text = report_text(
    dataclasses.replace(answer, program=dataclasses.replace(answer.program, memory=memory))
  )
  assert '(above 100%: an error of the count)' in text


@pytest.mark.libtpu
def test_every_collective_is_listed_with_axes_bytes_and_time(answer):
  rows = report_dict(answer)['collectives']
  assert sum(row['seconds'] for row in rows) == pytest.approx(answer.estimate.by_kind['collective'])
  # A 2D layout gathers and reduce-scatters over both axes; nothing is sent along z of size 1.
  assert {axis for row in rows for axis in row['axes']} == {'x', 'y'}
  text = report_text(answer)
  for row in rows:
    assert row['bytes'] > 0 and row['seconds'] > 0 and row['devices'] in (2, 4)
    assert re.search(rf'{row["kind"]} +{"".join(row["axes"])} +{row["count"]} x', text), row


@pytest.mark.libtpu
def test_json_and_text_agree_and_add_up(answer):
  data = json.loads(json.dumps(report_dict(answer)))
  assert data['fits'] and data['slice'] == 'v4:2x2x1' and data['mesh'] == {'x': 2, 'y': 2, 'z': 1}
  assert data['case']['decode_layout'] == 'ws_2d/batch' and data['case']['model'] == SMALL.to_dict()
  serial = data['seconds']['serial']
  assert sum(row['seconds'] for row in data['operations']) == pytest.approx(serial)
  assert sum(data['seconds']['by_kind'].values()) == pytest.approx(serial)
  waits = sum(c.exposed_seconds for c in answer.estimate.costs if not c.seconds)
  assert 0 < data['seconds']['overlapped'] <= serial + waits
  assert data['mfu']['serial'] == pytest.approx(data['bounds']['flops'] / serial)
  assert data['memory']['needed'] == sum(
    data['memory'][k] for k in ('weights', 'cache', 'other', 'temporaries')
  )
  assert f'time: {serial * 1e3:.2f} ms a step' in report_text(answer)


@pytest.mark.libtpu
def test_the_layer_s_products_run_once_a_layer(answer):
  products = [row for row in report_dict(answer)['operations'] if row['kind'] == 'matmul']
  assert {row['count'] for row in products} == {1, 10}  # the logits', and of the 10 layers
  # All parameters but the norms' multiply; a single key head's columns are on more than one chip.
  assert sum(row['flops'] * row['count'] for row in products) == pytest.approx(
    2 * SMALL.num_params * 8 / 4, rel=0.05
  )


@pytest.mark.libtpu
def test_a_shortage_says_what_is_missing_and_what_would_do(shortage):
  text = report_text(shortage)
  for words in (
    'does not fit: 45.00 GiB are needed on each chip and 30.00 GiB are available',
    'weights 4.00, cache 11.00',
    'the rest 30.00',
    'RESOURCE_EXHAUSTED: too much',
    'would fit: --batch=8, 4.00 of 30.00 GiB (compiled)',
    'would fit: --layout=ws_2d/batch',
  ):
    assert words in text, words
  data = json.loads(json.dumps(report_dict(shortage)))
  assert not data['fits'] and data['memory']['needed'] == 45 * GIB
  assert [a['change'] for a in data['alternatives']] == ['batch', 'layout']
  nothing = report_text(dataclasses.replace(shortage, alternatives=()))
  assert 'no other layout, smaller batch or larger slice that was tried fits' in nothing


@pytest.mark.libtpu
def test_the_best_layout_has_the_least_estimate(monkeypatch):
  _only(monkeypatch, ('ws_2d/batch', 'ws_1d/batch', 'wg_xyz/batch'))
  answer = analyze(SMALL, 'int8', 'v4:2x2x1', 'decode', 6, 128, scan_layers=True)
  tried = {t.layout: t for t in answer.tried}
  assert set(tried) == {'ws_2d/batch', 'ws_1d/batch', 'wg_xyz/batch'}
  timed = {name: t.seconds for name, t in tried.items() if t.seconds is not None}
  assert (
    set(timed) == {'ws_2d/batch', 'ws_1d/batch'} and 'multiple of 4' in tried['wg_xyz/batch'].reason
  )
  assert str(answer.case.layout) == min(timed, key=timed.get)
  assert answer.estimate.serial_seconds == min(timed.values())
  text = report_text(answer)
  assert (
    f'layout: none given; {answer.case.layout} has the smallest estimated time of ws_2d/batch'
    in text
  )
  assert "wg_xyz/batch (can't be used here: wg_xyz/batch splits tokens" in ' '.join(text.split())


@pytest.mark.libtpu
def test_the_best_of_many_layers_is_found_as_it_will_run(monkeypatch):
  """Layouts are compared with a few unrolled layers, and the best is compiled with all of them."""
  _only(monkeypatch, ('ws_2d/batch', 'ws_1d/batch'))
  heard = []
  answer = analyze(SMALL, 'int8', 'v4:2x2x1', 'decode', 8, 128, say=heard.append)
  assert not answer.case.stacked and all(t.from_few_layers for t in answer.tried)
  # Each layout as a loop, with 2 and with 6 layers; then the best one.
  assert sum(text.startswith('compiling') for text in heard) == 2 * 3 + 1
  assert not any(c.kind == 'matmul' and c.count > 1 for c in answer.estimate.costs)
  expected = {t.layout: t.seconds for t in answer.tried}[str(answer.case.layout)]
  assert answer.estimate.serial_seconds == pytest.approx(expected, rel=0.05)
  assert ', extrapolated from a few layers' in ' '.join(report_text(answer).split())
  as_loop = analyze(SMALL, 'int8', 'v4:2x2x1', 'decode', 8, 128, scan_layers=True)
  assert as_loop.case.stacked and any(
    c.kind == 'matmul' and c.count == 10 for c in as_loop.estimate.costs
  )
  assert 'extrapolated' not in report_text(as_loop)


@pytest.mark.libtpu
def test_no_layout_may_do(monkeypatch):
  _only(monkeypatch, ('wg_xyz/batch',))
  with pytest.raises(
    UserError, match='none of the layouts wg_xyz/batch can be used: wg_xyz/batch splits tokens'
  ):
    analyze(SMALL, 'int8', 'v4:2x2x1', 'decode', 3, 128)


@pytest.mark.libtpu
def test_where_none_fits_the_nearest_is_reported(monkeypatch):
  needs = {'ws_2d/batch': 50 * GIB, 'ws_2d/heads': 40 * GIB, 'ws_1d/batch': 60 * GIB}

  def refuse(case, slice_, mesh=None):
    return Shortage(case, slice_, needs[str(case.layout)], 30 * GIB, GIB, GIB, 'no')

  monkeypatch.setattr(fit, 'try_compile', refuse)
  monkeypatch.setattr(analysis.fit, 'alternatives', lambda shortage, say: [])
  answer = analyze(SMALL, 'int8', 'v4:2x2x1', 'decode', 8, 128)
  assert str(answer.case.layout) == 'ws_2d/heads' and not answer.fits
  assert [t.reason for t in answer.tried] == ['does not fit'] * 3
  assert 'ws_2d/heads is the nearest to fitting of ws_2d/batch (does not fit)' in ' '.join(
    report_text(answer).split()
  )


@pytest.mark.parametrize(
  'arguments,error,words',
  [
    (('v4:9x9x9', 'decode', 8), MeshError, 'there is no v4 slice v4:9x9x9'),
    (('v7:2x2', 'decode', 8), MeshError, 'a slice is written generation:shape'),
    (('v4:2x2x1', 'train', 8), RequestError, 'phase must be one of'),
  ],
)
def test_what_makes_no_sense_is_refused_before_compiling(arguments, error, words):
  slice_name, phase, batch = arguments
  with pytest.raises(error, match=words):
    analyze(SMALL, 'int8', slice_name, phase, batch, 128, layout='ws_2d/batch')
