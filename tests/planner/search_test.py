"""The search: nothing that it leaves out is better, and it says why where nothing fits."""

import dataclasses
import itertools

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
import pytest

from t5x_inference_ext import config
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import MeshError, RequestError, UserError
from t5x_inference_ext.planner import search
from t5x_inference_ext.planner.advice import NothingFits, largest_that
from t5x_inference_ext.planner.case import PassCase
from t5x_inference_ext.planner.choose import choose
from t5x_inference_ext.planner.costs import cost
from t5x_inference_ext.planner.json_text import plan_json
from t5x_inference_ext.planner.machine import Machine
from t5x_inference_ext.planner.network import axis_sizes
from t5x_inference_ext.planner.report import plan_text
from t5x_inference_ext.planner.request import Plan, PlanRequest, pair_memories, tightest_phase
from t5x_inference_ext.sharding.activations import padded_batch
from t5x_inference_ext.sharding.layout import ATTENTION, FEEDFORWARD, Layout, check_pair

SMALL = ModelConfig(num_layers=2, d_model=256, d_ff=1024, num_heads=8, d_head=32, vocab_size=384)
PALM = config.preset('palm_540b')
# Each example is a search: shrinking one that fails would take minutes.
NO_SHRINKING = (Phase.explicit, Phase.generate)
MACHINES = [
  Machine.parse(name)
  for name in ('v4:1x1x1', 'v4:2x2x1', 'v4:2x2x2', 'v5e:2x4', 'v4:4x4x4', 'A100:8')
]


def every_plan(request: PlanRequest, machine: Machine):
  """All pairs of all layouts that can run, on all meshes, without any of the search's shortcuts."""
  layouts = [
    Layout(f, a)
    for f, a in itertools.product(FEEDFORWARD, ATTENTION)
    if (f, a) != ('wg_xyz', 'heads')
  ]

  def costs(mesh, phase, length, context):
    found = []
    for layout in layouts:
      try:
        case = PassCase(
          request.config,
          machine,
          mesh,
          layout,
          phase,
          request.batch,
          length,
          context,
          request.weights,
          request.cache,
        )
      except MeshError:
        continue
      if (
        phase == 'decode' and padded_batch(layout, request.batch, axis_sizes(mesh)) != request.batch
      ):
        continue  # a run would take more rows
      found.append(cost(case, request.convention, request.efficiency))
    return found

  for mesh in machine.meshes(request.config):
    prefills = costs(mesh, 'prefill', request.input_length, request.input_length)
    for p, d in itertools.product(prefills, costs(mesh, 'decode', 1, request.mean_context)):
      try:
        check_pair(p.case.layout, d.case.layout)
      except MeshError:
        continue
      yield Plan(request, p, d)


@settings(max_examples=25, deadline=None, derandomize=True, phases=NO_SHRINKING)
@given(
  st.sampled_from(MACHINES),
  st.integers(1, 40),
  st.integers(1, 500),
  st.integers(1, 100),
  st.sampled_from([1, 8]),
  st.sampled_from(['int8', 'bfloat16']),
  st.sampled_from(['parallel', 'serial']),
)
def test_no_other_layout_beats_the_choice(machine, batch, tokens, output, kv_heads, weights, block):
  model = dataclasses.replace(SMALL, num_kv_heads=kv_heads, block=block)
  request = PlanRequest(model, batch, tokens, output, weights=weights)
  choice = choose(request, [machine])
  least = min(plan.seconds for plan in every_plan(request, machine) if plan.fits)
  assert choice.plan.seconds <= least * (1 + 1e-12)
  order = [plan.seconds for plan in choice.ranked if plan.fits]
  assert order == sorted(order) and choice.plan is choice.ranked[0]


