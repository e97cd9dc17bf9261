"""PaLM as palm_rlhf_pytorch stores it, against that code's arithmetic in NumPy."""

import numpy as np
import pytest

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.errors import CheckpointError
from tests import reference
from tests.checkpoints import public_files

E, F, H, Q, V, L = 24, 96, 3, 8, 37, 2


def state(rng, around: float) -> dict[str, np.ndarray]:
  """Return the state of a random model."""

  def normal(*shape):
    return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)

  def norm(name):
    return {
      f'{name}.gamma': (around + 0.1 * rng.standard_normal(E)).astype(np.float32),
      f'{name}.beta': np.zeros(E, np.float32),
    }

  arrays = {'token_emb.weight': normal(V, E), **norm('norm')}
  for i in range(L):
    place = f'layers.{i}.fn'
    arrays |= norm(f'{place}.norm')
    arrays |= {
      f'{place}.fused_attn_ff_proj.weight': normal(H * Q + 2 * Q + 2 * F, E),
      f'{place}.attn_out.weight': normal(E, H * Q),
      f'{place}.ff_out.2.weight': normal(E, F),
      f'{place}.rotary_emb.inv_freq': np.zeros(Q // 2, np.float32),
      f'{place}.rotary_emb.scale': np.zeros(Q // 2, np.float32),
    }
  return {**arrays, 'to_logits.weight': arrays['token_emb.weight']}


def logits(arrays: dict[str, np.ndarray], tokens: np.ndarray, offset: float) -> np.ndarray:
  """Return what palm_rlhf_pytorch computes for tokens [T]."""
  t = {name: values.astype(np.float64) for name, values in arrays.items()}
  n = len(tokens)

  def norm(x, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return x * (t[f'{name}.gamma'] + offset)

  angles = np.arange(n)[:, None] * 10000 ** (-np.arange(0, Q, 2) / Q)
  angles = np.concatenate([angles, angles], -1)
  base = (np.arange(0, Q, 2) + 0.4 * Q) / (1.4 * Q)
  scale = base ** ((np.arange(n) - n // 2) / 512)[:, None]
  scale = np.concatenate([scale, scale], -1)

  def rotated(x, scale):
    half = np.concatenate([-x[..., Q // 2 :], x[..., : Q // 2]], -1)
    return (x * np.cos(angles) + half * np.sin(angles)) * scale

  x = t['token_emb.weight'][tokens]
  for i in range(L):
    place = f'layers.{i}.fn'
    fused = norm(x, f'{place}.norm') @ t[f'{place}.fused_attn_ff_proj.weight'].T
    q, k, v, ff = np.split(fused, np.cumsum([H * Q, Q, Q]), -1)
    q = rotated(q.reshape(n, H, Q).swapaxes(0, 1), scale)
    scores = q @ rotated(k, 1 / scale).T * Q**-0.5
    scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    attention = (weights @ v).swapaxes(0, 1).reshape(n, H * Q) @ t[f'{place}.attn_out.weight'].T
    linear, gate = np.split(ff, 2, -1)
    hidden = gate / (1 + np.exp(-gate)) * linear
    x = x + attention + hidden @ t[f'{place}.ff_out.2.weight'].T
  return norm(x, 'norm') @ t['to_logits.weight'].T


@pytest.mark.parametrize('norm_scale', ['one', 'zero'])
def test_logits(tmp_path, norm_scale):
  rng = np.random.default_rng(0)
  arrays = state(rng, around=1.0 if norm_scale == 'one' else 0.0)
  public_files.write_safetensors(tmp_path / 'model.safetensors', arrays)
  found = open_checkpoint(tmp_path, norm_scale=norm_scale)
  c = found.config
  assert (c.num_layers, c.d_ff, c.num_heads, c.d_head, c.vocab_size) == (L, F, H, Q, V)
  assert any('assumed, as in palm_rlhf_pytorch' in note for note in found.notes)
  tokens = rng.integers(0, V, 20)
  tensors = {name: tensor.read() for name, tensor in found.tensors.items()}
  wanted = logits(arrays, tokens, 0.0 if norm_scale == 'one' else 1.0)
  np.testing.assert_allclose(
    reference.logits(c, tensors, tokens[None])[0], wanted, rtol=0, atol=1e-5
  )


def test_the_norm_scales_convention_has_to_be_given(tmp_path):
  arrays = state(np.random.default_rng(0), around=1.0)
  public_files.write_safetensors(tmp_path / 'model.safetensors', arrays)
  with pytest.raises(CheckpointError, match='give norm_scale=one .* or norm_scale=zero'):
    open_checkpoint(tmp_path)
  arrays['layers.0.fn.fused_attn_ff_proj.weight'] = np.zeros((7, E), np.float32)
  public_files.write_safetensors(tmp_path / 'model.safetensors', arrays)
  with pytest.raises(CheckpointError, match='has 7 rows'):
    open_checkpoint(tmp_path, norm_scale='one')
