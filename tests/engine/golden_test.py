"""The real checkpoints against what T5X itself computed: float32 on 1 to 8 devices in every layout,
bfloat16, int8.
"""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.checkpoints.convert import convert
from t5x_inference_ext.checkpoints.load import load_weights
from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.inputs import model_inputs
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.sharding.layout import Layout
from tests import memory

# (mesh, prefill, decode)
ENGINES = [
  ('1x1x1', 'ws_2d/batch', 'ws_2d/batch'),
  ('2x1x1', 'wg_x/batch', 'ws_2d/heads'),
  ('1x2x2', 'ws_1d/heads', 'ws_1d/batch'),
  ('2x2x2', 'wg_xyz/batch', 'ws_2d/batch'),
  ('1x2x4', 'ws_2d/batch', 'wg_xy/heads'),
]

LAYOUTS_2D = [
  'ws_2d/heads',
  'ws_2d/batch',
  'wg_x/heads',
  'wg_x/batch',
  'wg_xy/heads',
  'wg_xy/batch',
  'wg_xyz/batch',
]
PAIRS = [
  *itertools.product(['ws_1d/heads', 'ws_1d/batch'], repeat=2),
  *itertools.product(LAYOUTS_2D, repeat=2),
]


@pytest.fixture(scope='module', params=ENGINES, ids='-'.join)
def engine(request, palm_tiny):
  mesh, prefill, decode = request.param
  return Engine.load(
    palm_tiny, mesh=mesh, dtype='float32', prefill_layout=prefill, decode_layout=decode
  )


@pytest.fixture(scope='module')
def forced(golden):
  """input_tokens, target_tokens [4, 128] and logits [4, 128, V]."""
  with np.load(golden / 'logits.npz') as arrays:
    return dict(arrays)


@pytest.fixture(scope='module')
def greedy(golden):
  return json.loads((golden / 'greedy.json').read_text())


@pytest.fixture(scope='module')
def scores(golden):
  return json.loads((golden / 'scores.json').read_text())


def test_logits(engine, forced):
  np.testing.assert_allclose(
    engine.logits(forced['input_tokens']), forced['logits'], rtol=0, atol=1e-4
  )


def test_greedy(engine, greedy):
  completions = engine.generate(
    [row['prompt_tokens'] for row in greedy], max_new_tokens=48, eos_id=-1
  )
  assert [c.tokens for c in completions] == [row['greedy_tokens'] for row in greedy]
  assert len(completions) == 8


def test_scores(engine, forced, scores):
  found = engine.score(forced['input_tokens'], forced['target_tokens'])
  np.testing.assert_allclose(found, scores['score_batch'], rtol=1e-3)


@functools.cache
def loaded(checkpoint, layout: str) -> Engine:
  """The weights of a storage kind, layers stacked: programs are then small and compile quickly."""
  model = Engine.load(
    checkpoint, mesh='2x2x2', dtype='float32', prefill_layout=layout, decode_layout=layout
  )
  return dataclasses.replace(
    model, weights=load_weights(model.checkpoint, model.model, stacked=True)
  )


def test_there_are_53_valid_pairs():
  assert len(set(PAIRS)) == 2 * 2 + 7 * 7


decode_step = jax.jit(Model.decode_step, static_argnames='self')


@pytest.mark.parametrize('prefill, decode', PAIRS)
def test_greedy_under_every_valid_pair(palm_tiny, greedy, prefill, decode):
  """On 2x2x2: all 48 tokens where both phases have one layout, else the first 8, by when the cache
  has moved.
  """
  steps = 48 if prefill == decode else 8
  one = loaded(palm_tiny, 'ws_1d/batch' if prefill.startswith('ws_1d') else 'ws_2d/batch')
  model = dataclasses.replace(
    one.model, prefill_layout=Layout.parse(prefill), decode_layout=Layout.parse(decode)
  )
  # A decode step knows nothing of the prefill's layout, so that pairs share a program.
  decoder = dataclasses.replace(model, prefill_layout=model.decode_layout)
  tokens, lengths = model_inputs([row['prompt_tokens'] for row in greedy], 41)
  wanted = np.asarray([row['greedy_tokens'] for row in greedy])
  logits, cache = memory.prefill(
    model, one.weights, *programs.put(one.model, tokens, lengths), size=41 + 48
  )
  for step in range(steps):
    token = np.argmax(logits, axis=-1).astype(np.int32)
    np.testing.assert_array_equal(token, wanted[:, step], err_msg=f'step {step}')
    if step < steps - 1:
      logits, cache = decode_step(decoder, one.weights, cache, *programs.put(one.model, token))


