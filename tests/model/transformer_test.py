"""The sharded model against the reference, over shapes that divide badly: all passes.

layouts_test.py has the same of every layout; here are the meshes and batches of the default one,
and the edges.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.engine import programs
from t5x_inference_ext.errors import MeshError, RequestError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import make_mesh
from tests import memory, reference

pytestmark = pytest.mark.usefixtures('quick_programs')

TENSORS = {config: reference.random_tensors(config) for config in (memory.ODD, memory.ODDER)}
LENGTH = 7


@functools.cache
def expected(config, rows):
  return reference.logits(config, TENSORS[config], memory.tokens(config, rows, LENGTH))


def close(found, wanted):
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


# (mesh, rows): attention splits rows over all axes, over some, over none.
UNROLLED = [('1x1x1', 3), ('1x2x4', 2), ('2x4x1', 4), ('4x1x2', 2), ('2x2x2', 3), ('1x1x8', 1)]
STACKED = [('1x1x1', 3), ('2x2x2', 16)]
CASES = [(*case, False) for case in UNROLLED] + [(*case, True) for case in STACKED]


@pytest.mark.parametrize('mesh, rows, stacked', CASES)
def test_prefill_and_decode_equal_the_full_forward(mesh, rows, stacked):
  """Rows of lengths 1, 2, 3, ... are prefilled at once, then decode the rest of their tokens."""
  config = memory.ODDER if (rows + stacked) % 2 else memory.ODD
  engine = memory.engine(config, TENSORS[config], mesh, stacked=stacked)
  tokens, wanted = memory.tokens(config, rows, LENGTH), expected(config, rows)
  lengths = np.arange(rows) % 4 + 1
  everyone = np.arange(rows)
  # Beyond its length a row holds ids that must not matter.
  prompt = np.where(np.arange(4)[None, :] < lengths[:, None], tokens[:, :4], 77).astype(np.int32)
  logits, cache = memory.prefill(
    engine.model,
    engine.weights,
    *programs.put(engine.model, prompt, lengths.astype(np.int32)),
    size=LENGTH,
  )
  close(logits, wanted[everyone, lengths - 1])
  assert cache.size == 8  # LENGTH in whole tiles
  for step in range(LENGTH - 4):
    (token,) = programs.put(engine.model, tokens[everyone, lengths + step])
    logits, cache = memory.decode_step(engine.model, engine.weights, cache, token)
    close(logits, wanted[everyone, lengths + step])
  np.testing.assert_array_equal(cache.lengths, lengths + LENGTH - 4)


@pytest.mark.parametrize(
  'mesh, rows, stacked, layout',
  [
    ('2x2x2', 2, False, 'ws_2d/batch'),
    ('1x4x1', 1, False, 'ws_2d/heads'),
    ('4x2x1', 4, True, 'ws_2d/batch'),
    ('2x2x2', 8, True, 'ws_1d/batch'),
    ('2x2x2', 1, True, 'wg_xyz/batch'),
    ('2x2x2', 2, False, 'wg_xy/heads'),
    ('2x2x2', 3, True, 'wg_x/batch'),
  ],
)
@pytest.mark.parametrize('config', TENSORS, ids=['norms around 0', 'norms around 1'])
def test_logits_at_every_position(config, mesh, rows, stacked, layout):
  """Where rows are few, weight-gathered layouts split positions, and pad them."""
  engine = memory.engine(
    config, TENSORS[config], mesh, stacked=stacked, prefill=layout, decode=layout
  )
  close(engine.logits(memory.tokens(config, rows, LENGTH)), expected(config, rows))


def test_norm_scales_around_zero_and_one_are_different_models():
  """The test above would pass if norm_scale were ignored by both sides; this one would not."""
  config = memory.ODD
  assert (
    np.abs(TENSORS[memory.ODD]['final_norm']).mean()
    < 0.5
    < TENSORS[memory.ODDER]['final_norm'].mean()
  )
  shifted = {n: x + 1 if n.endswith('_norm') else x for n, x in TENSORS[config].items()}
  as_one = dataclasses.replace(config, norm_scale='one')
  tokens = memory.tokens(config, 1, LENGTH)
  close(memory.engine(as_one, shifted, '1x1x1').logits(tokens), expected(config, 1))
  wrong = memory.engine(as_one, TENSORS[config], '1x1x1').logits(tokens)
  assert np.abs(wrong - expected(config, 1)).max() > 0.1


@pytest.mark.parametrize('mesh', ['1x1x1', '2x2x2'])
def test_int8_equals_the_float_model_it_stands_for(mesh):
  config = memory.ODD
  int8 = reference.quantized(config, TENSORS[config])
  tokens = memory.tokens(config, 8, LENGTH)
  wanted = reference.logits(config, reference.dequantized(config, int8), tokens)
  assert np.abs(wanted - expected(config, 8)).max() > 1e-3
  for stacked in (False, True):
    engine = memory.engine(config, int8, mesh, stacked=stacked)
    assert engine.weights.quantized
    np.testing.assert_allclose(engine.logits(tokens), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize('mesh', ['1x1x1', '2x2x2'])
def test_an_id_outside_the_vocabulary_embeds_as_zeros(mesh):
  """Its one-hot vector is zeros too. Ids 101 to 103 are in the padding, the others beyond it."""
  config = memory.ODD
  tokens = memory.tokens(config, 8, LENGTH)
  outside = np.arange(8), np.array([2, 1, 3, 4, 5, 6, 1, 2])
  tokens[outside] = [101, 103, 104, 500, -1, -101, 2**31 - 1, -(2**31)]
  wider = {**TENSORS[config], 'embedding': np.pad(TENSORS[config]['embedding'], ((0, 1), (0, 0)))}
  as_last = tokens.copy()
  as_last[outside] = 101
  wanted = reference.logits(dataclasses.replace(config, vocab_size=102), wider, as_last)[..., :101]
  engine = memory.engine(config, TENSORS[config], mesh)
  logits = memory.quick_jit(Model.logits, static_argnums=0)(
    engine.model, engine.weights, *programs.put(engine.model, tokens)
  )
  close(logits, wanted)


@pytest.mark.parametrize('stacked', [False, True], ids=['unrolled', 'stacked'])
def test_a_full_row_drops_its_write_and_the_others_do_not(stacked):
  """The first row is full. Its logits are right: attention sees the cache and the new token."""
  config, size = memory.ODD, 8
  engine = memory.engine(config, TENSORS[config], '2x1x1', stacked=stacked)
  tokens = memory.tokens(config, 2, size + 1)
  wanted = reference.logits(config, TENSORS[config], tokens)
  lengths = np.array([size, 2], np.int32)
  prompt = np.where(np.arange(size)[None, :] < lengths[:, None], tokens[:, :size], 77).astype(
    np.int32
  )
  _, before = memory.prefill(
    engine.model, engine.weights, *programs.put(engine.model, prompt, lengths), size=size
  )
  logits, after = memory.decode_step(
    engine.model, engine.weights, before, *programs.put(engine.model, tokens[[0, 1], lengths])
  )
  close(logits, wanted[[0, 1], lengths])
  arrays = [jax.tree.leaves((cache.keys, cache.values)) for cache in (before, after)]
  assert len(arrays[0]) == (2 if stacked else 2 * config.num_layers)
  for old, new in zip(*arrays):
    old, new = np.moveaxis(old, -4, 0), np.moveaxis(new, -4, 0)  # [B, (L,) K, S, Q]
    np.testing.assert_array_equal(new[0], old[0])
    assert np.all(new[1][..., 2, :] != old[1][..., 2, :])
    np.testing.assert_array_equal(np.delete(new[1], 2, axis=-2), np.delete(old[1], 2, axis=-2))


@pytest.mark.parametrize(
  'mesh, rows, layout',
  [
    ('1x1x1', 2, 'ws_2d/batch'),
    ('2x2x2', 8, 'ws_2d/batch'),
    ('2x2x2', 2, 'wg_xyz/batch'),
    ('2x2x2', 3, 'ws_1d/heads'),
  ],
)
def test_log_probs(mesh, rows, layout):
  config = memory.ODD
  engine = memory.engine(config, TENSORS[config], mesh, prefill=layout, decode=layout)
  inputs = memory.tokens(config, rows, LENGTH)
  targets = np.roll(inputs, -1, axis=1)
  wanted = np.take_along_axis(
    np.asarray(jax.nn.log_softmax(expected(config, rows))), targets[..., None], 2
  )[..., 0]
  found = memory.quick_jit(Model.log_probs, static_argnames='self')(
    engine.model, engine.weights, *programs.put(engine.model, inputs, targets)
  )
  close(found, wanted)
  weights = np.random.default_rng(0).random((rows, LENGTH)).astype(np.float32)
  np.testing.assert_allclose(
    engine.score(inputs, targets, weights), np.sum(wanted * weights, axis=1), atol=1e-4
  )
  # The last target is BOS, 0: padding unless weights say otherwise.
  np.testing.assert_allclose(
    engine.score(inputs, targets), np.sum(wanted[:, :-1], axis=1), atol=1e-4
  )


@pytest.mark.parametrize('mesh, rows', [('1x1x1', 2), ('2x2x2', 8)])
def test_bfloat16_keeps_float32_where_it_matters(mesh, rows):
  """Norms, softmax, logits. Measured: 0.03, of logits up to 4.2; the bound is twice that."""
  config = memory.ODD
  engine = memory.engine(config, TENSORS[config], mesh, dtype='bfloat16')
  assert engine.weights.final_norm.dtype == jnp.float32
  prompt, lengths = memory.tokens(config, rows, LENGTH)[:, :4], np.full(rows, 4, np.int32)
  logits, cache = memory.prefill(
    engine.model, engine.weights, *programs.put(engine.model, prompt, lengths), size=LENGTH
  )
  assert logits.dtype == jnp.float32
  assert {x.dtype for x in jax.tree.leaves((cache.keys, cache.values))} == {jnp.dtype(jnp.bfloat16)}
  error = np.abs(np.asarray(logits) - expected(config, rows)[:, 3]).max()
  print(f'bfloat16 logits: {error:.4f} at worst, of {np.abs(expected(config, rows)).max():.1f}')
  assert 1e-4 < error < 0.06, error


def test_the_cache_lies_as_decode_has_it():
  """It is split by rows or heads, whatever prefill's layout, before and after a decode step."""
  config = memory.ODD
  for decode, spec in (('ws_2d/batch', (('x', 'z', 'y'),)), ('ws_2d/heads', ())):
    engine = memory.engine(config, TENSORS[config], '2x2x2', prefill='wg_xyz/batch', decode=decode)
    wanted = jax.sharding.NamedSharding(engine.model.mesh, jax.sharding.PartitionSpec(*spec))
    tokens = memory.tokens(config, 8, 4)
    _, cache = memory.prefill(
      engine.model,
      engine.weights,
      *programs.put(engine.model, tokens, np.full(8, 4, np.int32)),
      size=6,
    )
    _, after = memory.decode_step(
      engine.model, engine.weights, cache, *programs.put(engine.model, tokens[:, 1])
    )
    leaves = jax.tree.leaves((cache, after))
    assert len(leaves) == 2 * (2 * config.num_layers + 1)
    for x in leaves:
      assert x.sharding.is_equivalent_to(wanted, x.ndim), (decode, x.sharding)


def test_what_is_refused():
  """Before anything is compiled or loaded."""
  mesh = make_mesh((2, 2, 2))
  with pytest.raises(RequestError, match='dtype must be one of float32, bfloat16'):
    Model(memory.ODD, mesh, dtype='float16')
  with pytest.raises(
    MeshError,
    match='ws_1d/batch for prefill and wg_x/batch for decode place the weights differently',
  ):
    Model(memory.ODD, mesh, Layout('ws_1d'), Layout('wg_x'))
  model = Model(memory.ODD, mesh, Layout('wg_xyz'), Layout('wg_xyz'), 'float32')
  with pytest.raises(
    MeshError,
    match='use a batch that is a multiple of 8, or a weight-stationary layout .* for decode',
  ):
    nothing = Weights(embedding=None, final_norm=None, layers=())
    jax.eval_shape(
      lambda: model.prefill(nothing, jnp.zeros((4, 8), jnp.int32), jnp.ones(4, jnp.int32), 8)
    )
  assert model.padded_batch(4) == 8
