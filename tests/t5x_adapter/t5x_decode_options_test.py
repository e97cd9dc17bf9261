"""Slot refill takes over what a user binds to T5X's decode_fn, or refuses it with one sentence."""

import functools
import inspect

import gin
import jax
import pytest
from t5x import decoding

from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.t5x.decode_options import _TAKEN, DecodeOptions, decode_options
from t5x_inference_ext.t5x.refill import Refill
from tests.t5x_adapter import running

GREEDY = DecodeOptions(0.0, 0, 1.0, None)
# What is bound to temperature_sample, and what slot refill makes of it.
OPTIONS = [
  ({}, GREEDY),  # T5X's own defaults: temperature 1, but one token only
  (dict(temperature=0.8), GREEDY),
  (dict(temperature=0.8, topk=40), DecodeOptions(0.8, 40, 1.0, None)),
  (dict(topk=40), DecodeOptions(1.0, 40, 1.0, None)),
  (dict(temperature=0.8, topk=0), DecodeOptions(0.8, 0, 1.0, None)),
  (dict(topk=0, topp=0.9), DecodeOptions(1.0, 0, 0.9, None)),
  (dict(temperature=0.0, topk=40), DecodeOptions(0.0, 40, 1.0, None)),
  (dict(temperature=1e-5, topk=0), GREEDY),  # T5X takes it for 0
  (dict(max_decode_steps=8), DecodeOptions(0.0, 0, 1.0, 8)),
  (dict(max_decode_steps=8, max_decode_steps_hard_limit=5), DecodeOptions(0.0, 0, 1.0, 5)),
  (dict(max_decode_steps=8, max_decode_steps_hard_limit=0), DecodeOptions(0.0, 0, 1.0, 8)),
  (dict(max_decode_steps_hard_limit=5), GREEDY),
  (dict(num_decodes=1, logit_callback_fn=None, rescale_log_probs=False), GREEDY),
]


@pytest.fixture(autouse=True)
def no_configuration():
  gin.clear_config()
  yield
  gin.clear_config()


def _refill(*bindings):
  """The Refill that continuous.gin makes of bindings in front and, from '--' on, behind it."""
  front, _, behind = '\n'.join(bindings).partition('--')
  gin.parse_config(f"""
from __gin__ import dynamic_registration
from t5x import decoding
include 't5x_inference_ext/configs/t5x/model.gin'
{front}
include 't5x_inference_ext/configs/t5x/continuous.gin'
from t5x_inference_ext.engine import sampling
from t5x_inference_ext.t5x import refill
{behind}
""")
  return gin.get_configurable(Refill)()


def _bound(options):
  return [f'decoding.temperature_sample.{name} = {value!r}' for name, value in options.items()]


@pytest.mark.parametrize('options, expected', OPTIONS)
def test_options_are_taken_over(options, expected):
  assert decode_options(functools.partial(decoding.temperature_sample, **options)) == expected
  refill = _refill(*_bound(options))
  assert refill.sampling == SamplingParams(expected.temperature, expected.top_k, expected.top_p)
  assert refill.max_new_tokens == expected.max_new_tokens


def test_what_continuous_gin_binds_comes_before_what_t5x_would_take():
  stock = _bound(dict(temperature=0.8, topk=40, max_decode_steps=8))
  assert _refill(*stock, '--', 'TEMPERATURE = 0.0').sampling == SamplingParams(0.0, top_k=40)
  gin.clear_config()
  assert _refill(*stock, '--', 'TOP_K = 5', 'TOP_P = 0.5', 'MAX_NEW_TOKENS = None') == Refill(
    sampling=SamplingParams(0.8, top_k=5, top_p=0.5)
  )
  gin.clear_config()
  refill = _refill('--', 'TEMPERATURE = 0.7', 'sampling.SamplingParams.stop = [[5]]')
  assert refill.sampling == SamplingParams(0.7, stop=((5,),))


REFUSED = {
  'num_decodes': (3, 'bind InferenceModel.predict_batch_with_aux.num_decodes instead'),
  'rescale_log_probs': (True, "bind False, as scores are of the model's own distribution"),
  'logit_callback_fn': (lambda logits, state: logits, 'bind LOGIT_BIAS or a penalty instead'),
}


