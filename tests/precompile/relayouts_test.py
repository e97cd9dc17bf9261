"""Weights, caches and rows are stored as the compiled programs want them.

No weight and no cache is laid out anew in HBM, or converted there, in any layout; reduce-scatters
stay such.
"""

import collections
import dataclasses

import pytest

from t5x_inference_ext.config import preset
from t5x_inference_ext.precompile.analysis import analyze

pytestmark = pytest.mark.libtpu

LAYOUTS = (
  'ws_1d/heads',
  'ws_1d/batch',
  'ws_2d/heads',
  'ws_2d/batch',
  'wg_x/heads',
  'wg_x/batch',
  'wg_xy/heads',
  'wg_xy/batch',
  'wg_xyz/batch',
)


def _layers(model: str, count: int = 3, **fields):
  return dataclasses.replace(preset(model), num_layers=count, **fields)


def _relaid(weights: str, phase: str, layout: str, cache: str | None = None) -> list[str]:
  answer = analyze(
    _layers('palm_8b'),
    weights,
    'v4:2x2x2',
    phase,
    16,
    512,
    layout=layout,
    mesh='2x2x2',
    cache=cache,
    scan_layers=True,
  )
  return [f'{c.name} {c.result} of {c.sources}' for c in answer.estimate.weight_copies if c.relaid]


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('weights', ['int8,embedding:8', 'bfloat16'])
def test_no_decode_step_lays_a_weight_or_a_cache_out_anew(weights, layout):
  assert not _relaid(weights, 'decode', layout)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_no_prefill_lays_a_weight_out_anew(layout):
  relaid = _relaid('int8', 'prefill', layout)
  # With one key head and attention by heads, the finished keys and values are copied once each,
  # half a megabyte a layer here. No weight is.
  assert len(relaid) <= 2 * layout.endswith('heads'), relaid
  assert all('result' in copy for copy in relaid), relaid


@pytest.mark.parametrize('phase', ['extend', 'slots', 'admit'])
@pytest.mark.parametrize('layout', ['ws_2d/heads', 'ws_2d/batch', 'wg_xyz/batch'])
def test_no_program_of_slot_refill_does(phase, layout):
  assert not _relaid('int8', phase, layout)


def test_no_pages_of_several_key_heads_are_laid_out_anew():
  """With heads between positions and features, a call copied every layer's pages, and back."""
  config = _layers('llama3_8b', 2)
  answer = analyze(config, 'int8', 'v4:2x2x1', 'slots', 32, 2048, layout='ws_2d/batch')
  assert not answer.estimate.weight_copies


@pytest.mark.parametrize(
  'phase, layout',
  [('decode', 'ws_1d/heads'), ('decode', 'ws_2d/batch'), ('prefill', 'ws_2d/batch')],
)
def test_no_int8_cache_is_laid_out_anew(phase, layout):
  """A new position is a part of a tile: unaligned, the cache is copied twice for every row."""
  assert not _relaid('int8', phase, layout, 'int8')


@pytest.mark.parametrize('layout', ['wg_x/batch', 'wg_xy/heads'])
@pytest.mark.parametrize(
  'weights, scan_layers', [('int8', True), ('bfloat16', True), ('bfloat16', False)]
)
def test_no_gathered_matrix_of_a_large_model_is(weights, scan_layers, layout):
  """The compiler gathered some of PaLM 540B's matrices transposed, and turned them around."""
  config = _layers('palm_540b', 4)
  answer = analyze(
    config, weights, 'v4:4x4x4', 'decode', 64, 2048, layout=layout, scan_layers=scan_layers
  )
  assert not [c for c in answer.estimate.weight_copies if c.relaid]


def _layer_costs(model: str, slice_name: str, batch: int, layout: str):
  answer = analyze(
    _layers(model), 'int8', slice_name, 'decode', batch, 512, layout=layout, scan_layers=True
  )
  return [c for c in answer.estimate.costs if c.in_layer_loop]


@pytest.mark.parametrize(
  'slice_name, batch, layout',
  [
    ('v4:2x2x1', 32, 'ws_2d/batch'),
    ('v4:2x2x4', 32, 'ws_2d/batch'),
    ('v4:4x4x4', 64, 'ws_2d/batch'),
    ('v4:4x4x4', 64, 'ws_1d/batch'),
  ],
)
def test_a_decode_step_scatters_few_rows(slice_name, batch, layout):
  """A reduce-scatter to less than a tile of rows, or over three axes, became an all-reduce.

  model/collectives/ops.py has the forms that the compiler keeps.
  """
  collectives = [
    (c.collective.kind, c.bytes)
    for c in _layer_costs('palm_8b', slice_name, batch, layout)
    if c.collective
  ]
  # The norms sum one number for each row.
  assert not [c for c in collectives if c[0] == 'all-reduce' and c[1] > 4 * batch]
  assert 'reduce-scatter' in dict(collectives)


@pytest.mark.parametrize(
  'model, slice_name, batch',
  [('palm_8b', 'v4:2x2x1', 1), ('palm_8b', 'v4:2x2x1', 4), ('palm_540b', 'v4:4x4x4', 8)],
)
def test_few_rows_cost_no_more_than_the_weights(model, slice_name, batch):
  """A single row missed the matrix unit; with few rows weights were cut out or turned around."""
  seconds = collections.defaultdict(float)
  for c in _layer_costs(model, slice_name, batch, 'ws_2d/batch'):
    seconds[c.kind] += c.seconds
  assert seconds['matmul'] > 2 * sum(
    s for kind, s in seconds.items() if kind not in ('matmul', 'collective')
  )
