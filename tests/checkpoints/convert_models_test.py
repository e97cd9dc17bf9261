"""Serving checkpoints of every kind of model: block, heads, MLP and norm."""

import json

import ml_dtypes
import numpy as np
import pytest

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import convert, open_checkpoint, serving
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError
from tests import reference
from tests.checkpoints import synthetic

BASE = dict(num_layers=2, d_model=16, d_ff=24, num_heads=4, d_head=6, vocab_size=12)
MODELS = {
  'serial multihead gelu layer norm': dict(
    num_kv_heads=4, block='serial', mlp='gelu', norm='layer', norm_scale='one', norm_epsilon=1e-5
  ),
  'serial grouped swiglu rms': dict(num_kv_heads=2, block='serial'),
  'serial multiquery gelu rms': dict(block='serial', mlp='gelu', norm_scale='one'),
  'parallel grouped gelu layer norm': dict(num_kv_heads=2, mlp='gelu', norm='layer'),
}


@pytest.fixture(params=MODELS)
def config(request) -> ModelConfig:
  return ModelConfig(**BASE, **MODELS[request.param])


@pytest.fixture(params=[None, 5], ids=['one chunk a layer', 'many chunks'])
def chunking(request, monkeypatch):
  if request.param:
    monkeypatch.setattr(serving, 'MAX_CHUNK_ROWS', request.param)
    monkeypatch.setattr(serving, 'MAX_CHUNK_COLUMNS', request.param)


def write(path, config, tensors):
  """A T5X checkpoint of these tensors."""
  leaves = (synthetic.separate if config.block == 'serial' else synthetic.fused)(tensors, config)
  return synthetic.write_legacy(path, leaves, inline=True)


def read(checkpoint):
  return {name: tensor.read() for name, tensor in checkpoint.tensors.items()}


def test_int8(tmp_path, config, chunking):
  tensors = reference.random_tensors(config)
  report = convert.convert(
    write(tmp_path / 'source', config, tensors),
    tmp_path / 'out',
    config=config,
    rescale_logits=True,
  )
  checkpoint = open_checkpoint(tmp_path / 'out')
  assert (checkpoint.config, checkpoint.weights) == (config, 'int8')
  out, expected = read(checkpoint), reference.quantized(config, tensors)
  assert set(out) == {*params.parameters(config), *params.scales(config)}
  for name, p in {**params.parameters(config), **params.scales(config)}.items():
    if p.kind != 'embedding':
      np.testing.assert_array_equal(out[name], expected[name], strict=True, err_msg=name)
  np.testing.assert_array_equal(
    out['embedding'], tensors['embedding'].astype(ml_dtypes.bfloat16), strict=True
  )
  on_disk = sum(
    f.stat().st_size
    for name, p in {**params.parameters(config), **params.scales(config)}.items()
    if p.kind in ('matrix', 'scale')
    for f in (tmp_path / 'out' / name).iterdir()
  )
  assert report.layer_bytes == on_disk
  assert report.source_bytes == 4 * config.num_params
  assert report.layer_float32_bytes == 4 * sum(
    tensors[name].size for name, p in params.parameters(config).items() if p.kind == 'matrix'
  )


def test_int8_model_is_near_the_float_one(tmp_path, config):
  tensors = reference.random_tensors(config)
  convert.convert(
    write(tmp_path / 'source', config, tensors),
    tmp_path / 'out',
    config=config,
    rescale_logits=True,
  )
  tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 9))
  exact = reference.logits(config, tensors, tokens)
  served = reference.logits(
    config, reference.dequantized(config, read(open_checkpoint(tmp_path / 'out'))), tokens
  )
  assert 0 < np.abs(served - exact).max() < 0.1 * exact.std()


def test_bfloat16(tmp_path, config, chunking):
  tensors = reference.random_tensors(config)
  convert.convert(
    write(tmp_path / 'source', config, tensors),
    tmp_path / 'out',
    'bfloat16',
    config=config,
    rescale_logits=True,
  )
  out = read(open_checkpoint(tmp_path / 'out'))
  assert set(out) == set(tensors)
  for name, p in params.parameters(config).items():
    dtype = np.float32 if p.kind in ('norm', 'bias') else ml_dtypes.bfloat16
    np.testing.assert_array_equal(out[name], tensors[name].astype(dtype), strict=True, err_msg=name)


