"""The serial and the overlapped estimate of small compiled texts, computed by hand."""

import dataclasses
import pathlib

import jax
import pytest

from t5x_inference_ext import hardware
from t5x_inference_ext.config import preset
from t5x_inference_ext.precompile.analysis import analyze
from t5x_inference_ext.precompile.estimate import Estimate, estimate
from t5x_inference_ext.sharding.torus import parse_slice

TEXTS = pathlib.Path(__file__).parents[1] / 'testdata' / 'hlo'
US = 1e-6
PREFETCH = 64 * 288 * 2  # bytes of the prefetch in decode_layer.txt


def text(name: str) -> str:
  return (TEXTS / f'{name}.txt').read_text()


def read(name: str, slice_: str = 'v4:4x4x4', **mesh: int) -> Estimate:
  return estimate(text(name), parse_slice(slice_), mesh or {'x': 4, 'y': 4, 'z': 4})


def rows(found: Estimate) -> dict:
  return {c.name: c for c in found.costs}


def test_a_decode_layer():
  found = read('decode_layer')
  layer = {
    'broadcast.9': 610 / 1050 * US,
    'psum.19': 2 * (256 * 63 / 64 / 270e9 + 6 * US),
    'all_gather.22': 64 * 4608 * 2 * 15 / 16 / 180e9 + 4 * US,
    'copy.50': 15936 / 1050 * US,
    'fusion.89': 72826 / 1050 * US,
    'slice.4': 1 * US,
    'reshape.275': 2 * 48 * 256 * 2 / 1200e9,
    'fusion.92': 2 * US,
    'dynamic_update_slice.17': 2 * 48 * 256 * 2 / 1200e9,
    'add.1': 12 / 1200e9,
    'lt.109': 9 / 1200e9,
  }
  costs = rows(found)
  for name, seconds in layer.items():
    assert costs[name].seconds == pytest.approx(118 * seconds, rel=1e-9), name
    assert (costs[name].count, costs[name].in_layer_loop) == (118, True)
  # Outside the loop: a prefetch, which is free, and the counter's first value.
  assert costs['copy-start.1'].seconds == 0
  assert not costs['copy.58'].in_layer_loop
  assert found.serial_seconds == pytest.approx(118 * sum(layer.values()) + 8 / 1200e9, rel=1e-9)
  # Nothing is asynchronous but the prefetch, whose end waits for its bytes to leave HBM.
  assert costs['copy-start.1'].exposed_seconds == pytest.approx(PREFETCH / 1200e9)
  assert found.overlapped_seconds == pytest.approx(found.serial_seconds + PREFETCH / 1200e9)
  assert found.flops == 118 * (2 * 64 * 4608 * 10016 + 2 * 48 * 2048 * 256)
  assert not found.unknown_loops
  assert not found.weight_copies


def test_kinds_and_totals():
  found = read('decode_layer')
  kinds = {n: c.kind for n, c in rows(found).items()}
  assert kinds['fusion.89'] == 'matmul'
  assert kinds['fusion.92'] == 'attention'
  assert kinds['copy.50'] == kinds['reshape.275'] == 'relayout'
  assert kinds['slice.4'] == kinds['dynamic_update_slice.17'] == kinds['copy-start.1'] == 'copy'
  assert kinds['psum.19'] == kinds['all_gather.22'] == 'collective'
  assert kinds['broadcast.9'] == 'other'
  assert sum(found.by_kind.values()) == pytest.approx(found.serial_seconds)
  assert list(found.by_kind) == sorted(found.by_kind, key=found.by_kind.get, reverse=True)


def _at_full_rate(found: Estimate) -> set[str]:
  """Names of what takes time, is no collective, and has no cycles of the compiler's."""
  return {c.name for c in found.costs if c.seconds and not c.estimated and not c.collective}


def test_instructions_without_cycles_are_marked():
  names = {'reshape.275', 'dynamic_update_slice.17', 'add.1', 'lt.109', 'copy.58'}
  assert _at_full_rate(read('decode_layer')) == names


