"""jax's global switches, as a user's program may have set them, change no result."""

import jax
import numpy as np
import pytest

from t5x_inference_ext import SamplingParams
from tests import memory, reference

SAMPLING = SamplingParams(temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.1)
PROMPTS = [[3, 4, 5], [6]]


@pytest.fixture(scope='module')
def engine():
  config = memory.ODD
  return memory.engine(config, reference.random_tensors(config), '1x1x1', cache='int8')


def results(engine):
  """Everything that the engine does, with few compilations."""
  inputs = memory.tokens(engine.model.config, 2, 8)
  static = engine.generate(PROMPTS, max_new_tokens=4, sampling=SAMPLING)
  events = list(engine.stream(PROMPTS, max_new_tokens=4, sampling=SAMPLING, slots=2))
  chat = engine.chat(max_length=32)
  return (
    [c.tokens for c in static],
    sorted((e.request, e.tokens) for e in events),
    np.round(engine.log_probs(inputs, inputs), 4).tolist(),
    list(chat.reply([3, 4], max_new_tokens=4)),
  )


def test_results_are_those_without_the_switches(engine):
  """All at once, as each alone would compile everything anew."""
  wanted = results(engine)
  jax.clear_caches()
  with (
    jax.enable_x64(True),
    jax.numpy_dtype_promotion('strict'),
    jax.debug_nans(True),
    jax.default_prng_impl('rbg'),
  ):
    assert results(engine) == wanted
