"""Checkpoints that conversions write in T5X's format, read by T5X and by flaxformer with its quantized variables."""

import json

from absl import flags
from flax import traverse_util
import jax
import numpy as np
import pytest
from t5x import checkpoints

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


def test_int8_gives_the_same_tokens_with_flaxformer_s_quantized_variables(palm_tiny, golden, tmp_path):
  convert(palm_tiny, tmp_path / 'checkpoint_1000', format='t5x_int8')
  params = read_by_t5x(tmp_path / 'checkpoint_1000')['target']
  module = palm_flaxformer.make_module(*SIZES, quantized=True)
  inputs = np.ones((1, 8), np.int32)
  expected = flat(jax.eval_shape(
      lambda: module.init(jax.random.PRNGKey(0), inputs, inputs, enable_dropout=False))['params'])
  assert {name: (x.shape, x.dtype) for name, x in flat(params).items()} == {
      name: (x.shape, x.dtype) for name, x in expected.items()}

  # Greedy tokens by induction: given ours so far, flaxformer's most likely next token is ours, at every position.
  prompts = [row['prompt_tokens'] for row in json.loads((golden / 'greedy.json').read_text())]
  engine = Engine.load(open_checkpoint(tmp_path / 'checkpoint_1000'), dtype='float32')
  rows = [p + c.tokens for p, c in zip(prompts, engine.generate(prompts, max_new_tokens=24, eos_id=-1))]
  tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
  for row, values in zip(tokens, rows):
    row[:len(values)] = values
  inputs = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
  logits = jax.jit(lambda p: module.apply({'params': p}, inputs, tokens, enable_dropout=False))(params)
  expected = np.argmax(np.asarray(logits), -1)
  for prompt, row, greedy in zip(prompts, rows, expected):
    np.testing.assert_array_equal(greedy[len(prompt):len(row)], row[len(prompt):])
