"""Reading a compiled program: instructions, layouts, groups of devices, trip counts, work."""

import math
import pathlib

import numpy as np
import pytest

from t5x_inference_ext import hardware
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.precompile import collective_cost, loops, work
from t5x_inference_ext.precompile.collective_cost import HloCollective
from t5x_inference_ext.precompile.hlo import Module
from t5x_inference_ext.precompile.hlo_parser import parse_hlo
from t5x_inference_ext.precompile.relayouts import relays, weight_copies
from t5x_inference_ext.precompile.shapes import HBM, ArrayShape, HloError
from t5x_inference_ext.sharding import links
from t5x_inference_ext.sharding.torus import parse_slice

TEXTS = pathlib.Path(__file__).parents[1] / 'testdata' / 'hlo'
V4 = hardware.chip('v4')


def read(name: str) -> Module:
  return parse_hlo((TEXTS / f'{name}.txt').read_text())


@pytest.fixture(scope='module')
def decode() -> Module:
  return read('decode_layer')


@pytest.fixture(scope='module')
def ring() -> Module:
  return read('ring_step')


def test_instructions_in_the_order_of_the_schedule(decode):
  body = decode.computations['body']
  assert decode.partitions == 64
  assert decode.entry.name == 'main.17_spmd'
  assert body.root.name == 'tuple.58'
  names = ['psum.19', 'all_gather.22', 'copy.50', 'fusion.89']
  assert [i.name for i in body.instructions if i.name in names] == names
  fusion = body['fusion.89']
  assert (fusion.opcode, fusion.cycles) == ('fusion', 72826)
  assert fusion.operands == ('get-tuple-element.392', 'get-tuple-element.390', 'copy.50')
  assert fusion.call('calls') == 'fused_computation.10'
  assert fusion.attribute('kind') == 'kOutput'
  assert body['dynamic_update_slice.17'].cycles is None
  assert [u.name for u in body.users['copy.50']] == ['fusion.89']
  assert decode.entry['param.16'].op_name == "w.layers['parallel'].w_in"


def test_shapes_with_layout_and_memory(decode):
  shape = decode.computations['body']['all_gather.22'].shapes[0]
  assert shape == ArrayShape('bf16', (64, 4608), (0, 1), 'T(2,128)(2,1)', 3)
  assert (shape.bytes, shape.on_chip) == (64 * 4608 * 2, True)
  assert str(shape) == 'bf16[64,4608]{0,1:T(2,128)(2,1)S(3)}'
  weights = decode.entry['param.16'].shapes[0]
  assert (weights.bytes, weights.space, weights.on_chip) == (118 * 4608 * 10016, HBM, False)
  assert ArrayShape('s4', (3, 3)).bytes == 5
  loop = decode.entry['while.4']
  assert loop.parts == (1, 1, 1, 1, 1)
  assert loop.element(3)[0].dims == (118, 1, 2048, 1, 256)


def test_results_of_asynchronous_starts(ring):
  assert [s.dims for s in ring.entry['slice-start'].results] == [(1024, 1024)]
  copy = ring.entry['copy-start.5']
  assert (copy.operation, copy.phase, copy.results[0].on_chip) == ('copy', 'start', False)
  assert ring.entry['all-to-all-start'].parts == (1, 1, 1, 1)
  assert ring.entry['async-done'].phase == 'done'
  assert ring.entry['convolution.1'].phase == ''


def test_functions_that_an_instruction_comes_from(decode):
  product = decode.computations['fused_computation.104']['convolution.18']
  assert decode.functions(product) == ('attend', 'Layer._attention', 'Model.decode_step')
  assert decode.functions(decode.computations['body']['copy.50']) == ()


@pytest.mark.parametrize(
  'text, reason',
  [
    ('HloModule m\n', 'no ENTRY computation'),
    ('ENTRY %m () -> f32[] {\n  surprise\n}\n', 'not an instruction'),
    ('ENTRY %m () -> q7[] {\n  ROOT %a = q7[] parameter(0)\n}\n', 'element type q7'),
    ('ENTRY %m () -> f32[] {\n  ROOT %a = f32[] add(%b, (%c\n}\n', 'a bracket is not closed'),
  ],
)
def test_text_that_is_not_understood(text, reason):
  with pytest.raises(HloError, match=reason):
    parse_hlo(text)


