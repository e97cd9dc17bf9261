"""Checkpoints of flaxformer's layers, written by T5X, compute what flaxformer computes."""

import flax
from flax import traverse_util
from flax.linen.partitioning import AxisMetadata
import jax
import numpy as np
import pytest
from t5x import partitioning, train_state
from t5x.examples.decoder_only import network

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.checkpoints.conventions import Conventions
from t5x_inference_ext.checkpoints.convert import convert
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError, RequestError
from t5x_inference_ext.t5x.stock_model import stock_conventions
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


def saved(module, directory):
  """The path of random parameters as T5X saves them, the module's logits, and their tokens."""
  with jax.numpy_rank_promotion('allow'):
    return _saved(module, directory)


def _saved(module, directory):
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
  path, expected, tokens = saved(separate_flaxformer.make_module(**SIZES, **options), tmp_path)
  checkpoint = open_checkpoint(path, config=config, **{'rescale_logits': True, **arguments})
  assert (checkpoint.format, checkpoint.config) == ('t5x', config)
  np.testing.assert_allclose(_logits(checkpoint, tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize('scan', [True, False])
def test_fused_layers_with_gelu(scan, tmp_path):
  module = palm_flaxformer.make_module(**SIZES, scan=scan, activations=('gelu',))
  path, expected, tokens = saved(module, tmp_path)
  checkpoint = open_checkpoint(path)
  assert checkpoint.config == ModelConfig(
    **{**CONFIG, 'block': 'parallel', 'mlp': 'gelu', 'norm_scale': 'zero'}
  )
  np.testing.assert_allclose(_logits(checkpoint, tokens), expected, atol=1e-4, rtol=0)


STOCK = {
  'one subtree a layer, split heads, geglu': (
    dict(activations=('gelu', 'linear'), norm='rms', split=True, scan_axis=None),
    dict(mlp='geglu', rescale_logits=True),
  ),
  'merged heads, not rescaled, relative bias, untied': (
    dict(activations=('relu', 'linear'), norm='rms', relative=True, rescale_logits=False)
    | dict(tied=False, scan_axis=None),
    dict(mlp='reglu', rescale_logits=False, positions='none', relative_max_distance=128),
  ),
  'around zero, one activation, untied': (
    dict(activations=('swish',), norm='rms around zero', tied=False),
    dict(mlp='swish', rescale_logits=True, norm_scale='zero'),
  ),
  'layer norm': (
    dict(activations=('sigmoid', 'linear'), rescale_logits=False),
    dict(mlp='glu', rescale_logits=False),
  ),
}


@pytest.mark.parametrize('case', STOCK)
def test_the_stock_model_says_what_its_weights_do_not(case, tmp_path):
  """With what the module says the tree computes what the module computes; without it is refused."""
  options, fields = STOCK[case]
  module = separate_flaxformer.make_module(**SIZES, **options)
  said = stock_conventions(module)
  rotary = dict(positions='rotary', rope_max_timescale=1e4)
  expected = dict(norm_scale='one', norm_epsilon=1e-6, num_heads=4)
  expected |= {**({} if options.get('relative') else rotary), **fields}
  assert said.stated() == expected
  path, logits, tokens = saved(module, tmp_path)
  with pytest.raises(CheckpointError, match='weights do not show mlp.*; rescale_logits'):
    open_checkpoint(path)
  checkpoint = open_checkpoint(path, stock=lambda: said)
  np.testing.assert_allclose(_logits(checkpoint, tokens), logits, atol=1e-4, rtol=0)
  assert checkpoint.config.tied_head == options.get('tied', True)


@pytest.mark.parametrize('tied', [True, False])
def test_decoder_only(tied, tmp_path):
  """T5X's example: only its activations and sizes are options."""
  module = network.DecoderWrapper(
    network.TransformerConfig(
      vocab_size=384,
      emb_dim=32,
      num_heads=4,
      num_layers=3,
      head_dim=10,
      mlp_dim=80,
      mlp_activations=('gelu', 'linear'),
      dropout_rate=0.0,
      logits_via_embedding=tied,
    )
  )
  said = stock_conventions(module)
  assert said == Conventions(
    norm_scale='one',
    norm_epsilon=1e-6,
    mlp='geglu',
    rescale_logits=False,
    relative_max_distance=128,
    num_heads=4,
  )
  path, logits, tokens = saved(module, tmp_path)
  checkpoint = open_checkpoint(path, stock=lambda: said)
  assert checkpoint.config == ModelConfig(
    **MULTIHEAD, mlp='geglu', positions='relative', tied_head=tied
  )
  np.testing.assert_allclose(_logits(checkpoint, tokens), logits, atol=1e-4, rtol=0)


def test_palms_stock_model_says_palms_conventions():
  said = stock_conventions(palm_flaxformer.make_module(**SIZES))
  assert said == Conventions(
    norm_scale='zero',
    norm_epsilon=1e-6,
    mlp='swiglu',
    rescale_logits=True,
    positions='rotary',
    rope_max_timescale=1e4,
    num_heads=4,
  )


@pytest.mark.parametrize(
  'module,error,words',
  [
    (
      separate_flaxformer.make_module(**SIZES, activations=('tanh', 'linear')),
      CheckpointError,
      "activations .'tanh', 'linear'. of the MLP are not supported",
    ),
    (
      palm_flaxformer.make_module(**{**SIZES, 'heads': None}),
      RequestError,
      "T5X's own model, in the gin files in front, can't be built",
    ),
  ],
)
def test_stock_models_that_say_nothing_useful(module, error, words):
  with pytest.raises(error, match=words):
    stock_conventions(module)


def test_a_wrong_norm_convention_is_doubted(tmp_path):
  options = dict(norm='rms around zero', split=True, fuse=None)
  path, expected, tokens = saved(separate_flaxformer.make_module(**SIZES, **options), tmp_path)
  told = dict(mlp='gelu', rescale_logits=True, norm_epsilon=1e-6)
  told |= dict(positions='rotary', rope_max_timescale=1e4)
  checkpoint = open_checkpoint(path, norm_scale='one', **told)
  assert np.abs(_logits(checkpoint, tokens) - expected).max() > 0.1
  assert 'try norm_scale=zero' in '\n'.join(checkpoint.notes)
  right = open_checkpoint(path, norm_scale='zero', **told)
  np.testing.assert_allclose(_logits(right, tokens), expected, atol=1e-4, rtol=0)


def test_conversion(tmp_path):
  """To bfloat16: within what rounding the weights to 8 bits of mantissa does."""
  options, fields, arguments = CASES['logits not rescaled']
  path, expected, tokens = saved(
    separate_flaxformer.make_module(**SIZES, **options), tmp_path / 'source'
  )
  convert(str(path), str(tmp_path / 'out'), 'bfloat16', config=ModelConfig(**fields), **arguments)
  converted = open_checkpoint(tmp_path / 'out')
  assert converted.config == ModelConfig(**fields)
  error = np.abs(_logits(converted, tokens) - expected)
  assert 0 < error.max() < 0.05 * expected.std()
