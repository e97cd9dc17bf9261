"""The reference model in numpy, slow and obvious: one device, no cache, no sharding, no fusing."""

import dataclasses

import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.config import ModelConfig


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
  """Return random canonical float32 tensors of plausible magnitudes."""
  rng = np.random.default_rng(seed)
  tensors = {}
  for name, p in params.parameters(config).items():
    scale = (
      0.1 if p.kind in ('norm', 'bias') else 1.0 if p.kind == 'embedding' else p.shape[1] ** -0.5
    )
    tensors[name] = (rng.normal(size=p.shape) * scale).astype(np.float32)
    if p.kind == 'norm' and config.norm_scale == 'one':
      tensors[name] += 1
  return tensors


def quantized(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return the int8 model nearest to `tensors`: int8 matrices and their scales."""
  groups = {}
  for name, p in params.parameters(config).items():
    if p.scale:
      groups.setdefault(p.scale, []).append(name)
  out = dict(tensors)
  for scale, names in groups.items():
    out[scale] = np.max([np.abs(tensors[n]).max(axis=1) for n in names], axis=0) / 127  # [L, out]
    for n in names:
      out[n] = np.round(tensors[n] / out[scale][:, None, :]).astype(np.int8)
  return out


def dequantized(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return the float32 model that an int8 model stands for."""
  out = {n: tensors[n] for n in params.parameters(config)}
  for name, p in params.parameters(config).items():
    if p.scale:
      out[name] = tensors[name].astype(np.float32) * tensors[p.scale][:, None, :]
  return out


def logits(
  config: ModelConfig, tensors: dict[str, np.ndarray], tokens: np.ndarray, cache: str | None = None
) -> np.ndarray:
  """Return float64 logits [B, T, V] of tokens [B, T]; keys and values are as a cache holds them."""
  c = config
  t = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
  x = t['embedding'][tokens]  # [B, T, E], the residual stream
  for i in range(c.num_layers):
    layer = {
      name: w[i]
      for name, w in t.items()
      if name not in ('embedding', 'final_norm', 'final_norm_bias')
    }
    if c.block == 'parallel':
      y = _norm(x, layer, 'layer_norm', c)
      x = x + _attention(y, layer, c, cache) + _mlp(y, layer, c)
    else:
      x = x + _attention(_norm(x, layer, 'attention_norm', c), layer, c, cache)
      x = x + _mlp(_norm(x, layer, 'mlp_norm', c), layer, c)
  return _norm(x, t, 'final_norm', c) @ t['embedding'].T / np.sqrt(c.d_model)


def greedy(config, tensors, prompt: list[int], new_tokens: int) -> list[int]:
  """Continue one prompt greedily; the whole sequence is recomputed for each token."""
  tokens = [0] + list(prompt)
  for _ in range(new_tokens):
    tokens.append(int(np.argmax(logits(config, tensors, np.asarray([tokens]))[0, -1])))
  return tokens[len(prompt) + 1 :]


def _norm(x, t, name, c):
  scale = 1 + t[name] if c.norm_scale == 'zero' else t[name]
  bias = 0
  if c.norm == 'layer':
    x = x - x.mean(axis=-1, keepdims=True)
    bias = t[f'{name}_bias']
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + c.norm_epsilon) * scale + bias


def _attention(y, t, c, cache):
  b, length, _ = y.shape
  q = _rotary((y @ t['query']).reshape(b, length, c.num_heads, c.d_head), c)
  k = _rotary((y @ t['key']).reshape(b, length, c.num_kv_heads, c.d_head), c)
  v = (y @ t['value']).reshape(b, length, c.num_kv_heads, c.d_head)
  if cache == 'int8':
    k, v = (_rounded(z) for z in (k, v))
  # Query head h reads key/value head h // (H / K).
  k, v = (np.repeat(z, c.num_heads // c.num_kv_heads, axis=2) for z in (k, v))
  scores = np.einsum('bthd,bshd->bhts', q, k) / np.sqrt(c.d_head)
  scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
  return (
    np.einsum('bhts,bshd->bthd', _softmax(scores), v).reshape(b, length, -1) @ t['attention_output']
  )


def _rounded(x):
  """Round x [B, T, K, Q] to multiples of a 127th of the largest value of each position and head."""
  units = np.abs(x).max(-1, keepdims=True) / 127
  return np.rint(x / units) * units


def _mlp(y, t, c):
  linear = y @ t['linear']
  if c.mlp == 'gelu':
    hidden = linear / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (linear + 0.044715 * linear**3)))
  else:
    gate = y @ t['gate']
    hidden = gate / (1 + np.exp(-gate)) * linear
  return hidden @ t['mlp_output']


def _rotary(x, c):
  half = c.d_head // 2
  angle = np.arange(x.shape[1])[:, None] * c.rope_max_timescale ** (-np.arange(half) / half)
  sin, cos = np.sin(angle)[:, None, :], np.cos(angle)[:, None, :]
  a, b = x[..., :half], x[..., half:]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class ArrayTensor:
  """A checkpoint tensor held in memory."""

  array: np.ndarray

  def read(self, index=...):
    return self.array[index]


@dataclasses.dataclass(frozen=True)
class MemoryCheckpoint:
  """A checkpoint of arrays, as load_weights reads it."""

  config: ModelConfig
  tensors: dict
  format: str = 'serving'
  vocabulary: object = None
  bos_id: int | None = 0
  end_ids: tuple = (1,)

  @classmethod
  def of(cls, config, arrays):
    return cls(config, {name: ArrayTensor(x) for name, x in arrays.items()})

  @property
  def weights(self):
    return str(self.tensors['query'].array.dtype)