@settings(max_examples=30, deadline=None, derandomize=True, phases=NO_SHRINKING)
@given(
  st.sampled_from(MACHINES),
  st.integers(1, 80),
  st.integers(1, 300),
  st.integers(1, 50),
  st.sampled_from(['batch', 'input_length', 'output_length']),
  st.integers(1, 7),
  st.sampled_from(['torus', 'paper']),
  st.sampled_from([1, 8]),
)
def test_a_request_for_more_never_takes_less(
  machine, batch, tokens, output, what, by, convention, kv_heads
):
  """Whatever divides: the planner may add empty rows and positions."""
  request = PlanRequest(
    dataclasses.replace(SMALL, num_kv_heads=kv_heads), batch, tokens, output, convention=convention
  )
  more = request.replace(**{what: getattr(request, what) + by})
  # The paper's network makes no layout by batch of rows that fill no axis, which a few more rows
  # may.
  if convention == 'paper' and what == 'batch':
    return
  before, after = (search.plans(r, machine)[0].seconds for r in (request, more))
  assert after >= before * (1 - 1e-12)


@settings(max_examples=5, deadline=None, derandomize=True, phases=NO_SHRINKING)
@given(
  st.integers(1, 40),
  st.integers(1, 3000),
  st.sampled_from([1, 8]),
  st.sampled_from(['int8', 'bfloat16']),
)
def test_a_larger_slice_needs_no_more_memory_per_chip(batch, tokens, kv_heads, weights):
  request = PlanRequest(
    dataclasses.replace(SMALL, num_kv_heads=kv_heads), batch, tokens, 8, weights=weights
  )
  needs = [
    min(p.memory.needed for p in search.plans(request, Machine.parse(name)))
    for name in ('v4:1x1x1', 'v4:2x2x1', 'v4:2x2x2', 'v4:2x2x4', 'v4:2x4x4', 'v4:4x4x4')
  ]
  assert needs == sorted(needs, reverse=True)


def test_empty_rows_are_added_where_they_save_time():
  plan = choose(
    PlanRequest(config.preset('palm_62b'), 63, 8000, 500), [Machine.parse('v4:4x4x4')]
  ).plan
  assert plan.rows == 64
  # Nobody is charged less for them, nor credited for their work.
  assert plan.cost_of(plan.decode) == 64 * plan.decode.seconds / 63
  assert plan.mfu_of(plan.decode) == pytest.approx(plan.decode.mfu * 63 / 64)


def test_the_total_is_the_prefill_and_all_steps():
  plan = choose(PlanRequest(PALM, 64), [Machine.parse('v4:4x4x4')]).plan
  assert plan.seconds == plan.prefill.seconds + 64 * plan.decode.seconds
  assert plan.prefill.case.length == 1920 and plan.decode.case.context == 1952
  pinned = PlanRequest(PALM, 64, layouts=tuple(map(Layout.parse, ('wg_xyz/batch', 'ws_2d/batch'))))
  memories = choose(pinned, [Machine.parse('v4:4x4x4')]).plan.memories
  assert memories['prefill'].cache == memories['decode'].cache
  assert plan.request.context == 1984
  assert plan.chip_seconds_per_token == pytest.approx(64 * plan.seconds / 64**2)


def test_one_chip_has_one_layout():
  choice = choose(PlanRequest(SMALL, 3, 16, 4), [Machine.parse('v4:1x1x1')])
  assert [p.layouts for p in choice.ranked] == [('ws_2d/heads', 'ws_2d/heads')]


@pytest.mark.parametrize('mesh', [(4, 4, 4), (1, 16, 4), (64, 1, 1)])
def test_no_layout_comes_twice_under_two_names(mesh):
  request = PlanRequest(PALM, 64, mesh=mesh)
  for phase in ('prefill', 'decode'):
    found = search.phase_costs(request, Machine.parse('v4:4x4x4'), mesh, phase, 64)
    placed = [
      (
        c.case.sharding.attention_heads,
        c.case.sharding.attention_rows,
        c.case.sharding.attention_positions,
        tuple(sorted(c.parts.items())),
      )
      for c in found
      if c.case.layout.feedforward != 'ws_1d'
    ]
    assert len(placed) == len(set(placed))


