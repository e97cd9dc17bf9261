"""Tables of prices: what is between rows, files, and errors."""

import json

import pytest

from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.simulator import measure
from t5x_inference_ext.simulator.measure import measure_service
from t5x_inference_ext.simulator.prices import PROGRAMS, PricedProgram, PricedService, PriceTable
from t5x_inference_ext.speculation import Speculation
from tests import memory, reference


def test_a_program_takes_what_the_next_larger_one_takes():
  sizes = ((16, 0, 1.0), (16, 512, 2.0), (64, 0, 3.0), (64, 512, 4.0))
  table = PriceTable(
    [PricedProgram('prefill_chunk', {'tokens': t, 'read': r}, s) for t, r, s in sizes], 'FILE'
  )
  for tokens, read, seconds in (
    (16, 0, 1.0),
    (9, 0, 1.0),
    (16, 1, 2.0),
    (17, 0, 3.0),
    (64, 9, 4.0),
  ):
    assert table.seconds('prefill_chunk', tokens=tokens, read=read) == seconds
  assert table.seconds('wake') == 0.0  # tables may lack it
  with pytest.raises(RequestError) as refused:
    table.seconds('prefill_chunk', tokens=64, read=513)
  assert str(refused.value) == (
    'FILE has no row for prefill_chunk(tokens=64, read=513) or larger sizes: add one'
  )


def test_copies_take_time_by_their_number():
  rows = [PricedProgram('save_blocks', {'blocks': n}, s) for n, s in ((2, 3.0), (6, 5.0), (8, 9.0))]
  table = PriceTable(rows)
  found = [table.seconds('save_blocks', blocks=n) for n in (1, 2, 4, 6, 7, 9)]
  assert found == pytest.approx([2.5, 3, 4, 5, 7, 11])
  alone = PriceTable([PricedProgram('insert', {'positions': 5}, 2.0)])
  assert alone.seconds('insert', positions=100) == 2.0


SERVICE = PricedService(
  SchedulerConfig(2, 64, end_ids=()),
  (1, 2, 2),
  (Layout.parse('wg_xyz/batch'), Layout.parse('ws_2d/heads')),
  (
    PricedProgram('decode_steps', {'read': 3, 'read_shared': 0}, 0.004),
    PricedProgram('host', {}, 0.0002),
  ),
  shared=True,
)


def test_a_file_holds_everything(tmp_path):
  path = tmp_path / 'prices.json'
  path.write_text(SERVICE.text())
  assert PricedService.read(str(path)) == SERVICE


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda data: data.pop('mesh'), "no 'mesh'"),
    (lambda data: data.update(shared='yes'), "shared must be true or false, got 'yes'"),
    (lambda data: data.update(mesh='2x'), '2x'),
    (lambda data: data.update(layouts=['ws_2d/batch']), 'not enough values'),
    (lambda data: data['scheduler'].update(slots=0), 'slots must be'),
    (lambda data: data['scheduler'].update(nonsense=1), "argument 'nonsense'"),
    (lambda data: data['programs'][0].pop('read'), "no 'read'"),
    (lambda data: data['programs'][0].update(read=1.5), 'sizes that are not whole numbers'),
    (lambda data: data['programs'][0].update(seconds=-1), 'takes -1 seconds'),
    (lambda data: data['programs'][0].update(program='dance'), "no program is called 'dance'"),
  ],
)
def test_a_file_that_is_none_is_refused_with_the_reason(tmp_path, change, words):
  path, data = tmp_path / 'prices.json', json.loads(SERVICE.text())
  change(data)
  path.write_text(json.dumps(data))
  with pytest.raises(RequestError) as refused:
    PricedService.read(str(path))
  assert str(path) in str(refused.value) and words in str(refused.value)


def test_every_program_of_a_service_is_measured():
  engine = memory.engine(memory.ODD, reference.random_tensors(memory.ODD), '1x1x1', stacked=True)
  config = SchedulerConfig(
    2, 64, page_size=32, prefix_bytes=2**14, prefill_chunk=16, shared_pages=2, end_ids=()
  )
  found = measure_service(engine.model, engine.weights, config, repeats=1)
  assert {row.program for row in found.programs} == set(PROGRAMS) - {'speculative_steps'}
  # On a CPU the programs' own times include their starts. What is a difference of two times is 0
  # where it is less than the noise.
  without_time = {row.program for row in found.programs if not row.seconds}
  assert found.shared and {'start'} <= without_time <= {'start', 'save_blocks', 'wake'}
  sizes = [tuple(r.sizes.values()) for r in found.programs if r.program == 'decode_steps']
  assert sizes == config.step_reads(1) == [(3, 0), (5, 0), (5, 2)]
  chunks = [tuple(r.sizes.values()) for r in found.programs if r.program == 'prefill_chunk']
  assert chunks == [(16, read) for read in config.prefill_reads]


@pytest.mark.usefixtures('quick_programs')
def test_steps_that_check_drafts_are_measured_and_kept_in_a_file(tmp_path):
  engine = memory.engine(memory.ODD, reference.random_tensors(memory.ODD), '1x1x1', stacked=True)
  sizes = dict(page_size=32, page_reads=1, prefill_chunk=16, end_ids=())
  config = SchedulerConfig(2, 96, speculate=Speculation('ngram', 4), **sizes)
  timer = measure._Timer(engine.model, engine.weights, config, repeats=1)
  rows = list(timer.steps())
  assert [(row.program, row.sizes.get('draft')) for row in rows] == [
    ('decode_steps', None),
    ('speculative_steps', 2),
    ('speculative_steps', 4),
  ]
  path = tmp_path / 'prices.json'
  layouts = engine.model.prefill_layout, engine.model.decode_layout
  written = PricedService(config, (1, 1, 1), layouts, tuple(rows))
  path.write_text(written.text())
  assert PricedService.read(str(path)) == written
  # Every pass checked the drafts that it should, and every draft was right.
  timer._fill(SamplingParams(logit_bias={0: 1e6}))
  work = timer._executor.fetch(timer._step(*config.step_reads(1)[0], 2)).work
  assert work.passes.tolist() == [0, 0, 1] and work.drafted == work.accepted == 8
