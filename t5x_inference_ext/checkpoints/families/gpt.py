"""Families that share no tensor names: GPT-2, StarCoder, GPT-J, CodeGen, GPT-NeoX, Phi.

Each function reads a family's settings as its config.json has them, with the defaults of
transformers, and returns the model with the stored names of its tensors.
"""

from typing import Any

from t5x_inference_ext.checkpoints.families.family import (
  PLAIN,
  FamilyModel,
  even_sizes,
  head_sizes,
  rotary_fields,
)
from t5x_inference_ext.checkpoints.families.settings import Settings
from t5x_inference_ext.config import ModelConfig

# All matrices have biases.
BIASES = {'qkv_bias': True, 'attention_output_bias': True, 'mlp_bias': True}
_H = 'transformer.h.{}.'


def one_module(module: str) -> dict[str, str]:
  """Return the entries of FamilyModel.modules for queries, keys and values in one module."""
  return dict.fromkeys(('query', 'key', 'value'), module)


_OUTSIDE = {'embedding': 'transformer.wte', 'final_norm': 'transformer.ln_f', 'head': 'lm_head'}
_GPT2_MODULES = {
  **_OUTSIDE,
  'position_embedding': 'transformer.wpe',
  'attention_norm': f'{_H}ln_1',
  'mlp_norm': f'{_H}ln_2',
  **one_module(f'{_H}attn.c_attn'),
  'attention_output': f'{_H}attn.c_proj',
  'linear': f'{_H}mlp.c_fc',
  'mlp_output': f'{_H}mlp.c_proj',
}
_GPTJ_MODULES = {
  **_OUTSIDE,
  'layer_norm': f'{_H}ln_1',
  'query': f'{_H}attn.q_proj',
  'key': f'{_H}attn.k_proj',
  'value': f'{_H}attn.v_proj',
  'attention_output': f'{_H}attn.out_proj',
  'linear': f'{_H}mlp.fc_in',
  'mlp_output': f'{_H}mlp.fc_out',
}
_NEOX = 'gpt_neox.layers.{}.'
_NEOX_MODULES = {
  'embedding': 'gpt_neox.embed_in',
  'final_norm': 'gpt_neox.final_layer_norm',
  'head': 'embed_out',
  'attention_norm': f'{_NEOX}input_layernorm',
  'mlp_norm': f'{_NEOX}post_attention_layernorm',
  **one_module(f'{_NEOX}attention.query_key_value'),
  'attention_output': f'{_NEOX}attention.dense',
  'linear': f'{_NEOX}mlp.dense_h_to_4h',
  'mlp_output': f'{_NEOX}mlp.dense_4h_to_h',
}
_PHI = 'model.layers.{}.'
_PHI_MODULES = {
  'embedding': 'model.embed_tokens',
  'final_norm': 'model.final_layernorm',
  'head': 'lm_head',
  'layer_norm': f'{_PHI}input_layernorm',
  'query': f'{_PHI}self_attn.q_proj',
  'key': f'{_PHI}self_attn.k_proj',
  'value': f'{_PHI}self_attn.v_proj',
  'query_norm': f'{_PHI}self_attn.q_layernorm',
  'key_norm': f'{_PHI}self_attn.k_layernorm',
  'attention_output': f'{_PHI}self_attn.dense',
  'linear': f'{_PHI}mlp.fc1',
  'mlp_output': f'{_PHI}mlp.fc2',
}


def layer_norm(s: Settings, *names: str) -> dict[str, Any]:
  """Return the ModelConfig fields of layer norm. `names`: settings that may hold its epsilon."""
  return {'norm': 'layer', 'norm_scale': 'one', 'norm_epsilon': s.number(*names, default=1e-5)}


def _gpt_sizes(s: Settings, tied: bool) -> dict[str, Any]:
  """Return the sizes, from settings with GPT-2's names, and tied_head, whose default is `tied`."""
  d_model, heads = s.integer('n_embd', 'hidden_size'), s.integer('n_head', 'num_attention_heads')
  d_ff, layers = s.integer('n_inner', default=4 * d_model), ('n_layer', 'num_hidden_layers')
  return even_sizes(s, d_model, heads, d_ff=d_ff, layers=layers, tied=tied)


def learned(s: Settings) -> dict[str, Any]:
  """Return the ModelConfig fields of learned positions."""
  count = s.integer('n_positions', 'max_position_embeddings', default=1024)
  return {'positions': 'learned', 'num_positions': count}


def _unscaled(s: Settings) -> float | None:
  """Return the scale of attention logits: 1 if GPT-2's settings turn scaling off, else None."""
  return None if s.flag('scale_attn_weights', True) else 1.0