def test_trip_counts_multiply_and_the_unknown_is_named():
  found, unknown = loops.executed(read('nested_loops'))
  times = {e.instruction.name: e.times for e in found}
  # The outer loop goes down from 8 while >= 1. The inner one goes from 3 in twos (3, 5, 7, 9) to
  # the 10 that comes in through both states.
  assert (times['copy.2'], times['copy.1']) == (8, 8 * 4)
  assert unknown == ['while.search']
  assert times['copy.3'] == 1
  assert next(e.loops for e in found if e.instruction.name == 'copy.1') == (
    'while.outer',
    'while.inner',
  )


def test_a_noted_trip_count_is_believed():
  text = (
    (TEXTS / 'nested_loops.txt')
    .read_text()
    .replace(
      'body=%search_body', 'body=%search_body, backend_config={"known_trip_count":{"n":"6"}}'
    )
  )
  found, unknown = loops.executed(parse_hlo(text))
  assert not unknown
  assert next(e.times for e in found if e.instruction.name == 'copy.3') == 6


@pytest.mark.parametrize(
  'change, trips',
  [
    (('constant(118)', 'constant(7)'), 7),
    (('direction=LT', 'direction=LE'), 119),
    (('direction=LT', 'direction=NE'), 118),
    (
      ('%constant.95 = s32[]{:T(128)} constant(0)', '%constant.95 = s32[]{:T(128)} constant(100)'),
      18,
    ),
    # Never true, and a counter that walks away from its bound.
    (('constant(118)', 'constant(-1)'), 0),
    (('direction=LT', 'direction=GT'), None),
    (('direction=LT', 'direction=EQ'), None),
  ],
)
def test_trip_count_of_the_condition(change, trips):
  text = (TEXTS / 'decode_layer.txt').read_text()
  assert change[0] in text
  module = parse_hlo(text.replace(*change))
  assert loops.trip_count(module, module.entry, module.entry['while.4']) == trips


def test_only_one_branch_of_a_conditional_is_told_from_the_others():
  found, _ = loops.executed(read('conditional'))
  assert {e.instruction.name: e.branches for e in found if e.instruction.opcode == 'negate'} == {
    'n.1': (('c', 0),),
    'n.2': (('c', 1),),
  }


@pytest.mark.parametrize(
  'text, groups',
  [
    ('{{0,2},{1,3}}', ((0, 2), (1, 3))),
    ('[2,2]<=[4]', ((0, 1), (2, 3))),
    ('[2,2]<=[2,2]T(1,0)', ((0, 2), (1, 3))),
    ('[1,8]<=[2,2,2]T(2,0,1)', ((0, 2, 4, 6, 1, 3, 5, 7),)),
    ('{}', ((0, 1, 2, 3),)),
  ],
)
def test_replica_groups(text, groups):
  module = parse_hlo(f"""
ENTRY %m (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={text}, to_apply=%m
}}
""")
  assert collective_cost.replica_groups(module.entry['r'], 4) == groups


def test_collectives_with_bytes_and_mesh_axes(decode, ring):
  mesh = {'x': 4, 'y': 4, 'z': 4}
  body = decode.computations['body']
  assert collective_cost.find_collective(decode, body, body['psum.19'], mesh) == HloCollective(
    'all-reduce', 64, 256, ('x', 'y', 'z')
  )
  assert collective_cost.find_collective(
    decode, body, body['all_gather.22'], mesh
  ) == HloCollective('all-gather', 16, 64 * 4608 * 2, ('y', 'z'))
  assert collective_cost.find_collective(decode, body, body['copy.50'], mesh) is None

  mesh, entry = {'x': 4, 'y': 4}, ring.entry
  found = {
    n: collective_cost.find_collective(ring, entry, entry[n], mesh)
    for n in (
      'fusion.4',
      'async-start',
      'async-done',
      'all-to-all-start',
      'all-gather-start',
      'collective-permute-start',
    )
  }
  # An all-reduce inside a fusion that keeps a slice, and a wrapped reduce-scatter.
  assert found['fusion.4'] == HloCollective('reduce-scatter', 4, 2**21, ('y',))
  assert found['async-start'] == HloCollective('reduce-scatter', 4, 2**21, ('x',))
  assert found['async-done'] is None
  assert found['all-to-all-start'] == HloCollective('all-to-all', 4, 2**21, ('x',))
  assert found['all-gather-start'] == HloCollective('all-gather', 16, 2**21, ('x', 'y'))
  permute = found['collective-permute-start']
  assert (permute.axes, permute.bytes, permute.pairs[0]) == (('y',), 2**21, (0, 1))
  with pytest.raises(HloError, match='more devices than the mesh'):
    collective_cost.find_collective(ring, entry, entry['all-to-all-start'], {'x': 4, 'y': 2})


