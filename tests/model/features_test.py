"""Features of public decoder families in every layout, against the reference, which has each."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from t5x_inference_ext import params
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.features import CHOICES
from tests import memory, reference
from tests.model.layouts_test import LAYOUTS

_SIZES = dict(num_layers=2, d_model=32, d_ff=64, d_head=8, vocab_size=101)
# Each has many features, not one family's: a feature that works in one of them works.
MODELS = {
  # 6 heads over 4 or 8 shards are padded.
  'neox': ModelConfig(
    num_heads=6,
    num_kv_heads=6,
    mlp='gelu_erf',
    norm='layer',
    norm_scale='one',
    parallel_norms=2,
    tied_head=False,
    head_bias=True,
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    rotary_dims=4,
    **_SIZES,
  ),
  # 2 groups of 4 queries are shared by 4 shards, or by 8.
  'gemma': ModelConfig(
    num_heads=8,
    num_kv_heads=2,
    block='serial',
    mlp='geglu',
    mlp_bias=True,
    norm_position='both',
    qk_norm='rms',
    qkv_bias=True,
    rope_scaling='linear',
    rope_factor=3.0,
    logit_soft_cap=2.0,
    **_SIZES,
  ),
  # Keys of all heads are normed together, and some heads have copies on several shards.
  'olmo': ModelConfig(
    num_heads=6,
    num_kv_heads=3,
    block='serial',
    norm_scale='one',
    norm_position='after',
    qk_norm='rms_all',
    qkv_clip=1.0,
    tied_head=False,
    attention_output_bias=True,
    rope_scaling='llama3',
    rope_factor=8.0,
    rope_low_factor=1.5,
    rope_high_factor=3.0,
    rope_original_length=32,
    logit_soft_cap=4.0,
    **_SIZES,
  ),
  'command': ModelConfig(
    num_heads=6,
    parallel_norms=2,
    mlp_bias=True,
    qk_norm='layer',
    qkv_bias=True,
    rotary_dims=6,
    **_SIZES,
  ),
  'bloom': ModelConfig(
    num_heads=6,
    num_kv_heads=6,
    block='serial',
    mlp='gelu',
    norm='layer',
    norm_scale='one',
    positions='alibi',
    alibi_max=6.0,
    embedding_norm=True,
    tied_head=False,
    head_bias=True,
    **_SIZES,
  ),
  'mpt': ModelConfig(
    num_heads=6,
    positions='alibi',
    alibi_slopes='falcon',
    alibi_max=5.0,
    layer_pattern=('local', 'global'),
    window=3,
    attention_soft_cap=1.0,
    qkv_clip=1.5,
    **_SIZES,
  ),
  'falcon-rw': ModelConfig(
    num_heads=6,
    num_kv_heads=3,
    block='serial',
    mlp='relu_squared',
    norm='layer',
    positions='alibi',
    alibi_slopes='falcon_eager',
    embedding_norm=True,
    attention_output_bias=True,
    **_SIZES,
  ),
  't5': ModelConfig(
    num_heads=3,
    num_kv_heads=3,
    block='serial',
    mlp='geglu_erf',
    norm_scale='one',
    tied_head=False,
    head_bias=True,
    attention_output_bias=True,
    embedding_norm=True,
    positions='relative',
    relative_buckets=5,
    relative_max_distance=6,
    logit_soft_cap=3.0,
    **_SIZES,
  ),
  't5-parallel': ModelConfig(
    num_heads=8,
    num_kv_heads=2,
    mlp='bilinear',
    positions='relative',
    relative_buckets=4,
    relative_max_distance=4,
    attention_soft_cap=2.0,
    layer_pattern=('local',),
    window=4,
    **_SIZES,
  ),
  'gpt': ModelConfig(
    num_heads=8,
    num_kv_heads=2,
    block='serial',
    mlp='relu',
    positions='learned',
    num_positions=35,
    qk_norm='layer_all',
    **_SIZES,
  ),
  'gpt-parallel': ModelConfig(
    num_heads=6, mlp='reglu', positions='learned', num_positions=17, parallel_norms=2, **_SIZES
  ),
  'gemma3': ModelConfig(
    num_heads=6,
    num_kv_heads=2,
    block='serial',
    mlp='glu',
    norm_position='both',
    layer_pattern=('local', 'global', 'local'),
    window=3,
    rope_scaling='linear',
    rope_factor=4.0,
    local_rope_max_timescale=30.0,
    **{**_SIZES, 'num_layers': 3},
  ),
  'r7b': ModelConfig(
    num_heads=6,
    num_kv_heads=6,
    layer_pattern=('local', 'global'),
    window=3,
    global_rotary=False,
    local_rope_max_timescale=50.0,
    xpos_scale_base=4.0,
    **_SIZES,
  ),
  'xpos': ModelConfig(
    num_heads=6,
    block='serial',
    mlp='swish',
    layer_pattern=('global', 'local'),
    window=4,
    global_rotary=False,
    xpos_scale_base=8.0,
    rope_scaling='llama3',
    rope_factor=8.0,
    rope_low_factor=1.5,
    rope_high_factor=3.0,
    rope_original_length=32,
    **_SIZES,
  ),
  'none': ModelConfig(num_heads=3, num_kv_heads=3, positions='none', **_SIZES),
  # 6 heads over 4 shards are 3 over each 2, in whole tiles.
  'cut': ModelConfig(
    num_heads=6, qkv_bias=True, qk_norm='layer_all', mlp_bias=True, **{**_SIZES, 'd_head': 256}
  ),
}
STEPS = 3
ROWS = {'ws_1d': (4, 1), 'ws_2d': (1, 8), 'wg_x': (8, 2), 'wg_xy': (4, 8), 'wg_xyz': (8, 16)}


@dataclasses.dataclass(frozen=True)
class Case:
  """One model in one layout on 2x2x2: a prefill, and STEPS - 1 decode steps."""

  model: str
  prefill: str
  decode: str
  rows: int
  prompt_size: int = 4
  stacked: bool = True
  weights: str = 'float32'

  def __str__(self):
    form = 'stacked' if self.stacked else 'unrolled'
    return f'{self.model}:{self.prefill}+{self.decode}:{self.rows}:{form}:{self.weights}'


def cases() -> list[Case]:
  models, out = [name for name in MODELS if name not in ('none', 'cut')], []
  for i, layout in enumerate(LAYOUTS):
    for j, model in enumerate(models):
      if (i + j) % 2:
        rows = ROWS[layout.split('/')[0]][(i + j) // 2 % 2]
        weights = ('float32', 'int8')[(i + j) // 4 % 2]
        out.append(Case(model, layout, layout, rows, 4 + i % 3, (i + j) % 3 > 0, weights))
  out += [
    Case('command', 'wg_xyz/batch', 'ws_2d/batch', 8, weights='int8'),
    Case('olmo', 'wg_xyz/batch', 'ws_2d/batch', 1, 9),
    Case('gemma', 'wg_xy/batch', 'ws_2d/heads', 1, 5, stacked=False),
    Case('neox', 'ws_2d/batch', 'wg_xyz/batch', 16, weights='int8'),
    Case('none', 'wg_xyz/batch', 'ws_2d/batch', 2, weights='float32,embedding:8'),
    Case('cut', 'ws_2d/batch', 'ws_2d/heads', 8),
    Case('cut', 'ws_2d/heads', 'ws_2d/batch', 1, 5),
    Case('cut', 'wg_xyz/batch', 'wg_x/batch', 8),
  ]
  return out


CASES = cases()


@functools.cache
def tensors(model: str, weights: str) -> dict[str, np.ndarray]:
  """With int8 weights, an untied head and its embedding are int8, too."""
  config = MODELS[model]
  made = reference.random_tensors(config)
  if weights == 'int8' and not config.tied_head:
    weights = 'int8,embedding:8,head:8'
  return reference.quantized(config, made, weights) if '8' in weights else made


@functools.cache
def expected(model: str, weights: str) -> memory.Greedy:
  config, made = MODELS[model], tensors(model, weights)
  made = reference.dequantized(config, made) if '8' in weights else made
  return memory.greedy(config, made, 16, STEPS)


@pytest.mark.parametrize('case', CASES, ids=str)
def test_logits_and_greedy_tokens(case):
  wanted = expected(case.model, case.weights).first(case.rows)
  engine = memory.engine(
    MODELS[case.model],
    tensors(case.model, case.weights),
    '2x2x2',
    stacked=case.stacked,
    prefill=case.prefill,
    decode=case.decode,
  )
  found = memory.decode(engine, wanted, case.prompt_size)
  np.testing.assert_allclose(found.logits, wanted.logits, rtol=0, atol=1e-4)
  np.testing.assert_array_equal(found.chosen, wanted.chosen)


def test_the_cases_have_every_feature_in_every_layout():
  """What the module promises: a feature or a layout that is added shows here."""
  fields = {field.name: field.default for field in dataclasses.fields(ModelConfig)[13:]}
  for layout, phase in itertools.product(LAYOUTS, ['prefill', 'decode']):
    mine = [MODELS[c.model] for c in CASES if getattr(c, phase).startswith(layout)]
    assert {name for config in mine for name in config.features} == set(fields), (layout, phase)
    assert {c.weights for c in CASES if getattr(c, phase) == layout} >= {'float32', 'int8'}
  used = MODELS.values()
  for name, choices in CHOICES.items():
    if name not in ('block', 'norm', 'norm_scale'):  # of layouts_test
      assert {getattr(config, name) for config in used} >= set(choices), name


@pytest.mark.parametrize('model', [name for name in MODELS if name != 'cut'])
def test_no_feature_is_left_out_of_the_reference(model):
  """Without any of a model's features its logits are others: neither side may ignore one."""
  config = MODELS[model]
  tensors_ = tensors(model, 'float32')
  tokens = memory.tokens(config, 1, 8)
  wanted = reference.logits(config, tensors_, tokens)
  checked = 0
  for name in config.features:
    if name in TOGETHER:
      continue
    without = dataclasses.replace(
      config,
      **{f: ModelConfig.__dataclass_fields__[f].default for f in (name, *WITH.get(name, ()))},
    )
    # Norms that a model does not have in its tensors are made up.
    made = {**reference.random_tensors(without), **tensors_}
    found = reference.logits(without, {n: made[n] for n in reference_names(without)}, tokens)
    assert np.abs(found - wanted).max() > 1e-4, name
    checked += 1
  assert checked


# Fields that mean nothing alone, and go with another one.
WITH = {
  'positions': ('num_positions', 'relative_buckets', 'relative_max_distance'),
  'layer_pattern': ('window', 'local_rope_max_timescale', 'global_rotary'),
  'rope_scaling': ('rope_factor',),
}
TOGETHER = {
  *('num_positions', 'window', 'relative_buckets', 'relative_max_distance'),
  *('rope_factor', 'rope_low_factor', 'rope_high_factor', 'rope_original_length'),
}


def reference_names(config: ModelConfig) -> set[str]:
  return set(params.parameters(config))


@pytest.mark.parametrize('mesh', ['1x1x1', '2x2x2'])
def test_a_row_beyond_the_learned_positions_fails(mesh):
  config = dataclasses.replace(MODELS['gpt'], num_positions=4)
  engine = memory.engine(config, reference.random_tensors(config), mesh)
  logits = np.asarray(engine.logits(memory.tokens(config, 8, 6)))
  assert np.isfinite(logits[:, :4]).all() and np.isnan(logits[:, 4:]).all()