def test_every_other_option_is_refused():
  """Those of the T5X that is installed, whichever they are."""
  names = set(inspect.signature(decoding.temperature_sample).parameters)
  assert names > set(_TAKEN) | set(REFUSED) and len(names) >= 14
  others = names - set(_TAKEN)
  for name in others:
    value, message = REFUSED.get(name, (7, 'leave out configs/t5x/continuous.gin'))
    decode_fn = functools.partial(decoding.temperature_sample, **{name: value})
    with pytest.raises(RequestError, match=rf'temperature_sample\.{name} = .*: {message}'):
      decode_options(decode_fn)


@pytest.mark.parametrize(
  'bindings, message',
  [
    (['DECODE_FN = @decoding.beam_search'], "has no decode_fn 'beam_search'"),
    (
      ['DECODE_FN = @few/decoding.temperature_sample', 'few/decoding.temperature_sample.topk = 5'],
      "has no decode_fn 'temperature_sample' with code or a gin scope",
    ),
    (_bound(dict(num_decodes=3)), 'bind InferenceModel.predict_batch_with_aux.num_decodes instead'),
    (_bound(dict(topp=0.9)), 'takes topk = 1 or topp = 0.9, not both: bind topk = 0'),
    (_bound(dict(temperature='hot', topk=0)), "temperature must be a number, got 'hot'"),
    (_bound(dict(max_decode_steps=0)), 'Refill.max_new_tokens must be a whole number, 1 or more'),
  ],
)
def test_gin_is_told_what_to_bind_instead(bindings, message):
  with pytest.raises(ValueError, match=message):
    _refill(*bindings)


def test_the_model_asks_its_own_decode_fn(palm_tiny):
  """Also without continuous.gin, in Python or in a gin file of one's own."""
  sampled = functools.partial(decoding.temperature_sample, temperature=0.5, topk=3)
  model = running.adapter_model(palm_tiny, decode_fn=sampled, refill=Refill(max_new_tokens=4))
  assert model._predictor._refill == Refill(sampling=SamplingParams(0.5, top_k=3), max_new_tokens=4)
  for decode_fn in (decoding.beam_search, lambda **arguments: None):
    with pytest.raises(RequestError, match='has no decode_fn .*: bind DECODE_FN = @decoding'):
      running.adapter_model(palm_tiny, decode_fn=decode_fn, refill=Refill())


STOCK = """
from __gin__ import dynamic_registration
from t5x import decoding
from t5x import models
"""


@pytest.mark.parametrize('refill', [None, Refill(slots=4, max_new_tokens=6)])
def test_samples_bound_to_t5xs_own_model_are_made(refill, palm_tiny, batch):
  """A stock configuration binds num_decodes to the method of T5X's class."""
  gin.parse_config(
    f'{STOCK}models.DecoderOnlyModel.predict_batch_with_aux.num_decodes = 3\n'
    'models.DecoderOnlyModel.predict_batch_with_aux.return_all_decodes = True\n'
    'models.DecoderOnlyModel.decode_fn = @decoding.temperature_sample\n'
  )
  model = running.adapter_model(palm_tiny, refill=refill)
  state, _, _ = running.restored(model, palm_tiny)

  def predict(**options):
    step = functools.partial(model.predict_batch_with_aux, **options)
    if refill is not None:
      return step(state.params, batch)
    return jax.eval_shape(step, state.params, batch)  # T5X's loop, which takes long outside of jit

  tokens, aux = predict()
  assert tokens.shape == (3, 3, 96) and aux['scores'].shape == (3, 3)
  assert predict(num_decodes=2)[0].shape == (3, 2, 96)


@pytest.mark.parametrize(
  'binding, message',
  [
    ('inputs_bidirectional_attention = True', 'only causal attention is supported'),
    ('decode_fn = @decoding.beam_search', 'decode_fn = beam_search has no effect on InferenceMode'),
  ],
)
def test_options_of_t5xs_own_model_that_would_be_dropped(binding, message, palm_tiny):
  gin.parse_config(f'{STOCK}models.DecoderOnlyModel.{binding}\n')
  with pytest.raises(RequestError, match=message):
    running.adapter_model(palm_tiny, decode_fn=decoding.temperature_sample)
