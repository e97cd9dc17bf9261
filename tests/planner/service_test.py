"""Services on slices: predicted prices, what fits, the cheapest that meets the targets."""

import dataclasses
import json
import re

import pytest

from t5x_inference_ext.commands import plan as command
from t5x_inference_ext.config import preset
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.errors import MeshError, RequestError
from t5x_inference_ext.planner.case import PassCase
from t5x_inference_ext.planner.costs import cost
from t5x_inference_ext.planner.machine import Machine
from t5x_inference_ext.planner.request import PlanRequest
from t5x_inference_ext.planner.service import study_service
from t5x_inference_ext.planner.service_candidates import all_candidates
from t5x_inference_ext.planner.service_options import ServiceOptions
from t5x_inference_ext.planner.service_prices import PlannedPrices
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.simulator.prices import PricedProgram, PricedService
from t5x_inference_ext.simulator.trace import RandomTrace
from t5x_inference_ext.speculation import Speculation

PALM = preset('palm_8b')
REQUEST = PlanRequest(PALM, 1, 256, 16)
TRACE = RandomTrace(20, 256, 16).arrivals(4, PALM.vocab_size)


def case(phase: str, batch: int, length: int, context: int, layout='ws_2d/batch') -> PassCase:
  machine = Machine.parse('v4:2x2x1')
  return PassCase(
    PALM, machine, (1, 2, 2), Layout.parse(layout), phase, batch, length, context, 'int8'
  )


class TestPlannedPrices:
  CONFIG = SchedulerConfig(32, 1024, page_size=128, prefix_bytes=2**20, end_ids=())

  def prices(self, decode_layout='ws_2d/batch') -> PlannedPrices:
    prefill, decode = case('prefill', 1, 16, 16), case('decode', 32, 1, 9, decode_layout)
    return PlannedPrices(cost(prefill), cost(decode), self.CONFIG, 2e-4)

  def test_a_chunk_is_a_pass_after_what_is_cached(self):
    found = self.prices().seconds('prefill_chunk', tokens=256, read=512)
    assert found == cost(case('prefill', 1, 256, 768)).seconds

  def test_a_step_reads_the_pages_of_its_shard(self):
    # By batch, each of the 4 chips has 8 rows: 65 pages are 65 * 128 / 8 positions of each.
    by_batch = self.prices().seconds('decode_steps', read=65, read_shared=0)
    assert by_batch == cost(case('decode', 32, 1, 1040)).seconds
    # By heads, all chips have all 32 rows.
    by_heads = self.prices('ws_2d/heads').seconds('decode_steps', read=257, read_shared=0)
    assert by_heads == cost(case('decode', 32, 1, 1028, 'ws_2d/heads')).seconds
    assert self.prices().seconds('decode_steps', read=65, read_shared=8) > by_batch

  def test_an_insertion_reads_and_writes_keys_and_values(self):
    per_position = 2 * PALM.num_layers * PALM.num_kv_heads * PALM.d_head * 2  # of bfloat16
    found = self.prices().seconds('insert', positions=1000)
    assert found == pytest.approx(2 * 1000 * per_position / (0.903 * 1.2e12))
    assert self.prices().seconds('start_prefill', blocks=2) == pytest.approx(found * 64 / 1000)

  def test_a_step_that_checks_drafts_is_a_pass_over_them_after_a_draft_models_steps(self):
    decode = case('decode', 32, 1, 1040)
    sizes = dict(draft=4, read=65, read_shared=0)
    checked = dataclasses.replace(decode, phase='verify', length=5, context=1044)
    assert self.prices().seconds('speculative_steps', **sizes) == cost(checked).seconds
    draft = dataclasses.replace(decode, config=dataclasses.replace(PALM, num_layers=2))
    prices = PlannedPrices(
      cost(case('prefill', 1, 16, 16)), cost(decode), self.CONFIG, 2e-4, cost(draft)
    )
    both = cost(checked).seconds + 4 * cost(draft).seconds
    assert prices.seconds('speculative_steps', **sizes) == pytest.approx(both)

  def test_the_host_takes_what_was_given(self):
    assert self.prices().seconds('host') == 2e-4
    assert self.prices().seconds('start') == self.prices().seconds('start_prefill', blocks=0) == 0


