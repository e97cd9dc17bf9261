"""Every kind of flaxformer's layers gives its canonical tensors, or is refused with the reason."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import convert, open_checkpoint
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError
from tests.checkpoints import synthetic

BASE = dict(num_layers=3, d_model=8, d_ff=24, num_heads=4, d_head=6, vocab_size=12)
SERIAL = dict(BASE, block='serial', norm_scale='one')
ATTENTION = {
  'query': 'decoder/decoder/self_attention/query/kernel',
  'key': 'decoder/decoder/self_attention/key/kernel',
}


def model(**changes) -> ModelConfig:
  return ModelConfig(**{**SERIAL, **changes})


def opened(tmp_path, leaves, **arguments):
  return open_checkpoint(synthetic.write_legacy(tmp_path / 'c', leaves, inline=True), **arguments)


def check(checkpoint, config, expected):
  """This model, exactly its canonical tensors, and these values."""
  assert checkpoint.config == config
  assert set(checkpoint.tensors) == set(params.parameters(config))
  for name, values in expected.items():
    np.testing.assert_array_equal(
      checkpoint.tensors[name].read(), values, strict=True, err_msg=name
    )


def fails(tmp_path, leaves, *words, **arguments):
  with pytest.raises(CheckpointError) as caught:
    opened(tmp_path, leaves, **arguments)
  for word in (tmp_path, *words):
    assert str(word) in str(caught.value)
  assert '\n' not in str(caught.value)


LAYERS = {'scanned': dict, 'axis 0': synthetic.layers_first, 'per layer': synthetic.per_layer}


@pytest.mark.parametrize('layers', LAYERS)
@pytest.mark.parametrize('norm', ['rms', 'layer'])
@pytest.mark.parametrize('mlp', ['gelu', 'swiglu'])
@pytest.mark.parametrize('kv_heads', [1, 2, 4])
@pytest.mark.parametrize('block', ['serial', 'parallel'])
def test_every_model(tmp_path, block, kv_heads, mlp, norm, layers):
  """Heads merged into columns, flaxformer's default: the model given says how many there are."""
  config = model(block=block, num_kv_heads=kv_heads, mlp=mlp, norm=norm)
  expected = synthetic.canonical(config)
  stored = expected
  if block == 'parallel':  # DecoderLayer(parallel=True): the sum is divided by sqrt(2)
    outputs = ('attention_output', 'mlp_output')
    expected = {n: x * np.float32(2**-0.5) if n in outputs else x for n, x in expected.items()}
  leaves = LAYERS[layers](synthetic.separate(stored, config))
  check(opened(tmp_path, leaves, config=config, rescale_logits=True), config, expected)


@pytest.mark.parametrize('layers', LAYERS)
@pytest.mark.parametrize('norm,norm_scale', [('rms', 'zero'), ('layer', 'one')])
@pytest.mark.parametrize('mlp', ['gelu', 'swiglu'])
@pytest.mark.parametrize('kv_heads', [1, 2])
def test_fused_parallel_layers(tmp_path, kv_heads, mlp, norm, norm_scale, layers):
  config = model(block='parallel', num_kv_heads=kv_heads, mlp=mlp, norm=norm, norm_scale=norm_scale)
  expected = synthetic.canonical(config)
  check(opened(tmp_path, LAYERS[layers](synthetic.fused(expected, config))), config, expected)


@pytest.mark.parametrize('layers', LAYERS)
@pytest.mark.parametrize(
  'form',
  [
    dict(split=True),
    dict(split=True, attention='kv'),
    dict(split=True, attention='qkv'),
    dict(attention='qkv'),
    dict(attention='kv'),
    dict(split=True, mlp='wi'),
  ],
  ids=str,
)
@pytest.mark.parametrize('mlp', ['gelu', 'swiglu'])
def test_forms_that_say_their_heads(tmp_path, form, mlp, layers):
  """Sizes follow from the tree."""
  config = model(num_kv_heads=2 if form.get('attention') == 'kv' else 4, mlp=mlp, norm='layer')
  expected = synthetic.canonical(config)
  leaves = LAYERS[layers](synthetic.separate(expected, config, **form))
  check(opened(tmp_path, leaves, **synthetic.told(config)), config, expected)


def test_multiquery_kernels_say_their_heads(tmp_path):
  for i, split in enumerate((False, True)):
    expected = synthetic.canonical(model())
    leaves = synthetic.separate(expected, model(), split=split)
    check(opened(tmp_path / str(i), leaves, **synthetic.told(model())), model(), expected)


