"""Long sequences are scored in chunks: the values of one pass, in memory that grows with length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine import programs
from t5x_inference_ext.model import long_scoring
from t5x_inference_ext.model.transformer import Model
from tests import memory, reference

CONFIG = memory.ODD
TENSORS = reference.random_tensors(CONFIG)
LENGTH = 13

score = memory.quick_jit(long_scoring.score_sequences, static_argnames='model')
log_probs = memory.quick_jit(Model.log_probs, static_argnames='self')


@pytest.fixture
def chunks(monkeypatch):
  """Chunks of 4 positions, whatever fits."""
  monkeypatch.setattr(long_scoring, 'LONG', 4)
  monkeypatch.setattr(long_scoring, 'MOST_LOGITS', 1)
  monkeypatch.setattr(long_scoring, 'LEAST_CHUNK', 4)


@pytest.mark.parametrize(
  'mesh, rows, prefill, decode, stacked',
  [
    ('1x1x1', 3, 'ws_2d/batch', 'ws_2d/batch', False),
    ('2x2x2', 8, 'ws_2d/batch', 'ws_2d/batch', True),
    ('2x2x2', 2, 'wg_xyz/batch', 'ws_2d/heads', False),
    ('2x2x2', 3, 'ws_1d/heads', 'ws_1d/heads', False),
    ('1x2x4', 1, 'wg_xy/heads', 'ws_2d/batch', True),
    ('2x2x1', 4, 'wg_x/batch', 'ws_2d/batch', False),
  ],
)
def test_chunks_give_the_values_of_one_pass(chunks, mesh, rows, prefill, decode, stacked):
  """In every kind of layout; rows that fill the mesh or don't; the last chunk is padded."""
  engine = memory.engine(CONFIG, TENSORS, mesh, prefill=prefill, decode=decode, stacked=stacked)
  inputs = memory.tokens(CONFIG, rows, LENGTH)
  targets = np.roll(inputs, -1, axis=1)
  wanted = np.take_along_axis(
    np.asarray(jax.nn.log_softmax(reference.logits(CONFIG, TENSORS, inputs))), targets[..., None], 2
  )[..., 0]
  assert long_scoring.chunk_size(engine.model, rows, LENGTH) == 4
  found = score(engine.model, engine.weights, *programs.put(engine.model, inputs, targets))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_an_int8_cache_is_read_as_in_one_pass(chunks):
  engine = memory.engine(CONFIG, TENSORS, '2x2x1', cache='int8')
  inputs = memory.tokens(CONFIG, 2, LENGTH)
  arrays = programs.put(engine.model, inputs, np.roll(inputs, -1, axis=1))
  one_pass = log_probs(engine.model, engine.weights, *arrays)
  np.testing.assert_allclose(score(engine.model, engine.weights, *arrays), one_pass, atol=1e-5)


def test_sizes_of_chunks():
  """Short sequences take one pass. Longer ones take less memory than one pass would, or equal."""
  engine = memory.engine(CONFIG, TENSORS, '1x1x1')  # 3 heads
  size = lambda rows, length: long_scoring.chunk_size(engine.model, rows, length)
  assert [size(1, 8), size(64, 1024), size(1, 1100)] == [8, 1024, 1100]
  assert [size(1, 2048), size(1, 4096), size(2, 4096), size(1, 10**6)] == [640, 256, 128, 128]
  for rows, length in ((1, 4096), (2, 5000), (4, 2000)):
    assert rows * 3 * length * size(rows, length) <= long_scoring.MOST_LOGITS


def test_memory_grows_with_length_alone():
  """A pass over 8192 positions of 8 heads would need 2 GiB for attention's logits."""
  config = ModelConfig(
    num_layers=1, d_model=16, d_ff=16, num_heads=8, d_head=8, vocab_size=101, num_kv_heads=1
  )
  engine = memory.engine(config, reference.random_tensors(config), '1x1x1', stacked=True)

  def temporary(length):
    shape = jax.ShapeDtypeStruct((1, length), jnp.int32)
    lowered = score.lower(engine.model, engine.weights, shape, shape)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  short, long = temporary(8192), temporary(32768)
  assert short < 100e6 and long < 4.5 * short
