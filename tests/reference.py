"""The reference model in numpy, slow and obvious: one device, no cache, no sharding, no fusing."""

import dataclasses
import math

import ml_dtypes
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


def quantized(
  config: ModelConfig, tensors: dict[str, np.ndarray], weights: str = 'int8'
) -> dict[str, np.ndarray]:
  """Return the model nearest to `tensors` in 'int8' or 'int4': matrices and their scales.

  'int4,NAME:8,...' has some matrices or tables in int8, 'float32,NAME:8' some tables alone.
  """
  bits, *exceptions = weights.removeprefix('int').split(',')
  wider = {each.removesuffix(':8') for each in exceptions}
  groups = {}
  for name, p in params.parameters(config).items():
    if bits in '84' and p.scale and name not in params.TABLES:
      groups.setdefault(p.scale, []).append(name)
  out = dict(tensors)
  for name in wider & set(params.TABLES):
    out[f'{name}_scale'] = np.abs(tensors[name]).max(axis=1) / 127  # [V]
    out[name] = np.round(tensors[name] / out[f'{name}_scale'][:, None]).astype(np.int8)
  for scale, names in groups.items():
    is_int8 = bits == '8' or wider >= set(names)
    largest = np.max([np.abs(tensors[n]).max(axis=1) for n in names], axis=0)  # [L, out]
    out[scale] = largest / (127 if is_int8 else 7)
    for n in names:
      units = np.round(tensors[n] / out[scale][:, None, :])
      out[n] = units.astype(np.int8 if is_int8 else ml_dtypes.int4)
  return out


def dequantized(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return the float32 model that an int8 model stands for."""
  out = {n: tensors[n] for n in params.parameters(config)}
  for name, p in params.parameters(config).items():
    if p.scale in tensors:
      scale = np.expand_dims(tensors[p.scale], 1)  # [L, 1, out], or [V, 1]
      out[name] = tensors[name].astype(np.float32) * scale
  return out


def logits(
  config: ModelConfig, tensors: dict[str, np.ndarray], tokens: np.ndarray, cache: str | None = None
) -> np.ndarray:
  """Return float64 logits [B, T, V] of tokens [B, T]; keys and values are as a cache holds them."""
  c = config
  t = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
  x = t['embedding'][tokens]  # [B, T, E], the residual stream
  if c.positions == 'learned':
    x = x + t['position_embedding'][: tokens.shape[1]]
  if c.embedding_norm:
    x = _norm(x, t, 'embedding_norm', c)
  declared = params.parameters(config)
  layered = {name for name in t if name not in declared or declared[name].axes[0] == 'layers'}
  for i in range(c.num_layers):
    layer = {name: t[name][i] for name in layered}
    layer['bias'] = _position_bias(t, c, i, tokens.shape[1])
    layer['local'] = c.local_layers[i]
    before, after = c.norm_position != 'after', c.norm_position != 'before'
    if c.block == 'parallel':
      names = ['layer_norm'] * 2 if c.parallel_norms == 1 else ['attention_norm', 'mlp_norm']
      y, z = (_norm(x, layer, name, c) for name in names)
      x = x + _attention(y, layer, c, cache) + _mlp(z, layer, c)
    else:
      y = _attention(_norm(x, layer, 'attention_norm', c) if before else x, layer, c, cache)
      x = x + (_norm(y, layer, 'attention_post_norm', c) if after else y)
      y = _mlp(_norm(x, layer, 'mlp_norm', c) if before else x, layer, c)
      x = x + (_norm(y, layer, 'mlp_post_norm', c) if after else y)
  y = _norm(x, t, 'final_norm', c) @ t['embedding' if c.tied_head else 'head'].T
  y = y / np.sqrt(c.d_model) + t.get('head_bias', 0)
  return y if c.logit_soft_cap is None else c.logit_soft_cap * np.tanh(y / c.logit_soft_cap)


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
  q, k, v = (
    (y @ t[name] + t.get(f'{name}_bias', 0)).reshape(b, length, -1, c.d_head)
    for name in ('query', 'key', 'value')
  )
  if c.qkv_clip is not None:
    q, k, v = (np.clip(z, -c.qkv_clip, c.qkv_clip) for z in (q, k, v))
  if c.qk_norm != 'none':
    q, k = _qk_norm(q, t, 'query_norm', c), _qk_norm(k, t, 'key_norm', c)
  q, k = _rotary(q, c, t['local'], 1), _rotary(k, c, t['local'], -1)
  if cache == 'int8':
    k, v = (_rounded(z) for z in (k, v))
  # Query head h reads key/value head h // (H / K).
  k, v = (np.repeat(z, c.num_heads // c.num_kv_heads, axis=2) for z in (k, v))
  scores = np.einsum('bthd,bshd->bhts', q, k) / np.sqrt(c.d_head)
  if c.attention_soft_cap is not None:
    scores = c.attention_soft_cap * np.tanh(scores / c.attention_soft_cap)
  scores = scores + t['bias']
  mixed = np.einsum('bhts,bshd->bthd', _softmax(scores), v).reshape(b, length, -1)
  return mixed @ t['attention_output'] + t.get('attention_output_bias', 0)


def _position_bias(t, c, layer, length):
  """Return what is added to attention logits [H, T, S]: -inf where a token does not look."""
  query, key = np.arange(length)[:, None], np.arange(length)[None, :]
  seen = key <= query
  if c.local_layers[layer]:
    seen &= key > query - c.window
  bias = np.zeros((c.num_heads, length, length))
  for h in range(c.num_heads):
    if c.positions == 'alibi':
      slope = _alibi_slope(h, c.num_heads, c.alibi_max)
      if c.alibi_slopes.startswith('falcon'):
        rounded = _bfloat16(_bfloat16(slope) * _bfloat16(key + 0.0 * query))
        bias[h] = rounded / np.sqrt(c.d_head) * (2 if c.alibi_slopes == 'falcon_eager' else 1)
      else:
        bias[h] = slope * (key - query)
    if c.positions == 'relative':
      distance = np.maximum(query - key, 0)
      bias[h] = np.vectorize(lambda d, h=h: t['relative_bias'][h, _bucket(d, c)])(distance)
  return np.where(seen, bias, -np.inf)


def _alibi_slope(h, heads, largest):
  """Return the slope of a head as BLOOM's code computes it, with 3 for log2 of `largest`."""
  power = 2 ** math.floor(math.log2(heads))
  base = 2 ** -(2 ** -(math.log2(power) - math.log2(largest)))
  if h < power:
    return base ** (h + 1)
  extra = 2 ** -(2 ** -(math.log2(2 * power) - math.log2(largest)))
  return extra ** (2 * (h - power) + 1)


def _bfloat16(x):
  return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def _bucket(distance, c):
  """Return T5's bucket of a distance: exact for small ones, logarithmic up to the largest."""
  exact = c.relative_buckets // 2
  if distance < exact:
    return distance
  share = math.log(distance / exact) / math.log(c.relative_max_distance / exact)
  return min(exact + int(share * (c.relative_buckets - exact)), c.relative_buckets - 1)


def _qk_norm(x, t, name, c):
  """Normalize queries or keys [B, T, heads, Q]: each head, or all heads as one vector."""
  shape = x.shape
  scale = (1 if c.norm_scale == 'zero' else 0) + t[name]
  bias = t.get(f'{name}_bias', np.zeros_like(scale))
  x = x.reshape(*shape[:2], 1, -1) if c.qk_norm.endswith('_all') else x
  if c.qk_norm.startswith('layer'):
    x = x - x.mean(axis=-1, keepdims=True)
  x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + c.norm_epsilon)
  return x.reshape(shape) * scale.reshape(shape[2:]) + bias.reshape(shape[2:])


