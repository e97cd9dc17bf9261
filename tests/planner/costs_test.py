"""The costs of one pass: what is counted, and what holds for every shape."""

import dataclasses
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from t5x_inference_ext import config
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import MeshError, RequestError
from t5x_inference_ext.hardware import GPU_LAYER_LATENCY, MAX_ATTENTION_LOGITS
from t5x_inference_ext.planner.case import PassCase
from t5x_inference_ext.planner.costs import LIMITS, PARTS, cost
from t5x_inference_ext.planner.efficiency import FITTED, IDEAL, Efficiency
from t5x_inference_ext.planner.machine import Machine
from t5x_inference_ext.planner.memory import memory
from t5x_inference_ext.planner.network import CONVENTIONS, axis_sizes
from t5x_inference_ext.planner.search import LAYOUTS
from t5x_inference_ext.planner.work import work
from t5x_inference_ext.sharding.explain import ExplainSetting, explain_setting
from t5x_inference_ext.sharding.layout import Layout

ONE, EIGHT = Machine.parse('v4:1x1x1'), Machine.parse('v4:2x2x2')
SMALL = ModelConfig(num_layers=2, d_model=256, d_ff=1024, num_heads=8, d_head=32, vocab_size=384)


def case(
  model=SMALL,
  machine=EIGHT,
  mesh=(2, 2, 2),
  layout='ws_2d/batch',
  phase='decode',
  batch=8,
  length=1,
  context=64,
  **fields,
) -> PassCase:
  return PassCase(
    model, machine, mesh, Layout.parse(layout), phase, batch, length, context, **fields
  )


def test_the_work_of_one_chip_is_the_models():
  # 2 flops a parameter and token; two products of H Q with each of S positions.
  found = work(case(machine=ONE, mesh=(1, 1, 1), phase='prefill', batch=3, length=16, context=16))
  matrices = SMALL.num_params - 384 * 256 - 3 * 256
  assert found.matmul_flops == 2 * 48 * matrices and found.matmul_rows == 48
  assert found.logits_flops == 2 * 3 * 384 * 256 and found.logits_rows == 3
  assert found.attention_flops == 2 * (4 * 48 * 16 * 8 * 32)
  assert found.weight_bytes == 2 * (matrices + 384 * 256) + 4 * 3 * 256
  assert found.cache_bytes == 2 * (2 * 3 * 16 * 32) * 2


@pytest.mark.parametrize('layout', LAYOUTS)
def test_chips_share_attention_evenly(layout):
  """Rows, heads and positions all divide, so that no chip repeats another's products."""
  for phase, length, context in (('prefill', 16, 16), ('decode', 1, 64)):
    found = work(case(layout=str(layout), phase=phase, length=length, context=context))
    assert 8 * found.attention_flops == 2 * (4 * 8 * length * context * 8 * 32)


@pytest.mark.parametrize(
  'fields,more',
  [
    (dict(mlp='gelu'), -2 * 256 * 1024),  # no gate
    (dict(num_kv_heads=8), 2 * 2 * 256 * 7 * 32),
    (dict(block='serial'), 0),
  ],
)
def test_the_form_of_a_model_counts(fields, more):
  before, after = (
    work(case(dataclasses.replace(SMALL, **f), ONE, (1, 1, 1))) for f in ({}, fields)
  )
  assert after.matmul_flops - before.matmul_flops == 2 * 8 * more
  assert after.cache_bytes == before.cache_bytes * fields.get('num_kv_heads', 1)


def test_a_serial_block_moves_more():
  serial = cost(case(dataclasses.replace(SMALL, block='serial'), batch=64))
  assert serial.parts['activations moved'] > cost(case(batch=64)).parts['activations moved']


