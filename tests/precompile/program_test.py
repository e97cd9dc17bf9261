"""Slices that are not here, cases, and programs compiled for them: memory, shapes, results."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext import hardware
from t5x_inference_ext.config import preset
from t5x_inference_ext.errors import MeshError, RequestError, UserError
from t5x_inference_ext.model.cache import KVCache
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.precompile import slices
from t5x_inference_ext.precompile.case import CompileCase
from t5x_inference_ext.precompile.program import (
  abstract_decode_cache,
  abstract_weights,
  compile_case,
  phase_function,
)
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import make_mesh, mesh_links
from t5x_inference_ext.sharding.torus import parse_slice

SMALL = preset('palm_tiny', num_layers=2)
KINDS = ('v4', 'v5e', 'v5p', 'v6e')


# Slices.


@pytest.mark.parametrize('kind', KINDS)
def test_known_slices_are_accepted(kind):
  known = slices.known_slices(kind)
  assert len(known) >= 8
  for text in known:
    slices.check_slice(parse_slice(text))


@pytest.mark.parametrize('text', ['v4:4x2x2', 'v4:12x4x4', 'v5p:8x8x12', 'v5p:16x16x16'])
def test_turned_and_larger_boxes_are_accepted(text):
  slices.check_slice(parse_slice(text))


@pytest.mark.parametrize(
  'text', ['v4:1x2x2', 'v4:3x3x3', 'v4:16x16x32', 'v5e:3x3', 'v6e:32x32', 'v4:2x2x8']
)
def test_slices_that_nobody_rents_are_refused_with_those_there_are(text):
  kind = text[: text.index(':')]
  with pytest.raises(MeshError, match=f'there is no {kind} slice {text}; known: {kind}:1x1'):
    slices.check_slice(parse_slice(text))


@pytest.mark.libtpu
@pytest.mark.parametrize('text', ['v4:2x2x4', 'v5e:2x4', 'v5p:2x2x2', 'v6e:4x4'])
def test_a_slice_has_one_device_a_chip_in_its_box(text):
  slice_ = parse_slice(text)
  devices = slices.topology_devices(slice_)
  assert {tuple(d.coords) for d in devices} == set(np.ndindex(*slice_.shape))
  assert len(jax.devices()) == 8 and jax.devices()[0].platform == 'cpu'


@pytest.mark.libtpu
def test_the_mesh_lies_along_the_torus():
  mesh = slices.slice_mesh(parse_slice('v4:4x4x4'), preset('palm_540b'))
  assert mesh_links(mesh) == dict(x='ring', y='ring', z='ring') and mesh.devices.shape == (2, 8, 4)


@pytest.mark.libtpu
@pytest.mark.parametrize('kind', KINDS)
def test_the_memory_of_a_chip_is_what_the_table_says(kind):
  assert slices.available_bytes(kind) == pytest.approx(hardware.chip(kind).compiler_hbm_bytes)


@pytest.mark.parametrize(
  'message,limits',
  [
    (
      'the total memory required for HLO temporaries (50.5G) exceeds available HBM (30.75G)',
      (50.5, 30.75),
    ),
    (
      'Ran out of memory in memory space hbm. Used 33.5G of 30.75G hbm. Exceeded hbm capacity',
      (33.5, 30.75),
    ),
    ('something else', (None, None)),
  ],
)
def test_what_a_message_says_of_memory(message, limits):
  assert slices.memory_limits(message) == tuple(x and x * 2**30 for x in limits)


def test_without_libtpu_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(
    UserError, match=r"the TPU compiler is not installed: pip install 't5x_inference_ext\[tpu\]'"
  ):
    slices.topology_devices(parse_slice('v4:2x2x1'))


def test_a_mesh_that_does_not_divide_the_model_is_refused():
  with pytest.raises(
    MeshError, match='d_model=250 does not divide over the 4 devices of the mesh 1x2x2'
  ):
    slices.slice_mesh(parse_slice('v4:2x2x1'), preset('palm_tiny', d_model=250), (1, 2, 2))


@pytest.mark.parametrize('shape,positions', [((1, 2, 1), 2), ((2, 2, 2), 8)])
def test_a_mesh_of_another_size_than_the_slice_is_refused(shape, positions):
  with pytest.raises(MeshError, match=f'has {positions} positions and v4:2x2x1 has 4 chips'):
    slices.slice_mesh(parse_slice('v4:2x2x1'), SMALL, shape)


# Cases.


@pytest.mark.parametrize(
  'fields,words',
  [
    (dict(phase='train'), 'phase must be one of decode, prefill'),
    (dict(weights='int2'), 'weights must be one of'),
    (dict(batch=0), 'batch must be a whole number, 1 or more, got 0'),
    (dict(batch=10**20), 'batch must be a whole number, 1 to 2147483647, got 1000'),
    (dict(context=2.5), 'context must be'),
    (dict(phase='prefill', prompt=17), 'prompt=17 does not fit into context=16'),
  ],
)
def test_a_case_that_makes_no_sense_is_refused(fields, words):
  with pytest.raises(RequestError, match=words):
    CompileCase(
      **{**dict(config=SMALL, weights='int8', phase='decode', batch=8, context=16), **fields}
    )


def test_the_other_phase_gets_a_layout_that_shares_the_weights():
  case = CompileCase(SMALL, 'int8', 'prefill', 8, 16, Layout.parse('wg_xyz/batch'))
  assert [str(each) for each in case.layouts] == ['wg_xyz/batch', 'ws_2d/batch']
  case = CompileCase(SMALL, 'int8', 'decode', 8, 16, Layout.parse('ws_1d/heads'))
  assert [str(each) for each in case.layouts] == ['ws_1d/batch', 'ws_1d/heads']


# Programs: the shapes are those that real weights and caches have.


@pytest.mark.parametrize('weights', ['int8,embedding:8', 'bfloat16'])
@pytest.mark.parametrize('stacked', [True, False])
def test_abstract_weights_are_what_loading_makes(palm_tiny, tmp_path, weights, stacked):
  from t5x_inference_ext.checkpoints import convert, load, open_checkpoint

  name, _, bits = weights.partition(',')
  convert.convert(palm_tiny, tmp_path / 'serving', name, bits=bits)
  checkpoint = open_checkpoint(tmp_path / 'serving')
  model = Model(checkpoint.config, make_mesh((2, 2, 2)))
  real = load.load_weights(checkpoint, model, stacked=stacked)
  form = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)
  assert form(abstract_weights(model, weights, stacked)) == form(real)


def test_an_abstract_cache_is_what_prefill_makes():
  model = Model(SMALL, make_mesh((2, 2, 2)), decode_layout=Layout.parse('ws_2d/heads'))
  weights = abstract_weights(model, 'bfloat16')
  cache = abstract_decode_cache(model, weights, 8, 16)
  zeros = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), weights)
  tokens, lengths = jnp.ones((8, 4), jnp.int32), jnp.full((8,), 4, jnp.int32)
  made = jax.jit(model.prefill, static_argnums=3)(zeros, tokens, lengths, 16)[1]
  assert isinstance(cache, KVCache) and cache.size == 16
  assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == jax.tree.map(
    lambda x: (x.shape, x.dtype), made
  )
  jax.tree.map(
    lambda x, y: (
      pytest.fail(f'{x.sharding} {y.sharding}')
      if not x.sharding.is_equivalent_to(y.sharding, x.ndim)
      else None
    ),
    cache,
    made,
  )


def test_phases_run_and_agree_with_the_model():
  """Compiled programs run here: the cache and token of a prefill go into a decode step."""
  mesh = make_mesh((2, 2, 2))
  case = CompileCase(SMALL, 'bfloat16', 'prefill', 8, 16, prompt=4, dtype='float32')
  prefill, (weights, tokens, lengths) = phase_function(case, mesh)
  random = np.random.default_rng(0)
  weights = jax.tree.map(
    lambda x: jax.device_put(random.normal(size=x.shape).astype(x.dtype) * 0.05, x.sharding),
    weights,
  )
  tokens = jax.device_put(random.integers(3, 380, tokens.shape, np.int32), tokens.sharding)
  lengths = jax.device_put(np.full(lengths.shape, 4, np.int32), lengths.sharding)
  first, cache = prefill(weights, tokens, lengths)
  decode, _ = phase_function(CompileCase(SMALL, 'bfloat16', 'decode', 8, 16, dtype='float32'), mesh)
  second, cache = decode(weights, cache, first)
  both = jnp.concatenate([tokens, first[:, None], second[:, None]], axis=1)
  logits = jax.jit(case.model(mesh).logits)(weights, both)
  np.testing.assert_array_equal(jnp.argmax(logits[:, 3:5], axis=-1), both[:, 4:])
  assert cache.lengths.tolist() == [5] * 8


@pytest.mark.libtpu
@pytest.mark.parametrize('text', ['v4:2x2x1', 'v5e:2x2', 'v6e:2x2', 'v5p:2x2x1'])
def test_a_decode_step_compiles_for_every_generation(text):
  case = CompileCase(SMALL, 'int8,embedding:8', 'decode', batch=8, context=128)
  program = compile_case(case, slices.slice_mesh(parse_slice(text), SMALL))
  m = program.memory
  # On each of 4 chips: 2 rows in 2 layers, keys and values, one head, 2 bytes; and lengths.
  assert m.cache == 2 * 128 * 32 * 2 * 2 * 2 + 2 * 4
  assert m.weights > SMALL.num_params // 4 and m.other >= 0 and m.temporaries >= 0
  assert m.needed == m.weights + m.cache + m.other + m.temporaries
  found = program.compiled.memory_analysis()
  assert found.alias_size_in_bytes >= m.cache  # in place
  assert 'ENTRY' in program.text and '"estimated_cycles"' in program.text
  assert 'cross_program_prefetch_index' not in program.text


@pytest.mark.libtpu
def test_a_prefill_makes_the_cache():
  case = CompileCase(SMALL, 'bfloat16', 'prefill', batch=8, context=128, prompt=64)
  m = compile_case(case, slices.slice_mesh(parse_slice('v4:2x2x1'), SMALL)).memory
  assert m.cache >= 2 * 128 * 32 * 2 * 2 * 2 and m.needed > m.weights + m.cache