def _rounded(x):
  """Round x [B, T, K, Q] to multiples of a 127th of the largest value of each position and head."""
  units = np.abs(x).max(-1, keepdims=True) / 127
  return np.rint(x / units) * units


def _mlp(y, t, c):
  activation = {
    'swiglu': _swish,
    'swish': _swish,
    'geglu': _gelu_tanh,
    'gelu': _gelu_tanh,
    'geglu_erf': _gelu,
    'gelu_erf': _gelu,
    'reglu': lambda x: np.maximum(x, 0),
    'relu': lambda x: np.maximum(x, 0),
    'relu_squared': lambda x: np.maximum(x, 0) ** 2,
    'glu': lambda x: 1 / (1 + np.exp(-x)),
    'bilinear': lambda x: x,
  }[c.mlp]
  hidden = y @ t['linear'] + t.get('linear_bias', 0)
  if 'gate' in t:
    hidden = activation(y @ t['gate'] + t.get('gate_bias', 0)) * hidden
  else:
    hidden = activation(hidden)
  return hidden @ t['mlp_output'] + t.get('mlp_output_bias', 0)


def _swish(x):
  return x / (1 + np.exp(-x))


def _gelu_tanh(x):
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _gelu(x):
  return x / 2 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def _rotary(x, c, local, sign):
  """Rotate x; with xPos also multiply by a power of the position, with `sign` 1 or -1."""
  size, half = c.rotary_size, c.rotary_size // 2
  if c.positions != 'rotary' or not (local or c.global_rotary):
    return x
  own_base = local and c.local_rope_max_timescale
  base = own_base or c.rope_max_timescale
  frequencies = [base ** (-i / half) for i in range(half)]
  frequencies = frequencies if own_base else [_frequency(c, f) for f in frequencies]
  position = np.arange(x.shape[1])[:, None]
  sin, cos = np.sin(position * np.asarray(frequencies)), np.cos(position * np.asarray(frequencies))
  if c.xpos_scale_base is not None:
    scale = (np.arange(0, size, 2) + 0.4 * size) / (1.4 * size)
    scale = scale ** (sign * position / c.xpos_scale_base)
    sin, cos = sin * scale, cos * scale
  sin, cos = sin[:, None, :], cos[:, None, :]
  a, b, rest = x[..., :half], x[..., half:size], x[..., size:]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def _frequency(c, frequency):
  """Return the scaled frequency of a rotary dimension, as Llama 3.1's code says it."""
  if c.rope_scaling == 'linear':
    return frequency / c.rope_factor
  if c.rope_scaling == 'llama3':
    wavelength = 2 * math.pi / frequency
    if wavelength > c.rope_original_length / c.rope_low_factor:
      return frequency / c.rope_factor
    if wavelength > c.rope_original_length / c.rope_high_factor:
      smooth = c.rope_original_length / wavelength - c.rope_low_factor
      smooth /= c.rope_high_factor - c.rope_low_factor
      return (1 - smooth) * frequency / c.rope_factor + smooth * frequency
  return frequency


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
    usual = self.tensors['query'].array.dtype
    wider = [
      f'{name}:8'
      for name, tensor in sorted(self.tensors.items())
      if tensor.array.dtype == np.int8 and (usual.name == 'int4' or name in params.TABLES)
    ]
    return ','.join([usual.name, *wider])