def test_a_ring_step_overlapped():
  """16 chips without wraparound, 45 GB/s a link: y is a chain of 4, x a square of 2 x 2."""
  found = read('ring_step', 'v4:2x2x4', x=4, y=4)
  mib2, costs = 2**21, rows(found)
  permute = mib2 / 45e9 + 1 * US
  expected = {
    'copy-start': 0,
    'slice-start': 0,  # into on-chip memory
    # Opposite ways at the same time: once. One after the other: each.
    'collective-permute-start.1': permute,
    'collective-permute-start': 0,
    'collective-permute-start.2': permute,
    'collective-permute-start.3': permute,
    'convolution.1': 10 * US,
    'kernel.1': 10 * US,  # 2.75 GFLOP at 275 TFLOP/s; its 6 MB take 5 us
    'all-to-all-start': mib2 / 2 / 45e9 + 2 * US,
    'fusion.3': 4 * US,
    'fusion.4': mib2 * 3 / 4 / 45e9 + 3 * US,
    'async-start': mib2 * 3 / 4 / 90e9 + 2 * US,
    'all-gather-start': mib2 * 15 / 16 / 135e9 + 5 * US,
    'copy-start.5': 2 * mib2 / 1200e9,
  }  # out of on-chip memory
  assert {n: c.seconds for n, c in costs.items()} == pytest.approx(expected, rel=1e-9)
  assert found.serial_seconds == pytest.approx(sum(expected.values()))
  # A product and a kernel run beside the permutes, an addition beside the all-to-all.
  hidden = {n: c.hidden_seconds for n, c in costs.items() if c.hidden_seconds > 1e-12}
  assert hidden == pytest.approx(
    {'collective-permute-start.1': 20 * US, 'all-to-all-start': 4 * US}
  )
  # The first instructions wait for two prefetches, one after the other.
  prefetches = 2 * mib2 / 1200e9
  assert found.overlapped_seconds == pytest.approx(found.serial_seconds - 24 * US + prefetches)
  assert _at_full_rate(found) == {'kernel.1', 'copy-start.5'}


def test_no_more_is_hidden_than_a_collective_takes():
  longer = text('ring_step').replace('"estimated_cycles":"10500"', '"estimated_cycles":"1050000"')
  found = estimate(longer, parse_slice('v4:2x2x4'), {'x': 4, 'y': 4})
  cost = rows(found)['collective-permute-start.1']
  assert cost.hidden_seconds == pytest.approx(cost.seconds)


def test_kernels_without_an_estimate_cost_their_operands_and_results():
  silent = text('ring_step').replace(
    '"cost_estimate":{"flops":"2750000000","transcendentals":"0","bytes_accessed":"6000000"}',
    '"output_memory_colors":[]',
  )
  found = estimate(silent, parse_slice('v4:2x2x4'), {'x': 4, 'y': 4})
  assert rows(found)['kernel.1'].seconds == pytest.approx((2**21 + 64 * 1024 * 2) / 1200e9)


def test_nested_loops_and_one_of_unknown_length():
  found = read('nested_loops', 'v4:1x1x1', x=1)
  costs = rows(found)
  assert costs['copy.1'].seconds == pytest.approx(32 * US)
  assert costs['copy.2'].seconds == pytest.approx(16 * US)
  assert costs['copy.3'].seconds == pytest.approx(4 * US)  # once, and said so
  assert found.unknown_loops == ('while.search',)
  assert costs['copy.1'].in_layer_loop and not costs['copy.3'].in_layer_loop


def test_of_a_conditional_the_longest_branch_counts():
  found = read('conditional', 'v4:1x1x1', x=1)
  assert {n: (c.seconds, c.count) for n, c in rows(found).items()} == {
    'n.1': (0, 0),
    'n.2': (pytest.approx(3 * US), 1),
  }


def test_cycles_are_of_the_chip_that_the_program_is_for():
  """1.75 GHz and links of 90 GB/s on v5p, 1.05 GHz and 45 GB/s on v4."""
  v4, v5p = (rows(read('decode_layer', f'{kind}:4x4x4')) for kind in ('v4', 'v5p'))
  assert v5p['fusion.89'].seconds == pytest.approx(v4['fusion.89'].seconds * 1.05 / 1.75)
  assert v5p['all_gather.22'].seconds - 118 * 4 * US == pytest.approx(
    (v4['all_gather.22'].seconds - 118 * 4 * US) / 2
  )