def test_merged_multihead_kernels_do_not(tmp_path):
  config = model(num_kv_heads=4)
  leaves = synthetic.separate(synthetic.canonical(config), config)
  told = synthetic.told(config)
  fails(tmp_path, leaves, 'num_heads of merged kernels', 'MODEL_CONFIG', **told)
  found = opened(tmp_path / 'told', leaves, num_heads=4, **told)
  check(found, config, synthetic.canonical(config))
  fails(tmp_path / 'wrong', leaves, '[8, 24] is not made of 5 heads', num_heads=5, **told)


@pytest.mark.parametrize(
  'changes,words',
  [
    (dict(block='parallel'), ['block=parallel', 'block=serial']),
    (dict(mlp='swiglu'), ['mlp=swiglu', 'mlp=1 input matrices']),
    (dict(tied_head=False), ['tied_head=False', 'tied_head=True']),
    (dict(positions='relative'), ['positions=relative', 'no relative bias']),
    (dict(norm='layer'), ['norm=layer', 'norm=rms']),
    (dict(num_kv_heads=2), ['self_attention/key/kernel', '[8, 3, 24]', '[8, 3, 12]']),
    (dict(d_head=4), ['self_attention/query/kernel', '[8, 3, 24]', '[8, 3, 16]']),
    (dict(d_ff=48), ['mlp/wi/kernel', '[8, 3, 24]', '[8, 3, 48]']),
  ],
)
def test_another_model_than_asked_for(tmp_path, changes, words):
  config = model(num_kv_heads=4, mlp='gelu')
  leaves = synthetic.separate(synthetic.canonical(config), config)
  asked = dataclasses.replace(config, **changes)
  fails(tmp_path, leaves, *words, config=asked, rescale_logits=True)


def test_a_multihead_kernel_for_a_grouped_model(tmp_path):
  config = model(num_kv_heads=4)
  leaves = synthetic.separate(synthetic.canonical(config), config, split=True, attention='qkv')
  fails(
    tmp_path,
    leaves,
    'key: shape [3, 8, 24]',
    '[3, 8, 12]',
    config=dataclasses.replace(config, num_kv_heads=2),
    rescale_logits=True,
  )


