"""Families with Llama's tensor names: Llama, Mistral, Qwen, Gemma, Command-R, OLMo, StableLM.

Each function reads a family's settings as its config.json has them, with the defaults of
transformers, and returns the model with the stored names of its tensors.
"""

from typing import Any

from t5x_inference_ext.checkpoints.families.family import (
  GATED,
  FamilyModel,
  head_sizes,
  rotary_fields,
  window_fields,
)
from t5x_inference_ext.checkpoints.families.settings import Settings
from t5x_inference_ext.config import ModelConfig

_ATTENTION, _MLP = 'model.layers.{}.self_attn.', 'model.layers.{}.mlp.'
_FIRST, _SECOND = 'model.layers.{}.input_layernorm', 'model.layers.{}.post_attention_layernorm'
_MODULES = {
  'embedding': 'model.embed_tokens',
  'final_norm': 'model.norm',
  'head': 'lm_head',
  'query': f'{_ATTENTION}q_proj',
  'key': f'{_ATTENTION}k_proj',
  'value': f'{_ATTENTION}v_proj',
  'attention_output': f'{_ATTENTION}o_proj',
  'query_norm': f'{_ATTENTION}q_norm',
  'key_norm': f'{_ATTENTION}k_norm',
  'gate': f'{_MLP}gate_proj',
  'linear': f'{_MLP}up_proj',
  'mlp_output': f'{_MLP}down_proj',
}
SERIAL_MODULES = {**_MODULES, 'attention_norm': _FIRST, 'mlp_norm': _SECOND}
_PARALLEL_MODULES = {**_MODULES, 'layer_norm': _FIRST}
# In Gemma 2 and 3, the second norm is after attention, not before the MLP.
_SANDWICH_MODULES = {
  **_MODULES,
  'attention_norm': _FIRST,
  'attention_post_norm': _SECOND,
  'mlp_norm': 'model.layers.{}.pre_feedforward_layernorm',
  'mlp_post_norm': 'model.layers.{}.post_feedforward_layernorm',
}
_AFTER_MODULES = {
  **_MODULES,
  'attention_post_norm': _SECOND,
  'mlp_post_norm': 'model.layers.{}.post_feedforward_layernorm',
}


def _fields(
  s: Settings, *, tied: bool, d_head: int | None = None, theta: float = 1e4, part: float = 1.0
) -> dict[str, Any]:
  """Return the ModelConfig fields common to the Llama-like families in this module.

  Args:
    s: The settings.
    tied: Default of tie_word_embeddings.
    d_head: Default of head_dim; None: hidden_size / heads.
    theta: Default base of rotary positions.
    part: Default fraction of a head's dimensions that is rotated.
  """
  d_model, heads = s.integer('hidden_size'), s.integer('num_attention_heads')
  sizes = head_sizes(s, d_model, heads, d_head)
  return {
    'num_layers': s.layers('num_hidden_layers'),
    'd_model': d_model,
    'd_ff': s.integer('intermediate_size'),
    'vocab_size': s.integer('vocab_size'),
    **sizes,
    'block': 'serial',
    'norm_scale': 'one',
    'tied_head': s.flag('tie_word_embeddings', tied),
    **rotary_fields(s, sizes['d_head'], theta=theta, part=part),
  }


def _rms(s: Settings) -> dict[str, Any]:
  return {'norm': 'rms', 'norm_epsilon': s.number('rms_norm_eps', default=1e-6)}


def _attention_bias(s: Settings, name: str = 'attention_bias') -> dict[str, Any]:
  biased = s.flag(name, False)
  return {'qkv_bias': biased, 'attention_output_bias': biased}


def llama(s: Settings) -> FamilyModel:
  """Return a Llama, SmolLM or other model of Llama's shape."""
  fields = {
    **_fields(s, tied=False),
    **_rms(s),
    **_attention_bias(s),
    'mlp': s.choice('hidden_act', GATED, 'silu'),
    'mlp_bias': s.flag('mlp_bias', False),
  }
  return FamilyModel(ModelConfig(**fields), SERIAL_MODULES)