class TestCandidates:
  def test_each_number_of_slots_has_its_layouts_and_fits(self):
    machines = [Machine.parse('v4:2x2x1'), Machine.parse('v4:2x2x2')]
    found = all_candidates(REQUEST, machines, (8, 32), TRACE, 1e-4)
    assert [(str(c.machine), c.config.slots) for c in found] == [
      (str(machine), slots) for machine in machines for slots in (8, 32)
    ]
    for each in found:
      assert each.config.max_length >= 256 + 16 - 1
      assert 0 < each.memory <= each.machine.chip.usable_bytes
      assert each.config.slots == each.model.padded_batch(each.config.slots)

  def test_more_slots_take_more_memory_until_none_fit(self):
    machine = Machine.parse('v5e:1x1')
    few, many = (all_candidates(REQUEST, [machine], (n,), TRACE, 0)[0] for n in (8, 256))
    assert many.memory > few.memory
    with pytest.raises(RequestError, match='no service fits: 65536 slots of 271 positions need'):
      all_candidates(REQUEST, [machine], (2**16,), TRACE, 0)

  def test_a_draft_model_takes_memory_and_needs_the_vocabulary(self):
    machines, itself = [Machine.parse('v4:2x2x2')], Speculation('draft', 4, 'palm_8b')
    plain, drafted = (
      all_candidates(REQUEST, machines, (8,), TRACE, 0, speculate)[0]
      for speculate in (None, itself)
    )
    assert drafted.config.speculate == itself
    assert 1.3 < drafted.memory / plain.memory < 2
    other = REQUEST.replace(config=dataclasses.replace(PALM, vocab_size=512))
    with pytest.raises(RequestError, match='palm_8b has a vocabulary of 256128 tokens and the mod'):
      all_candidates(other, machines, (8,), TRACE, 0, itself)

  def test_a_slice_that_does_not_divide_the_model_is_left_out(self):
    tiny = dataclasses.replace(PALM, d_model=6, d_ff=12)
    machines = [Machine.parse(name) for name in ('v4:2x2x2', 'v4:1x1x1')]
    found = all_candidates(REQUEST.replace(config=tiny), machines, (8,), TRACE, 0)
    assert {str(c.machine) for c in found} == {'v4:1x1x1'}
    with pytest.raises(MeshError):
      all_candidates(REQUEST.replace(config=tiny), machines[:1], (8,), TRACE, 0)