@pytest.mark.parametrize(
  'extra,reason',
  [
    ('decoder/decoder/relpos_bias/rel_embedding', 'a relative bias must be one table'),
    ('decoder/position_embedder/pos_embedding', 'positions must not be learned'),
    ('decoder/decoder/encoder_decoder_attention/query/kernel', 'it must be a decoder-only model'),
    ('decoder/logits_dense/bias', 'only layer norms have biases'),
    ('decoder/decoder/self_attention/query/bias', 'only layer norms have biases'),
    ('decoder/decoder/self_attention/q_conv/kernel', 'there are no convolutions'),
  ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(tmp_path, extra, reason):
  leaves = synthetic.separate(synthetic.canonical(model()), model())
  fails(tmp_path, {**leaves, extra: np.ones((8, 3), np.float32)}, f'target/{extra}', f'({reason}')


def test_missing_parameters_are_those_of_the_tree_s_own_kind(tmp_path):
  leaves = synthetic.separate(synthetic.canonical(model()), model())
  del leaves[ATTENTION['key']]
  del leaves['decoder/decoder/pre_mlp_layer_norm/scale']
  fails(
    tmp_path,
    leaves,
    f'lacks target/decoder/decoder/pre_mlp_layer_norm/scale, target/{ATTENTION["key"]}. Supported',
  )


@pytest.mark.parametrize(
  'name,values,words',
  [
    (ATTENTION['key'], (8, 3, 7), ['do not match: both', '[8, 7]', '[8, 24]']),
    (ATTENTION['query'], (8, 3, 4, 6, 1), ['5 axes, expected 3 or 4']),
    (
      'decoder/decoder/mlp/wi_1/kernel',
      (8, 3, 23),
      ['mlp/wi_1/kernel', '[8, 3, 23]', '[8, 3, 24]'],
    ),
    ('decoder/decoder/mlp/wo/kernel', (24, 3, 9), ['mlp/wo/kernel', '[24, 3, 9]', '[24, 3, 8]']),
  ],
)
def test_shapes_that_no_model_has(tmp_path, name, values, words):
  leaves = synthetic.separate(synthetic.canonical(model()), model())
  told = synthetic.told(model())
  fails(tmp_path, {**leaves, name: np.ones(values, np.float32)}, *words, **told)


@pytest.mark.parametrize('rescale,factor', [(None, 1), (True, 1), (False, 6**0.5)])
@pytest.mark.parametrize('kind', ['serial', 'fused'])
def test_queries_of_a_model_that_does_not_rescale_logits(tmp_path, kind, rescale, factor):
  """The layer made for PaLM alone has a default, and says so."""
  config = model() if kind == 'serial' else model(block='parallel')
  expected = synthetic.canonical(config)
  leaves = (
    synthetic.separate(expected, config) if kind == 'serial' else synthetic.fused(expected, config)
  )
  told = synthetic.told(config, rescale_logits=rescale)
  if kind == 'serial' and rescale is None:
    fails(tmp_path, leaves, 'rescale_logits', '(True, False)', **told)
    return
  checkpoint = opened(tmp_path, leaves, **told)
  check(checkpoint, config, {**expected, 'query': expected['query'] * np.float32(factor)})
  said = checkpoint.conventions['rescale_logits']
  assert (said.value, said.source) == (
    rescale is not False,
    "assumed, PaLM's" if rescale is None else 'given',
  )
  assert f'rescale_logits: {said}' in checkpoint.notes


QUANTIZED = [dict(), dict(split=True), dict(split=True, attention='kv')]


@pytest.mark.parametrize('layers', LAYERS)
@pytest.mark.parametrize('form', QUANTIZED, ids=str)
def test_quantized_kernels(tmp_path, form, layers):
  """Two output scales; the products are those of the stored pairs."""
  config = model(num_kv_heads=2 if form.get('attention') else 1)
  leaves = synthetic.quantized(synthetic.separate(synthetic.canonical(config), config, **form))
  product = {
    n.replace('qkernel', 'kernel'): v * (1 / leaves[n.replace('qkernel', 'qscale')])
    if n.endswith('qkernel')
    else v
    for n, v in leaves.items()
    if not n.endswith('qscale')
  }
  told = synthetic.told(config)
  checkpoint = opened(tmp_path / 'a', LAYERS[layers](leaves), **told)
  products = opened(tmp_path / 'b', product, **told)
  assert (checkpoint.weights, checkpoint.config) == ('int8', config)
  assert set(checkpoint.tensors) == {*params.parameters(config), *params.scales(config)}
  for name, p in params.parameters(config).items():
    if p.kind == 'matrix':
      values, scale = checkpoint.tensors[name].read(), checkpoint.tensors[p.scale].read()
      assert (values.dtype, scale.dtype) == (np.int8, np.float32)
      np.testing.assert_array_equal(
        values * scale[:, None, :], products.tensors[name].read(), err_msg=name
      )


def test_quantized_queries_that_are_not_rescaled(tmp_path):
  leaves = synthetic.quantized(synthetic.separate(synthetic.canonical(model()), model()))
  plain, folded = (
    opened(tmp_path / str(rescale), leaves, **synthetic.told(model(), rescale_logits=rescale))
    for rescale in (True, False)
  )
  np.testing.assert_array_equal(folded.tensors['query'].read(), plain.tensors['query'].read())
  np.testing.assert_array_equal(
    folded.tensors['query_scale'].read(), plain.tensors['query_scale'].read() * np.float32(6**0.5)
  )


def test_quantized_outputs_of_a_parallel_layer_with_two_scales(tmp_path):
  config = model(block='parallel')
  leaves = synthetic.quantized(synthetic.separate(synthetic.canonical(config), config))
  words = ('attention_output and mlp_output', 'share one', 'convert the float checkpoint')
  fails(tmp_path, leaves, *words, **synthetic.told(config))


def test_folding_is_part_of_a_conversion(tmp_path):
  """rescale_logits is refused for a serving checkpoint: its queries are multiplied already."""
  source = synthetic.write_legacy(
    tmp_path / 'c', synthetic.separate(synthetic.canonical(model()), model())
  )
  told = synthetic.told(model(), rescale_logits=False)
  convert.convert(source, tmp_path / 'out', 'bfloat16', **told)
  query = synthetic.canonical(model())['query'] * np.float32(6**0.5)
  np.testing.assert_array_equal(
    open_checkpoint(tmp_path / 'out').tensors['query'].read(),
    query.astype(ml_dtypes.bfloat16),
    strict=True,
  )
  with pytest.raises(CheckpointError, match='rescale_logits is for T5X checkpoints'):
    open_checkpoint(tmp_path / 'out', rescale_logits=False)
