"""Machines, and how long collectives take on them."""

import dataclasses
import itertools
import math

import pytest

from t5x_inference_ext import config, hardware
from t5x_inference_ext.errors import MeshError, UserError
from t5x_inference_ext.planner.machine import Machine, known_machines
from t5x_inference_ext.planner.network import Network
from t5x_inference_ext.sharding.collective import Collective

MB = 10**6


def seconds(machine, mesh, move, convention='torus'):
  return Network(Machine.parse(machine), mesh, convention).seconds(move)


@pytest.mark.parametrize(
  'name,chips,wraps',
  [
    ('v4:4x4x4', 64, True),
    ('v4:2x2x4', 16, False),
    ('v5e:4x8', 32, False),
    ('A100:16', 16, False),
    ('h100:8', 8, False),
  ],
)
def test_machines(name, chips, wraps):
  machine = Machine.parse(name)
  assert machine.chips == chips and all(machine.wraps) == wraps
  assert str(machine).lower() == name.lower() and Machine.parse(str(machine)) == machine


@pytest.mark.parametrize(
  'name,words',
  [
    ('v7:4x4', 'no chip is called .v7.*v4, v5e, v5p, v6e, A100, H100, H200'),
    ('v4:3x3x3', 'there is no v4 slice v4:3x3x3; known: v4:1x1x1'),
    ('A100:3', 'A100:1, A100:2, A100:4'),
    ('4x4', 'a v4 slice has 3 physical axes'),
  ],
)
def test_unknown_machines_are_refused_with_those_known(name, words):
  with pytest.raises(MeshError, match=words):
    Machine.parse(name)


@pytest.mark.parametrize('chip', hardware.CHIPS)
def test_what_is_known_can_be_used(chip):
  model = config.preset('palm_62b')
  # The compiler's figure counts in GiB what data sheets of TPUs call GB.
  assert (
    hardware.chip(chip).source
    and 0.9 <= hardware.chip(chip).usable_bytes / hardware.chip(chip).hbm_bytes < 1.08
  )
  for name in known_machines(chip):
    machine = Machine.parse(name)
    assert str(machine) == name
    for mesh in machine.meshes(model):
      assert math.prod(mesh) == machine.chips


def test_the_first_mesh_is_the_best_for_two_dimensions():
  slice_ = Machine.parse('v4:4x4x4')
  assert slice_.meshes(config.preset('palm_540b'))[0] == (2, 8, 4)
  assert slice_.meshes(config.preset('palm_540b'), split=False)[0] == (4, 4, 4)
  assert Machine.parse('A100:64').meshes(config.preset('palm_540b'))[0] == (4, 4, 4)


def test_chips_that_do_not_divide_the_model_are_refused():
  with pytest.raises(MeshError, match='d_model=256 does not divide over the 512 devices'):
    Machine.parse('v4:8x8x8').meshes(config.preset('palm_tiny'))


def test_the_papers_convention_knows_one_bandwidth():
  for axes in (('x',), ('x', 'z', 'y')):
    for kind, passes in (
      ('all_gather', 1),
      ('reduce_scatter', 1),
      ('all_to_all', 1),
      ('all_reduce', 2),
    ):
      assert seconds(
        'v4:4x4x4', (4, 4, 4), Collective('', kind, axes, 4, 270 * MB), 'paper'
      ) == pytest.approx(passes * 1e-3)