def gpt2(s: Settings) -> FamilyModel:
  """Return a GPT-2. Its matrices are stored [in, out]."""
  s.only('scale_attn_by_inverse_layer_idx', False)
  fields = {
    **_gpt_sizes(s, tied=True),
    **layer_norm(s, 'layer_norm_epsilon'),
    **learned(s),
    **BIASES,
    'block': 'serial',
    'mlp': s.choice('activation_function', PLAIN, 'gelu_new'),
  }
  return FamilyModel(
    ModelConfig(**fields),
    _GPT2_MODULES,
    fused='stacked',
    transposed=False,
    attention_scale=_unscaled(s),
  )


def gpt_bigcode(s: Settings) -> FamilyModel:
  """Return a SantaCoder or StarCoder."""
  multiquery = s.flag('multi_query', True)
  s.value('num_key_value_heads', default=None)  # redundant: multi_query states it
  fields = {
    **_gpt_sizes(s, tied=True),
    **layer_norm(s, 'layer_norm_epsilon'),
    **learned(s),
    **BIASES,
    'block': 'serial',
    'mlp': s.choice('activation_function', PLAIN, 'gelu_pytorch_tanh'),
  }
  if multiquery:
    fields['num_kv_heads'] = 1
  return FamilyModel(
    ModelConfig(**fields),
    _GPT2_MODULES,
    fused='stacked' if multiquery else 'grouped',
    attention_scale=_unscaled(s),
  )


def gptj(s: Settings) -> FamilyModel:
  """Return a GPT-J."""
  return FamilyModel(ModelConfig(**_gptj_fields(s)), _GPTJ_MODULES, interleaved=True)


def codegen(s: Settings) -> FamilyModel:
  """Return a CodeGen: a GPT-J with queries, values and keys in one matrix."""
  modules = {**_GPTJ_MODULES, **one_module(f'{_H}attn.qkv_proj')}
  fields = _gptj_fields(s)
  if fields['num_heads'] % 4:
    raise s.error('n_head', fields['num_heads'], 'it must be a multiple of 4')
  return FamilyModel(ModelConfig(**fields), modules, fused='codegen', interleaved=True)


def _gptj_fields(s: Settings) -> dict[str, Any]:
  sizes = _gpt_sizes(s, tied=False)
  rotated = s.integer('rotary_dim', default=64)
  return {
    **sizes,
    **layer_norm(s, 'layer_norm_epsilon'),
    'mlp': s.choice('activation_function', PLAIN, 'gelu_new'),
    'mlp_bias': True,
    'head_bias': True,
    'rotary_dims': None if rotated == sizes['d_head'] or s.is_null('rotary_dim') else rotated,
  }


def gpt_neox(s: Settings) -> FamilyModel:
  """Return a GPT-NeoX or Pythia."""
  d_model, heads = s.integer('hidden_size'), s.integer('num_attention_heads')
  parallel, biased = s.flag('use_parallel_residual', True), s.flag('attention_bias', True)
  d_ff, layers = s.integer('intermediate_size'), ('num_hidden_layers',)
  sizes = even_sizes(s, d_model, heads, d_ff=d_ff, layers=layers, tied=False)
  fields = {
    **sizes,
    **layer_norm(s, 'layer_norm_eps'),
    **rotary_fields(s, sizes['d_head'], part=0.25),
    'block': 'parallel' if parallel else 'serial',
    'parallel_norms': 2 if parallel else 1,
    'mlp': s.choice('hidden_act', PLAIN, 'gelu'),
    'qkv_bias': biased,
    'attention_output_bias': biased,
    'mlp_bias': True,
  }
  return FamilyModel(ModelConfig(**fields), _NEOX_MODULES, fused='grouped')


def phi(s: Settings) -> FamilyModel:
  """Return a Phi-1, 1.5 or 2."""
  d_model = s.integer('hidden_size')
  sizes = head_sizes(s, d_model, s.integer('num_attention_heads'))
  fields = {
    'num_layers': s.layers('num_hidden_layers'),
    'd_model': d_model,
    'd_ff': s.integer('intermediate_size', default=4 * d_model),
    'vocab_size': s.integer('vocab_size'),
    **sizes,
    **layer_norm(s, 'layer_norm_eps'),
    **rotary_fields(s, sizes['d_head'], part=0.5),
    **BIASES,
    'mlp': s.choice('hidden_act', PLAIN, 'gelu_new'),
    'qk_norm': 'layer' if s.flag('qk_layernorm', False) else 'none',
    'tied_head': s.flag('tie_word_embeddings', False),
    'head_bias': True,
  }
  return FamilyModel(ModelConfig(**fields), _PHI_MODULES)