def test_padded_heads_are_work_and_memory():
  model = dataclasses.replace(config.preset('palm_540b'), num_layers=2)
  padded = dataclasses.replace(model, num_heads=64)
  machine = Machine.parse('v4:4x4x4')
  ws_1d = dict(machine=machine, mesh=(4, 4, 4), layout='ws_1d/batch', batch=64)
  found, whole = (work(case(m, **ws_1d)) for m in (model, padded))
  assert found.matmul_flops == whole.matmul_flops and found.weight_bytes == whole.weight_bytes
  # Over 16 shards nothing is padded.
  assert (
    work(case(model, machine, (4, 4, 4), 'ws_2d/batch', batch=64)).matmul_flops < found.matmul_flops
  )
  # MFU counts the model's own parameters.
  assert cost(case(model, **ws_1d)).mfu < cost(case(padded, **ws_1d)).mfu


def test_int8_weights_are_half_the_bytes_and_the_same_flops():
  big = dataclasses.replace(config.preset('palm_62b'), num_layers=4)
  whole, half = (work(case(big, weights=w)) for w in ('bfloat16', 'int8'))
  assert half.matmul_flops == whole.matmul_flops
  table = 256128 * 8192 * 2 / 8
  assert (half.weight_bytes - table) == pytest.approx((whole.weight_bytes - table) / 2, rel=2e-3)


@pytest.mark.parametrize('tied', [True, False])
def test_an_int8_table_is_half_the_bytes_and_its_scales(tied):
  """A pass reads only the untied head; a chip holds both the embedding and the head."""
  big = dataclasses.replace(config.preset('palm_62b'), num_layers=4, tied_head=tied)
  tables = ('embedding',) if tied else ('embedding', 'head')
  whole = case(big, weights='int8')
  half = case(big, weights=','.join(['int8', *(f'{name}:8' for name in tables)]))
  rows = whole.tensors['embedding'].shape[0]
  table, scales = rows * 8192 * 2 / 8, 4 * rows / 4  # rows are split over y and z
  assert work(whole).head_bytes == 2 * work(half).head_bytes == table
  assert work(whole).weight_bytes - work(half).weight_bytes == table / 2 - scales * len(tables)
  held = memory(whole, 64).weights - memory(half, 64).weights
  assert held == (table / 2 - scales) * len(tables)
  assert cost(half).seconds < cost(whole).seconds
  with pytest.raises(RequestError, match='weights must be one of int8, int4, bfloat16, got int2'):
    case(big, weights='int2,embedding:8')


def test_an_int8_cache_is_half_the_bytes_and_its_scales():
  whole, half = (cost(case(cache=c, context=10_000)) for c in ('bfloat16', 'int8'))
  assert half.work.cache_bytes / whole.work.cache_bytes == (32 + 4) / 64
  assert half.seconds < whole.seconds
  assert memory(half.case, 10_000).cache < memory(whole.case, 10_000).cache


def test_attention_by_batch_reads_a_chips_own_rows_alone():
  heads, batch = (work(case(layout=layout, batch=64)) for layout in ('ws_2d/heads', 'ws_2d/batch'))
  assert heads.cache_bytes == 8 * batch.cache_bytes


def test_few_rows_cost_as_many_as_a_tile_has():
  few, many = (cost(case(batch=b)).parts['matmuls'] for b in (8, 128))
  assert few == pytest.approx(many)
  assert cost(case(batch=256)).parts['matmuls'] == pytest.approx(2 * many)


def test_weights_are_gathered_beside_products():
  big = dataclasses.replace(config.preset('palm_8b'), num_layers=4)
  short, long = (
    cost(case(big, layout='wg_xyz/batch', phase='prefill', batch=8, length=n, context=n))
    for n in (16, 8192)
  )
  for found in (short, long):
    gathering = sum(c.seconds for c in found.collectives if c.collective.of_weights)
    assert found.hidden_seconds == pytest.approx(min(gathering, found.parts['matmuls']))
    assert found.parts['weights moved'] == pytest.approx(gathering - found.hidden_seconds)
  assert short.parts['weights moved'] > 0 and long.parts['weights moved'] == 0
  # Read as they are whole; not so the table, which stays.
  stays = work(case(big, phase='prefill', length=8192, context=8192)).weight_bytes
  table = 256128 * 4096 * 2 / 8
  assert long.work.weight_bytes - table == pytest.approx(8 * (stays - table), rel=1e-2)


