"""InferenceModel under T5X's decoding functions, against flaxformer's model under the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from t5x import checkpoints, decoding

from t5x_inference_ext import config
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.errors import CheckpointError, MeshError, RequestError
from t5x_inference_ext.t5x.models import InferenceModel
from tests.t5x_adapter import inference_tasks, running

LENGTH = 32
# Three rows fill no mesh of eight devices evenly. The last has no prompt: T5X starts from BOS.
PROMPTS = [row['prompt_tokens'] for row in inference_tasks.rows()][3:5] + [[]]

DECODING = {
  'top_k': (functools.partial(decoding.temperature_sample, temperature=0.8, topk=20), {}),
  'top_p': (functools.partial(decoding.temperature_sample, temperature=0.8, topk=0, topp=0.9), {}),
  # 3 rows padded to 4 would make 12, which 2x2x2 does not divide either.
  'num_decodes': (
    functools.partial(
      decoding.temperature_sample, temperature=0.7, topk=0, rescale_log_probs=False
    ),
    {'num_decodes': 3, 'return_all_decodes': True},
  ),
}


def batch_of(prompts, length=LENGTH):
  """As seqio's DecoderFeatureConverter makes it of prompts without targets."""
  tokens = np.zeros((len(prompts), length), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[1 : len(prompt) + 1] = prompt
  causal = np.arange(length)[None] <= np.asarray([len(p) for p in prompts])[:, None]
  return {'decoder_input_tokens': tokens, 'decoder_causal_attention': causal.astype(np.int32)}


@pytest.fixture(scope='module')
def stock_params(palm_tiny):
  # As jax arrays: a jitted function that closes over numpy ones computes in their memory (seen in
  # jax 0.10.2 on CPU).
  return jax.tree.map(jnp.array, checkpoints.load_t5x_checkpoint(str(palm_tiny))['target'])


@pytest.fixture(scope='module')
def state_of(palm_tiny, int8_checkpoint):
  """A function of a model: its restored state, kept, as decoding options don't matter."""
  states = {}

  def state(model):
    key = (model.model, model.module.weights, model.module.scan_layers)
    if key not in states:
      states[key] = running.restored(
        model, int8_checkpoint if model.module.weights == 'int8' else palm_tiny
      )
    return states[key]

  return state


def predict(model, state, batch, rng=0, **kwargs):
  """predict_batch_with_aux as t5x.infer partitions it."""
  state, initializer, partitioner = state
  step = partitioner.partition(
    lambda params, batch, rng: model.predict_batch_with_aux(params, batch, rng, **kwargs),
    in_axis_resources=(initializer.train_state_axes.params, partitioner.data_partition_spec, None),
    out_axis_resources=(None, None),
  )
  return jax.device_get(step(state.params, batch, jax.random.PRNGKey(rng)))


@pytest.mark.parametrize('name', DECODING)
def test_decodes_as_the_stock_model(name, palm_tiny, stock_params, state_of):
  """The same tokens, sampled ones too: padding rows do not change the noise of the others."""
  decode_fn, options = DECODING[name]
  stock = running.stock_model(decode_fn)
  expected, expected_aux = jax.jit(functools.partial(stock.predict_batch_with_aux, **options))(
    stock_params, batch_of(PROMPTS), jax.random.PRNGKey(0)
  )
  model = running.adapter_model(palm_tiny, '2x2x2', decode_fn)
  tokens, aux = predict(model, state_of(model), batch_of(PROMPTS), **options)
  np.testing.assert_array_equal(tokens, expected)
  assert tokens.any()
  assert aux.keys() == expected_aux.keys()
  np.testing.assert_allclose(aux['scores'], expected_aux['scores'], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('scan_layers', [False, True])
def test_beam_search(scan_layers, palm_tiny, stock_params, state_of):
  """Against T5X's search over logits that the stock model computes anew for each token.

  With the stock model's cache T5X's beam search does not run at all after a prefill.
  """
  # Of one length: T5X's search runs until the shortest prompt's row is full, over garbage.
  prompts = [row['prompt_tokens'][:11] for row in inference_tasks.rows()][:3]
  batch = batch_of(prompts)
  stock = running.stock_model()
  lengths = jnp.asarray([len(p) for p in prompts])

  def logits_after(state):
    tokens, last = state.cache['tokens'], state.cache['last']
    tokens = jnp.where(jnp.arange(LENGTH) == last[:, None], state.cur_token, tokens)
    logits = stock._compute_logits(
      stock_params, {'decoder_input_tokens': tokens, 'decoder_target_tokens': jnp.ones_like(tokens)}
    )
    logits = jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
    return logits, {'tokens': tokens, 'last': last + 1}

  decodes, expected_scores = jax.jit(
    functools.partial(decoding.beam_search, tokens_to_logits=logits_after, eos_id=1, num_decodes=3)
  )(
    inputs=jnp.asarray(batch['decoder_input_tokens']),
    initial_index=lengths,
    cache={'tokens': jnp.asarray(batch['decoder_input_tokens']), 'last': lengths},
  )
  model = running.adapter_model(palm_tiny, '2x2x2', decoding.beam_search, scan_layers=scan_layers)
  tokens, aux = predict(model, state_of(model), batch, num_decodes=3, return_all_decodes=True)
  np.testing.assert_allclose(aux['scores'], expected_scores, rtol=1e-3)
  expected = running.models.remove_prefix(decodes, lengths)
  np.testing.assert_array_equal(tokens, expected)
  assert tokens.any()


@pytest.mark.parametrize('scan_layers', [False, True])
def test_an_int8_cache(scan_layers, palm_tiny, state_of):
  """As the Engine decodes with one; and T5X's beam search reorders its scales with it."""
  model = running.adapter_model(palm_tiny, '2x2x2', scan_layers=scan_layers, cache='int8')
  shapes = jax.eval_shape(
    model._compute_kv_cache,
    state_of(model)[0].params,
    batch_of(PROMPTS * 4)['decoder_input_tokens'],
    batch_of(PROMPTS * 4)['decoder_causal_attention'],
  )[0]
  kept = shapes if scan_layers else shapes['layers_0']
  assert (kept['cached_key'].dtype, kept['cached_key_scale'].dtype) == (np.int8, np.float32)
  engine = Engine.load(str(palm_tiny), mesh='1x1x1', dtype='float32', cache='int8')
  tokens, _ = predict(model, state_of(model), batch_of(PROMPTS))
  for row, prompt, completion in zip(
    tokens, PROMPTS, engine.generate(PROMPTS, max_new_tokens=LENGTH), strict=True
  ):
    expected = completion.tokens[: LENGTH - len(prompt)]
    np.testing.assert_array_equal(row[: len(expected)], expected)
  prompts = [row['prompt_tokens'][:11] for row in inference_tasks.rows()][:3]
  model = running.adapter_model(
    palm_tiny, '2x2x2', decoding.beam_search, scan_layers=scan_layers, cache='int8'
  )
  tokens, aux = predict(
    model, state_of(model), batch_of(prompts), num_decodes=3, return_all_decodes=True
  )
  found = [
    (prompt, beam[beam != 0].tolist()) for prompt, beams in zip(prompts, tokens) for beam in beams
  ]
  scores = [sum(log_probs) for log_probs in engine.score_completions(found)]
  np.testing.assert_allclose(aux['scores'].ravel(), scores, rtol=1e-4)


@pytest.mark.parametrize(
  'mesh, layouts',
  [('1x1x1', ('ws_2d/batch', 'ws_2d/batch')), ('2x2x2', ('wg_xy/batch', 'ws_2d/batch'))],
)
@pytest.mark.parametrize('scan_layers', [False, True])
def test_greedy_continues_every_prompt(mesh, layouts, scan_layers, palm_tiny, state_of):
  """Also an empty prompt, and one with id 0 inside, which T5X's own model takes for shorter."""
  prompts = PROMPTS + [[103, 0, 104, 0, 105]]
  lengths = (
    {'inputs': max(map(len, prompts)), 'targets': 1} if scan_layers else None
  )  # prefill over the inputs alone
  model = running.adapter_model(
    palm_tiny,
    mesh,
    scan_layers=scan_layers,
    task_feature_lengths=lengths,
    prefill_layout=layouts[0],
    decode_layout=layouts[1],
  )
  tokens, aux = predict(model, state_of(model), batch_of(prompts), num_decodes=2)
  np.testing.assert_array_equal(aux['scores'], np.zeros(len(prompts)))
  engine = Engine.load(str(palm_tiny), mesh='1x1x1', dtype='float32')
  for row, prompt, completion in zip(
    tokens, prompts, engine.generate(prompts, max_new_tokens=LENGTH), strict=True
  ):
    expected = completion.tokens[: LENGTH - len(prompt)]
    np.testing.assert_array_equal(row[: len(expected)], expected)
    assert not row[len(expected) :].any()


def test_options_for_each_row(palm_tiny, state_of):
  """A temperature for each row is padded with the rows."""
  model = running.adapter_model(palm_tiny, '2x2x2', decoding.temperature_sample)
  temperatures = jnp.asarray([0.0, 5.0, 0.0])
  tokens, _ = predict(
    model,
    state_of(model),
    batch_of(PROMPTS),
    decoder_params={'temperature': temperatures, 'topk': 0},
  )
  greedy = running.adapter_model(palm_tiny, '2x2x2')
  expected, _ = predict(greedy, state_of(greedy), batch_of(PROMPTS))
  np.testing.assert_array_equal(tokens[[0, 2]], expected[[0, 2]])
  assert (tokens[1] != expected[1]).any()


def test_scores_and_logits(palm_tiny, golden, stock_params, state_of):
  arrays = np.load(golden / 'logits.npz')
  rows, length = 3, 40
  batch = {
    'decoder_input_tokens': arrays['input_tokens'][:rows, :length],
    'decoder_target_tokens': arrays['target_tokens'][:rows, :length],
    'decoder_loss_weights': (np.arange(length) >= 10).astype(np.int32)[None].repeat(rows, axis=0),
  }
  model = running.adapter_model(palm_tiny, '2x2x2')
  params = state_of(model)[0].params
  scores = jax.jit(model.score_batch)(params, batch)
  expected = jax.jit(running.stock_model().score_batch)(stock_params, batch)
  np.testing.assert_allclose(scores, expected, rtol=1e-3)
  again, intermediates = jax.jit(functools.partial(model.score_batch, return_intermediates=True))(
    params, batch
  )
  np.testing.assert_allclose(again, scores, rtol=1e-6)
  np.testing.assert_allclose(intermediates['decoder']['token_scores'][0].sum(-1), scores, rtol=1e-5)
  logits = jax.jit(model._compute_logits)(params, batch)
  np.testing.assert_allclose(logits, arrays['logits'][:rows, :length], atol=1e-4)


@pytest.mark.parametrize(
  'scan_layers, fields',
  [(False, {}), (True, {}), (True, dict(num_kv_heads=4, block='serial', mlp='gelu', norm='layer'))],
)
def test_int8_initializes_from_scratch(scan_layers, fields):
  """Without a checkpoint T5X makes random parameters, in place and of a sensible size."""
  model = InferenceModel(
    running.VOCABULARY,
    config=config.preset('palm_tiny', **fields),
    int8=True,
    mesh='2x2x2',
    dtype='float32',
    scan_layers=scan_layers,
  )
  partitioner = running.InferencePartitioner(mesh='2x2x2')
  initializer = running.utils.TrainStateInitializer(
    None, model.get_initial_variables, {'decoder_input_tokens': (8, 16)}, partitioner
  )
  params = initializer.from_scratch(jax.random.PRNGKey(0)).params
  logits = jax.jit(model._compute_logits)(
    params, {'decoder_input_tokens': np.ones((8, 16), np.int32)}
  )
  assert 0.1 < float(jnp.std(logits)) < 10


class TestErrors:
  def test_packed_examples(self, palm_tiny):
    model = running.adapter_model(palm_tiny)
    batch = dict.fromkeys(
      ('input_tokens', 'target_tokens', 'loss_weights', 'segment_ids'), np.ones((1, 4), np.int32)
    )
    with pytest.raises(RequestError, match='packed'):
      model.score_batch({}, {f'decoder_{k}': v for k, v in batch.items()})

  def test_bidirectional_inputs(self, palm_tiny):
    with pytest.raises(RequestError, match='only causal attention'):
      running.adapter_model(palm_tiny, inputs_bidirectional_attention=True)

  def test_unknown_dtype(self, palm_tiny):
    with pytest.raises(RequestError, match="'float16'"):
      running.adapter_model(palm_tiny, dtype='float16')

  def test_neither_checkpoint_nor_config(self):
    with pytest.raises(RequestError, match='a checkpoint .* or a config'):
      InferenceModel(running.VOCABULARY)

  def test_vocabulary_larger_than_the_embedding(self):
    with pytest.raises(RequestError, match='ids and the model.* 256 rows'):
      InferenceModel(running.VOCABULARY, config=config.preset('palm_tiny', vocab_size=256))

  def test_config_that_is_not_the_checkpoints(self, palm_tiny):
    with pytest.raises(
      CheckpointError, match=r'embedding: shape \[384, 256\] in .*needs \[384, 128\]'
    ):
      running.adapter_model(palm_tiny, config=config.preset('palm_tiny', d_model=128))

  def test_mesh_larger_than_the_devices(self, palm_tiny):
    with pytest.raises(MeshError, match='needs 64 devices and there are 8'):
      running.adapter_model(palm_tiny, '4x4x4')

  def test_layouts_that_cannot_share_weights(self, palm_tiny):
    with pytest.raises(
      MeshError, match='ws_1d/batch for prefill and ws_2d/batch for decode place the weights'
    ):
      running.adapter_model(palm_tiny, '2x2x2', prefill_layout='ws_1d/batch')

  def test_mesh_that_does_not_divide_the_model(self, palm_tiny):
    model = running.adapter_model(palm_tiny, '1x1x7')
    with pytest.raises(MeshError, match='d_model=256 does not divide'):
      model.get_initial_variables(jax.random.PRNGKey(0), {})
