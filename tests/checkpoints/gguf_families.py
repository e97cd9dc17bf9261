"""The models of tests/testdata/families as GGUF files, as llama.cpp's converter writes them."""

import json
import pathlib
import re

import numpy as np

from tests.checkpoints import public_files

# Names in transformers -> names in GGUF files, by family. {} is the layer.
_LLAMA = {
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'lm_head': 'output',
  'model.layers.{}.input_layernorm': 'blk.{}.attn_norm',
  'model.layers.{}.post_attention_layernorm': 'blk.{}.ffn_norm',
  'model.layers.{}.self_attn.q_proj': 'blk.{}.attn_q',
  'model.layers.{}.self_attn.k_proj': 'blk.{}.attn_k',
  'model.layers.{}.self_attn.v_proj': 'blk.{}.attn_v',
  'model.layers.{}.self_attn.o_proj': 'blk.{}.attn_output',
  'model.layers.{}.self_attn.q_norm': 'blk.{}.attn_q_norm',
  'model.layers.{}.self_attn.k_norm': 'blk.{}.attn_k_norm',
  'model.layers.{}.mlp.gate_proj': 'blk.{}.ffn_gate',
  'model.layers.{}.mlp.up_proj': 'blk.{}.ffn_up',
  'model.layers.{}.mlp.down_proj': 'blk.{}.ffn_down',
}
_GEMMA2 = {
  **_LLAMA,
  'model.layers.{}.post_attention_layernorm': 'blk.{}.post_attention_norm',
  'model.layers.{}.pre_feedforward_layernorm': 'blk.{}.ffn_norm',
  'model.layers.{}.post_feedforward_layernorm': 'blk.{}.post_ffw_norm',
}
_PHI = {
  **_LLAMA,
  'model.final_layernorm': 'output_norm',
  'model.layers.{}.self_attn.dense': 'blk.{}.attn_output',
  'model.layers.{}.mlp.fc1': 'blk.{}.ffn_up',
  'model.layers.{}.mlp.fc2': 'blk.{}.ffn_down',
}
_GPT2 = {
  'transformer.wte': 'token_embd',
  'transformer.wpe': 'position_embd',
  'transformer.ln_f': 'output_norm',
  'transformer.h.{}.ln_1': 'blk.{}.attn_norm',
  'transformer.h.{}.ln_2': 'blk.{}.ffn_norm',
  'transformer.h.{}.attn.c_attn': 'blk.{}.attn_qkv',
  'transformer.h.{}.attn.c_proj': 'blk.{}.attn_output',
  'transformer.h.{}.mlp.c_fc': 'blk.{}.ffn_up',
  'transformer.h.{}.mlp.c_proj': 'blk.{}.ffn_down',
}
_NEOX = {
  'gpt_neox.embed_in': 'token_embd',
  'gpt_neox.final_layer_norm': 'output_norm',
  'embed_out': 'output',
  'gpt_neox.layers.{}.input_layernorm': 'blk.{}.attn_norm',
  'gpt_neox.layers.{}.post_attention_layernorm': 'blk.{}.ffn_norm',
  'gpt_neox.layers.{}.attention.query_key_value': 'blk.{}.attn_qkv',
  'gpt_neox.layers.{}.attention.dense': 'blk.{}.attn_output',
  'gpt_neox.layers.{}.mlp.dense_h_to_4h': 'blk.{}.ffn_up',
  'gpt_neox.layers.{}.mlp.dense_4h_to_h': 'blk.{}.ffn_down',
}
_BLOOM = {
  'transformer.word_embeddings': 'token_embd',
  'transformer.word_embeddings_layernorm': 'token_embd_norm',
  'transformer.ln_f': 'output_norm',
  'transformer.h.{}.input_layernorm': 'blk.{}.attn_norm',
  'transformer.h.{}.post_attention_layernorm': 'blk.{}.ffn_norm',
  'transformer.h.{}.ln_mlp': 'blk.{}.attn_norm',
  'transformer.h.{}.ln_attn': 'blk.{}.attn_norm_2',
  'transformer.h.{}.self_attention.query_key_value': 'blk.{}.attn_qkv',
  'transformer.h.{}.self_attention.dense': 'blk.{}.attn_output',
  'transformer.h.{}.mlp.dense_h_to_4h': 'blk.{}.ffn_up',
  'transformer.h.{}.mlp.dense_4h_to_h': 'blk.{}.ffn_down',
}
_MPT = {
  'transformer.wte': 'token_embd',
  'transformer.norm_f': 'output_norm',
  'transformer.blocks.{}.norm_1': 'blk.{}.attn_norm',
  'transformer.blocks.{}.norm_2': 'blk.{}.ffn_norm',
  'transformer.blocks.{}.attn.Wqkv': 'blk.{}.attn_qkv',
  'transformer.blocks.{}.attn.out_proj': 'blk.{}.attn_output',
  'transformer.blocks.{}.ffn.up_proj': 'blk.{}.ffn_up',
  'transformer.blocks.{}.ffn.down_proj': 'blk.{}.ffn_down',
}
# Fixture -> (architecture, names).
ARCHITECTURES = {
  **dict.fromkeys(('smollm2', 'llama_untied', 'llama31'), ('llama', _LLAMA)),
  'mistral_window': ('llama', _LLAMA),
  'qwen2': ('qwen2', _LLAMA),
  'qwen3': ('qwen3', _LLAMA),
  'gemma': ('gemma', _LLAMA),
  'gemma3': ('gemma3', _GEMMA2),
  'cohere': ('command-r', _LLAMA),
  'cohere_qk_norm': ('command-r', _LLAMA),
  'cohere2': ('cohere2', _LLAMA),
  'olmo': ('olmo', _LLAMA),
  'olmo2': ('olmo2', _GEMMA2),
  'stablelm': ('stablelm', _LLAMA),
  'stablelm_parallel': ('stablelm', _LLAMA),
  'phi': ('phi2', _PHI),
  'gpt2': ('gpt2', _GPT2),
  'gpt_bigcode': ('starcoder', _GPT2),
  'gpt_neox': ('gptneox', _NEOX),
  'gpt_neox_serial': ('gptneox', _NEOX),
  'bloom': ('bloom', _BLOOM),
  'mpt': ('mpt', _MPT),
  'falcon_7b': ('falcon', _BLOOM),
  'falcon_40b': ('falcon', _BLOOM),
}
# Fused matrices that lie key head by key head.
_GROUPED = ('gpt_neox', 'gpt_neox_serial', 'bloom', 'falcon_40b')
_INTERLEAVED_LATER = ('smollm2', 'llama_untied', 'llama31', 'mistral_window', 'olmo')


