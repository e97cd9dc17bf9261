"""Prompts in chunks and turns equal one pass over the whole, in every layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.engine import programs
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model import chunks
from t5x_inference_ext.model.transformer import Model
from tests import memory, reference
from tests.model import features_test, layouts_test

MODELS = {**layouts_test.MODELS, **features_test.MODELS}
LENGTH = 12

empty_cache = memory.quick_jit(chunks.empty_cache, static_argnames=('model', 'rows', 'size'))
extend = memory.quick_jit(Model.prefill_chunk, static_argnames=('self', 'read'))
in_chunks = memory.quick_jit(chunks.prefill_in_chunks, static_argnames=('model', 'size', 'chunk'))


@functools.cache
def tensors(model):
  return reference.random_tensors(MODELS[model])


@functools.cache
def expected(model, cache=None):
  """Logits [16, LENGTH, V] at every position of memory.tokens."""
  return reference.logits(
    MODELS[model], tensors(model), memory.tokens(MODELS[model], 16, LENGTH), cache
  )


def close(found, wanted, cache=None):
  # float32 may round a number that lies between two units another way than float64: that moves
  # logits by up to 1e-3 here.
  np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 if cache is None else 2e-3)


# (model, prefill, decode, rows, mesh). Each decode layout is extended in, and each prefill layout
# in chunks, with rows that fill the mesh, some of it or nothing of it; heads that divide and heads
# that don't.
CASES = [
  ('multiquery-parallel', 'ws_2d/batch', 'ws_2d/batch', 8, '2x2x2'),
  ('multihead-serial', 'ws_2d/heads', 'ws_2d/batch', 2, '2x2x2'),
  ('grouped-serial', 'ws_1d/batch', 'ws_1d/heads', 3, '2x2x2'),
  ('grouped-parallel', 'ws_2d/batch', 'ws_2d/heads', 1, '4x2x1'),
  ('multihead-parallel', 'ws_1d/heads', 'ws_1d/batch', 4, '1x2x4'),
  ('multiquery-serial', 'wg_xyz/batch', 'wg_x/heads', 2, '2x2x2'),
  ('grouped-serial', 'wg_xyz/batch', 'wg_xy/batch', 8, '2x2x2'),
  ('multihead-serial', 'wg_xy/heads', 'wg_x/batch', 4, '2x2x2'),
  ('multiquery-parallel', 'wg_x/batch', 'wg_xy/heads', 4, '2x2x2'),
  ('grouped-parallel', 'wg_xy/batch', 'wg_xyz/batch', 8, '2x2x2'),
  ('multihead-parallel', 'wg_x/heads', 'ws_2d/batch', 1, '8x1x1'),
  ('multiquery-serial', 'ws_2d/batch', 'ws_2d/heads', 3, '1x1x1'),
]
CASES = [(*case, None) for case in CASES] + [(*CASES[i], 'int8') for i in (1, 2, 5)]
# Features whose effect depends on positions.
FEATURES = [
  ('bloom', 'ws_2d/batch', 'ws_2d/heads', 3, '2x2x2', None),
  ('gemma3', 'wg_xyz/batch', 'ws_2d/batch', 8, '2x2x2', 'int8'),
  ('t5', 'ws_1d/heads', 'ws_1d/batch', 4, '2x2x2', None),
  ('mpt', 'wg_x/heads', 'wg_xy/batch', 4, '2x2x2', None),
  ('gpt', 'ws_2d/batch', 'wg_xy/heads', 4, '2x2x2', None),
  ('r7b', 'wg_xy/batch', 'ws_2d/batch', 1, '2x2x2', None),
]
CASES += FEATURES


@pytest.mark.parametrize('model, prefill, decode, rows, mesh, holds', CASES)
def test_extend_then_decode_equals_the_full_forward(model, prefill, decode, rows, mesh, holds):
  """Ragged chunks, with rows that get nothing; then a decode step; then another chunk, a turn."""
  config = MODELS[model]
  engine = memory.engine(
    config, tensors(model), mesh, stacked=rows % 2 == 0, prefill=prefill, decode=decode, cache=holds
  )
  tokens, wanted, everyone = (
    memory.tokens(config, rows, LENGTH),
    expected(model, holds),
    np.arange(rows),
  )
  cache = empty_cache(engine.model, engine.weights, rows, LENGTH)
  lengths = np.zeros(rows, np.int32)
  for step, size in enumerate((4, 4, 1, 4)):
    counts = np.clip((everyone + step) % (size + 1), 1 - step % 2, None).astype(np.int32)
    new = np.full((rows, size), 77, np.int32)
    for row, (start, count) in enumerate(zip(lengths, counts)):
      new[row, :count] = tokens[row, start : start + count]
    if size == 1:
      counts = np.ones_like(counts)
      logits, cache = memory.decode_step(
        engine.model, engine.weights, cache, *programs.put(engine.model, tokens[everyone, lengths])
      )
    else:
      logits, cache = extend(
        engine.model, engine.weights, cache, *programs.put(engine.model, new, counts)
      )
    lengths += counts
    some = counts > 0
    close(np.asarray(logits)[some], wanted[everyone, lengths - 1][some], holds)
    np.testing.assert_array_equal(cache.lengths, lengths)


@pytest.mark.parametrize(
  'model, prefill, decode, rows, mesh, holds', CASES[:11:2] + CASES[12:15] + FEATURES[::2]
)
def test_prefill_in_chunks_equals_prefill(model, prefill, decode, rows, mesh, holds):
  """The cache ends in the decode layout: the next step is right, and no resharding comes first."""
  config = MODELS[model]
  engine = memory.engine(
    config, tensors(model), mesh, stacked=True, prefill=prefill, decode=decode, cache=holds
  )
  tokens, wanted, everyone = (
    memory.tokens(config, rows, LENGTH),
    expected(model, holds),
    np.arange(rows),
  )
  lengths = (3 + everyone * 5 % 8).astype(np.int32)
  prompts = np.where(np.arange(10)[None, :] < lengths[:, None], tokens[:, :10], 77).astype(np.int32)
  whole = jax.eval_shape(
    lambda *inputs: engine.model.prefill(*inputs, LENGTH)[1], engine.weights, prompts, lengths
  )
  for chunk in (3, 8):
    logits, cache = in_chunks(
      engine.model,
      engine.weights,
      *programs.put(engine.model, prompts, lengths),
      size=LENGTH,
      chunk=chunk,
    )
    close(logits, wanted[everyone, lengths - 1], holds)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, whole)
    if engine.model.padded_batch(rows) == rows:
      logits, _ = memory.decode_step(
        engine.model, engine.weights, cache, *programs.put(engine.model, tokens[everyone, lengths])
      )
      close(logits, wanted[everyone, lengths], holds)


@pytest.mark.parametrize('stacked', [False, True])
def test_what_finds_no_room_is_dropped(stacked):
  """A chunk may be padded beyond the cache's end: its tokens that count are written."""
  config = memory.ODD
  engine = memory.engine(config, reference.random_tensors(config), '2x1x1', stacked=stacked)
  tokens = memory.tokens(config, 2, 8)
  wanted = reference.logits(config, reference.random_tensors(config), tokens)
  cache = empty_cache(engine.model, engine.weights, 2, 6)
  _, cache = extend(
    engine.model,
    engine.weights,
    cache,
    *programs.put(engine.model, tokens[:, :4], np.array([4, 3], np.int32)),
  )
  new = np.array([[*tokens[0, 4:6], 77, 77], [*tokens[1, 3:6], 77]], np.int32)
  logits, cache = extend(
    engine.model,
    engine.weights,
    cache,
    *programs.put(engine.model, new, np.array([2, 3], np.int32)),
  )
  close(logits, wanted[:, 5])
  assert cache.lengths.tolist() == [6, 6]
  logits, _ = memory.decode_step(
    engine.model, engine.weights, cache, *programs.put(engine.model, tokens[:, 6])
  )
  close(logits, wanted[:, 6])