class TestStudies:
  def study(self, slices=('v4:1x1x1', 'v4:2x2x1'), slots=8, speculate=None, **options):
    machines = [Machine.parse(name) for name in slices]
    options = ServiceOptions(requests=40, **options)
    return study_service(REQUEST, machines, slots, options, speculate=speculate)

  def test_the_cheapest_that_meets_the_targets_is_chosen(self):
    loose = self.study(rate='2,30')
    assert loose.rates == (2, 30) and len(loose.runs) == 4
    one, four = loose.runs[:2]
    assert str(loose.cheapest(2).candidate.machine) == 'v4:1x1x1'
    limit = (one.service.between.p95 + four.service.between.p95) / 2 * 1e3
    tight = self.study(rate='2', tpot_ms=limit)
    assert [run.meets for run in tight.runs] == [False, True]
    assert str(tight.cheapest(2).candidate.machine) == 'v4:2x2x1'
    assert self.study(rate='2', tpot_ms=limit, ttft_ms=0.001).cheapest(2) is None

  def test_a_service_that_refuses_anyone_meets_nothing(self):
    busy = self.study(rate='1000', max_waiting_requests=4)
    assert all(run.service.refused and not run.meets for run in busy.runs)

  def test_cost_counts_idle_chips(self):
    slow, fast = self.study(slices=('v4:2x2x1',), rate='0.5,5').runs
    assert slow.chip_seconds_per_token == pytest.approx(
      4 * slow.service.seconds / slow.service.tokens
    )
    assert slow.chip_seconds_per_token > 5 * fast.chip_seconds_per_token
    assert slow.chip_hours_per_million == pytest.approx(slow.chip_seconds_per_token / 0.0036)

  def test_drafts_pay_where_they_are_right(self):
    drafts = dict(slices=('v4:2x2x1',), rate='2', speculate=Speculation('ngram', 8))
    (plain,), *runs = (
      self.study(**{**drafts, **more}).runs
      for more in ({'speculate': None}, {'acceptance': '0.9'}, {'acceptance': '0'})
    )
    (right,), (wrong,) = runs
    assert right.service.between.p50 < 0.6 * plain.service.between.p50
    assert wrong.service.between.p50 < 1.05 * plain.service.between.p50
    with pytest.raises(RequestError, match='give --acceptance'):
      self.study(**drafts)

  def test_measured_prices_take_the_place_of_predicted_ones(self, tmp_path):
    path = prices_file(tmp_path, step=0.25)
    (run,) = self.study(slices=('v4:2x2x1',), slots=None, rate='0.1', prices=path).runs
    assert run.service.between.p50 == pytest.approx(0.25, rel=0.01)
    assert run.candidate.config.slots == 4 and run.candidate.memory is None
    for arguments, words in (
      ({'slots': 8}, 'prices is for one slice and its slots'),
      ({'slots': None, 'slices': ('v4:1x1x1', 'v4:2x2x1')}, 'prices is for one slice'),
      ({'slots': None, 'slices': ('v4:1x1x1',)}, 'is for 4 chips and v4:1x1x1 has 1'),
      ({'speculate': Speculation('ngram', 2)}, 'a file of prices says which drafts'),
    ):
      with pytest.raises(RequestError, match=words):
        self.study(rate='1', prices=path, **arguments)


def prices_file(tmp_path, step: float) -> str:
  rows = (
    PricedProgram('prefill_chunk', {'tokens': 288, 'read': 2048}, 0.05),
    PricedProgram('decode_steps', {'read': 64, 'read_shared': 0}, step),
    PricedProgram('insert', {'positions': 1}, 0.001),
    PricedProgram('start_prefill', {'blocks': 0}, 0.0),
    *(PricedProgram(name, {}, 0.0) for name in ('host', 'start')),
  )
  layouts = Layout.parse('ws_2d/heads'), Layout.parse('ws_2d/heads')
  path = tmp_path / 'prices.json'
  path.write_text(
    PricedService(SchedulerConfig(4, 2048, end_ids=()), (1, 2, 2), layouts, rows).text()
  )
  return str(path)


@pytest.mark.parametrize(
  'options, words',
  [
    ({'requests': 7}, 'requests is for a simulated service: give --trace or --rate too'),
    ({'ttft_ms': 5.0}, 'ttft_ms is for a simulated service'),
    ({'rate': '2,none'}, "rate must be numbers above 0, separated by commas, got '2,none'"),
    ({'rate': '0'}, 'rate must be numbers above 0'),
    ({'rate': '1', 'ttft_ms': 0}, 'ttft_ms must be above 0 and finite, got 0'),
    ({'rate': '1', 'length_spread': -0.5}, 'length_spread must be 0 or more and finite'),
    ({'rate': '1', 'host_us': float('nan')}, 'host_us must be 0 or more and finite'),
    ({'rate': '1', 'requests': 0}, 'requests must be a whole number, 1 or more, got 0'),
  ],
)
def test_options_out_of_their_range_are_refused(options, words):
  with pytest.raises(RequestError, match=words):
    ServiceOptions(**options)