def test_a_mesh_that_is_asked_for_is_taken():
  plan = choose(PlanRequest(PALM, 64, mesh=(16, 2, 2)), [Machine.parse('v4:4x4x4')]).plan
  assert plan.mesh == (16, 2, 2)
  with pytest.raises(MeshError, match='the mesh 2x2x2 has 8 positions and v4:4x4x4 has 64 chips'):
    choose(PlanRequest(PALM, 64, mesh=(2, 2, 2)), [Machine.parse('v4:4x4x4')])


# One of several machines and batches.

V4 = [Machine.parse(name) for name in ('v4:2x2x2', 'v4:2x2x4', 'v4:4x4x4')]
PALM_62B = config.preset('palm_62b')


def test_the_objectives():
  found = {
    o: choose(PlanRequest(PALM_62B, 1, 512, 64), V4, o, batches=(1, 64))
    for o in ('latency', 'throughput', 'cost')
  }
  for objective, key in (
    ('latency', lambda p: p.seconds),
    ('throughput', lambda p: -p.tokens_per_second),
    ('cost', lambda p: p.chip_seconds_per_token),
  ):
    choice = found[objective]
    keys = [key(p) for p in (choice.plan, *choice.others)]
    assert keys == sorted(keys) and len(keys) == len(V4) * 2
  assert found['latency'].plan.request.batch == 1 and found['latency'].plan.machine.chips == 64
  assert found['throughput'].plan.request.batch == 64 and found['cost'].plan.machine.chips < 64
  with pytest.raises(UserError, match='objective must be one of latency, throughput, cost'):
    choose(PlanRequest(SMALL, 1), V4, 'speed')


def test_the_cheapest_slice_that_meets_a_target():
  request = PlanRequest(PALM_62B, 16, 512, 64)
  all_of_them = [choose(request, [m]).plan for m in V4]
  target = sorted(p.seconds for p in all_of_them)[1] * 1.01
  choice = choose(request, V4, target=target)
  meeting = [p for p in all_of_them if p.seconds <= target]
  assert len(meeting) == 2 == len(choice.others) + 1
  assert choice.plan.chip_seconds_per_token == min(p.chip_seconds_per_token for p in meeting)


def test_a_target_that_nothing_meets_is_said_with_how_far_off():
  with pytest.raises(
    NothingFits, match=r'nothing meets 1 ms: the fastest is v4:4x4x4 with .* ms .* times the target'
  ):
    choose(PlanRequest(PALM_62B, 16, 512, 64), V4, target=1e-3)


def test_what_does_not_fit_says_how_far_off_and_what_would():
  with pytest.raises(NothingFits) as raised:
    choose(PlanRequest(PALM, 64, weights='bfloat16'), [Machine.parse('v4:2x4x4')])
  message = str(raised.value)
  assert (
    'nothing fits: with the least memory' in message
    and 'and has 30.75: ' in message
    and 'too many' in message
  )
  assert message.endswith('what would fit: int8 weights; v4:4x4x4')
  for change in (dict(weights='int8'), dict(machine='v4:4x4x4')):  # as promised
    machine = Machine.parse(change.pop('machine', 'v4:2x4x4'))
    assert choose(PlanRequest(PALM, 64, **{'weights': 'bfloat16', **change}), [machine]).plan.fits


def _unpadded(plan: Plan) -> Plan:
  """Return a plan without the empty positions that save time and take a little memory."""
  case = dataclasses.replace(plan.prefill.case, least_padded=0)
  return dataclasses.replace(plan, prefill=dataclasses.replace(plan.prefill, case=case))


