"""Adapters, read: canonical tensors of every family, and what is refused, in one sentence."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import convert, open_checkpoint
from t5x_inference_ext.checkpoints.adapters.folding import fold_adapter
from t5x_inference_ext.checkpoints.adapters.read import read_adapter
from t5x_inference_ext.checkpoints.conversion.verify import verify
from t5x_inference_ext.checkpoints.families.module_map import ModuleMap
from t5x_inference_ext.errors import CheckpointError
from tests import reference
from tests.checkpoints import peft_files
from tests.checkpoints.public_formats_test import FAMILIES, families

__all__ = ['families']
# Modules with weights [in, out], transformers' Conv1D.
CONV1D = ('gpt2',)


@pytest.mark.parametrize('family', FAMILIES)
def test_a_lora_changes_the_matrices_as_in_the_family_itself(families, family, tmp_path):
  """The stored weights, changed as PEFT merges them, are read as another model to compare with."""
  base = open_checkpoint(families / family)
  path, changes = peft_files.write_lora(tmp_path / 'adapter', base)
  adapter = read_adapter(path, base)
  stored = safetensors.numpy.load_file(families / family / 'model.safetensors')
  stored = {name: values.astype(np.float32) for name, values in stored.items()}
  for module, change in changes.items():
    name = f'{module}.weight'
    if name not in stored:  # the file leaves the prefix out
      name = name.partition('.')[2]
    stored[name] = stored[name] + (change.T if family in CONV1D else change)
  merged = tmp_path / 'merged'
  shutil.copytree(families / family, merged)
  (merged / 'model.safetensors').unlink()
  safetensors.numpy.save_file(
    {name: np.ascontiguousarray(values) for name, values in stored.items()},
    merged / 'model.safetensors',
  )
  wanted = open_checkpoint(merged).tensors
  matrices = [n for n, p in params.parameters(base.config).items() if p.kind == 'matrix']
  assert set(adapter.low_rank) == set(matrices)
  for name in matrices:
    low_rank = adapter.low_rank[name]
    found = base.tensors[name].read().astype(np.float32) + low_rank.a @ low_rank.b
    np.testing.assert_allclose(found, wanted[name].read(), rtol=0, atol=2e-5)
    assert np.abs(low_rank.a @ low_rank.b).max() > 0.01


def test_ranks_and_scales_by_module(families, tmp_path):
  """rank_pattern, alpha_pattern and use_rslora, and a LoRA of some layers."""
  base = open_checkpoint(families / 'smollm2')
  rng, tensors = np.random.default_rng(0), {}
  ranks = {('q_proj', 0): 4, ('q_proj', 2): 1, ('v_proj', 0): 4}
  for (module, layer), rank in ranks.items():
    outputs = 48 if module == 'q_proj' else 16
    prefix = f'base_model.model.model.layers.{layer}.self_attn.{module}'
    tensors[f'{prefix}.lora_A.weight'] = rng.normal(size=(rank, 48)).astype(np.float32)
    tensors[f'{prefix}.lora_B.weight'] = rng.normal(size=(outputs, rank)).astype(np.float32)
  settings = {
    'peft_type': 'LORA',
    'r': 4,
    'lora_alpha': 6,
    'use_rslora': True,
    'rank_pattern': {r'layers\.2\.self_attn\.q_proj': 1},
    'alpha_pattern': {'v_proj': 10},
  }
  adapter = read_adapter(peft_files.write_adapter(tmp_path / 'a', settings, tensors), base)
  assert {name: each.rank for name, each in adapter.low_rank.items()} == {'query': 4, 'value': 4}
  for (module, layer), rank in ranks.items():
    prefix = f'base_model.model.model.layers.{layer}.self_attn.{module}'
    alpha = 10 if module == 'v_proj' else 6
    product = tensors[f'{prefix}.lora_B.weight'] @ tensors[f'{prefix}.lora_A.weight']
    found = adapter.low_rank['query' if module == 'q_proj' else 'value']
    np.testing.assert_allclose(
      (found.a[layer] @ found.b[layer]).T, product * alpha / rank**0.5, rtol=1e-5, atol=1e-5
    )
  assert not adapter.low_rank['query'].b[1].any() and not adapter.low_rank['value'].b[1:].any()


def test_factors_of_a_fused_module(testdata, families):
  base = open_checkpoint(families / 'falcon_7b')
  path = testdata / 'adapters' / 'falcon_7b-ia3-0'
  stored = safetensors.numpy.load_file(path / 'adapter_model.safetensors')
  found = read_adapter(path, base).scaling
  assert {name: values.shape for name, values in found.items()} == {
    'query': (3, 48),
    'key': (3, 8),
    'value': (3, 8),
    'mlp_output': (3, 192),
  }
  prefix = 'base_model.model.transformer.h.1.'
  fused = stored[f'{prefix}self_attention.query_key_value.ia3_l'][:, 0]
  np.testing.assert_array_equal(
    np.concatenate([found[name][1] for name in ('query', 'key', 'value')]), fused
  )
  np.testing.assert_array_equal(
    found['mlp_output'][1], stored[f'{prefix}mlp.dense_4h_to_h.ia3_l'][0]
  )


def test_a_prompt_saved_by_t5x(repository, tmp_path):
  base = open_checkpoint(repository / 'examples' / 'palm_tiny' / 'checkpoint_1000')
  prompt = np.random.default_rng(0).normal(size=(5, 256)).astype(np.float32)
  step = tmp_path / 'numpy_checkpoints' / 'checkpoint_20'
  step.mkdir(parents=True)
  file = step / 'decoder.prompt.prompt.prompt'
  with file.open('wb') as f:
    np.save(f, prompt)
  for path in (file, step):
    np.testing.assert_array_equal(read_adapter(path, base).prompt, prompt)
  with file.open('wb') as f:
    np.save(f, prompt[:, :40])
  with pytest.raises(CheckpointError, match=r'\[5, 40\], but .*palm_tiny.* needs \[tokens, 256\]'):
    read_adapter(file, base)
  with file.open('wb') as f:
    np.save(f, prompt.astype(ml_dtypes.bfloat16))
  with pytest.raises(CheckpointError, match='save float32'):
    read_adapter(file, base)
  with file.open('wb') as f:
    np.save(f, np.asarray([{}]), allow_pickle=True)
  with pytest.raises(CheckpointError, match='damaged'):
    read_adapter(file, base)
  shutil.copy(file, step / 'another.prompt')
  with pytest.raises(CheckpointError, match='several prompts'):
    read_adapter(step, base)


def test_a_converted_checkpoint_takes_its_models_adapters(testdata, families, tmp_path):
  convert.convert(families / 'smollm2', tmp_path / 'served', weights='int8')
  served = open_checkpoint(tmp_path / 'served')
  assert served.module_map == open_checkpoint(families / 'smollm2').module_map
  found = read_adapter(testdata / 'adapters' / 'smollm2-lora-0', served)
  declared = params.parameters(served.config)
  assert set(found.low_rank) == {n for n, p in declared.items() if p.kind == 'matrix'}
  manifest = tmp_path / 'served' / 'serving_config.json'
  assert ModuleMap.from_dict(json.loads(manifest.read_text())['source']['module_map'])
  for damaged in (None, {}, [], {'modules': {}}, {**served.module_map.to_dict(), 'modules': 3}):
    assert ModuleMap.from_dict(damaged) is None


def lora_settings(**changes):
  return {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 4, **changes}


@pytest.mark.parametrize(
  'settings, message',
  [
    (lora_settings(use_dora=True), r'option use_dora=True is not served'),
    (lora_settings(bias='lora_only'), r'bias=lora_only is not served'),
    (lora_settings(modules_to_save=['lm_head']), r"modules_to_save=\['lm_head'\] is not served"),
    (lora_settings(init_lora_weights='pissa'), "pissa changes the base model's own weights"),
    (lora_settings(some_new_option=3), 'option some_new_option=3 is not served'),
    (lora_settings(r=3), r'smollm2.*lora_A.* shape \[2, 48\], but .*smollm2 needs \[3, 48\]'),
    (lora_settings(r=0), 'not a positive number'),
    (lora_settings(lora_alpha='4'), 'lora_alpha of model.layers.0.self_attn.q_proj is 4'),
    (lora_settings(lora_alpha=1e300), r'is 1e\+300, not a positive number up to 1e\+09'),
    (lora_settings(lora_alpha=float('inf')), r'is inf, not a positive number up to 1e\+09'),
    (lora_settings(rank_pattern={'(.*)*(.*)*x': 2}), 'which repeats a group or has more than 4'),
    (lora_settings(rank_pattern={'.*.*.*.*.*x': 2}), 'which repeats a group or has more than 4'),
    (lora_settings(rank_pattern={'(': 1}), 'not a regular expression'),
    (lora_settings(rank_pattern=[1]), 'rank_pattern is not a JSON object'),
    (lora_settings(peft_type='LOHA'), 'peft_type LOHA is not served; served are LORA, IA3'),
    (lora_settings(task_type='SEQ_CLS'), 'task_type SEQ_CLS is not served'),
    (
      {'peft_type': 'IA3', 'r': None, 'lora_alpha': None},
      r'holds .*lora_A.weight, which is not served',
    ),
    (
      {'peft_type': 'PROMPT_TUNING', 'r': None, 'lora_alpha': None},
      'served is prompt_embeddings alone',
    ),
  ],
)
def test_settings_that_are_refused(families, tmp_path, settings, message):
  base = open_checkpoint(families / 'smollm2')
  modules = ('model.layers.{}.self_attn.q_proj',)
  path, _ = peft_files.write_lora(tmp_path / 'smollm2_adapter', base, modules=modules)
  content = json.loads((path / 'adapter_config.json').read_text())
  (path / 'adapter_config.json').write_text(json.dumps({**content, **settings}))
  with pytest.raises(CheckpointError, match=message):
    read_adapter(path, base)


MODULE = 'base_model.model.model.layers.0.self_attn.q_proj'
A, B = np.zeros((2, 48), np.float32), np.zeros((48, 2), np.float32)


@pytest.mark.parametrize(
  'tensors, message',
  [
    ({}, 'holds no tensors'),
    ({f'{MODULE}.lora_A.weight': A}, 'holds only one of lora_A.weight and lora_B.weight'),
    (
      {f'{MODULE}.lora_A.weight': A, f'{MODULE}.lora_B.weight': B[:40]},
      r'LoRA for someone/base, has .*\[40, 2\], but .*smollm2 needs \[48, 2\]',
    ),
    (
      {f'{MODULE}.lora_A.weight': A * np.nan, f'{MODULE}.lora_B.weight': B},
      'NaN or infinite values',
    ),
    (
      {f'{MODULE}.lora_A.weight': A, f'{MODULE}.lora_B.weight': B + np.float32(2e38)},
      'lora_B.weight times its scale: NaN or infinite values',  # the scale is 2
    ),
    (
      {f'{MODULE}.lora_A.weight': A + np.float32(3.395e38), f'{MODULE}.lora_B.weight': B},
      'lora_A.weight: NaN or infinite values',  # only in bfloat16
    ),
    (
      {f'{MODULE.replace("0", "3")}.lora_{x}.weight': A for x in 'AB'},
      r'adapts layer 3, but .*smollm2 has layers 0 to 2',
    ),
    (
      {f'base_model.model.lm_head.lora_{x}.weight': A for x in 'AB'},
      r'adapts lm_head, which is not a matrix in the layers of .*smollm2',
    ),
    (
      {f'base_model.model.transformer.h.0.attn.c_attn.lora_{x}.weight': A for x in 'AB'},
      r'adapts transformer.h.0.attn.c_attn, .* these are .*self_attn.k_proj',
    ),
    ({f'{MODULE}.lora_magnitude_vector': A}, 'lora_magnitude_vector, which is not served'),
  ],
)
def test_tensors_that_are_refused(families, tmp_path, tensors, message):
  base = open_checkpoint(families / 'smollm2')
  path = peft_files.write_adapter(tmp_path / 'adapter', lora_settings(), tensors)
  with pytest.raises(CheckpointError, match=message):
    read_adapter(path, base)


def test_other_models_and_no_adapter(repository, testdata, families, tmp_path):
  adapters = testdata / 'adapters'
  opt = open_checkpoint(families / 'opt')
  palm = open_checkpoint(repository / 'examples' / 'palm_tiny' / 'checkpoint_1000')
  for name in ('smollm2', 'falcon_7b'):
    for kind, base, where in (
      ('lora-0', opt, 'opt'),
      ('ia3-0', opt, 'opt'),
      ('prompt-0', palm, 'palm'),
    ):
      with pytest.raises(CheckpointError, match=f'{name}-{kind}, .*families/{name}, .*{where}'):
        read_adapter(adapters / f'{name}-{kind}', base)
  with pytest.raises(CheckpointError, match='does not record .*name the public model'):
    read_adapter(adapters / 'smollm2-lora-0', palm)
  gemma = open_checkpoint(families / 'gemma')
  assert gemma.config.d_model == 48  # as the prompt has
  with pytest.raises(CheckpointError, match='multiplies embeddings by'):
    read_adapter(adapters / 'smollm2-prompt-0', gemma)
  with pytest.raises(CheckpointError, match='is not an adapter: a PEFT adapter is a directory'):
    read_adapter(tmp_path, palm)
  with pytest.raises(CheckpointError, match='not fetched from a hub'):
    read_adapter('hf:someone/adapter', palm)
  shutil.copy(adapters / 'smollm2-lora-0' / 'adapter_config.json', tmp_path)
  with pytest.raises(CheckpointError, match='lacks adapter_model.safetensors'):
    read_adapter(tmp_path, palm)
  (tmp_path / 'adapter_model.bin').write_bytes(b'')
  with pytest.raises(CheckpointError, match='a pickle'):
    read_adapter(tmp_path, palm)


@pytest.mark.parametrize('name', ['smollm2-lora-0', 'falcon_7b-lora-1', 'falcon_7b-ia3-0'])
def test_a_folded_checkpoint_is_the_models_with_the_adapter(testdata, families, tmp_path, name):
  """Golden logits of PEFT, by the float tensors in the reference model."""
  source = open_checkpoint(families / name.partition('-')[0])
  path = testdata / 'adapters' / name
  folded = fold_adapter(source, read_adapter(path, source))
  assert {each.name for array in folded.arrays for each in array.arrangement.parts} == set(
    params.parameters(source.config)
  )
  golden = np.load(path / 'golden.npz')
  tensors = {n: tensor.read().astype(np.float32) for n, tensor in folded.tensors.items()}
  found = reference.logits(source.config, tensors, golden['input_ids'])
  np.testing.assert_allclose(found, golden['logits'], atol=1e-4 * np.abs(golden['logits']).max())
  part = (slice(1, 3), slice(5, 21), slice(3, 10))
  for n in ('query', 'mlp_output'):
    np.testing.assert_array_equal(folded.tensors[n].read(part), tensors[n][part])


def test_conversion_with_an_adapter(testdata, families, tmp_path):
  adapters, base = testdata / 'adapters', families / 'smollm2'
  path = adapters / 'smollm2-lora-0'
  convert.convert(base, tmp_path / 'out', weights='bfloat16', adapter=path)
  source = open_checkpoint(base)
  wanted, found = (
    fold_adapter(source, read_adapter(path, source)),
    open_checkpoint(tmp_path / 'out'),
  )
  for name, p in params.parameters(source.config).items():
    values = wanted.tensors[name].read()
    if p.kind == 'matrix':
      assert not np.array_equal(values, source.tensors[name].read())
      values = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found.tensors[name].read(), values)
  assert verify(str(tmp_path / 'out'))
  with pytest.raises(CheckpointError, match='made with an adapter folded in'):
    verify(str(tmp_path / 'out'), str(base))
  with pytest.raises(CheckpointError, match='soft prompt, which is no part of the weights'):
    convert.convert(base, tmp_path / 'no', adapter=adapters / 'smollm2-prompt-0')
  convert.convert(base, tmp_path / 'int8', weights='int8')
  with pytest.raises(CheckpointError, match='int8 weights of .*convert the float model'):
    convert.convert(tmp_path / 'int8', tmp_path / 'no', adapter=path)
  assert not (tmp_path / 'no').exists()
