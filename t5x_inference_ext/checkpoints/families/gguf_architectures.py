"""llama.cpp's architectures: conversion of a GGUF file's metadata and names to a family's.

The settings go to the family's function (registry.py), the same as for transformers' files. GGUF
files differ from those in names, and in changes that llama.cpp makes when it converts: fused
matrices hold all queries, then all keys, then all values; some architectures rotate interleaved
rows; 1 is added to Gemma's norm scales. Activations are not stored: the architecture implies them.
"""

from collections.abc import Callable, Mapping
import dataclasses
import difflib
from typing import Any

import numpy as np

from t5x_inference_ext.checkpoints.families.family import FamilyModel
from t5x_inference_ext.checkpoints.families.module_map import ModuleMap
from t5x_inference_ext.checkpoints.families.registry import family_model
from t5x_inference_ext.checkpoints.families.settings import Settings
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.errors import CheckpointError, printable

ROPE_FREQS = 'rope_freqs.weight'
_BLOCK = 'blk.{}.'
_MODULES = {
  'embedding': 'token_embd',
  'embedding_norm': 'token_embd_norm',
  'position_embedding': 'position_embd',
  'final_norm': 'output_norm',
  'head': 'output',
  'query': f'{_BLOCK}attn_q',
  'key': f'{_BLOCK}attn_k',
  'value': f'{_BLOCK}attn_v',
  'attention_output': f'{_BLOCK}attn_output',
  'query_norm': f'{_BLOCK}attn_q_norm',
  'key_norm': f'{_BLOCK}attn_k_norm',
  'layer_norm': f'{_BLOCK}attn_norm',
  'attention_norm': f'{_BLOCK}attn_norm',
  'attention_post_norm': f'{_BLOCK}post_attention_norm',
  'mlp_norm': f'{_BLOCK}ffn_norm',
  'mlp_post_norm': f'{_BLOCK}post_ffw_norm',
  'gate': f'{_BLOCK}ffn_gate',
  'linear': f'{_BLOCK}ffn_up',
  'mlp_output': f'{_BLOCK}ffn_down',
}
_FUSED = f'{_BLOCK}attn_qkv'
_SECOND_NORM = f'{_BLOCK}attn_norm_2'
# Setting of a family -> key in the file, without the architecture's name in front.
_KEYS = {
  'hidden_size': 'embedding_length',
  'num_hidden_layers': 'block_count',
  'intermediate_size': 'feed_forward_length',
  'num_attention_heads': 'attention.head_count',
  'num_key_value_heads': 'attention.head_count_kv',
  'num_kv_heads': 'attention.head_count_kv',
  'head_dim': 'attention.key_length',
  'rms_norm_eps': 'attention.layer_norm_rms_epsilon',
  'layer_norm_eps': 'attention.layer_norm_epsilon',
  'layer_norm_epsilon': 'attention.layer_norm_epsilon',
  'rope_theta': 'rope.freq_base',
  'sliding_window': 'attention.sliding_window',
  'attn_logit_softcapping': 'attn_logit_softcapping',
  'final_logit_softcapping': 'final_logit_softcapping',
  'logit_scale': 'logit_scale',
  'clip_qkv': 'attention.clamp_kqv',
  'use_parallel_residual': 'use_parallel_residual',
  'num_local_experts': 'expert_count',
}
_ALIASES = {
  'd_model': 'hidden_size',
  'n_layers': 'num_hidden_layers',
  'n_heads': 'num_attention_heads',
  'n_inner': 'intermediate_size',
  'ffn_hidden_size': 'intermediate_size',
}


@dataclasses.dataclass(frozen=True)
class Architecture:
  """One of llama.cpp's architectures.

  Attributes:
    family: Key of FAMILIES.
    interleaved: Whether rotary positions rotate neighbouring rows.
    more: Function from (settings so far, stored tensors) to further settings.
  """

  family: str
  interleaved: bool = False
  more: Callable[[dict[str, Any], Mapping[str, Tensor]], dict[str, Any]] = lambda s, stored: {}


