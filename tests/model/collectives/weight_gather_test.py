"""Gathered matmuls against the whole matrix: numbers, bytes, and when a gather may start."""

import functools
import math
import re

import jax
from jax.extend.core import Literal
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from t5x_inference_ext.model.collectives import weight_gather
from t5x_inference_ext.sharding.mesh import AXES, make_mesh
from tests import memory

MESHES = [(2, 2, 2), (1, 2, 4), (8, 1, 1), (2, 4, 1)]
BYTES = {'f32': 4, 'bf16': 2, 's8': 1}
SPLITS = [
  (('x',), ('y', 'z')),
  (('y', 'z'), ('x',)),
  ((), AXES),
  (AXES, ()),
  (('z', 'x'), ('y',)),
  ((), ('y',)),
  ((), ()),
]
# Odd shards, cut across their columns everywhere; cut across their rows, and not at all, on one
# mesh.
CASES = [(mesh, *split, (3, 5)) for mesh in MESHES for split in SPLITS]
CASES += [((2, 2, 2), *split, shard) for split in SPLITS[:4] for shard in ((5, 3), (1, 1))]


def compiled(fn, mesh, in_specs, out_specs, *args):
  per_shard = jax.shard_map(
    fn, mesh=make_mesh(mesh), in_specs=in_specs, out_specs=out_specs, check_vma=False
  )
  return memory.quick_jit(per_shard).lower(*args).compile()


def run(fn, mesh, in_specs, out_specs, *args):
  return jax.tree.map(np.asarray, compiled(fn, mesh, in_specs, out_specs, *args)(*args))


def size_of(mesh, axes):
  return math.prod(n for a, n in zip(AXES, mesh) if a in axes)


def received(text: str, collective: str) -> int:
  """The bytes that one device is left with by all collectives of a kind."""
  shapes = re.findall(rf' = (\w+)\[([\d,]*)\]\S* {collective}\(', text)
  return sum(BYTES[dtype] * math.prod(map(int, dims.split(','))) for dtype, dims in shapes)


def operands(rows, columns, dtype=np.float32):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, rows)).astype(np.float32)
  w = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
  return (x, w) if dtype == np.int8 else (x, (w / np.float32(127)).astype(dtype))


@pytest.mark.parametrize('mesh, rows, columns, shard', CASES)
def test_gathered_matmul(mesh, rows, columns, shard):
  """Every shard of tokens is multiplied by the whole matrix. Here tokens are replicated."""
  shape = shard[0] * size_of(mesh, rows), shard[1] * size_of(mesh, columns)
  x, w = operands(*shape)
  _, w8 = operands(*shape, np.int8)

  def both(x, w, w8):
    return {m.dtype.name: weight_gather.gathered_matmul(x, m, rows, columns) for m in (w, w8)}

  split = P(rows or None, columns or None)
  results = run(both, mesh, (P(), split, split), P(), x, w, w8)
  assert len(results) == 2
  for dtype, y in results.items():
    expected = x.astype(np.float64) @ (w8 if dtype == 'int8' else w).astype(np.float64)
    np.testing.assert_allclose(
      y, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max(), err_msg=dtype
    )


@pytest.mark.parametrize('rows, columns', [(('x',), ('y', 'z')), (AXES, ()), ((), AXES)])
def test_bfloat16_is_rounded_once(rows, columns):
  x, w = operands(64, 64)
  x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
  exact = x.astype(np.float64) @ w.astype(np.float64)
  y = run(
    lambda x, w: weight_gather.gathered_matmul(x, w, rows, columns),
    (2, 2, 2),
    (P(), P(rows or None, columns or None)),
    P(),
    x,
    w,
  )
  assert y.dtype == jnp.bfloat16
  bound = 2**-8 * (np.abs(x.astype(np.float64)) @ np.abs(w.astype(np.float64)))
  error = np.abs(y.astype(np.float64) - exact)
  assert (error <= bound).all()
  # 0.16% rms was measured.
  assert np.sqrt((error**2).mean() / (exact**2).mean()) < 0.0025


def test_int8_weights_travel_as_int8():
  x, w = operands(40, 24, np.int8)
  text = compiled(
    lambda x, w: weight_gather.gathered_matmul(x, w, ('x',), ('y', 'z')),
    (2, 2, 2),
    (P(), P('x', ('y', 'z'))),
    P(),
    x,
    w,
  ).as_text()
  assert (
    received(text, 'all-gather') == w.nbytes + w.nbytes // 4
  )  # Rows first, of a quarter of the columns.


def test_axes_of_size_1_cost_nothing():
  x, w = operands(8, 6)
  text = compiled(
    functools.partial(weight_gather.gathered_matmul, row_axes=('x',), column_axes=('y', 'z')),
    (1, 1, 1),
    (P(), P()),
    P(),
    x,
    w,
  ).as_text()
  assert not re.search('all-gather|dynamic-slice', text)


def test_sizes_that_do_not_fit_are_refused():
  x, w = operands(16, 12)
  with pytest.raises(ValueError, match='2 shards of 6 rows cannot be multiplied by 16 columns'):
    run(
      lambda x, w: weight_gather.gathered_matmul(x, w.T, ('x',), ('y',)),
      (2, 2, 2),
      (P(), P('y', 'x')),
      P(),
      x,
      w,
    )


def layer(matrices):
  """Matmuls that do not wait for each other of themselves."""

  def independent(x, *ws):
    gatherer = weight_gather.Gatherer()
    return tuple(gatherer.matmul(x, w, ('x',), ('y', 'z')) for w in ws)

  specs = (P(AXES),) + (P('x', ('y', 'z')),) * matrices
  return jax.shard_map(
    independent,
    mesh=make_mesh((2, 2, 2)),
    in_specs=specs,
    out_specs=(P(AXES),) * matrices,
    check_vma=False,
  )


def prerequisites(fn, *args) -> list[tuple[str, set[int]]]:
  """List (primitive, indices of the operations that it waits for) of a shard_map, in order."""
  outer = jax.make_jaxpr(fn)(*args).jaxpr
  equations = next(e.params['jaxpr'] for e in outer.eqns if e.primitive.name == 'shard_map').eqns
  waits, found = {}, []
  for i, equation in enumerate(equations):
    needed = set().union(
      *(waits.get(v, set()) for v in equation.invars if not isinstance(v, Literal))
    )
    found.append((equation.primitive.name, needed))
    waits.update({v: needed | {i} for v in equation.outvars})
  return found


def test_a_gatherer_computes_what_gathered_matmuls_do():
  x, w = operands(40, 24)
  x = np.tile(x[:, 0], (4, 1))
  results = jax.jit(layer(5))(x, *[k * w for k in range(5)])
  assert len(results) == 5
  for k, y in enumerate(results):
    np.testing.assert_allclose(y, k * (x @ w), rtol=1e-4, atol=1e-4)


def test_one_matrix_in_use_and_one_in_flight():
  """A gather waits for the matmul before the last and no later one; a matmul for all before it."""
  x, w = operands(40, 24)
  found = prerequisites(layer(6), np.tile(x[:, 0], (8, 1)), *[w] * 6)
  matmuls = [i for i, (name, _) in enumerate(found) if name == 'dot_general']
  gathers = [needed for name, needed in found if name == 'all_gather']
  assert len(matmuls) == 6 and len(gathers) == 12
  for k in range(6):
    for needed in gathers[2 * k : 2 * k + 2]:  # Of rows, then of columns.
      assert needed & set(matmuls) == set(matmuls[: max(0, k - 1)])
    assert found[matmuls[k]][1] & set(matmuls) == set(matmuls[:k])