@settings(max_examples=40, deadline=None, derandomize=True, phases=NO_SHRINKING)
@given(
  st.sampled_from(['v4:1x1x1', 'v4:2x2x1', 'v4:2x2x4', 'v5e:2x4', 'A100:8']),
  st.integers(1, 3000),
  st.integers(1, 100_000),
  st.sampled_from(['both', 'prefill', 'decode']),
  st.sampled_from(['torus', 'paper']),
)
def test_whether_a_plan_fits_is_known_without_prices(name, batch, tokens, phase, convention):
  request = PlanRequest(
    config.preset('palm_8b'), batch, tokens, 8, phase=phase, convention=convention
  )
  machine = Machine.parse(name)
  found = search.plans(request, machine)
  assert search.fits(request, machine) == any(plan.fits for plan in found)
  needed, prefill, decode = search.least_memory(request, machine)
  assert needed == min(_unpadded(plan).memory.needed for plan in found)
  memories = pair_memories(request, prefill, decode)
  assert needed == memories[tightest_phase(request, memories)].needed


@pytest.mark.parametrize('most', [0, 1, 2, 3, 7, 8, 12, 16, 17, 98, 99])
def test_the_largest_number_that_fits_is_found(most):
  asked = []
  found = largest_that(lambda n: asked.append(n) or n <= most, 100)
  assert found == most and max(asked) < 100 and len(asked) <= 14


def test_the_paper_is_searched_for_once(monkeypatch):
  choice = choose(PlanRequest(PALM, 64), [Machine.parse('v4:4x4x4')])
  conventions, plans = [], search.plans

  def counted(request, machine):
    conventions.append(request.convention)
    return plans(request, machine)

  monkeypatch.setattr(search, 'plans', counted)
  assert choice.paper_plan.layouts == ('wg_xy/heads', 'ws_2d/batch')
  plan_text(choice), plan_json(choice)
  assert conventions == ['paper']
  paper = choose(PlanRequest(PALM, 64, convention='paper'), [Machine.parse('v4:4x4x4')])
  assert paper.paper_plan is None


def test_the_largest_batch_that_fits_is_named():
  slice_, request = Machine.parse('v4:2x2x1'), PlanRequest(config.preset('palm_8b'), 1024, 4000, 64)
  with pytest.raises(NothingFits) as raised:
    choose(request, [slice_])
  batch = int(str(raised.value).partition('a batch of ')[2].partition(';')[0])
  assert choose(request.replace(batch=batch), [slice_]).plan.fits
  with pytest.raises(NothingFits):
    choose(request.replace(batch=batch + 1), [slice_])


def test_the_longest_prompts_that_fit_are_named():
  slice_, request = (
    Machine.parse('v4:2x2x1'),
    PlanRequest(config.preset('palm_8b'), 1, 10_000_000, 64),
  )
  with pytest.raises(NothingFits) as raised:
    choose(request, [slice_])
  length = int(str(raised.value).partition('prompts of ')[2].partition(' tokens')[0])
  assert choose(request.replace(input_length=length), [slice_]).plan.fits
  with pytest.raises(NothingFits):
    choose(request.replace(input_length=length + 1), [slice_])


def test_a_model_that_no_machine_divides_is_refused():
  with pytest.raises(MeshError, match='d_model=250 does not divide over the 4 devices'):
    choose(PlanRequest(dataclasses.replace(SMALL, d_model=250), 1), [Machine.parse('v4:2x2x1')])


@pytest.mark.parametrize(
  'fields,words',
  [
    (dict(batch=0), 'batch must be'),
    (dict(input_length=0), 'input_length must be'),
    (dict(weights='int2'), 'weights must'),
    (dict(output_length=-1), 'output_length must be'),
    (dict(convention='wires'), 'convention must be one of torus, compiled, paper'),
  ],
)
def test_a_request_that_makes_no_sense_is_refused(fields, words):
  with pytest.raises(RequestError, match=words):
    PlanRequest(SMALL, **{'batch': 1, **fields})


