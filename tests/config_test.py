"""Model shapes: the presets are the paper's models, and what no model can be is refused."""

import dataclasses
import json

import pytest

from t5x_inference_ext import config, params
from t5x_inference_ext.config import ModelConfig

PALM = dict(num_layers=2, d_model=8, d_ff=24, num_heads=4, d_head=4, vocab_size=12)


@pytest.mark.parametrize(
  'name,count',
  [
    ('palm_8b', 8.63e9),
    ('palm_62b', 62.50e9),
    ('palm_540b', 540.36e9),
    ('megatron_530b', 529.5e9),
    ('llama3_8b', 8.03e9),
    ('llama3_70b', 70.55e9),
    ('falcon_40b', 41.84e9 - 65024 * 8192),
    ('falcon_180b', 179.52e9 - 65024 * 14848),
    ('command_r', 34.98e9),
    ('bloom_176b', 176.25e9),
    ('gpt3_175b', 174.6e9),
    ('gemma_7b', 8.54e9),
  ],
)
def test_presets_have_the_published_parameter_counts(name, count):
  """PaLM's and GPT-3's tables, the Megatron-Turing model and public models' files, to 0.1%.

  Falcon's files hold the head besides the embedding that it is tied to.
  """
  assert config.preset(name).num_params == pytest.approx(count, rel=1e-3)


@pytest.mark.parametrize(
  'changes',
  [
    {},
    dict(num_kv_heads=2),
    dict(block='serial', mlp='gelu', norm='layer', num_kv_heads=4),
    dict(norm='layer'),
    dict(mlp='gelu'),
    dict(block='serial'),
    dict(mlp='relu', mlp_bias=True),
    dict(tied_head=False, head_bias=True, mlp='geglu', mlp_bias=True),
    dict(qkv_bias=True, attention_output_bias=True, num_kv_heads=2),
    dict(parallel_norms=2, norm='layer'),
    dict(block='serial', norm_position='after', qk_norm='rms_all', num_kv_heads=2),
    dict(block='serial', norm_position='both', norm='layer', qk_norm='layer'),
    dict(positions='learned', num_positions=9, embedding_norm=True),
    dict(positions='relative', relative_buckets=8),
  ],
  ids=str,
)
def test_parameters_are_those_of_the_tensors(changes):
  model = ModelConfig(**{**PALM, **changes})
  count = 0
  for p in params.parameters(model).values():
    size = 1
    for n in p.shape:
      size *= n
    count += size
  assert model.num_params == count


@pytest.mark.parametrize(
  'changes,scales',
  [
    ({}, {'gate_scale', 'linear_scale', 'output_scale'}),
    (dict(mlp='gelu'), {'linear_scale', 'output_scale'}),
    (
      dict(block='serial'),
      {'gate_scale', 'linear_scale', 'attention_output_scale', 'mlp_output_scale'},
    ),
  ],
  ids=['parallel', 'gelu', 'serial'],
)
def test_an_int8_model_has_a_scale_for_every_sum(changes, scales):
  """One for each addition to the residual stream."""
  assert set(params.scales(ModelConfig(**{**PALM, **changes}))) == {
    'query_scale',
    'key_scale',
    'value_scale',
    *scales,
  }


@pytest.mark.parametrize('name', sorted(config.PRESETS))
def test_dict_and_back(name):
  model = config.preset(name)
  assert ModelConfig.from_dict(model.to_dict()) == model


def test_a_dict_from_before_there_were_other_models_is_palm_style():
  fields = {
    k: v for k, v in ModelConfig(**PALM).to_dict().items() if k not in ('block', 'mlp', 'norm')
  }
  assert ModelConfig.from_dict(fields) == ModelConfig(
    **PALM, block='parallel', mlp='swiglu', norm='rms'
  )


def test_features_are_recorded_only_where_they_are_not_palm_s():
  """So versions without features read the checkpoints of models without features."""
  assert set(ModelConfig(**PALM).to_dict()) == {
    f.name for f in dataclasses.fields(ModelConfig)[:13]
  }
  model = ModelConfig(**PALM, layer_pattern=('local', 'global'), window=3, tied_head=False)
  fields = json.loads(json.dumps(model.to_dict()))
  assert fields.items() >= {'window': 3, 'tied_head': False}.items()
  assert fields['layer_pattern'] == ['local', 'global'] and 'head_bias' not in fields
  assert ModelConfig.from_dict(fields) == model
  assert model.local_layers == (True, False) and 'window 3' in str(model)


def test_unknown_fields_are_of_a_newer_version():
  with pytest.raises(ValueError, match='num_experts.*newer version'):
    ModelConfig.from_dict({**PALM, 'num_experts': 2})


@pytest.mark.parametrize(
  'changes,words',
  [
    (dict(num_layers=0), 'num_layers.*above 0'),
    (dict(d_ff=2.5), 'd_ff.*2.5'),
    (dict(d_head=5), 'even d_head'),
    (dict(num_kv_heads=3), 'num_kv_heads=3 must divide num_heads=4'),
    (dict(block='both'), "block.*'both'"),
    (dict(mlp='moe'), "mlp.*'moe'"),
    (dict(norm='batch'), "norm.*'batch'"),
    (dict(norm_scale='two'), "norm_scale.*'two'"),
    (dict(parallel_norms=3), 'parallel_norms.*3'),
    (dict(parallel_norms=True), 'parallel_norms.*True'),
    (dict(parallel_norms=2, block='serial'), "parallel_norms=2 needs block='parallel'"),
    (dict(norm_position='after'), "norm_position='after' needs block='serial'"),
    (dict(qk_norm='batch'), "qk_norm.*'batch'"),
    (dict(qkv_clip=0.0), 'qkv_clip.*above 0'),
    (dict(logit_soft_cap=float('inf')), 'logit_soft_cap.*above 0'),
    (dict(norm_epsilon='1e-6'), 'norm_epsilon.*above 0'),
    (dict(tied_head=1), 'tied_head.*True or False'),
    (dict(rotary_dims=3), 'even rotary_dims.*3'),
    (dict(rotary_dims=6), 'at most d_head=4, got 6'),
    (dict(positions='learned'), 'num_positions.*need'),
    (dict(num_positions=8), "num_positions.*positions='rotary'"),
    (dict(positions='alibi', rotary_dims=2), "rotary_dims is for positions='rotary'"),
    (dict(positions='relative', relative_max_distance=16), 'relative_max_distance=16'),
    (dict(layer_pattern=('local',)), 'window.*need'),
    (dict(window=4), 'window is for local layers'),
    (dict(layer_pattern=()), 'layer_pattern'),
    (dict(layer_pattern=('local', 'glocal')), 'layer_pattern.*glocal'),
    (dict(rope_scaling='yarn'), "rope_scaling.*'yarn'"),
    (dict(rope_scaling='llama3', rope_low_factor=4.0), 'rope_low_factor=4.0 must be below'),
  ],
)
def test_what_no_model_can_be(changes, words):
  with pytest.raises(ValueError, match=words):
    ModelConfig(**{**PALM, **changes})


def test_unknown_preset():
  with pytest.raises(ValueError, match='palm_9b.*known: bloom_176b, .*palm_540b'):
    config.preset('palm_9b')
  assert config.preset('palm_8b', num_layers=1) == dataclasses.replace(
    config.preset('palm_8b'), num_layers=1
  )


def test_printed_as_what_it_is():
  text = str(config.preset('megatron_530b'))
  for words in (
    '105 layers',
    '128 heads x 160',
    '128 kv head',
    'serial block',
    'gelu',
    'layer norm',
  ):
    assert words in text