def converted(directory: pathlib.Path) -> tuple[dict, dict[str, np.ndarray]]:
  """Return the metadata and the tensors of a fixture's GGUF file, all in float32."""
  family = directory.name
  architecture, names = ARCHITECTURES[family]
  config = json.loads((directory / 'config.json').read_text())
  arrays = {}
  stored = public_files.read_safetensors(directory / 'model.safetensors')
  for name, values in stored.items():
    values = values.astype(np.float32)
    head = re.fullmatch(r'(.*)\.([qk])_layernorm\.norms\.(\d+)\.weight', name)
    if head:
      if head[3] != '0':
        continue
      same = re.compile(re.escape(f'{head[1]}.{head[2]}_layernorm.norms.') + r'(\d+)\.weight')
      found = sorted((int(m[1]), n) for n in stored if (m := same.fullmatch(n)))
      values = np.stack([stored[n].astype(np.float32) for _, n in found])
      name = f'{head[1]}.{head[2]}_norm.weight'
    module, leaf = name.rsplit('.', 1)
    layer = re.search(r'\.(\d+)\.', f'{module}.')
    pattern = module.replace(f'.{layer[1]}.', '.{}.', 1) if layer else module
    new = names[pattern].replace('{}', layer[1] if layer else '')
    arrays[f'{new}.{leaf}'] = _changed(family, pattern, leaf, values, config)
  if architecture in ('bloom', 'gpt2'):
    arrays['output.weight'] = arrays['token_embd.weight']
  metadata = {'general.architecture': architecture}
  metadata |= {f'{architecture}.{k}': v for k, v in _metadata(family, config, arrays).items()}
  if family == 'llama31':
    arrays['rope_freqs.weight'] = _rope_freqs(config)
  return metadata, arrays