def _biases(s: dict[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Any]:
  attention, mlp = 'blk.0.attn_q.bias' in stored, 'blk.0.ffn_up.bias' in stored
  return {'attention_bias': attention, 'mlp_bias': mlp}


def _llama(s: dict[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Any]:
  window = {'model_type': 'mistral'} if s.get('sliding_window') else {}
  return {**_biases(s, stored), **window}


def _gemma(s: dict[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Any]:
  # Gemma 2 27B has 46 layers, Gemma 3 27B 62: llama.cpp scales their queries by E / H.
  scalar = s.get('head_dim', 256)
  if s.get('num_hidden_layers') in (46, 62):
    scalar = s['hidden_size'] // max(1, s['num_attention_heads'])
  return {'query_pre_attn_scalar': scalar, 'attention_bias': False}


def _falcon(s: dict[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Any]:
  two_norms = 'blk.0.attn_norm_2.weight' in stored
  grouped = two_norms or s.get('num_kv_heads', 1) != 1
  return {
    'new_decoder_architecture': grouped,
    'multi_query': True,
    'num_ln_in_parallel_attn': 2 if two_norms else 1,
  }


def _learned(s: dict[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Any]:
  table = stored.get('position_embd.weight')
  return {'n_positions': table.shape[0] if table is not None else None}


def _mpt(s: dict[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Any]:
  return {'attn_config': {'clip_qkv': s.get('clip_qkv'), 'alibi_bias_max': s.get('alibi_bias_max')}}


def _qk_norm(s: dict[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Any]:
  has = 'blk.0.attn_q_norm.weight' in stored
  return {'use_qk_norm': has, 'qk_layernorm': has, 'use_qkv_bias': 'blk.0.attn_q.bias' in stored}


ARCHITECTURES = {
  'llama': Architecture('llama', True, _llama),
  'qwen2': Architecture('qwen2'),
  'qwen3': Architecture('qwen3', more=_biases),
  'gemma': Architecture('gemma', more=_gemma),
  'gemma2': Architecture('gemma2', more=_gemma),
  'gemma3': Architecture('gemma3_text', more=_gemma),
  'command-r': Architecture('cohere', True, _qk_norm),
  'cohere2': Architecture('cohere2', True),
  'olmo': Architecture('olmo', True),
  'olmo2': Architecture('olmo2'),
  'stablelm': Architecture('stablelm', more=_qk_norm),
  'gpt2': Architecture('gpt2', more=_learned),
  'starcoder': Architecture('gpt_bigcode', more=_learned),
  'gptneox': Architecture('gpt_neox'),
  'phi2': Architecture('phi'),
  'bloom': Architecture('bloom'),
  'mpt': Architecture('mpt', more=_mpt),
  'falcon': Architecture('falcon', more=_falcon),
}


def gguf_family_model(
  metadata: Mapping[str, Any], stored: Mapping[str, Tensor], where: str
) -> tuple[FamilyModel, ModuleMap]:
  """Return the model that a GGUF file's metadata describes, and its modules in transformers.

  The first result has the file's tensor names.

  Args:
    metadata: Values by key.
    stored: Stored tensors, by name.
    where: Name of the file, for messages.

  Raises:
    CheckpointError: The architecture is unknown, or a setting is missing or can't be served.
  """
  name = metadata.get('general.architecture')
  if not isinstance(name, str) or name not in ARCHITECTURES:
    near = difflib.get_close_matches(str(name)[:80], ARCHITECTURES, 1, 0.0)[0]
    raise CheckpointError(
      f'{where}: general.architecture is {printable(name, 80)}, which is not a known one; the '
      f'nearest is {near}; known are {", ".join(ARCHITECTURES)}'
    )
  architecture = ARCHITECTURES[name]
  settings = _settings(metadata, name, stored, where)
  settings = {'model_type': architecture.family, **settings}
  model = family_model(Settings({**settings, **architecture.more(settings, stored)}, where))
  modules = dict(_MODULES)
  fused = f'{_FUSED.replace("{}", "0")}.weight' in stored
  if fused:
    modules |= dict.fromkeys(('query', 'key', 'value'), _FUSED)
  if model.config.parallel_norms == 2 and architecture.family == 'falcon':
    modules |= {'attention_norm': _SECOND_NORM, 'mlp_norm': f'{_BLOCK}attn_norm'}
  in_file = dataclasses.replace(
    model,
    modules=modules,
    fused='stacked' if fused else '',
    interleaved=architecture.interleaved,
    transposed=True,
    norm_offset=0.0,
    skipped_positions=0,
  )
  return in_file, ModuleMap.of(model)


def _settings(
  metadata: Mapping[str, Any], name: str, stored: Mapping[str, Tensor], where: str
) -> dict[str, Any]:
  """Return the settings that all architectures have, with config.json's names."""

  def value(key: str) -> Any:
    found = metadata.get(f'{name}.{key}')
    return found.tolist() if isinstance(found, np.ndarray) else found

  found = {setting: value(key) for setting, key in _KEYS.items()}
  found |= {alias: found[setting] for alias, setting in _ALIASES.items()}
  embedding = stored.get('token_embd.weight')
  if embedding is None:
    raise CheckpointError(f'{where} lacks token_embd.weight, which every model has')
  found['vocab_size'] = embedding.shape[0]
  found['tie_word_embeddings'] = 'output.weight' not in stored
  found['alibi_bias_max'] = value('attention.max_alibi_bias')
  rotated, heads = value('rope.dimension_count'), found['num_attention_heads']
  d_head = found['head_dim']
  if d_head is None and type(heads) is int and heads and type(found['hidden_size']) is int:
    d_head = found['hidden_size'] // heads
  if type(rotated) is int and type(d_head) is int and d_head:
    found['partial_rotary_factor'] = rotated / d_head
  if value('rope.scaling.type') not in (None, 'none'):
    factor = value('rope.scaling.factor')
    found['rope_scaling'] = {'rope_type': value('rope.scaling.type'), 'factor': factor}
  if ROPE_FREQS in stored:
    found['rope_scaling'] = _llama3_scaling(stored[ROPE_FREQS], found, d_head, where)
  return {setting: value for setting, value in found.items() if value is not None}


def _llama3_scaling(
  freqs: Tensor, settings: Mapping[str, Any], d_head: Any, where: str
) -> dict[str, Any]:
  """Find the rotary scaling from which a file's divisors of frequencies [Q / 2] were computed.

  Raises:
    CheckpointError: No known original context length of Llama 3 gives these divisors.
  """
  theta = settings.get('rope_theta', 1e4)
  if type(theta) is float and theta > 0 and freqs.shape == (d_head // 2,):
    found = freqs.read().astype(np.float64)
    waves = 2 * np.pi * theta ** (np.arange(0, d_head, 2) / d_head)
    factor = float(found.max())
    for length in (8192, 4096, 2048, 1024, 512, 256, 128, 64, 32):
      smooth = np.clip((length / waves - 1) / 3, 0, 1)
      divisors = 1 / ((1 - smooth) / factor + smooth)
      if np.allclose(divisors, found, rtol=1e-4):
        return {
          'rope_type': 'llama3',
          'factor': factor,
          'low_freq_factor': 1.0,
          'high_freq_factor': 4.0,
          'original_max_position_embeddings': length,
        }
  raise CheckpointError(
    f"{where}: {ROPE_FREQS} changes the rotary frequencies in a way that can't be served; only the "
    "scaling of Llama 3.1 to 3.3 ('llama3', with factors 1 and 4) can"
  )