def test_int4_halves_the_bytes_but_not_the_time_on_v4():
  """XLA unpacks int4 on v4 no faster than it reads int8; other chips read half the bytes."""
  found = {}
  for kind in ('v4', 'v5p'):
    for weights in ('int8', 'int4'):
      found[kind, weights] = work(case(machine=Machine.parse(f'{kind}:2x2x2'), weights=weights))
  matrices = sum(math.prod(t.shape) for t in case().tensors.values() if t.kind == 'matrix')
  saved = matrices * SMALL.num_layers // 8 // 2
  for kind in ('v4', 'v5p'):
    int8, int4 = found[kind, 'int8'], found[kind, 'int4']
    assert int8.weight_bytes - int4.weight_bytes == saved and int8.unpacking_bytes == 0
    assert int4.unpacking_bytes == (saved if kind == 'v4' else 0)


def test_weights_gathered_over_some_axes_wait():
  big = dataclasses.replace(config.preset('palm_8b'), num_layers=4)
  for layout in ('wg_x/batch', 'wg_xy/batch'):
    found = cost(case(big, layout=layout, phase='prefill', batch=8, length=8192, context=8192))
    gathering = sum(c.seconds for c in found.collectives if c.collective.of_weights)
    assert found.hidden_seconds == 0 and found.parts['weights moved'] == pytest.approx(gathering)
  flat = dict(mesh=(4, 2, 1), layout='wg_xy/batch')  # all axes that there are
  assert cost(case(big, phase='prefill', length=8192, context=8192, **flat)).hidden_seconds > 0


def test_as_compiled_nothing_overlaps_but_the_loading_of_weights():
  """The compiler prefetches weights from HBM; it runs no gather beside other work."""
  big = dataclasses.replace(config.preset('palm_8b'), num_layers=4)
  each = case(big, layout='wg_xyz/batch', phase='prefill', batch=8, length=512, context=512)
  found = cost(each, 'compiled')
  gathering = sum(c.seconds for c in found.collectives if c.collective.of_weights)
  assert found.parts['weights moved'] == pytest.approx(gathering) and gathering > 0
  head = found.work.head_bytes / 1200e9 - found.parts['logits']  # all other loads overlap
  assert found.hidden_seconds == 0 and found.parts['weight load'] == pytest.approx(head)
  step = cost(case(big, weights='bfloat16'), 'compiled')
  layers, head = step.work.weight_bytes - step.work.head_bytes, step.work.head_bytes
  beside = layers / 1200e9 - step.parts['matmuls'], head / 1200e9 - step.parts['logits']
  assert step.parts['weight load'] == pytest.approx(sum(beside)) and min(beside) > 0


def test_as_compiled_v5p_reads_weights_below_its_rate():
  """The compiler's estimates read int8 at 0.4, and the bfloat16 head at 0.46 of HBM's rate."""
  big = dataclasses.replace(config.preset('palm_8b'), num_layers=4)
  step = cost(case(big, weights='int8', machine=Machine.parse('v5p:2x2x2')), 'compiled')
  layers, head = step.work.weight_bytes - step.work.head_bytes, step.work.head_bytes
  loaded = layers / 0.4 / 2800e9 + head / 0.46 / 2800e9
  assert step.whole['weight load'] == pytest.approx(loaded) and head > 0