def bits_per_byte(engine: Engine, targets: np.ndarray) -> float:
  """Mean of -log2 p over the tokens of targets [B, T] (none is padding), each row from BOS."""
  inputs = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
  return float(-np.sum(engine.score(inputs, targets), dtype=np.float64) / np.log(2) / targets.size)


@pytest.fixture(scope='module')
def heldout(golden):
  tokens = np.load(golden / 'heldout_tokens.npy').astype(np.int32)
  assert np.all(tokens != 0)
  return tokens


@pytest.fixture(scope='module')
def palm_tiny_int8(palm_tiny, tmp_path_factory):
  output = tmp_path_factory.mktemp('golden') / 'int8'
  convert(str(palm_tiny), str(output))
  return output


@pytest.fixture(scope='module')
def float32_bits(palm_tiny, heldout):
  return bits_per_byte(Engine.load(palm_tiny, mesh='1x1x1', dtype='float32'), heldout)


def test_heldout_float32(float32_bits, scores):
  print(f'bits per byte, float32: {float32_bits:.6f}')
  assert float32_bits == pytest.approx(scores['bits_per_byte_heldout'], rel=1e-4)


def test_heldout_bfloat16(float32_bits, palm_tiny, heldout):
  bits = bits_per_byte(Engine.load(palm_tiny, mesh='1x1x1', dtype='bfloat16'), heldout)
  print(f'bits per byte, bfloat16: {bits:.6f} ({bits / float32_bits - 1:+.4%})')
  assert bits == pytest.approx(float32_bits, rel=1e-3)


@pytest.mark.parametrize('cache', [None, 'int8'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_heldout_int8(float32_bits, palm_tiny_int8, heldout, dtype, cache):
  bits = bits_per_byte(Engine.load(palm_tiny_int8, mesh='1x1x1', dtype=dtype, cache=cache), heldout)
  print(
    f'bits per byte, int8 weights, {dtype} activations, {cache or dtype} cache: {bits:.6f} '
    f'({bits / float32_bits - 1:+.4%})'
  )
  assert bits != float32_bits, 'int8 weights were not used'
  assert bits == pytest.approx(float32_bits, rel=1e-3)


@pytest.mark.parametrize('stacked', [False, True], ids=['unrolled', 'stacked'])
@pytest.mark.parametrize('mesh', ['1x1x1', '2x1x2', '1x4x1'])
def test_per_layer_checkpoint(testdata, mesh, stacked):
  """6 heads over 4 shards, 48 columns of d_model."""
  with np.load(testdata / 'palm_unscanned' / 'logits.npz') as arrays:
    inputs, logits = arrays['input_tokens'], arrays['logits']
  model = Engine.load(testdata / 'palm_unscanned' / 'checkpoint_0', mesh=mesh, dtype='float32')
  weights = load_weights(model.checkpoint, model.model, stacked=stacked)
  found = Engine(model.checkpoint, model.model, weights).logits(
    np.concatenate([inputs, inputs[:1]])
  )
  np.testing.assert_allclose(found[:3], logits, rtol=0, atol=1e-4)
  np.testing.assert_allclose(found[3], logits[0], rtol=0, atol=1e-4)


def test_orbax_gives_the_same_weights_on_the_mesh(palm_tiny, testdata):
  model = Engine.load(palm_tiny, mesh='2x2x2', dtype='float32')
  other = load_weights(
    open_checkpoint(testdata / 'palm_tiny_orbax' / 'checkpoint_1000'), model.model
  )
  memory.assert_same_weights(model.weights, other)


def test_bfloat16_is_near(palm_tiny, forced, greedy):
  """Logits of up to 18 in size. Measured: 0.10 at worst and 0.015 root mean square; the bounds are
  twice that.
  """
  model = Engine.load(palm_tiny, mesh='1x2x1', dtype='bfloat16')
  error = model.logits(forced['input_tokens']) - forced['logits']
  print(
    f'bfloat16 logits: {np.abs(error).max():.4f} at worst, {np.sqrt(np.mean(error**2)):.5f} root '
    'mean square, of '
    f'{np.abs(forced["logits"]).max():.1f}'
  )
  assert 1e-3 < np.abs(error).max() < 0.2
  assert np.sqrt(np.mean(error**2)) < 0.03
  completions = model.generate(
    [row['prompt_tokens'] for row in greedy], max_new_tokens=16, eos_id=-1
  )
  same = [
    np.mean(np.equal(c.tokens, row['greedy_tokens'][:16])) for c, row in zip(completions, greedy)
  ]
  print(f'bfloat16 greedy tokens as in float32: {np.mean(same):.3f}')
  assert np.mean(same) > 0.5
