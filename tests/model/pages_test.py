"""A cache in pages against a dense one: the same logits, and the same keys and values written."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.engine import cache_rows, programs
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model import cache as kv_cache
from t5x_inference_ext.model import chunks, pages
from t5x_inference_ext.model.cache import KVCache
from t5x_inference_ext.model.pages import PagedCache, SharedPages
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.quantization.kv import Int8KV, to_cache
from tests import memory, reference
from tests.model import features_test, layouts_test

WIDTH = 3  # M
insert_row = memory.quick_jit(cache_rows.insert_row, static_argnames='model')

# (model, decode layout, rows, mesh, stacked, cache): every layout, with rows that fill the mesh,
# some of its axes, or none.
CASES = [
  ('multiquery-parallel', 'ws_2d/batch', 4, '1x1x1', True, None),
  ('grouped-serial', 'ws_2d/batch', 3, '1x1x1', False, 'int8'),
  ('multiquery-parallel', 'ws_2d/batch', 16, '2x2x2', True, 'int8'),
  ('grouped-parallel', 'ws_2d/batch', 4, '2x2x2', False, None),
  ('multihead-serial', 'ws_2d/heads', 3, '2x2x2', True, None),
  ('grouped-serial', 'ws_1d/heads', 2, '2x2x2', False, 'int8'),
  ('multihead-parallel', 'ws_1d/batch', 8, '2x2x2', True, None),
  ('multiquery-serial', 'wg_x/heads', 4, '2x2x2', True, None),
  ('multihead-serial', 'wg_x/batch', 8, '2x2x2', False, None),
  ('grouped-serial', 'wg_xy/heads', 8, '2x2x2', True, None),
  ('multiquery-parallel', 'wg_xy/batch', 4, '2x2x2', True, 'int8'),
  ('grouped-parallel', 'wg_xyz/batch', 16, '2x2x2', False, None),
  # Rules by position, with pages that some rows share.
  ('bloom', 'ws_2d/heads', 3, '2x2x2', True, None),
  ('gemma3', 'ws_2d/batch', 8, '2x2x2', True, 'int8'),
  ('t5', 'wg_xy/batch', 4, '2x2x2', False, None),
  ('mpt', 'ws_1d/batch', 2, '2x2x2', True, None),
  ('gpt', 'ws_2d/batch', 4, '2x2x2', False, None),
]
MODELS = {**layouts_test.MODELS, **features_test.MODELS}


def load(model, layout, mesh, stacked, cache):
  prefill = layout if layout.startswith(('ws', 'wg')) else 'ws_2d/batch'
  tensors = reference.random_tensors(MODELS[model])
  return memory.engine(
    MODELS[model], tensors, mesh, stacked=stacked, prefill=prefill, decode=layout, cache=cache
  )


class Pool:
  """A dense cache of random rows, and one in pages that holds the same, both on the mesh."""

  def __init__(self, engine, rows, seed, shared_pages=0, spare=2):
    self.rng = rng = np.random.default_rng(seed)
    self.model, self.weights, self.rows = engine.model, engine.weights, rows
    self.size = size = 32 if engine.model.cache_dtype == 'int8' else 8
    self.shards = chunks.page_shards(engine.model, rows)
    self.each = each = rows // self.shards
    # Rows with nothing, at a page's first and last position, and anywhere.
    lengths = rng.integers(0, (WIDTH - 1) * size, rows)
    lengths[rng.integers(rows)] = 0
    lengths[rng.integers(rows)] = size - 1
    lengths[rng.integers(rows)] = size
    self.local = each * WIDTH + 1 + spare  # pages of a shard
    dense = chunks.empty_cache(engine.model, engine.weights, rows, WIDTH * size)
    paged = chunks.empty_pages(
      engine.model, engine.weights, rows, self.local, size, WIDTH, shared_pages
    )
    dense_kv = self.random((dense.keys, dense.values))
    pages_kv = self.random((paged.keys, paged.values))
    table = np.zeros((rows, WIDTH), np.int32)
    owners = rng.integers(0, each, self.shards * self.local).astype(np.int32)
    starts = np.full(self.shards * self.local, pages.UNUSED, np.int32)
    visible = rng.random((rows, shared_pages)) < 0.5
    visible[:, 1:] &= visible[:, :-1]  # a row sees the first ones
    visible &= lengths[:, None] >= (np.arange(shared_pages)[None, :] + 1) * size
    shared_kv = None
    if shared_pages:
      shared_kv = self.random((paged.shared.keys, paged.shared.values))
    for row in range(rows):
      shard, own = divmod(row, each)
      free = np.setdiff1d(np.arange(1, self.local - spare), table[shard * each : row])
      sees = int(visible[row].sum())
      for m in range(WIDTH):
        at = np.s_[m * size : (m + 1) * size]
        if m < sees:  # its own page in the dense cache is what it shares
          copy(dense_kv, shared_kv, lambda x, m=m: x[..., m, :, :], row, at)
          continue
        page = table[row, m] = rng.choice(np.setdiff1d(free, table[row]))
        which = shard * self.local + page
        owners[which], starts[which] = own, m * size
        copy_out(pages_kv, which, dense_kv, row, at)
    lengths = lengths.astype(np.int32)
    self.dense = self.put(KVCache(*dense_kv, lengths))
    shared = shared_kv and SharedPages(
      *shared_kv, visible, (np.arange(shared_pages) * size).astype(np.int32)
    )
    self.paged = self.put(
      PagedCache(
        *pages_kv, lengths, table, owners, starts, shared, self.local - spare, shared_pages
      )
    )
    self.table, self.lengths, self.visible = table, lengths, visible

  def random(self, like):
    def fill(x):
      values = jnp.asarray(self.rng.normal(size=x.shape), jnp.float32)
      return jax.tree.map(np.array, to_cache(values, self.model.cache_dtype))

    return jax.tree.map(fill, like, is_leaf=lambda x: isinstance(x, Int8KV))

  def put(self, cache):
    spec = self.model.cache_spec(self.model.cache_sharding(self.rows), self.weights, cache)

    def place(spec, arrays):
      sharding = jax.sharding.NamedSharding(self.model.mesh, spec)
      return jax.tree.map(lambda x: jax.device_put(x, sharding), arrays)

    return jax.tree.map(place, spec, cache)

  def as_dense(self, paged):
    """Keys and values of all rows of a cache in pages, [.., B, K, WIDTH * S, Q]."""

    def gather(x, shared):
      out = []
      for row in range(self.rows):
        shard = row // self.each
        sees = self.visible[row].sum()
        at = shard * self.local + self.table[row]
        parts = [
          np.take(shared, m, -3) if m < sees else np.take(np.asarray(x), at[m], -4)
          for m in range(WIDTH)
        ]
        out.append(np.concatenate(parts, axis=-2))
      return np.stack(out, axis=-4)

    kv = paged.keys, paged.values
    shared = (paged.shared.keys, paged.shared.values) if paged.shared else kv
    return jax.tree.map(gather, kv, jax.tree.map(np.asarray, shared))


def copy(dense_kv, shared_kv, of, row, at):
  for x, shared in zip(jax.tree.leaves(dense_kv), jax.tree.leaves(shared_kv)):
    x[..., row, :, at, :] = of(shared)


def copy_out(pages_kv, page, dense_kv, row, at):
  for x, dense in zip(jax.tree.leaves(pages_kv), jax.tree.leaves(dense_kv)):
    x[..., page, :, :, :] = dense[..., row, :, at, :]


@pytest.mark.parametrize('case', range(len(CASES)), ids=lambda i: ':'.join(map(str, CASES[i])))
def test_decode_equals_that_of_a_dense_cache(case):
  """Pages of any order among stale ones; pages shared by some rows; steps that cross pages."""
  model, layout, rows, mesh, stacked, cache = CASES[case]
  engine = load(model, layout, mesh, stacked, cache)
  pool = Pool(engine, rows, seed=case, shared_pages=case % 3)
  dense, paged, run = pool.dense, pool.paged, (engine.model, engine.weights)
  assert paged.read < pool.local and (paged.shared is not None) == (case % 3 > 0)
  for step in range(3):
    (token,) = programs.put(engine.model, memory.tokens(engine.model.config, rows, 4)[:, step])
    wanted, dense = memory.decode_step(*run, dense, token)
    found, paged = memory.decode_step(*run, paged, token)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(paged.lengths, dense.lengths)
  # The first layer's are equal, bit for bit; later layers' nearly, and in int8 to a unit.
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      np.asarray(x, np.float32), np.asarray(y, np.float32), atol=2e-5 if x.dtype != np.int8 else 1
    ),
    pool.as_dense(paged),
    (dense.keys, dense.values),
  )


@pytest.mark.parametrize('dtype, size', [('float32', 8), ('int8', 32)])
@pytest.mark.parametrize('write', [pages._scatter, pages._row_by_row])
@pytest.mark.parametrize('tokens', [1, 2, 5])
def test_tokens_are_written_across_pages(write, tokens, dtype, size):
  """As into a dense row; beyond the table's end they are dropped."""
  rng = np.random.default_rng(tokens)
  rows, layers, heads, width = 8, 2, 2, 4
  lengths = np.asarray(
    [0, size - 1, size - 3, 3 * size - 2, 5, 3 * size - 1, 2 * size, 7], np.int32
  )
  counts = np.asarray([tokens, tokens, tokens, tokens, 0, 1, tokens, 1], np.int32)
  table = rng.permutation(rows * 3).reshape(rows, 3).astype(np.int32)
  held = lambda *shape: to_cache(jnp.asarray(rng.normal(size=shape), jnp.float32), dtype)
  pool = [held(layers, rows * 3, heads, size, width) for _ in range(2)]
  new = [held(layers, rows, heads, tokens, width) for _ in range(2)]
  nobody = jnp.zeros(rows * 3, jnp.int32)
  cache = PagedCache(*pool, jnp.asarray(lengths), jnp.asarray(table), nobody, nobody)
  found = jax.jit(write)(cache, *new, counts)
  joined = lambda x: jnp.concatenate(jnp.moveaxis(x[:, table], 2, 0), axis=-2)
  dense = jax.tree.map(joined, pool)
  wanted = jax.jit(kv_cache._scatter)(KVCache(*dense, jnp.asarray(lengths)), *new, counts)
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(joined, tuple(found)), tuple(wanted))


