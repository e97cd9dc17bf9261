"""Families with ALiBi or with names like BLOOM's: BLOOM, MPT, Falcon; and OPT.

Each function reads a family's settings as its config.json has them, with the defaults of
transformers, and returns the model with the stored names of its tensors.
"""

from t5x_inference_ext.checkpoints.families.family import (
  PLAIN,
  FamilyModel,
  even_sizes,
  rotary_fields,
)
from t5x_inference_ext.checkpoints.families.gpt import BIASES, layer_norm, learned, one_module
from t5x_inference_ext.checkpoints.families.settings import Settings
from t5x_inference_ext.config import ModelConfig

_H = 'transformer.h.{}.'
_OPT = 'model.decoder.layers.{}.'
_OPT_MODULES = {
  'embedding': 'model.decoder.embed_tokens',
  'position_embedding': 'model.decoder.embed_positions',
  'final_norm': 'model.decoder.final_layer_norm',
  'head': 'lm_head',
  'attention_norm': f'{_OPT}self_attn_layer_norm',
  'mlp_norm': f'{_OPT}final_layer_norm',
  'query': f'{_OPT}self_attn.q_proj',
  'key': f'{_OPT}self_attn.k_proj',
  'value': f'{_OPT}self_attn.v_proj',
  'attention_output': f'{_OPT}self_attn.out_proj',
  'linear': f'{_OPT}fc1',
  'mlp_output': f'{_OPT}fc2',
}
# BLOOM's names, which Falcon shares.
_BLOOM_MODULES = {
  'embedding': 'transformer.word_embeddings',
  'embedding_norm': 'transformer.word_embeddings_layernorm',
  'final_norm': 'transformer.ln_f',
  'head': 'lm_head',
  'layer_norm': f'{_H}input_layernorm',
  'attention_norm': f'{_H}input_layernorm',
  'mlp_norm': f'{_H}post_attention_layernorm',
  **one_module(f'{_H}self_attention.query_key_value'),
  'attention_output': f'{_H}self_attention.dense',
  'linear': f'{_H}mlp.dense_h_to_4h',
  'mlp_output': f'{_H}mlp.dense_4h_to_h',
}
# With eager attention, transformers 5.24 adds ALiBi twice: to the scores and to the mask.
_FALCON_ALIBI = (
  "assumed: ALiBi is added twice, as transformers' eager attention does "
  '(alibi_slopes=falcon_eager; alibi_slopes=falcon adds it once)'
)
_MPT = 'transformer.blocks.{}.'
_MPT_MODULES = {
  'embedding': 'transformer.wte',
  'final_norm': 'transformer.norm_f',
  'head': 'lm_head',
  'attention_norm': f'{_MPT}norm_1',
  'mlp_norm': f'{_MPT}norm_2',
  **one_module(f'{_MPT}attn.Wqkv'),
  'attention_output': f'{_MPT}attn.out_proj',
  'linear': f'{_MPT}ffn.up_proj',
  'mlp_output': f'{_MPT}ffn.down_proj',
}


def opt(s: Settings) -> FamilyModel:
  """Return an OPT with norms before attention and MLP: every OPT except OPT-350M."""
  s.only('do_layer_norm_before', True)
  s.only('_remove_final_layer_norm', False)
  s.only('layer_norm_elementwise_affine', True)
  d_model, heads = s.integer('hidden_size'), s.integer('num_attention_heads')
  s.only('word_embed_proj_dim', d_model)
  biased = s.flag('enable_bias', True)
  d_ff, layers = s.integer('ffn_dim'), ('num_hidden_layers',)
  fields = {
    **even_sizes(s, d_model, heads, d_ff=d_ff, layers=layers, tied=True),
    'norm': 'layer',
    'norm_scale': 'one',
    'norm_epsilon': 1e-5,
    **learned(s),
    **dict.fromkeys(BIASES, biased),
    'block': 'serial',
    'mlp': s.choice('activation_function', PLAIN, 'relu'),
  }
  return FamilyModel(ModelConfig(**fields), _OPT_MODULES, skipped_positions=2)