def test_softmax_and_elementwise_work_is_a_share_of_what_the_compiler_says():
  each = case(phase='prefill', length=64, context=64)
  compiled, torus, paper = (
    cost(each, name, IDEAL).parts for name in CONVENTIONS[1::-1] + ('paper',)
  )
  # Softmax: 8 rows of 64 tokens, 8 heads, 64 positions, 2 layers, over 8 chips.
  assert compiled['softmax'] == pytest.approx(16 * 8 * 64 * 8 * 64 * 2 / 8 / 1200e9)
  # SwiGLU's two columns and the queries over y and z; norm and residual sum over x.
  elements = (2 * 1024 + 8 * 32) / 4 + 2 * 256 / 2
  moved = 4 * 8 * 64 * 2 * elements / 1200e9
  small = (2 * 45 + 60) * 0.66e-6  # operations of two layers, and of lookup and logits
  assert compiled['elementwise'] == pytest.approx(moved + small)
  assert torus['elementwise'] == pytest.approx(0.3 * moved)
  assert torus['softmax'] == pytest.approx(0.3 * compiled['softmax'])
  assert paper['softmax'] == paper['elementwise'] == 0


@pytest.mark.parametrize(
  'layout,phase',
  [('ws_2d/batch', 'decode'), ('wg_xyz/batch', 'prefill'), ('ws_1d/batch', 'decode')],
)
@pytest.mark.parametrize('weights', ['int8', 'int4', 'bfloat16'])
def test_memory_is_that_of_the_arrays_on_the_chips(layout, phase, weights):
  each = case(
    layout=layout, phase=phase, batch=16, length=8 if phase == 'prefill' else 1, weights=weights
  )
  parsed = Layout.parse(layout)
  e = explain_setting(
    ExplainSetting(
      SMALL,
      axis_sizes(each.mesh),
      parsed,
      parsed if phase == 'decode' else Layout(),
      weights=weights,
      batch=16,
      prompt_length=8,
      cache_length=64,
    )
  )
  found = memory(each, 64)
  assert found.weights == e.weight_bytes
  cache = next(t.bytes for t in e.cache if t.name == 'cache')
  assert found.cache == cache
  assert found.needed == found.weights + found.cache + found.working


