"""Collectives against numpy on 2 x 2 x 2 devices: a wrong order of shards would go unnoticed."""

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.sharding.mesh import AXES, make_mesh

X = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)


def _run(fn, in_spec, out_spec, x=X, mesh=(2, 2, 2)):
  per_shard = jax.shard_map(
    fn, mesh=make_mesh(mesh), in_specs=in_spec, out_specs=out_spec, check_vma=False
  )
  return np.asarray(jax.jit(per_shard)(x))


@pytest.mark.parametrize('axes', [('x',), ('y', 'z'), AXES])
def test_all_gather_undoes_a_sharding(axes):
  np.testing.assert_array_equal(_run(lambda x: ops.all_gather(x, axes, 1), P(None, axes), P()), X)


@pytest.mark.parametrize('axes', [('x',), ('y', 'z'), AXES])
def test_reduce_scatter_sums_and_keeps_the_shards_slice(axes):
  scaled = _run(
    lambda x: ops.reduce_scatter(x * (1 + ops.shard_index(axes)), axes, 1), P(), P(None, axes)
  )
  shards = 2 ** len(axes)
  np.testing.assert_array_equal(scaled, X * (shards * (shards + 1) / 2))


@pytest.mark.parametrize(
  'shape, dim',
  [
    ((8, 1, 256), 0),
    ((32, 1, 128), 0),
    ((64, 1, 256), 0),
    ((128, 1, 256), 0),
    ((8, 2, 384), 0),
    ((2, 16, 128), 1),
    ((8, 1, 100), 0),
    ((2, 8, 2**17), 1),
    ((64, 2**16), 0),
    ((1, 3, 2**20), 2),
  ],
)
def test_reduce_scatter_of_few_and_of_many_elements(shape, dim):
  """Each form for XLA:TPU: up to a tile of rows on a shard, more rows, large arrays."""
  x = np.random.default_rng(0).integers(-9, 9, shape).astype(np.float32)
  spec = P(*(AXES if i == dim else None for i in range(len(shape))))
  found = _run(
    lambda x: ops.reduce_scatter(x * (1 + ops.shard_index(AXES)), AXES, dim), P(), spec, x
  )
  np.testing.assert_array_equal(found, 36 * x)


@pytest.mark.parametrize('axes', [('y',), ('y', 'z'), AXES])
def test_all_to_all_moves_a_sharding(axes):
  moved = _run(lambda x: ops.all_to_all(x, axes, 0, 1), P(None, axes), P(axes))
  np.testing.assert_array_equal(moved, X)


def test_all_reduce_sums():
  np.testing.assert_array_equal(_run(lambda x: ops.all_reduce(x, ('x', 'z')), P(), P()), 4 * X)


def test_axes_of_size_1_cost_nothing():
  def everything(x):
    x = ops.all_reduce(ops.all_gather(x, AXES, 0), AXES)
    return ops.all_to_all(ops.reduce_scatter(x, AXES, 1), AXES, 0, 1)

  lowered = jax.jit(
    jax.shard_map(
      everything, mesh=make_mesh((1, 1, 1)), in_specs=P(), out_specs=P(), check_vma=False
    )
  ).lower(X)
  for collective in ('all_reduce', 'all_gather', 'reduce_scatter', 'all_to_all'):
    assert collective not in lowered.as_text()
