"""Checkpoints that conversions write in T5X's format, read by T5X and by flaxformer."""

import json

from absl import flags
from flax import traverse_util
import jax
import numpy as np
import pytest
from t5x import checkpoints, models

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.checkpoints.convert import convert
from t5x_inference_ext.engine.engine import Engine
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
  palm_tiny, golden, tmp_path
):
  convert(palm_tiny, tmp_path / 'checkpoint_1000', format='t5x_int8')
  params = read_by_t5x(tmp_path / 'checkpoint_1000')['target']
  module = palm_flaxformer.make_module(*SIZES, quantized=True)
  inputs = np.ones((1, 8), np.int32)
  expected = flat(
    jax.eval_shape(
      lambda: module.init(jax.random.PRNGKey(0), inputs, inputs, enable_dropout=False)
    )['params']
  )
  assert {name: (x.shape, x.dtype) for name, x in flat(params).items()} == {
    name: (x.shape, x.dtype) for name, x in expected.items()
  }

  # T5X's own loop over flaxformer's quantized variables and its cache, beside ours.
  prompts = [row['prompt_tokens'] for row in json.loads((golden / 'greedy.json').read_text())]
  new, eos = 24, running.VOCABULARY.eos_id
  engine = Engine.load(open_checkpoint(tmp_path / 'checkpoint_1000'), mesh='1x1x1', dtype='float32')
  ours = [c.tokens for c in engine.generate(prompts, max_new_tokens=new, eos_id=eos)]
  tokens = np.zeros((len(prompts), max(map(len, prompts)) + new), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  lengths = np.array([len(prompt) for prompt in prompts])
  batch = {
    'decoder_target_tokens': tokens,
    'decoder_input_tokens': np.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
    'decoder_causal_attention': (np.arange(tokens.shape[1]) <= lengths[:, None]).astype(np.int32),
  }
  model = models.DecoderOnlyModel(
    module, running.VOCABULARY, optimizer_def=None, decode_fn=running.GREEDY
  )
  decoded, _ = jax.jit(model.predict_batch_with_aux)(params, batch)
  assert any(len(row) == new for row in ours)
  for row, expected in zip(np.asarray(decoded), ours):
    np.testing.assert_array_equal(row[: len(expected)], expected)