@pytest.mark.parametrize(
  'fields,expected',
  [
    # 48 tokens: the stream and its sum, the columns of the MLP; logits of each position and head.
    (
      dict(machine=ONE, mesh=(1, 1, 1), batch=3, length=16, context=16),
      2 * (2 * 48 * 256 + 48 * 1024) + 4 * 48 * 8 * 16,
    ),
    # Features of the stream over x, columns over y and z, rows of attention over all.
    (
      dict(batch=8, length=16, context=16),
      2 * (2 * 128 * 256 // 2 + 128 * 1024 // 4) + 4 * 16 * 8 * 16,
    ),
    # More query columns than MLP columns, in attention by batch: of all heads.
    (
      dict(model=dataclasses.replace(SMALL, num_heads=64), batch=8, length=16, context=16),
      2 * (2 * 128 * 256 // 2 + 16 * 64 * 32) + 4 * 16 * 64 * 16,
    ),
    # One row of tokens on each chip, whole, with one of the MLP's matrices, whole.
    (
      dict(layout='wg_xyz/batch', batch=8, length=16, context=16),
      2 * (2 * 16 * 256 + 16 * 1024) + 4 * 16 * 8 * 16 + 2 * 256 * 1024,
    ),
    (
      dict(layout='wg_xyz/batch', batch=8, length=16, context=16, weights='int8'),
      2 * (2 * 16 * 256 + 16 * 1024) + 4 * 16 * 8 * 16 + 256 * 1024,
    ),
    # Attention's logits are computed in parts.
    (
      dict(batch=8, length=8192, context=8192),
      2 * (2 * 65536 * 256 // 2 + 65536 * 1024 // 4) + 4 * MAX_ATTENTION_LOGITS,
    ),
    # After the layers: the vocabulary over y and z.
    (
      dict(model=dataclasses.replace(SMALL, vocab_size=2**15), phase='decode', context=16),
      4 * 8 * 2**15 // 4,
    ),
  ],
)
def test_temporaries_are_the_largest_arrays_of_a_pass(fields, expected):
  each = case(**{'phase': 'prefill', **fields})
  assert memory(each, each.context).working == expected


def test_other_efficiencies_stretch_their_own_parts():
  gpus = dict(machine=Machine.parse('A100:8'), mesh=(2, 2, 2))
  whole = cost(case(batch=64, **gpus), efficiency=IDEAL)
  assert whole.parts['launches'] == 2 * GPU_LAYER_LATENCY
  slow = whole.at(Efficiency(0.5, 0.25, 0.2))
  shares = {'compute': 2, 'elementwise': 4, 'weight load': 4, 'cache load': 4, 'network': 5}
  for part, limit in LIMITS.items():
    by = shares.get(limit, 1)  # the host's time has no share
    assert slow.parts[part] == pytest.approx(by * whole.parts[part])
  again = slow.at(IDEAL)
  assert again.parts == pytest.approx(whole.parts)
  assert cost(case(batch=64, **gpus)).parts == pytest.approx(whole.at(FITTED['torus']).parts)


@pytest.mark.parametrize(
  'fields,words',
  [
    (dict(phase='train'), 'phase must be one of prefill, decode'),
    (dict(weights='int2'), 'weights must be one of int8, int4, bfloat16'),
    (dict(cache='float8'), 'cache must be one of int8, bfloat16'),
    (dict(batch=0), 'batch must be a whole number above 0'),
    (dict(length=2), 'a decode step takes one position'),
    (dict(mesh=(2, 2, 1)), 'the mesh 2x2x1 has 4 positions'),
    (dict(phase='prefill', length=65), 'context=64 must hold the 65 positions'),
  ],
)
def test_what_makes_no_sense_is_refused(fields, words):
  with pytest.raises(RequestError, match=words):
    case(**fields)


def test_rows_that_can_not_be_split_are_refused():
  with pytest.raises(MeshError, match='use a batch that is a multiple of 8'):
    case(layout='wg_xyz/batch', batch=3)


# What holds for every shape. Sizes that divide: padding is another matter, and tested above.

MESHES = {
  (1, 1, 1): 'v4:1x1x1',
  (2, 2, 2): 'v4:2x2x2',
  (1, 2, 2): 'v4:2x2x1',
  (2, 4, 2): 'v4:2x2x4',
  (4, 4, 4): 'v4:4x4x4',
  (4, 2, 1): 'v5e:2x4',
  (2, 4, 1): 'A100:8',
  (4, 4, 1): 'A100:16',
}


@st.composite
def cases(draw):
  mesh = draw(st.sampled_from(sorted(MESHES)))
  heads = 64 * draw(st.integers(1, 2))
  model = ModelConfig(
    num_layers=draw(st.integers(1, 4)),
    d_model=512 * draw(st.integers(1, 4)),
    d_ff=1024 * draw(st.integers(1, 6)),
    num_heads=heads,
    d_head=32 * draw(st.integers(1, 3)),
    vocab_size=draw(st.integers(100, 5000)),
    num_kv_heads=draw(st.sampled_from([1, heads])),
    block=draw(st.sampled_from(['parallel', 'serial'])),
    mlp=draw(st.sampled_from(['swiglu', 'gelu'])),
    norm=draw(st.sampled_from(['rms', 'layer'])),
  )
  phase = draw(st.sampled_from(['prefill', 'decode']))
  length = 64 * draw(st.integers(1, 8)) if phase == 'prefill' else 1
  return PassCase(
    model,
    Machine.parse(MESHES[mesh]),
    mesh,
    draw(st.sampled_from(LAYOUTS)),
    phase,
    64 * draw(st.integers(1, 4)),
    length,
    length + draw(st.integers(0, 3000)),
    draw(st.sampled_from(['int8', 'bfloat16'])),
    draw(st.sampled_from(['int8', 'bfloat16'])),
  )


conventions = st.sampled_from(CONVENTIONS)
efficiencies = st.builds(Efficiency, *[st.floats(0.05, 1)] * 3)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases(), conventions, efficiencies)
def test_the_sum_of_the_parts_is_the_whole(each, convention, efficiency):
  found = cost(each, convention, efficiency)
  assert tuple(found.parts) == PARTS and all(v >= 0 for v in found.parts.values())
  assert found.seconds == pytest.approx(sum(found.parts.values()))
  assert sum(found.limits.values()) == pytest.approx(found.seconds)
  moved = sum(c.seconds for c in found.collectives)
  assert moved == pytest.approx(
    found.parts['activations moved'] + found.parts['weights moved'] + found.hidden_seconds
  )
  assert found.chip_seconds_per_token * found.tokens == pytest.approx(
    each.machine.chips * found.seconds
  )
  assert 0 < found.mfu < 1
  if each.machine.chips == 1:
    assert moved == 0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
  cases(),
  conventions,
  st.sampled_from(['num_layers', 'd_ff', 'vocab_size', 'batch', 'length', 'context']),
  st.integers(2, 3),
)
def test_time_never_falls_when_work_grows(each, convention, what, factor):
  if what in ('num_layers', 'd_ff', 'vocab_size'):
    model = dataclasses.replace(each.config, **{what: getattr(each.config, what) * factor})
    more = dataclasses.replace(each, config=model)
  elif what == 'length':
    if each.phase == 'decode':
      return
    more = dataclasses.replace(
      each, length=each.length * factor, context=each.context + each.length * (factor - 1)
    )
  else:
    more = dataclasses.replace(each, **{what: getattr(each, what) * factor})
  before, after = (cost(c, convention) for c in (each, more))
  assert after.seconds >= before.seconds
  assert memory(more, more.context).needed >= memory(each, each.context).needed


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases(), st.sampled_from([0, 1, 2]))
def test_more_chips_never_need_more_memory_per_chip(each, axis):
  """A mesh with twice the chips along one axis; a machine is needed for its memory alone."""
  mesh = tuple(2 * n if i == axis else n for i, n in enumerate(each.mesh))
  if 64 % math.prod(mesh):
    return
  chips = Machine.parse(f'A100:{math.prod(mesh)}')
  more = dataclasses.replace(each, machine=chips, mesh=mesh)
  before, after = (memory(c, c.context) for c in (each, more))
  assert (after.weights, after.cache) <= (before.weights, before.cache)
  assert after.cache <= before.cache and after.needed <= before.needed


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases(), conventions, st.sampled_from(['matmul', 'memory', 'network']))
def test_worse_efficiencies_never_save_time(each, convention, name):
  found = cost(each, convention)
  slower = found.at(
    dataclasses.replace(found.efficiency, **{name: getattr(found.efficiency, name) / 2})
  )
  assert slower.seconds >= found.seconds


