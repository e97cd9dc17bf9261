"""Log-probabilities of some positions at a time, and the memory that they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.engine import programs
from t5x_inference_ext.model import log_probs
from t5x_inference_ext.model.transformer import Model
from tests import memory, reference

CONFIG = memory.ODD
TENSORS = reference.random_tensors(CONFIG)
LENGTH = 13


@pytest.mark.parametrize(
  'mesh, rows, layout',
  [
    ('1x1x1', 3, 'ws_2d/batch'),
    ('2x2x2', 8, 'ws_2d/batch'),
    ('2x2x2', 2, 'wg_xyz/batch'),
    ('2x2x2', 3, 'ws_1d/heads'),
    ('1x2x4', 1, 'wg_xy/heads'),
    ('2x2x1', 4, 'wg_x/batch'),
  ],
)
def test_some_positions_at_a_time(mesh, rows, layout, monkeypatch):
  """Positions are whole, or split over devices; the last part of them is padded."""
  engine = memory.engine(CONFIG, TENSORS, mesh, prefill=layout, decode=layout)
  inputs = memory.tokens(CONFIG, rows, LENGTH)
  targets = np.roll(inputs, -1, axis=1)
  wanted = np.take_along_axis(
    np.asarray(jax.nn.log_softmax(reference.logits(CONFIG, TENSORS, inputs))), targets[..., None], 2
  )[..., 0]
  parts = []
  for limit in (1, rows * 101 * 3):
    monkeypatch.setattr(log_probs, 'MAX_LOGITS', limit)
    lowered = memory.quick_jit(lambda *arguments: engine.model.log_probs(*arguments)).lower(
      engine.weights, *programs.put(engine.model, inputs, targets)
    )
    np.testing.assert_allclose(
      lowered.compile()(engine.weights, *programs.put(engine.model, inputs, targets)),
      wanted,
      atol=1e-4,
    )
    parts.append(f'x{LENGTH}x101xf32' not in lowered.as_text())
  assert all(parts), 'logits of all positions at once'


def test_no_logits_of_all_positions():
  """Of a large vocabulary the program takes the memory of a part."""
  big = memory.ModelConfig(
    num_layers=1, d_model=16, d_ff=16, num_heads=1, d_head=8, vocab_size=100_000
  )
  engine = memory.engine(big, reference.random_tensors(big), '1x1x1')
  shape = jax.ShapeDtypeStruct((4, 2048), jnp.int32)
  compiled = (
    jax.jit(Model.log_probs, static_argnames='self')
    .lower(engine.model, engine.weights, shape, shape)
    .compile()
  )
  assert 4 * 2048 * 100_000 * 4 > 3e9
  assert compiled.memory_analysis().temp_size_in_bytes < 1.2e9
