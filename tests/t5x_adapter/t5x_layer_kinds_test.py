"""Checkpoints of flaxformer's layers, written by T5X, compute what flaxformer computes."""

import flax
from flax import traverse_util
from flax.linen.partitioning import AxisMetadata
import jax
import numpy as np
import pytest
from t5x import partitioning, train_state

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.checkpoints.convert import convert
from t5x_inference_ext.config import ModelConfig
from tests import reference
from tests.t5x_adapter import palm_flaxformer, running, separate_flaxformer

SIZES = dict(vocab=384, layers=3, embed=32, ff=80, heads=4, head_dim=10)
CONFIG = dict(
  num_layers=3,
  d_model=32,
  d_ff=80,
  num_heads=4,
  d_head=10,
  vocab_size=384,
  block='serial',
  norm_scale='one',
)
MULTIHEAD = dict(CONFIG, num_kv_heads=4)
AXES = ('first', 'second', 'third', 'fourth', 'fifth')
# (what flaxformer is told, the model it is, what open_checkpoint must be told beyond the model)
CASES = {
  'multihead gelu layer norm': ({}, dict(MULTIHEAD, mlp='gelu', norm='layer'), {}),
  'of rms norm around zero, layers first': (
    dict(norm='rms around zero', scan_axis=0),
    dict(MULTIHEAD, mlp='gelu', norm_scale='zero'),
    {},
  ),
  'one subtree a layer, split heads, swiglu': (
    dict(activations=('swish', 'linear'), split=True, scan_axis=None),
    dict(MULTIHEAD, norm='layer'),
    {},
  ),
  'multiquery swiglu rms norm': (
    dict(multiquery=True, activations=('swish', 'linear'), norm='rms'),
    dict(CONFIG),
    {},
  ),
  'fused': (
    dict(split=True, fuse='qkv', fuse_mlp=True, activations=('swish', 'linear')),
    dict(MULTIHEAD, norm='layer'),
    {},
  ),
  'fused keys': (
    dict(split=True, fuse='kv', fuse_mlp=True, norm='rms'),
    dict(MULTIHEAD, mlp='gelu'),
    {},
  ),
  'logits not rescaled': (
    dict(rescale_logits=False),
    dict(MULTIHEAD, mlp='gelu', norm='layer'),
    dict(rescale_logits=False),
  ),
  'parallel': (
    dict(parallel=True),
    dict(MULTIHEAD, mlp='gelu', norm='layer', block='parallel'),
    {},
  ),
  'parallel multiquery': (
    dict(parallel=True, multiquery=True, activations=('swish', 'linear'), norm='rms'),
    dict(CONFIG, block='parallel'),
    {},
  ),
}


def _saved(module, directory):
  """The path of random parameters as T5X saves them, the module's logits, and their tokens."""
  tokens = np.array([[0, 5, 300, 17, 2, 3, 381, 40, 41], [0, 11, 12, 13, 14, 15, 16, 17, 18]])
  targets = np.ones_like(tokens)  # only where they are above 0, padding otherwise, is looked at
  params = jax.jit(lambda key: module.init(key, tokens, targets, enable_dropout=False)['params'])(
    jax.random.PRNGKey(0)
  )
  rng = np.random.default_rng(0)
  # Norms start as all zeros or ones, which would hide how they are applied.
  params = jax.tree.map(
    lambda x: x + 0.1 * (float(x.std()) or 1.0) * rng.standard_normal(x.shape), params
  )
  # T5X asks for names of axes, which flax's own LayerNorm does not give.
  flat = traverse_util.flatten_dict(params)
  axes = {
    (*path, f'{name}_axes'): AxisMetadata(AXES[: x.ndim]) for (*path, name), x in flat.items()
  }
  state = train_state.InferenceState.create(
    flax.core.freeze({'params': params, 'params_axes': traverse_util.unflatten_dict(axes)})
  )
  partitioner = partitioning.PjitPartitioner(
    num_partitions=1, logical_axis_rules=[(axis, None) for axis in AXES]
  )
  running.saved_by_t5x(state, partitioner, directory)
  (path,) = directory.iterdir()
  logits = jax.jit(
    lambda params: module.apply({'params': params}, tokens, targets, enable_dropout=False)
  )(params)
  return path, np.asarray(logits), tokens


def _logits(checkpoint, tokens):
  tensors = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
  return reference.logits(checkpoint.config, tensors, tokens)


@pytest.mark.parametrize('case', CASES)
def test_logits_are_flaxformers(case, tmp_path):
  options, fields, arguments = CASES[case]
  config = ModelConfig(**fields)
  path, expected, tokens = _saved(separate_flaxformer.make_module(**SIZES, **options), tmp_path)
  checkpoint = open_checkpoint(path, config=config, **arguments)
  assert (checkpoint.format, checkpoint.config) == ('t5x', config)
  np.testing.assert_allclose(_logits(checkpoint, tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize('scan', [True, False])
def test_fused_layers_with_gelu(scan, tmp_path):
  module = palm_flaxformer.make_module(**SIZES, scan=scan, activations=('gelu',))
  path, expected, tokens = _saved(module, tmp_path)
  checkpoint = open_checkpoint(path)
  assert checkpoint.config == ModelConfig(
    **{**CONFIG, 'block': 'parallel', 'mlp': 'gelu', 'norm_scale': 'zero'}
  )
  np.testing.assert_allclose(_logits(checkpoint, tokens), expected, atol=1e-4, rtol=0)


def test_the_model_of_a_tree_that_says_its_heads(tmp_path):
  options, fields, _ = CASES['one subtree a layer, split heads, swiglu']
  path, expected, tokens = _saved(separate_flaxformer.make_module(**SIZES, **options), tmp_path)
  checkpoint = open_checkpoint(path)
  assert checkpoint.config == ModelConfig(**fields)
  np.testing.assert_allclose(_logits(checkpoint, tokens), expected, atol=1e-4, rtol=0)


def test_wrong_conventions_are_noticed_and_matter(tmp_path):
  """What a tree does not record: another answer gives other logits, and the notes doubt it."""
  options = dict(norm='rms around zero', rescale_logits=False, split=True, fuse=None)
  path, expected, tokens = _saved(separate_flaxformer.make_module(**SIZES, **options), tmp_path)
  checkpoint = open_checkpoint(path)
  assert np.abs(_logits(checkpoint, tokens) - expected).max() > 0.1
  notes = '\n'.join(checkpoint.notes)
  assert 'try norm_scale=zero' in notes and 'try rescale_logits=False' in notes
  told = open_checkpoint(path, norm_scale='zero', rescale_logits=False)
  np.testing.assert_allclose(_logits(told, tokens), expected, atol=1e-4, rtol=0)


def test_conversion(tmp_path):
  """To bfloat16: within what rounding the weights to 8 bits of mantissa does."""
  options, fields, arguments = CASES['logits not rescaled']
  path, expected, tokens = _saved(
    separate_flaxformer.make_module(**SIZES, **options), tmp_path / 'source'
  )
  convert(str(path), str(tmp_path / 'out'), 'bfloat16', config=ModelConfig(**fields), **arguments)
  converted = open_checkpoint(tmp_path / 'out')
  assert converted.config == ModelConfig(**fields)
  error = np.abs(_logits(converted, tokens) - expected)
  assert 0 < error.max() < 0.05 * expected.std()