def mistral(s: Settings) -> FamilyModel:
  """Return a Mistral."""
  fields = _fields(s, tied=False)
  fields |= {**_rms(s), 'mlp': s.choice('hidden_act', GATED, 'silu')}
  # An explicit null, as in Mistral 0.2 and later, means no window. A missing setting does not.
  window = s.integer('sliding_window', default=4096) if not s.is_null('sliding_window') else None
  fields |= window_fields(s, fields['num_layers'], window, 0)
  return FamilyModel(ModelConfig(**fields), SERIAL_MODULES)


def qwen2(s: Settings) -> FamilyModel:
  """Return a Qwen 2 or 2.5."""
  fields = {**_fields(s, tied=False), **_rms(s), 'qkv_bias': True}
  return _qwen(s, fields)


def qwen3(s: Settings) -> FamilyModel:
  """Return a Qwen 3."""
  fields = {**_fields(s, tied=False, d_head=128), **_rms(s), **_attention_bias(s), 'qk_norm': 'rms'}
  return _qwen(s, fields)


def _qwen(s: Settings, fields: dict[str, Any]) -> FamilyModel:
  layers = fields['num_layers']
  fields['mlp'] = s.choice('hidden_act', GATED, 'silu')
  if s.flag('use_sliding_window', False):
    window, full = s.integer('sliding_window', default=4096), s.whole('max_window_layers', 28)
    kinds = ['sliding_attention' if i >= full else 'full_attention' for i in range(layers)]
    kinds = s.value('layer_types', default=kinds)
    fields |= window_fields(s.changed(layer_types=kinds), layers, window, 0)
  else:
    s.value('sliding_window', 'layer_types', default=None)  # no effect in this case
  return FamilyModel(ModelConfig(**fields), SERIAL_MODULES)


def gemma(s: Settings) -> FamilyModel:
  """Return a Gemma 1. Its default activation is GELU's tanh approximation."""
  fields = {**_gemma_fields(s), **_attention_bias(s)}
  return _gemma_model(fields, SERIAL_MODULES)


def gemma2(s: Settings) -> FamilyModel:
  """Return a Gemma 2."""
  fields = {**_gemma_fields(s), **_attention_bias(s), 'norm_position': 'both'}
  fields |= window_fields(s, fields['num_layers'], s.integer('sliding_window', default=4096), 2)
  fields['attention_soft_cap'] = s.cap('attn_logit_softcapping', 50.0)
  fields['logit_soft_cap'] = s.cap('final_logit_softcapping', 30.0)
  scale = s.number('query_pre_attn_scalar', default=256) ** -0.5
  return _gemma_model(fields, _SANDWICH_MODULES, scale)


def gemma3(s: Settings) -> FamilyModel:
  """Return a text-only Gemma 3. Its local layers have another rotary base, without scaling."""
  kinds = s.group('rope_parameters')
  local = kinds.group('sliding_attention') if kinds else None
  if kinds is not None:
    s = s.changed(rope_parameters=kinds.value('full_attention', default={}))
  fields = {**_gemma_fields(s, theta=1e6), **_attention_bias(s)}
  local_theta = s.number('rope_local_base_freq', default=1e4)
  if local is not None:
    local.only('rope_type', 'default')
    local_theta = local.number('rope_theta', default=local_theta)
  every = s.integer('sliding_window_pattern', '_sliding_window_pattern', default=6)
  fields |= {
    **window_fields(s, fields['num_layers'], s.integer('sliding_window', default=4096), every),
    'norm_position': 'both',
    'qk_norm': 'rms',
    'attention_soft_cap': s.cap('attn_logit_softcapping', None),
    'logit_soft_cap': s.cap('final_logit_softcapping', None),
  }
  if 'window' in fields:
    fields['local_rope_max_timescale'] = local_theta
  scale = s.number('query_pre_attn_scalar', default=256) ** -0.5
  return _gemma_model(fields, _SANDWICH_MODULES, scale)


def _gemma_fields(s: Settings, theta: float = 1e4) -> dict[str, Any]:
  s.value('hidden_act', default=None)  # transformers reads only hidden_activation
  s.only('use_bidirectional_attention', False)
  activation = s.choice('hidden_activation', GATED, 'gelu_pytorch_tanh')
  return {**_fields(s, tied=True, d_head=256, theta=theta), **_rms(s), 'mlp': activation}