@pytest.mark.parametrize(
  'machine,mesh,axes,shards,rate,hops',
  [
    ('v4:4x4x4', (4, 4, 4), ('x',), 4, 90e9, 2),  # a ring: two links
    ('v4:4x4x4', (4, 4, 4), ('z', 'y'), 16, 180e9, 4),
    ('v4:4x4x4', (4, 4, 4), ('x', 'z', 'y'), 64, 270e9, 6),
    ('v4:4x4x4', (4, 16, 1), ('y',), 16, 180e9, 4),  # one mesh axis of two physical ones
    ('v4:4x4x4', (2, 8, 4), ('x',), 2, 45e9, 1),  # half a physical axis
    ('v4:4x4x4', (2, 8, 4), ('z', 'y'), 32, 225e9, 5),  # two axes and a half
    ('v4:2x2x4', (2, 4, 2), ('x',), 2, 45e9, 1),  # no wraparound: a chain has one link to its end
    ('v4:2x2x4', (2, 4, 2), ('y',), 4, 45e9, 3),
    ('v5e:16x16', (16, 16, 1), ('x',), 16, 90e9, 8),
    ('v5e:4x8', (4, 8, 1), ('y',), 8, 45e9, 7),
  ],
)
def test_as_compiled_a_collective_has_the_links_of_all_its_axes(
  machine, mesh, axes, shards, rate, hops
):
  moved = 90 * MB * (shards - 1) / shards
  each = moved / rate + hops * 1e-6
  for kind, passes in (('all_gather', 1), ('reduce_scatter', 1), ('all_reduce', 2)):
    move = Collective('', kind, axes, shards, 90 * MB)
    if kind == 'all_reduce' or len(axes) < 3:
      assert seconds(machine, mesh, move, 'compiled') == pytest.approx(passes * each)


def test_as_compiled_a_gather_over_three_axes_is_two():
  """The second one, over the first two axes, carries the whole array."""
  move = Collective('', 'all_gather', ('x', 'z', 'y'), 64, 90 * MB)
  whole = 90 * MB * 15 / 16 / 180e9 + 4e-6
  part = 90 * MB / 16 * 3 / 4 / 90e9 + 2e-6
  assert seconds('v4:4x4x4', (4, 4, 4), move, 'compiled') == pytest.approx(whole + part)


def test_as_compiled_weights_are_gathered_along_x_and_then_along_the_others():
  """Each of the two dimensions has its own gather, with the links of its own axes."""
  move = Collective('weights: gate', 'all_gather', ('x', 'y'), 8, 90 * MB)
  part, whole = 90 * MB / 4 / 2 / 45e9 + 1e-6, 90 * MB * 3 / 4 / 45e9 + 3e-6
  assert seconds('v5e:2x4', (2, 4, 1), move, 'compiled') == pytest.approx(whole + part)
  one = dataclasses.replace(move, axes=('y',), shards=4)
  assert seconds('v5e:2x4', (2, 4, 1), one, 'compiled') == pytest.approx(whole)


@pytest.mark.parametrize(
  'machine,mesh,axes,chips,rates,hops',
  [
    ('v4:4x4x4', (4, 4, 4), ('x',), [4], [90e9], 2),
    ('v4:4x4x4', (4, 4, 4), ('z', 'y'), [4, 4], [90e9, 90e9], 4),
    ('v4:4x4x4', (4, 16, 1), ('y',), [4, 4], [90e9, 90e9], 4),  # one mesh axis, two physical ones
    ('v4:4x4x4', (2, 8, 4), ('z', 'y'), [4, 4, 2], [90e9, 90e9, 45e9], 5),
    ('v4:4x4x8', (4, 8, 4), ('y', 'z'), [8, 4], [90e9, 90e9], 6),  # the longer ring carries most
    ('v5e:4x8', (4, 8, 1), ('y',), [8], [45e9], 7),
  ],
)
def test_a_collective_runs_along_one_axis_after_the_other(machine, mesh, axes, chips, rates, hops):
  def along(order):
    total, share = 0.0, 90 * MB
    for i in order:
      total += share * (chips[i] - 1) / chips[i] / rates[i]
      share /= chips[i]
    return total

  least = min(map(along, itertools.permutations(range(len(chips)))))
  each = least + hops * 1e-6 + len(chips) * 3e-6
  shards = math.prod(chips)
  for kind, passes in (('all_gather', 1), ('reduce_scatter', 1), ('all_reduce', 2)):
    move = Collective('', kind, axes, shards, 90 * MB)
    assert seconds(machine, mesh, move) == pytest.approx(passes * each)