@pytest.mark.parametrize(
  'kind, mesh, axes, slice_, seconds',
  [
    # 90 MB. A ring of 4 has 90 GB/s and 2 hops, two of them 180 and 4, three of them 270 and 6.
    ('all-gather', (4, 4, 4), 'x', 'v4:4x4x4', 0.75e-3 + 2e-6),
    ('reduce-scatter', (4, 4, 4), 'yz', 'v4:4x4x4', 15 / 16 * 0.5e-3 + 4e-6),
    ('all-reduce', (4, 4, 4), 'xyz', 'v4:4x4x4', 2 * (63 / 64 * 1e-3 / 3 + 6e-6)),
    # Half a ring: one link of 45 GB/s, one hop.
    ('all-gather', (2, 8, 4), 'x', 'v4:4x4x4', 1e-3 + 1e-6),
    ('all-gather', (2, 8, 4), 'y', 'v4:4x4x4', 7 / 8 * 90e6 / 135e9 + 3e-6),
    ('all-gather', (2, 8, 4), 'yz', 'v4:4x4x4', 31 / 32 * 90e6 / 225e9 + 5e-6),
    # Half of the bytes of a ring of 4, or of two at once, pass through its middle.
    ('all-to-all', (4, 4, 4), 'x', 'v4:4x4x4', 1e-3 + 2e-6),
    ('all-to-all', (4, 4, 4), 'yz', 'v4:4x4x4', 1e-3 + 4e-6),
    # Without wraparound: 45 GB/s an axis, size - 1 hops.
    ('all-gather', (2, 4, 2), 'y', 'v4:2x2x4', 1.5e-3 + 3e-6),
    ('all-gather', (2, 4, 2), 'xy', 'v4:2x2x4', 7 / 8 * 1e-3 + 4e-6),
    ('all-gather', (4, 4, 4), 'xy', 'v5p:4x4x4', 15 / 16 * 0.25e-3 + 4e-6),
    # A square of 2 x 2 has links along both axes.
    ('all-gather', (1, 4, 1), 'y', 'v4:2x2x1', 0.75e-3 + 2e-6),
    # Two torus axes at most, and rings only of 16.
    ('all-gather', (8, 8, 1), 'xy', 'v5e:8x8', 63 / 64 * 1e-3 + 14e-6),
    ('all-gather', (16, 16, 1), 'xy', 'v6e:16x16', 255 / 256 * 0.25e-3 + 16e-6),
    ('all-gather', (4, 4, 4), '', 'v4:4x4x4', 0),
    ('collective-permute', (2, 2, 1), 'x', 'v4:2x2x1', 2e-3 + 1e-6),
  ],
)
def test_time_of_a_collective_at_link_speed(kind, mesh, axes, slice_, seconds):
  slice_ = parse_slice(slice_)
  along = [axis for axis, name in enumerate('xyz') if name in axes]
  size = math.prod(mesh[axis] for axis in along)
  devices = np.moveaxis(np.arange(math.prod(mesh)).reshape(mesh), along, range(-len(along), 0))
  groups = tuple(map(tuple, devices.reshape(-1, size).tolist()))
  chips = tuple(links.grid(slice_.shape, slice_.wraps, mesh).ravel().tolist())
  found = collective_cost.seconds(
    HloCollective(kind, size, 90_000_000, (), groups=groups),
    hardware.chip(slice_.kind),
    slice_,
    chips,
  )
  assert found == pytest.approx(seconds, rel=1e-12)


def test_flops_of_products(decode):
  body = decode.computations['body']
  assert work.flops(decode, body, body['fusion.89']) == 2 * 64 * 4608 * 10016
  assert work.flops(decode, body, body['fusion.92']) == 2 * 48 * 2048 * 256
  assert work.flops(decode, body, body['copy.50']) == 0