@pytest.mark.parametrize('block', ['parallel', 'serial'])
def test_factors_of_a_bfloat16_source(tmp_path, block):
  """1/sqrt(2) of a parallel DecoderLayer, sqrt(6) of queries: bfloat16 has few digits of them."""
  config = ModelConfig(**BASE, num_kv_heads=4, block=block, norm_scale='one')
  tensors = reference.random_tensors(config)
  leaves = {
    name: values.astype(ml_dtypes.bfloat16)
    for name, values in synthetic.separate(tensors, config, split=True).items()
  }
  source = synthetic.write_legacy(tmp_path / 'source', leaves)
  told = synthetic.told(config, rescale_logits=False)
  direct = read(open_checkpoint(source, **told))
  convert.convert(source, tmp_path / 'out', 'bfloat16', **told)
  out = read(open_checkpoint(tmp_path / 'out'))
  exact = tensors['query'].astype(ml_dtypes.bfloat16).astype(np.float64) * np.sqrt(6)
  np.testing.assert_allclose(direct['query'], exact, rtol=1e-6)
  for name in ('query', 'attention_output', 'mlp_output'):
    np.testing.assert_array_equal(
      out[name], direct[name].astype(ml_dtypes.bfloat16), strict=True, err_msg=name
    )


def test_a_second_conversion_is_a_copy(tmp_path, config):
  convert.convert(
    write(tmp_path / 'source', config, reference.random_tensors(config)),
    tmp_path / 'a',
    config=config,
    rescale_logits=True,
  )
  convert.convert(tmp_path / 'a', tmp_path / 'b')
  assert (tmp_path / 'a' / 'checksums.json').read_text() == (
    tmp_path / 'b' / 'checksums.json'
  ).read_text()


@pytest.mark.parametrize(
  'name,layer', [('attention_norm_bias', ' in layer 1'), ('final_norm_bias', '')]
)
def test_nan_in_a_bias(tmp_path, name, layer):
  config = ModelConfig(**BASE, **MODELS['serial multihead gelu layer norm'])
  tensors = reference.random_tensors(config)
  tensors[name][(1, 3) if layer else 3] = np.nan
  with pytest.raises(CheckpointError, match=f'^{name}: 1 NaN or infinite values{layer}, '):
    convert.convert(
      write(tmp_path / 'source', config, tensors),
      tmp_path / 'out',
      config=config,
      rescale_logits=True,
    )


def test_a_checkpoint_from_before_there_were_other_models(tmp_path):
  """Its header lacks what only PaLM-style models were, and opens as one."""
  tensors = synthetic.canonical()
  convert.convert(
    synthetic.write_legacy(tmp_path / 'source', synthetic.fused(tensors)), tmp_path / 'out'
  )
  path = tmp_path / 'out' / 'serving_config.json'
  header = json.loads(path.read_text())
  for field in ('block', 'mlp', 'norm'):
    del header['model'][field]
  del header['text'], header['files'], header['crc32']
  header['version'] = 1
  path.write_text(json.dumps(header))
  checkpoint = open_checkpoint(tmp_path / 'out')
  assert checkpoint.config == synthetic.CONFIG
  assert (checkpoint.config.block, checkpoint.config.mlp, checkpoint.config.norm) == (
    'parallel',
    'swiglu',
    'rms',
  )
  np.testing.assert_array_equal(
    checkpoint.tensors['final_norm'].read(), tensors['final_norm'], strict=True
  )


@pytest.mark.parametrize(
  'field,value', [('block', 'parallel'), ('norm', 'rms'), ('mlp', 'swiglu'), ('num_kv_heads', 2)]
)
def test_another_kind_of_model_than_asked_for(tmp_path, field, value):
  config = ModelConfig(**BASE, **MODELS['serial multihead gelu layer norm'])
  convert.convert(
    write(tmp_path / 's', config, reference.random_tensors(config)),
    tmp_path / 'out',
    config=config,
    rescale_logits=True,
  )
  asked = ModelConfig(**{**config.to_dict(), field: value})
  with pytest.raises(CheckpointError) as caught:
    open_checkpoint(tmp_path / 'out', config=asked)
  expected = 'key: shape [2, 16, 24]' if field == 'num_kv_heads' else f'{field}={value}'
  assert expected in str(caught.value) and str(tmp_path / 'out') in str(caught.value)