def _gemma_model(
  fields: dict[str, Any], modules: dict[str, str], scale: float | None = None
) -> FamilyModel:
  return FamilyModel(
    ModelConfig(**fields),
    modules,
    norm_offset=1.0,
    # transformers rounds this scale to the dtype that it computes in, here float32.
    embedding_scale=fields['d_model'] ** 0.5,
    attention_scale=scale,
  )


def cohere(s: Settings) -> FamilyModel:
  """Return a Command-R or R+."""
  fields = {**_cohere_fields(s), 'qk_norm': 'layer' if s.flag('use_qk_norm', False) else 'none'}
  return _cohere_model(s, fields)


def cohere2(s: Settings) -> FamilyModel:
  """Return a Command-R7B, whose layers without a window have no positions."""
  fields = _cohere_fields(s)
  every = s.integer('sliding_window_pattern', '_sliding_window_pattern', default=4)
  window = window_fields(s, fields['num_layers'], s.integer('sliding_window', default=4096), every)
  if window:
    fields |= {**window, 'global_rotary': False}
  return _cohere_model(s, fields)


def _cohere_fields(s: Settings) -> dict[str, Any]:
  return {
    **_fields(s, tied=True),
    **_attention_bias(s),
    'block': 'parallel',
    'norm': 'layer',
    'norm_epsilon': s.number('layer_norm_eps', default=1e-5),
    'mlp': s.choice('hidden_act', GATED, 'silu'),
  }


def _cohere_model(s: Settings, fields: dict[str, Any]) -> FamilyModel:
  biases = 'layer_norm_bias', 'final_norm_bias', 'query_norm_bias', 'key_norm_bias'
  return FamilyModel(
    ModelConfig(**fields),
    _PARALLEL_MODULES,
    interleaved=True,
    absent=frozenset(biases),
    logit_scale=s.number('logit_scale', default=0.0625),
  )


def olmo(s: Settings) -> FamilyModel:
  """Return an OLMo 1: layer norms without parameters."""
  fields = {
    **_fields(s, tied=False),
    **_attention_bias(s),
    'norm': 'layer',
    'norm_epsilon': 1e-5,
    'mlp': s.choice('hidden_act', GATED, 'silu'),
    'qkv_clip': s.cap('clip_qkv', None),
  }
  norms = 'attention_norm', 'mlp_norm', 'final_norm'
  absent = frozenset((*norms, *(f'{name}_bias' for name in norms)))
  return FamilyModel(ModelConfig(**fields), SERIAL_MODULES, absent=absent)


def olmo2(s: Settings) -> FamilyModel:
  """Return an OLMo 2: norms after attention and MLP; norms over all query or all key heads."""
  fields = {
    **_fields(s, tied=False),
    **_attention_bias(s),
    **_rms(s),
    'norm_position': 'after',
    'qk_norm': 'rms_all',
    'mlp': s.choice('hidden_act', GATED, 'silu'),
  }
  return FamilyModel(ModelConfig(**fields), _AFTER_MODULES)


def stablelm(s: Settings) -> FamilyModel:
  """Return a StableLM 2; if queries and keys have norms, each head has its own."""
  parallel = s.flag('use_parallel_residual', False)
  fields = {
    **_fields(s, tied=False, part=0.25),
    'block': 'parallel' if parallel else 'serial',
    'norm': 'layer',
    'norm_epsilon': s.number('layer_norm_eps', default=1e-5),
    'mlp': s.choice('hidden_act', GATED, 'silu'),
    'qkv_bias': s.flag('use_qkv_bias', False),
    'qk_norm': 'layer' if s.flag('qk_layernorm', False) else 'none',
  }
  modules = {
    **(_PARALLEL_MODULES if parallel else SERIAL_MODULES),
    'query_norm': f'{_ATTENTION}q_layernorm.norms.[]',
    'key_norm': f'{_ATTENTION}k_layernorm.norms.[]',
  }
  absent = frozenset(('query_norm_bias', 'key_norm_bias'))
  return FamilyModel(ModelConfig(**fields), modules, absent=absent)