@pytest.mark.parametrize(
  'line, flops',
  [
    (
      '%r = f32[8,5,7]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, '
      'rhs_batch_dims={0}, rhs_contracting_dims={1}',
      2 * 8 * 5 * 6 * 7,
    ),
    # The TPU compiler writes the batch as a window that meets one place at a time.
    (
      '%r = f32[8,5,7]{2,1,0} convolution(%a, %b), window={size=8 stride=7 pad=0_0 lhs_dilate=8}, '
      'dim_labels=0bf_0io->0bf',
      2 * 8 * 5 * 6 * 7,
    ),
    (
      '%r = f32[8,5,7]{2,1,0} convolution(%a, %b), window={size=8 pad=7_0}, '
      'dim_labels=0bf_0io->0bf',
      2 * sum(range(1, 9)) * 5 * 6 * 7,
    ),
  ],
)
def test_flops_of_batched_products(line, flops):
  module = parse_hlo(f"""
ENTRY %m (a: f32[8,5,6], b: f32[8,6,7]) -> f32[8,5,7] {{
  %a = f32[8,5,6]{{2,1,0}} parameter(0)
  %b = f32[8,6,7]{{2,1,0}} parameter(1)
  ROOT {line}
}}
""")
  assert work.flops(module, module.entry, module.entry['r']) == flops


def test_traffic_counts_what_is_touched(decode, ring):
  body = decode.computations['body']
  # The layer's slice of the stacked weights, through a nested fusion; the input; the output.
  assert (
    work.traffic(decode, body, body['fusion.89'])
    == 4608 * 10016 + 64 * 4608 * 2 + 64 * 10016 * 2 + 4
  )
  assert work.traffic(decode, body, body['dynamic_update_slice.17']) == 2 * 48 * 256 * 2
  assert work.traffic(decode, body, body['copy.50']) == 2 * 64 * 4608 * 2
  assert work.traffic(decode, body, body['bitcast.9']) == 0
  assert work.traffic(ring, ring.entry, ring.entry['slice-start']) == 2 * 2**21
  assert work.traffic(ring, ring.entry, ring.entry['kernel.1']) == 6_000_000
  assert (
    work.in_place(decode, body['dynamic_update_slice.17']),
    work.in_place(decode, body['fusion.89']),
  ) == (True, False)


@pytest.mark.parametrize(
  'before, after, differ',
  [((2, 1, 0), (2, 1, 0), False), ((2, 1, 0), (1, 2, 0), True), ((0, 2, 1), (2, 1, 0), False)],
)
def test_relaid_is_another_order_of_dimensions_that_count(before, after, differ):
  shapes = [ArrayShape('bf16', (1, 64, 32), order, 'T(8,128)(2,1)') for order in (before, after)]
  assert relays(*shapes) == differ


def test_other_tiles_are_another_layout():
  shapes = [
    ArrayShape('s8', (64, 32), (1, 0), tiles) for tiles in ('T(32,128)(4,1)', 'T(8,128)(4,1)')
  ]
  assert relays(*shapes)


def test_weights_and_caches_written_to_hbm_again():
  found = {c.name: c for c in weight_copies(read('relaid_weights'))}
  w_in, w_out = "w.layers['parallel'].w_in", "w.layers['parallel'].w_out"
  assert {n: (c.sources, c.relaid) for n, c in found.items()} == {
    'copy.68': ((w_out,), True),  # the whole stack under other tiles, in every layer
    'fusion.106': ((w_in,), False),  # a layer's slice as it lies
    'fusion.107': ((w_out,), True),  # widened to bfloat16
    'copy.70': ((w_in,), True),  # a gathered weight, transposed
    'copy.90': (('result 0',), True),
  }  # the cache that the loop filled
  # Not: a slice on chip, a gather's own output, an activation, tokens, an update in place.
  assert found['copy.68'].computation == 'body'
  assert not weight_copies(read('relaid_weights'), smallest=2**40)


def test_a_program_that_leaves_its_weights_alone(decode):
  assert weight_copies(decode) == []


def test_an_unknown_chip():
  with pytest.raises(UserError, match="no chip is called 'v3'.*v4, v5e, v5p, v6e, A100"):
    hardware.chip('v3')


def test_v4_in_numbers():
  assert (V4.bf16_flops, V4.hbm_bandwidth, V4.link_bandwidth, V4.clock_hz) == (
    275e12,
    1200e9,
    45e9,
    1.05e9,
  )
  # All links of a chip together are the paper's 270 GB/s.
  assert V4.links * V4.link_bandwidth == 270e9