def test_a_prefill_whose_cache_goes_to_another_layout_also_pays_for_that():
  grouped = dataclasses.replace(SMALL, num_kv_heads=4)
  alone = case(grouped, phase='prefill', layout='ws_2d/heads', length=16)
  for convention in CONVENTIONS:
    for efficiency in (None, IDEAL, Efficiency(0.5, 0.5, 0.5)):
      found = cost(alone, convention, efficiency).into(Layout('ws_2d', 'batch'))
      whole = dataclasses.replace(alone, decode_layout=Layout('ws_2d', 'batch'))
      wanted = cost(whole, convention, efficiency)
      assert found.case == whole
      assert found.parts == pytest.approx(wanted.parts) and found.whole == pytest.approx(
        wanted.whole
      )
      assert sum(c.seconds for c in found.collectives) == pytest.approx(
        sum(c.seconds for c in wanted.collectives)
      )
  # 8 rows of 16 positions, 8 key heads with copies on 8 chips, keys and values, in 2 bytes.
  moves = [c for c in found.collectives if c.collective.name == 'cache']
  assert [(c.collective.kind, c.collective.bytes, c.count) for c in moves] == [
    ('all_to_all', 2 * 8 * 16 * 32 * 2, 2)
  ]
  # The rows are split alike: nothing moves.
  batch = cost(dataclasses.replace(alone, layout=Layout('ws_2d', 'batch')))
  assert batch.into(Layout('ws_2d', 'batch')) is batch
