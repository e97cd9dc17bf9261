"""Keys and values from one sharding to another: every head of every row, and the bytes moved."""

import collections
import itertools

import jax
from jax.sharding import NamedSharding
import numpy as np
import pytest

from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.sharding.cache_moves import cache_collectives, cache_moves
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import make_mesh, parse_mesh
from tests import hlo, memory
from tests.sharding.traffic_test import MODELS

LENGTH, KEPT = 8, 5
PREFILL = ('ws_2d/heads', 'ws_2d/batch', 'wg_x/heads', 'wg_xy/batch', 'wg_xyz/batch')
DECODE = ('ws_2d/heads', 'ws_2d/batch', 'wg_x/heads')
# Each model on each mesh; pairs of layouts and numbers of rows take turns.
CASES = [
  (name, mesh, *pair, (8, 4, 2, 16)[(i + j + k) % 4])
  for i, name in enumerate(('multihead', 'grouped', 'multiquery', 'cut'))
  for j, mesh in enumerate(('2x2x2', '1x2x4', '4x2x1'))
  for k, pair in enumerate(itertools.product(PREFILL, DECODE))
  if (i + j + k) % 3 == 0
] + [
  ('multihead', '2x2x2', 'ws_2d/heads', 'wg_x/heads', 1),
  ('grouped', '2x2x2', 'ws_2d/heads', 'wg_xyz/batch', 4),
]


def setting(name, mesh, prefill, decode, rows):
  devices = make_mesh(parse_mesh(mesh))
  model = Model(MODELS[name], devices, Layout.parse(prefill), Layout.parse(decode), 'float32')
  return model, model.prefill_sharding(rows, LENGTH), model.cache_sharding(rows)


@pytest.mark.parametrize('case', CASES, ids=lambda case: ':'.join(map(str, case)))
def test_every_head_of_every_row_arrives_by_the_predicted_bytes(case):
  model, held, wanted = setting(*case)
  rows, config = case[-1], model.config
  heads = np.random.default_rng(0).normal(size=(rows, config.num_kv_heads, LENGTH, config.d_head))
  heads = heads.astype(np.float32)
  cached = np.stack([heads[:, 0 if h is None else h] for h in held.heads.cached()], axis=1)
  before, after = (NamedSharding(model.mesh, each.cache) for each in (held, wanted))
  kv = jax.device_put((cached, -cached), before)
  program = memory.quick_jit(
    lambda *kv: model.reshard_kv(kv, KEPT, held, wanted), out_shardings=after
  )
  program = program.lower(*kv).compile()
  for found, sign in zip(program(*kv), (1, -1), strict=True):
    assert found.shape == (rows, len(wanted.heads.cached()), KEPT, config.d_head)
    for i, head in enumerate(wanted.heads.cached()):
      if head is not None:  # padding holds any head
        np.testing.assert_array_equal(np.asarray(found)[:, i], sign * heads[:, head, :KEPT])
  bytes_ = collections.defaultdict(float)
  shape = model.mesh.shape
  for c in cache_collectives(held, wanted, shape, rows, KEPT, 4 * config.d_head):
    bytes_[{'permute': 'collective-permute'}.get(c.kind, c.kind.replace('_', '-'))] += c.moved
  assert hlo.moved(hlo.collectives(program.as_text())) == pytest.approx(dict(bytes_), rel=1e-3)


def test_the_cases_have_every_kind_of_move():
  kinds = set()
  for case in CASES:
    model, held, wanted = setting(*case)
    moves = cache_moves(held, wanted, model.mesh.shape)
    kinds |= {(move.kind, move.dim) for move in (*moves.before, *moves.after)}
  assert kinds == {
    *itertools.product(('all_gather', 'all_to_all'), ('rows', 'heads')),
    ('slice', 'rows'),
    ('permute', 'rows'),
  }


def test_equal_shardings_move_nothing():
  model, held, _ = setting('grouped', '2x2x2', 'ws_2d/batch', 'ws_2d/batch', 8)
  moves = cache_moves(held, held, model.mesh.shape)
  assert not moves.before and not moves.heads and not moves.after