class TestCommand:
  SERVICE = [
    '--model=palm_tiny',
    '--slice=v4:1x1x1,v4:2x2x1',
    '--batch=8',
    '--input_length=48',
    '--output_length=16',
    '--requests=20',
  ]

  @pytest.fixture(autouse=True)
  def platforms(self, monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')

  def run(self, *argv: str) -> int:
    return command.run(['plan', *argv])

  def test_a_row_for_each_slice_and_rate_and_a_choice_for_each_rate(self, tmp_path, capsys):
    path = tmp_path / 'service.json'
    asked = [*self.SERVICE, '--rate=5,1', '--ttft_ms=1000', '--chip_hour=3.22', f'--json={path}']
    assert self.run(*asked) == 0
    out = capsys.readouterr().out
    rows = re.findall(r'^(v4:\S+) +8 +(\d+) +(.+)$', out, re.MULTILINE)
    assert [row[:2] for row in rows] == [
      (slice_, rate) for rate in '15' for slice_ in ('v4:1x1x1', 'v4:2x2x1')
    ]
    data = json.loads(path.read_text())
    for row, run in zip(rows, data['runs']):
      cells = row[2].split()
      assert float(cells[1]) == pytest.approx(run['first_token']['p95'] * 1e3, rel=0.01)
      assert float(cells[4]) == pytest.approx(run['between_tokens']['p95'] * 1e3, rel=0.01)
      cost_of_million = 3.22 * run['chip_seconds_per_token'] * 1e6 / 3600
      assert float(cells[8]) == pytest.approx(cost_of_million, rel=0.001)
    text = ' '.join(out.split())
    assert '5 requests a second: the cheapest within 1000 ms to the first token for 95%' in text
    assert data['cheapest']['5']['slice'] == 'v4:1x1x1'

  def test_a_log_is_simulated(self, tmp_path, capsys):
    path = tmp_path / 'log.jsonl'
    rows = [{'arrival': i / 4, 'input_length': 30 + i, 'output_length': 5} for i in range(9)]
    path.write_text('\n'.join(map(json.dumps, rows)))
    assert self.run(*self.SERVICE[:3], f'--trace={path}') == 0
    out = ' '.join(capsys.readouterr().out.split())
    assert f'9 requests of {path}, 34 tokens in, 5 out on average' in out
    assert '4 requests a second: the cheapest is v4:1x1x1 with 8 slots' in out

  @pytest.mark.parametrize(
    'argv, words',
    [
      (['--rate=1', '--sweep'], 'sweep applies to a single plan, and this run simulates a service'),
      (['--rate=1', '--gin_output=x.gin'], 'gin_output applies to a single plan'),
      (['--rate=1', '--phase=decode'], 'phase applies to a single plan'),
      (['--tpot_ms=5'], 'tpot_ms is for a simulated service: give --trace or --rate too'),
      (['--trace=nowhere.jsonl'], "can't read nowhere.jsonl: No such file"),
      (['--rate=1', '--mesh=1x2x2'], 'mesh=1x2x2 needs one slice'),
    ],
  )
  def test_errors_are_one_line(self, argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert self.run(*self.SERVICE[:5], *argv) == 2
    err = capsys.readouterr().err
    assert words in err and err.count('\n') == 1

  def test_the_figure_has_a_line_for_each_service(self, tmp_path, capsys):
    asked = [*self.SERVICE, '--rate=1,5', '--figures', f'--output_dir={tmp_path}']
    assert self.run(*asked) == 0
    assert 'figure: ' in capsys.readouterr().out
    drawn = (tmp_path / 'service.svg').read_text()
    for words in (
      'palm_tiny, 20 requests',
      'v4:1x1x1, 8 slots: p95',
      'v4:2x2x1, 8 slots: p50',
      'requests a second',
      'to the first token (ms)',
    ):
      assert words in drawn

  def test_gin_says_the_same(self, tmp_path, capsys):
    by_flags, by_gin = tmp_path / 'flags', tmp_path / 'gin'
    assert self.run(*self.SERVICE, '--rate=1', f'--json={by_flags}') == 0
    assert (
      self.run(
        '--gin_file=t5x_inference_ext/configs/runs/plan.gin',
        '--gin_file=t5x_inference_ext/configs/models/palm_tiny.gin',
        '--gin.SLICE="v4:1x1x1,v4:2x2x1"',
        '--gin.BATCH=8',
        '--gin.INPUT_LENGTH=48',
        '--gin.OUTPUT_LENGTH=16',
        '--gin.RATE="1"',
        '--gin.run.plan.requests=20',
        f'--gin.JSON_FILE="{by_gin}"',
      )
      == 0
    )
    assert json.loads(by_flags.read_text()) == json.loads(by_gin.read_text())
