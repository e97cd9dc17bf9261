"""Checkpoints that conversions write in T5X's format, read by T5X and by flaxformer with its quantized variables."""

import json

from absl import flags
from flax import traverse_util
import jax
import numpy as np
import pytest
from t5x import checkpoints, models

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.checkpoints.convert import convert
from t5x_inference_ext.engine import Engine
from tests.t5x_adapter import palm_flaxformer, running

SIZES = (384, 4, 256, 1024, 8, 32)


@pytest.fixture(autouse=True)
def parsed_flags():
  """AQT reads one of absl's flags."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def read_by_t5x(path):
  with running.closed_event_loops():
    return checkpoints.load_t5x_checkpoint(str(path))


def flat(tree):
  return traverse_util.flatten_dict(tree, sep='/')


def test_float_is_what_t5x_wrote(palm_tiny, tmp_path):
  convert(palm_tiny, tmp_path / 'checkpoint_1000', format='t5x_float')
  ours, original = read_by_t5x(tmp_path / 'checkpoint_1000'), read_by_t5x(palm_tiny)
  assert int(ours['state']['step']) == int(original['state']['step']) == 1000
  ours, original = flat(ours['target']), flat(original['target'])
  assert set(ours) == set(original)
  for name, values in original.items():
    np.testing.assert_array_equal(ours[name], values, strict=True, err_msg=name)


def test_float_from_a_serving_checkpoint_serves_in_stock_t5x(int8_checkpoint, stock_rows, tmp_path):
  """Back from int8: T5X's whole inference runs on it, and says mostly what it said before."""
  convert(int8_checkpoint, tmp_path / 'checkpoint_1000', format='t5x_float')
  rows = running.stock_infer(tmp_path / 'checkpoint_1000', tmp_path / 'out', 'predict')
  before = stock_rows('predict')
  assert len(rows) == len(before)
  same = sum(a['prediction'] == b['prediction'] for a, b in zip(rows, before))
  assert same >= len(rows) // 2


def test_int8_gives_the_same_tokens_with_flaxformer_s_quantized_variables(
    palm_tiny, int8_checkpoint, golden, tmp_path):
  convert(palm_tiny, tmp_path / 'checkpoint_1000', format='t5x_int8')
  params = read_by_t5x(tmp_path / 'checkpoint_1000')['target']
  module = palm_flaxformer.make_module(*SIZES, quantized=True)
  inputs = np.ones((1, 8), np.int32)
  expected = flat(jax.eval_shape(
      lambda: module.init(jax.random.PRNGKey(0), inputs, inputs, enable_dropout=False))['params'])
  assert {name: (x.shape, x.dtype) for name, x in flat(params).items()} == {
      name: (x.shape, x.dtype) for name, x in expected.items()}

  rows = json.loads((golden / 'greedy.json').read_text())
  prompts = [row['prompt_tokens'] for row in rows['rows']] if isinstance(rows, dict) else [
      row['prompt_tokens'] for row in rows]
  new_tokens = 24
  length = max(map(len, prompts)) + new_tokens
  tokens = np.zeros((len(prompts), length + 1), np.int32)
  mask = np.zeros_like(tokens)
  for i, prompt in enumerate(prompts):
    tokens[i, 1:len(prompt) + 1] = prompt
    mask[i, :len(prompt) + 1] = 1
  model = models.DecoderOnlyModel(module, running.VOCABULARY, optimizer_def=None, decode_fn=running.GREEDY)
  batch = {'decoder_input_tokens': tokens, 'decoder_target_tokens': np.roll(tokens, -1, 1),
           'decoder_loss_weights': np.ones_like(tokens), 'decoder_causal_attention': mask}
  decoded = np.asarray(jax.jit(lambda p, b: model.predict_batch(p, b))(params, batch))
  engine = Engine.load(open_checkpoint(tmp_path / 'checkpoint_1000'), dtype='float32')
  served = Engine.load(int8_checkpoint, dtype='float32')
  ours = engine.generate(prompts, max_new_tokens=new_tokens, eos_id=-1)
  # The serving checkpoint differs in its bfloat16 embedding alone: hence float32's embedding for equal tokens.
  assert len(served.generate(prompts, max_new_tokens=new_tokens, eos_id=-1)) == len(ours)
  for row, completion in zip(decoded, ours):
    np.testing.assert_array_equal(row[:new_tokens], completion.tokens[:new_tokens])
