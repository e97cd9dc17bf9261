"""Stock T5X compiled for a slice, as benchmarks.tpu_compile has it beside this package."""

import importlib.util

import jax
import pytest

from benchmarks import stock_t5x, tpu_compile
from benchmarks.stock_t5x import Partitioning
from t5x_inference_ext.config import ModelConfig, preset
from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.sharding.torus import parse_slice

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='libtpu, the TPU compiler, is not installed (extra `test`)',
)

SLICE = 'v4:2x2x1'
CONFIG = ModelConfig(num_layers=3, d_model=256, d_ff=1024, num_heads=8, d_head=128, vocab_size=512)
MODEL_ALONE, BOTH = stock_t5x.PARTITIONINGS[SLICE]


def test_every_row_has_partitionings():
  assert {row.slice_name for row in tpu_compile.ROWS if row.has_stock} <= set(
    stock_t5x.PARTITIONINGS
  )


def test_weights_are_split_by_the_standard_rules():
  """4 chips of 'model', or 2 of 'data' and 2 of 'model', over which keys and values are whole."""
  c = CONFIG
  shared = c.num_layers * c.d_model * 2 * c.d_head + (c.num_layers + 1) * c.d_model
  split = c.num_params - shared
  for partitioning, held in ((MODEL_ALONE, split / 4 + shared), (BOTH, split / 4 + shared / 2)):
    partitioner = stock_t5x.slice_partitioner(parse_slice(SLICE), partitioning)
    _, (params, cache, _) = stock_t5x.phase_function(c, partitioner, 'decode', 4, 64)
    assert stock_t5x.shard_bytes(params) == 2 * held
    shards = {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(cache) if x.ndim == 4}
    rows = partitioner.mesh.shape['data']
    assert shards == {(c.num_layers, 4 // rows, c.d_head, 64)}


@pytest.mark.parametrize('phase', ['decode', 'prefill'])
def test_best_is_the_fastest_of_those_tried(phase):
  best, tried = stock_t5x.best(CONFIG, SLICE, phase, 3, 128)
  assert [s.partitioning for s in tried] == [MODEL_ALONE, BOTH]
  assert [s.batch for s in tried] == [3, 4]  # two shards of data take no 3 rows
  assert all(s.fits and not s.estimate.unknown_loops for s in tried)
  assert best.estimate.serial_seconds == min(s.estimate.serial_seconds for s in tried) > 0
  assert all(0 < s.memory.weights < s.memory.needed < s.memory.available for s in tried)
  assert any(c.count == CONFIG.num_layers and c.kind == 'attention' for c in best.estimate.costs)


@pytest.mark.parametrize('batch', [1, 10_000])
def test_too_large_is_an_answer(batch):
  """PaLM 540B by arithmetic; a cache of 10,000 rows by the compiler."""
  config = preset('palm_540b') if batch == 1 else CONFIG
  stock = stock_t5x.analyze(config, SLICE, 'decode', batch, 2048, MODEL_ALONE)
  assert not stock.fits and stock.needed > 30.75 * 2**30


def test_submesh_that_does_not_divide():
  with pytest.raises(MeshError, match='does not divide v4:2x2x1'):
    stock_t5x.slice_partitioner(parse_slice(SLICE), Partitioning((4, 1, 1, 1), 1, 1))