@pytest.mark.parametrize('stacked, holds', [(True, None), (False, 'int8')])
@pytest.mark.parametrize('mesh', ['1x1x1', '2x2x2'])
def test_a_chunk_reads_the_first_positions_alone(mesh, stacked, holds):
  """The logits and the cache are as of all; what lies beyond is not read, nor copied."""
  model, rows = 'grouped-serial', 3
  engine = memory.engine(MODELS[model], tensors(model), mesh, stacked=stacked, cache=holds)
  run, size, read = (engine.model, engine.weights), 96, 32
  tokens = memory.tokens(MODELS[model], rows, LENGTH)
  first, second, counts = programs.put(
    engine.model, tokens[:, :8], tokens[:, 8:], np.asarray([4, 0, 3], np.int32)
  )
  cache = empty_cache(*run, rows, size)
  _, cache = extend(*run, cache, first, *programs.put(engine.model, np.full(rows, 8, np.int32)))
  wanted, whole = extend(*run, cache, second, counts)
  found, partly = extend(*run, cache, second, counts, read=read)
  some = np.asarray(counts) > 0
  np.testing.assert_allclose(np.asarray(found)[some], np.asarray(wanted)[some], atol=1e-5)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=1e-5), whole, partly
  )
  if mesh == '1x1x1' and stacked:
    compiled = [
      jax.jit(Model.prefill_chunk, static_argnames=('self', 'read'), donate_argnums=2)
      .lower(*run, cache, second, counts, read=n)
      .compile()
      for n in (None, read)
    ]
    # Of each layer only a third is taken out of the cache for the products.
    layer = sum(x.nbytes for x in jax.tree.leaves((cache.keys, cache.values))) // 4  # of two layers
    whole, partly = (p.memory_analysis().temp_size_in_bytes for p in compiled)
    assert whole - partly > layer / 2 and partly < whole / 2 + layer


def test_more_tokens_than_positions_are_refused():
  model = memory.engine(memory.ODD, reference.random_tensors(memory.ODD), '1x1x1')
  cache = empty_cache(model.model, model.weights, 2, 8)
  with pytest.raises(
    RequestError, match='9 new tokens at once do not fit into a cache of 8 positions'
  ):
    jax.eval_shape(
      model.model.prefill_chunk,
      model.weights,
      cache,
      jnp.zeros((2, 9), jnp.int32),
      jnp.ones(2, jnp.int32),
    )