def _changed(family: str, pattern: str, leaf: str, values: np.ndarray, config: dict) -> np.ndarray:
  """Return a tensor as the converter changes it."""
  heads = config.get('num_attention_heads') or config.get('n_head')
  if family.startswith('gemma') and 'norm' in pattern:
    return values + 1
  if family in _INTERLEAVED_LATER and pattern.endswith(('q_proj', 'k_proj')):
    count = heads if pattern.endswith('q_proj') else config['num_key_value_heads']
    halves = values.reshape(count, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
  if family == 'gpt2' and values.ndim == 2 and pattern.startswith('transformer.h.'):
    return values.T
  if family in _GROUPED and pattern.endswith('query_key_value'):
    kv = config['num_kv_heads'] if family == 'falcon_40b' else heads
    groups = values.reshape(kv, heads // kv + 2, -1, *values.shape[1:])
    parts = groups[:, :-2], groups[:, -2], groups[:, -1]
    return np.concatenate([x.reshape(-1, *values.shape[1:]) for x in parts])
  return values


def _metadata(family: str, config: dict, arrays: dict[str, np.ndarray]) -> dict:
  """Return the keys of a file, without the architecture in front."""

  def first(*names):
    return next((config[n] for n in names if config.get(n) is not None), None)

  kv = first('num_key_value_heads', 'num_kv_heads')
  if family == 'falcon_7b':
    kv = 1
  rope = first('rope_parameters') or {}
  rope = rope.get('full_attention', rope)
  d_model, heads = first('hidden_size', 'n_embd', 'd_model'), first('num_attention_heads', 'n_head')
  heads = heads or config['n_heads']
  found = {
    'embedding_length': d_model,
    'block_count': first('num_hidden_layers', 'n_layer', 'n_layers'),
    'feed_forward_length': arrays['blk.0.ffn_up.weight'].shape[0],
    'attention.head_count': heads,
    'attention.head_count_kv': kv,
    'attention.key_length': first('head_dim'),
    'attention.layer_norm_rms_epsilon': first('rms_norm_eps'),
    'attention.layer_norm_epsilon': first('layer_norm_eps', 'layer_norm_epsilon'),
    'rope.freq_base': rope.get('rope_theta'),
    'attention.sliding_window': first('sliding_window'),
    'logit_scale': first('logit_scale'),
    'attention.clamp_kqv': first('clip_qkv'),
    'use_parallel_residual': config.get('use_parallel_residual'),
  }
  if 'partial_rotary_factor' in rope:
    found['rope.dimension_count'] = int(rope['partial_rotary_factor'] * d_model / heads)
  if family == 'mpt':
    found['attention.max_alibi_bias'] = 8.0
  return {key: value for key, value in found.items() if value is not None}


def _rope_freqs(config: dict) -> np.ndarray:
  """Return the divisors of frequencies that stand for Llama 3's scaling."""
  rope = config['rope_parameters']
  dim, length = config['head_dim'], rope['original_max_position_embeddings']
  low, high, factor = rope['low_freq_factor'], rope['high_freq_factor'], rope['factor']
  out = []
  for i in range(0, dim, 2):
    wave = 2 * np.pi * rope['rope_theta'] ** (i / dim)
    if wave < length / high:
      out.append(1)
    elif wave > length / low:
      out.append(factor)
    else:
      smooth = (length / wave - low) / (high - low)
      out.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(out, np.float32)