@pytest.mark.parametrize('case', [0, 2, 3, 4, 8])
def test_a_row_is_inserted_into_its_pages_alone(case):
  """From its first own page on; and one of its pages becomes a shared one."""
  model, layout, rows, mesh, stacked, cache = CASES[case]
  engine = load(model, layout, mesh, stacked, cache)
  pool = Pool(engine, rows, seed=case, shared_pages=2)
  size, row = pool.size, rows - 1
  length = 2 * size + 3
  heads = len(engine.model.cache_sharding(rows).heads.cached())
  lead = (engine.model.config.num_layers,) if stacked else ()
  shape = (*lead, 1, heads, length + 2, engine.model.config.d_head)
  layers = lambda: shape_like(shape, stacked, engine.model.config.num_layers)
  one = KVCache(*pool.random((layers(), layers())), np.asarray([length], np.int32))
  with_row = insert_row(
    engine.model,
    pool.paged,
    engine.weights,
    np.int32(row),
    jax.tree.map(jnp.asarray, one),
    pool.table[row],
    np.int32(1),
    np.asarray([1, 0, 0], np.int32),
    (np.int32(0), np.int32(1)),
  )
  wanted = jax.tree.map(np.array, (pool.paged.keys, pool.paged.values))
  shared = jax.tree.map(np.array, (pool.paged.shared.keys, pool.paged.shared.values))
  first = pool.local * (row // pool.each)
  for x, part, new in zip(*map(jax.tree.leaves, (wanted, shared, (one.keys, one.values)))):
    new = np.pad(new[..., 0, :, :, :], [(0, 0)] * len(lead) + [(0, 0), (0, size), (0, 0)])
    for m in (1, 2):
      x[..., first + pool.table[row, m], :, :, :] = new[..., m * size : (m + 1) * size, :]
    part[..., 1, :, :] = new[..., :size, :]
  filled = lambda kv: jax.tree.map(np.asarray, kv)
  jax.tree.map(np.testing.assert_array_equal, filled((with_row.keys, with_row.values)), wanted)
  jax.tree.map(
    np.testing.assert_array_equal, filled((with_row.shared.keys, with_row.shared.values)), shared
  )
  assert np.asarray(with_row.lengths).tolist() == [*pool.lengths[:-1], length]
  assert np.asarray(with_row.shared.starts).tolist() == [0, 0]  # page 1 was another position's
  for a, b in zip(jax.tree.leaves(with_row), jax.tree.leaves(pool.paged)):
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def shape_like(shape, stacked, layers):
  return np.zeros(shape) if stacked else tuple(np.zeros(shape) for _ in range(layers))


@pytest.mark.parametrize('stacked', [False, True])
def test_a_decode_step_copies_no_layer_of_its_cache(stacked):
  """Of either kind. Unrolled, XLA:CPU would write before the last layer has read, into a copy."""
  engine = load('multiquery-parallel', 'ws_2d/batch', '1x1x1', stacked, None)
  run, rows = (engine.model, engine.weights), 3
  dense = chunks.empty_cache(*run, rows, 512)
  paged = dataclasses.replace(chunks.empty_pages(*run, rows, 192, 8, 4), read=rows)
  for cache in (dense, paged):
    step = jax.jit(Model.decode_step, static_argnames='self', donate_argnums=2)
    compiled = step.lower(*run, cache, jnp.zeros(rows, jnp.int32)).compile()
    lead, *rest = jax.tree.leaves(cache.keys)[0].shape[-4:]
    layer = ','.join(map(str, (lead, *rest)))
    copies = re.findall(rf'= f32\[(?:\d,)?{layer}\]\S* copy\(', compiled.as_text())
    assert layer in compiled.as_text() and not copies


def test_a_broken_row_breaks_no_other():
  """Its partial sums are multiplied by other rows' zeros."""
  engine = load(*CASES[0][:2], '1x1x1', True, None)
  pool = Pool(engine, 4, seed=0, shared_pages=1)
  run = engine.model, engine.weights
  embedding = engine.weights.embedding.at[50].set(jnp.inf)
  broken = engine.model, dataclasses.replace(engine.weights, embedding=embedding)
  (token,) = programs.put(engine.model, np.asarray([3, 50, 4, 5], np.int32))
  wanted, _ = memory.decode_step(*run, pool.paged, token)
  found, cache = memory.decode_step(*broken, pool.paged, token)
  ids = [i for i in range(found.shape[1]) if i != 50]  # whose own logit is inf
  assert np.isnan(found[1]).all()
  np.testing.assert_array_equal(np.delete(found, 1, 0)[:, ids], np.delete(wanted, 1, 0)[:, ids])
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((cache.keys, cache.values)))


@pytest.mark.parametrize('dtype, size, multiple', [('int8', 40, 32), ('float32', 12, 8)])
def test_page_sizes_are_whole_tiles(dtype, size, multiple):
  pages.check_page_size(multiple, dtype)
  for refused in (size, 0):
    with pytest.raises(RequestError, match=f'must have a multiple of {multiple}, such as'):
      pages.check_page_size(refused, dtype)