def test_one_phase_alone_has_to_fit_and_is_priced_alone():
  """The paper decodes 512 rows of PaLM 62B on 8 chips, which can't prefill them."""
  request, slice_ = (
    PlanRequest(PALM_62B, 512, 1984, 64, weights='bfloat16'),
    [Machine.parse('v4:2x2x2')],
  )
  with pytest.raises(NothingFits, match='in prefill'):
    choose(request, slice_)
  choice = choose(request.replace(phase='decode'), slice_)
  plan = choice.plan
  assert (
    plan.seconds == 64 * plan.decode.seconds
    and plan.memory == plan.memories['decode']
    and plan.fits
  )
  layouts = [p.layouts[1] for p in choice.ranked]
  assert len(layouts) == len(set(layouts)) == len(search.LAYOUTS)
  prefill = choose(request.replace(phase='prefill'), [Machine.parse('v4:2x4x4')]).plan
  assert prefill.seconds == prefill.prefill.seconds
  assert prefill.chip_seconds_per_token == pytest.approx(32 * prefill.seconds / (512 * 1984))
  with pytest.raises(RequestError, match='phase must be one of both, prefill, decode'):
    request.replace(phase='train')


def test_requested_layouts_are_the_only_ones():
  machine = Machine.parse('v4:2x2x4')
  asked = Layout.parse('wg_xyz/batch'), Layout.parse('ws_2d/heads')
  request = PlanRequest(config.preset('palm_8b'), 32, 256, 16)
  pinned = search.plans(request.replace(layouts=asked), machine)
  assert {tuple(c.case.layout for c in plan.phases) for plan in pinned} == {asked}
  everything = search.best(search.plans(request, machine))
  same = next(p for p in everything if p.layouts == tuple(map(str, asked)))
  assert search.best(pinned)[0].seconds == same.seconds
  assert search.fits(request.replace(layouts=asked), machine)


def test_layouts_that_share_no_weights_are_refused():
  pair = Layout.parse('ws_1d/batch'), Layout.parse('ws_2d/batch')
  with pytest.raises(MeshError, match='place the weights differently'):
    PlanRequest(config.preset('palm_8b'), 32, layouts=pair)


def test_layouts_that_can_not_run_the_rows_are_refused_in_a_sentence():
  asked = (Layout.parse('ws_2d/batch'),) * 2
  request = PlanRequest(
    config.preset('palm_8b'), 1, 64, 8, convention='paper', mesh=(1, 2, 2), layouts=asked
  )
  with pytest.raises(NothingFits, match='no mesh of v4:2x2x1 lets these layouts run 1 rows'):
    choose(request, [Machine.parse('v4:2x2x1')])


@pytest.mark.parametrize('phase', ['prefill', 'decode'])
def test_one_dimension_is_called_so(phase):
  """On a mesh with one chip along x, ws_2d is ws_1d; beside gathered weights it keeps its name."""
  machine = Machine.parse('v4:4x4x4')
  request = PlanRequest(config.preset('palm_540b'), 64, phase=phase)
  alone = [next(iter(p.phases)).case for p in search.plans(request, machine)]
  assert any(case.layout.feedforward == 'ws_1d' for case in alone)
  assert not any(case.layout_text.endswith('(1D)') for case in alone)
  cases = [p.decode.case for p in search.plans(request.replace(phase='both'), machine)]
  for case in cases:
    one_dimensional = case.layout.feedforward == 'ws_2d' and case.mesh[0] == 1
    assert case.layout_text == f'{case.layout}{" (1D)" * one_dimensional}'
  assert any(case.layout_text.endswith('(1D)') for case in cases)


def test_nothing_is_priced_to_say_that_nothing_fits(monkeypatch):
  def price(*arguments):
    raise AssertionError('a plan is priced')

  monkeypatch.setattr(search, 'cost', price)
  request = PlanRequest(config.preset('palm_540b'), 64)
  with pytest.raises(NothingFits, match='weights 126.95.*what would fit: v4:2x4x4'):
    choose(request, [Machine.parse('v4:2x2x1')])