def test_relaid_weights_are_offences_and_slices_are_not():
  found = read('relaid_weights')
  assert {c.name for c in found.offending_relayouts} == {
    'copy.68',
    'copy.70',
    'copy.90',
    'fusion.107',
  }
  assert {c.name for c in found.weight_copies} - {c.name for c in found.offending_relayouts} == {
    'fusion.106'
  }
  assert rows(found)['copy.68'].kind == 'relayout'


@pytest.mark.libtpu
@pytest.mark.parametrize('slice_name', ['v5p:2x2x1', 'v6e:2x2'])
def test_a_lookup_that_is_left_to_a_sparse_core(slice_name):
  """jaxlib can't write such a program as text; the compiler's own text has all of the lookup."""
  config = dataclasses.replace(preset('palm_8b'), num_layers=1)
  answer = analyze(config, 'int8', slice_name, 'prefill', 4, 512, layout='ws_2d/batch')
  with pytest.raises(jax.errors.JaxRuntimeError):
    answer.program.compiled.as_text()
  lookups = [c for c in answer.estimate.costs if c.opcode == 'async-start' and 'gather' in c.name]
  # The rows of 4 x 512 tokens are read and written, some of them at a time.
  assert sum(c.bytes * c.count for c in lookups) == pytest.approx(
    2 * 4 * 512 * config.d_model * 2, rel=0.01
  )
  assert sum(c.seconds for c in lookups) == pytest.approx(
    sum(c.bytes * c.count for c in lookups) / hardware.chip(answer.slice.kind).hbm_bandwidth,
    rel=0.01,
  )
  assert answer.estimate.serial_seconds < 1


def test_a_collective_that_fusions_carry_on_counts_once_and_their_products_count():
  """v5e fuses products into an asynchronous gather, and repeats the gather in each fusion."""
  found = read('collective_fusion', 'v5e:2x4', x=1, y=4, z=2)
  # 8 chips, 2 x 4 without wraparound: two links of 45 GB/s, 1 + 3 hops.
  gather = 4096 * 4096 * 7 / 8 / 90e9 + 4 * US
  seconds = {
    'async-collective-start.3': gather,
    'fusion.1': 600_000 / 1.5e9,
    'fusion.2': 30_000 / 1.5e9,
  }
  costs = rows(found)
  assert {n: c.seconds for n, c in costs.items()} == pytest.approx(seconds)
  assert [costs[n].kind for n in seconds] == ['collective', 'matmul', 'matmul']
  assert found.flops == 2 * 2 * 8192 * 4096 * 1024
  assert found.overlapped_seconds == pytest.approx(630_000 / 1.5e9)
  # A gather that outlasts both products is waited for.
  short = text('collective_fusion').replace('"600000"', '"60000"')
  waits = estimate(short, parse_slice('v5e:2x4'), {'x': 1, 'y': 4, 'z': 2})
  assert waits.overlapped_seconds == pytest.approx(gather)


def test_calibrated_by_category():
  """Factors of calibration.py, on each operation; no product becomes faster than the chip."""
  v4 = read('decode_layer')
  by_name = rows(v4)
  expected = 0.0
  for cost in by_name.values():
    if cost.collective:
      expected += 0.96 * cost.seconds + cost.count * 3 * US
    elif cost.flops:
      expected += cost.seconds
    else:
      expected += (0.25 if cost.kind == 'copy' else 0.3) * cost.seconds
  assert v4.calibrated.serial_seconds == pytest.approx(expected)
  v5e = read('collective_fusion', 'v5e:2x4', x=1, y=4, z=2).calibrated
  product = 2 * 8192 * 4096 * 1024 / 197e12  # above 0.68 of either fusion's cycles
  gather = 1.2 * (4096 * 4096 * 7 / 8 / 90e9 + 4 * US)
  assert v5e.serial_seconds == pytest.approx(2 * product + gather)
  assert v5e.overlapped_seconds == pytest.approx(2 * product)
  assert read('decode_layer', 'v5p:4x4x4').calibrated is None