def test_gathered_weights_pass_through_one_link():
  move = Collective('weights: gate', 'all_gather', ('x', 'y', 'z'), 64, 64 * 45 * MB)
  assert seconds('v4:4x4x4', (4, 4, 4), move) == pytest.approx(63 * (1e-3 + 1e-6 + 3e-6))
  assert seconds('v4:4x4x4', (4, 4, 4), move, 'compiled') < 63e-3 / 3.5


def test_half_of_what_an_all_to_all_moves_crosses_the_middle():
  # A ring of 4: two links cross each cut, each way. 2 chips send half their array across.
  ring = seconds('v4:4x4x4', (4, 4, 4), Collective('', 'all_to_all', ('x',), 4, 90 * MB))
  assert ring == pytest.approx(2 * 45 * MB / (2 * 45e9) + 2e-6 + 3e-6)
  chain = seconds('v5e:4x4', (4, 4, 1), Collective('', 'all_to_all', ('x',), 4, 90 * MB))
  assert chain == pytest.approx(2 * 45 * MB / 45e9 + 3e-6 + 3e-6)


def test_a_split_axis_is_slower_than_a_whole_one():
  # Half of a physical axis of 4: a chain of 2 with one link.
  whole = seconds('v4:4x4x4', (4, 4, 4), Collective('', 'all_gather', ('x',), 4, 90 * MB))
  split = seconds('v4:4x4x4', (2, 8, 4), Collective('', 'all_gather', ('x',), 2, 90 * MB))
  assert split * 4 / 3 > whole


def test_within_a_node_there_is_nvlink_and_between_nodes_are_cards():
  """Latencies of NCCL's table, microseconds: 14, 1.25 a step over NVLink, 8.5 between nodes."""
  bytes_ = 8 * 300 * MB
  inside = seconds('A100:8', (8, 1, 1), Collective('', 'all_gather', ('x',), 8, bytes_))
  assert inside == pytest.approx(bytes_ * 7 / 8 / 300e9 + (14 + 7 * 1.25) * 1e-6, rel=1e-9)
  both = seconds('A100:16', (16, 1, 1), Collective('', 'all_gather', ('x',), 16, bytes_))
  assert both == pytest.approx(
    bytes_ * 7 / 8 / 300e9 + bytes_ / 8 / 2 / 25e9 + (14 + 7 * 1.25 + 8.5) * 1e-6, rel=1e-9
  )
  # Across nodes alone: one chip of each.
  across = seconds('A100:16', (2, 8, 1), Collective('', 'all_gather', ('x',), 2, bytes_))
  assert across == pytest.approx(bytes_ / 2 / 25e9 + (14 + 8.5) * 1e-6, rel=1e-9)
  # Few bytes over four nodes: twice through the tree.
  few = seconds('A100:32', (32, 1, 1), Collective('', 'all_reduce', ('x',), 32, 1))
  assert few == pytest.approx((14 + 2 * (7 * 1.25 + 2 * 8.5)) * 1e-6, rel=1e-3)


def test_an_unknown_convention_is_refused():
  with pytest.raises(UserError, match='there are torus, compiled, paper'):
    seconds('v4:4x4x4', (4, 4, 4), Collective('', 'all_gather', ('x',), 4, 1), 'wires')


@pytest.mark.parametrize('name', hardware.CHIPS)
def test_the_guide_has_the_numbers_of_a_chip(name, repository):
  chip = hardware.chip(name)
  text = (repository / 'docs' / 'planner.md').read_text(encoding='utf-8')
  row = next(line for line in text.splitlines() if line.startswith(f'| {name} |')).split('|')[2:6]
  assert [float(cell) for cell in row] == pytest.approx(
    [
      chip.bf16_flops / 1e12,
      chip.hbm_bandwidth / 1e12,
      chip.usable_bytes / 2**30,
      chip.network_bandwidth / 1e9,
    ],
    abs=0.005,
  )