def bloom(s: Settings) -> FamilyModel:
  """Return a BLOOM."""
  s.only('apply_residual_connection_post_layernorm', False)
  d_model = s.integer('hidden_size', 'n_embed')
  heads = s.integer('n_head', 'num_attention_heads')
  layers = 'n_layer', 'num_hidden_layers'
  fields = {
    **even_sizes(s, d_model, heads, d_ff=4 * d_model, layers=layers, tied=True),
    **layer_norm(s, 'layer_norm_epsilon'),
    **BIASES,
    'block': 'serial',
    'mlp': 'gelu',
    'positions': 'alibi',
    'embedding_norm': True,
  }
  return FamilyModel(ModelConfig(**fields), _BLOOM_MODULES, fused='grouped')


def mpt(s: Settings) -> FamilyModel:
  """Return an MPT."""
  attention = s.group('attn_config') or Settings({}, f'attn_config in {s.where}')
  attention.only('attn_type', 'multihead_attention')
  for name in ('alibi', 'prefix_lm', 'qk_ln', 'attn_uses_sequence_id'):
    attention.only(name, name == 'alibi')
  s.only('no_bias', True)
  s.only('logit_scale', None)
  s.only('norm_type', 'low_precision_layernorm', 'layernorm')
  s.only('embedding_fraction', 1.0)
  s.value('expansion_ratio', 'learned_pos_emb', 'max_seq_len', default=None)  # transformers ignores
  d_model, heads = s.integer('d_model'), s.integer('n_heads')
  d_ff = 4 * d_model  # transformers ignores expansion_ratio
  fields = {
    **even_sizes(s, d_model, heads, d_ff=d_ff, layers=('n_layers',), tied=True),
    **layer_norm(s, 'layer_norm_epsilon'),
    'block': 'serial',
    'mlp': 'gelu_erf',
    'positions': 'alibi',
    'alibi_max': attention.number('alibi_bias_max', default=8.0),
    'qkv_clip': attention.cap('clip_qkv', None),
  }
  return FamilyModel(
    ModelConfig(**fields),
    _MPT_MODULES,
    fused='stacked',
    absent=frozenset(('attention_norm_bias', 'mlp_norm_bias', 'final_norm_bias')),
    attention_scale=attention.cap('softmax_scale', None),
  )


def falcon(s: Settings) -> FamilyModel:
  """Return a Falcon: 7B (multiquery), 40B and 180B (grouped, two norms), or RW (serial)."""
  s.only('apply_residual_connection_post_layernorm', False)
  grouped, parallel = s.flag('new_decoder_architecture', False), s.flag('parallel_attn', True)
  multiquery, alibi = s.flag('multi_query', True), s.flag('alibi', False)
  d_model = s.integer('hidden_size')
  heads = s.integer('num_attention_heads', 'n_head')
  kv_heads = s.integer('num_kv_heads', default=heads)
  two_norms = grouped and s.integer('num_ln_in_parallel_attn', default=2) == 2
  biased, layers = s.flag('bias', False), ('num_hidden_layers', 'n_layer')
  d_ff = s.integer('ffn_hidden_size', default=4 * d_model)
  sizes = even_sizes(s, d_model, heads, d_ff=d_ff, layers=layers, tied=True)
  fields = {
    **sizes,
    'num_kv_heads': kv_heads if grouped else 1 if multiquery else heads,
    **layer_norm(s, 'layer_norm_epsilon'),
    **dict.fromkeys(BIASES, biased),
    'block': 'parallel' if parallel or grouped else 'serial',
    'parallel_norms': 2 if two_norms else 1,
    'mlp': s.choice('activation', PLAIN, 'gelu'),
  }
  positions = rotary_fields(s, sizes['d_head'])
  fields |= {'positions': 'alibi', 'alibi_slopes': 'falcon_eager'} if alibi else positions
  modules = dict(_BLOOM_MODULES)
  if two_norms:
    modules |= {'attention_norm': f'{_H}ln_attn', 'mlp_norm': f'{_H}ln_mlp'}
  fused = 'grouped' if grouped or not multiquery else 'stacked'
  notes = (_FALCON_ALIBI,) if alibi else ()
  return FamilyModel(ModelConfig(**fields), modules, fused=fused, notes=notes)
