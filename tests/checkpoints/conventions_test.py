"""Who says what the weights of a T5X tree do not show, and whose word counts."""

import shutil

import pytest

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.checkpoints.conventions import Conventions
from t5x_inference_ext.checkpoints.convert import convert
from t5x_inference_ext.checkpoints.readers.training_gin import training_conventions
from t5x_inference_ext.checkpoints.tree_notes import recorded_conventions
from t5x_inference_ext.errors import CheckpointError
from tests.checkpoints import synthetic
from tests.checkpoints.t5x_families_test import FAMILIES

# What T5X writes for its decoder_only: gin.config_str() with most of it left out.
DECODER_ONLY = """
from __gin__ import dynamic_registration
from t5x import models
from t5x.examples.decoder_only import network

# Macros:
# ==============================================================================
ACTIVATIONS = ('gelu', 'linear')
# Parameters for models.DecoderOnlyModel:
# ==============================================================================
models.DecoderOnlyModel.module = @network.DecoderWrapper()
network.DecoderWrapper.config = @network.TransformerConfig()
# Parameters for network.TransformerConfig:
# ==============================================================================
network.TransformerConfig.dropout_rate = 0.0
network.TransformerConfig.mlp_activations = %ACTIVATIONS
network.TransformerConfig.num_heads = 5
"""
FLAXFORMER = """
from __gin__ import dynamic_registration
import flaxformer.components.attention.dense_attention
from flaxformer.architectures.t5 import t5_architecture
from flaxformer.components import dense, layer_norm

t5_architecture.DecoderLayer:
  self_attention = @flaxformer.components.attention.dense_attention.MultiHeadDotProductAttention()
  mlp = @dense.MlpBlock()
  layer_norm_factory = @layer_norm.T5LayerNorm
flaxformer.components.attention.dense_attention.MultiHeadDotProductAttention:
  use_rotary_embedding = True
dense.MlpBlock:
  activations = ('swish', 'linear')
""".replace(
  'import dense, layer_norm', 'import dense\nfrom flaxformer.components import layer_norm'
)
UNSCALED = Conventions(
  norm_scale='one',
  norm_epsilon=1e-6,
  mlp='swiglu',
  rescale_logits=False,
  positions='rotary',
  rope_max_timescale=1e4,
)


def said(text: str) -> Conventions:
  return training_conventions(text, 'config.gin')


def test_decoder_only():
  """All but the activations and the heads is fixed in T5X's code."""
  assert said(DECODER_ONLY) == Conventions(**FAMILIES['decoder_only_tied'] | {'num_heads': 5})
  default = DECODER_ONLY.replace('network.TransformerConfig.mlp_activations = %ACTIVATIONS\n', '')
  assert said(default).mlp == 'relu'  # network.TransformerConfig's own default


def test_flaxformer():
  """Options without a binding have flaxformer's defaults: rescale_logits is False."""
  assert said(FLAXFORMER) == UNSCALED


@pytest.mark.parametrize(
  'binding,expected',
  [
    ('layer_norm.T5LayerNorm.epsilon = 1e-5', {'norm_epsilon': 1e-5}),
    ('layer_norm.T5LayerNorm.center_scale_at_zero = True', {'norm_scale': 'zero'}),
    ("dense.MlpBlock.activations = ['linear', 'linear']", {'mlp': 'bilinear'}),
    ("dense.MlpBlock.activations = ('silu',)", {'mlp': 'swish'}),
    # Values that can't be known without running the file: nothing is said.
    ('dense.MlpBlock.activations = %ELSEWHERE', {'mlp': None}),
    ("dense.MlpBlock.activations = (@jax.nn.gelu, 'linear')", {'mlp': None}),
    # Under a scope in which the block may be called, or not.
    ("decoder/dense.MlpBlock.activations = ('relu', 'linear')", {'mlp': None}),
    ("decoder/dense.MlpBlock.activations = ('swish', 'linear')", {'mlp': 'swiglu'}),
    # A class that nothing refers to says nothing, and so doesn't contradict.
    (
      'flaxformer.components.attention.dense_attention.MultiQueryDotProductAttention'
      '.rescale_logits = True',
      {},
    ),
    ('x.y = @layer_norm.T5LayerNorm', {}),
  ],
)
def test_bindings(binding, expected):
  assert vars(said(f'{FLAXFORMER}{binding}\n')) == {**vars(UNSCALED), **expected}


def test_scoped_references_take_the_values_of_their_scopes():
  text = FLAXFORMER.replace('@dense.MlpBlock()', '@decoder/mlp/dense.MlpBlock()')
  text += "decoder/dense.MlpBlock.activations = ('gelu', 'linear')\n"
  assert said(text).mlp == 'geglu'
  assert said(f"{text}encoder/dense.MlpBlock.activations = ('relu',)\n").mlp == 'geglu'


def test_a_file_of_another_model_says_nothing():
  for text in ('', 'X = 3\n', DECODER_ONLY.replace('t5x.examples.decoder_only', 'mine')):
    assert not said(text).stated()
  ours = 'from t5x_inference_ext.t5x import models\nMODEL = @models.InferenceModel()\n'
  assert not said(ours).stated()


@pytest.mark.parametrize(
  'text,words',
  [
    ('dense.MlpBlock.activations = (', 'is no gin file, or is damaged'),
    ('\0', 'is no gin file, or is damaged'),
    (FLAXFORMER.replace("'swish', 'linear'", "'tanh', 'linear'"), "activations .'tanh', 'linear'."),
    (FLAXFORMER.replace("'swish', 'linear'", "'linear', 'swish'"), "activations .'linear', 'swi"),
    (FLAXFORMER + 'layer_norm.T5LayerNorm.epsilon = "x"\n', 'norm_epsilon must be a number'),
    (
      FLAXFORMER.replace('use_rotary_embedding', 'use_extra_logit'),
      'use_extra_logit=True of attention is not supported',
    ),
  ],
)
def test_files_that_are_refused(text, words):
  with pytest.raises(CheckpointError, match=f'config.gin.*{words}') as caught:
    said(text)
  assert '\n' not in str(caught.value)


@pytest.fixture
def unscaled(testdata, tmp_path):
  """A checkpoint in its model directory, without config.gin."""
  source = testdata / 't5x_families' / 'flaxformer_split_unscaled' / 'checkpoint_0'
  return shutil.copytree(source, tmp_path / 'model' / 'checkpoint_0')


@pytest.mark.parametrize('inside', [False, True])
def test_the_runs_own_file_is_found(unscaled, inside, tmp_path):
  """In the model directory, where T5X writes it, or copied into the checkpoint."""
  file = (unscaled if inside else unscaled.parent) / 'config.gin'
  file.write_text(FLAXFORMER)
  checkpoint = open_checkpoint(unscaled)
  assert checkpoint.config == open_checkpoint(unscaled, **UNSCALED.stated()).config
  assert {s.source for s in checkpoint.conventions.values()} == {str(file)}
  assert f'mlp: swiglu ({file})' in checkpoint.notes
  convert(str(unscaled), str(tmp_path / 'out'))
  recorded = open_checkpoint(tmp_path / 'out')
  assert f'rescale_logits: False (recorded: {file})' in recorded.notes
  assert recorded.conventions['rescale_logits'].value is False


def test_precedence(unscaled):
  """The stock model in front, then the run's file; what the user asks for may only agree."""
  file = unscaled.parent / 'config.gin'
  file.write_text(FLAXFORMER)
  front = Conventions(**{**UNSCALED.stated(), 'mlp': 'geglu'})
  checkpoint = open_checkpoint(unscaled, stock=lambda: front)
  assert checkpoint.config.mlp == 'geglu'
  assert f'  mlp is swiglu by {file}, which {checkpoint.conventions["mlp"].source} overrules' in (
    checkpoint.notes
  )
  assert open_checkpoint(unscaled, mlp='swiglu').config.mlp == 'swiglu'
  config = open_checkpoint(unscaled).config
  assert open_checkpoint(unscaled, config=config).config == config
  for arguments in ({'mlp': 'geglu'}, {'rescale_logits': True}, {'norm_scale': 'zero'}):
    ((name, value),) = arguments.items()
    with pytest.raises(CheckpointError, match=f'{name}={value} was given, but it is .*config.gin'):
      open_checkpoint(unscaled, **arguments)
  other = type(config)(**{**config.to_dict(), 'mlp': 'geglu'})
  with pytest.raises(CheckpointError, match='mlp=geglu was given with the model, but it is swiglu'):
    open_checkpoint(unscaled, config=other)
  # What the file leaves open, the user says.
  file.write_text(FLAXFORMER.replace("('swish', 'linear')", '%ELSEWHERE'))
  with pytest.raises(CheckpointError, match='do not show mlp.*config.gin does not say it either'):
    open_checkpoint(unscaled)
  assert open_checkpoint(unscaled, mlp='swiglu').config == config


def test_palms_layer_alone_has_defaults(tmp_path):
  """They are printed as assumed; a file beside the checkpoint replaces them."""
  path = synthetic.write_legacy(tmp_path / 'c', synthetic.fused(synthetic.canonical()))
  checkpoint = open_checkpoint(path)
  assert checkpoint.config == synthetic.CONFIG
  assert {s.source for s in checkpoint.conventions.values()} == {"assumed, PaLM's"}
  assert set(checkpoint.conventions) == set(UNSCALED.stated())
  (path / 'config.gin').write_text(FLAXFORMER)
  found = open_checkpoint(path)
  assert found.config.norm_scale == 'one' and found.conventions['rescale_logits'].value is False


def test_a_run_with_other_heads_is_not_this_ones(unscaled):
  file = unscaled.parent / 'config.gin'
  attention = 'flaxformer.components.attention.dense_attention.MultiHeadDotProductAttention'
  file.write_text(f'{FLAXFORMER}{attention}.num_heads = 7\n')
  with pytest.raises(CheckpointError, match=r'num_heads=7 .*config.gin.* the kernels have 5'):
    open_checkpoint(unscaled)


def test_relative_and_rotary_positions_at_once_are_refused(testdata, tmp_path):
  source = testdata / 't5x_families' / 'flaxformer_relpos_geglu' / 'checkpoint_0'
  path = shutil.copytree(source, tmp_path / 'c')
  told = FAMILIES['flaxformer_relpos_geglu']
  with pytest.raises(CheckpointError, match='rotary positions too: only one is supported'):
    open_checkpoint(path, **told, stock=lambda: UNSCALED)
  with pytest.raises(
    CheckpointError, match=r'positions=none \(given\), but .* has a relative bias'
  ):
    open_checkpoint(path, **told, positions='none')


def test_what_a_conversion_recorded(tmp_path):
  """A tree that this package wrote says all in its manifest, and a damaged one says so.

  Its queries are those of a model that rescales, whatever the trained model did.
  """
  source = synthetic.write_legacy(tmp_path / 'c', synthetic.fused(synthetic.canonical()))
  convert(str(source), str(tmp_path / 'out'), format='t5x_float', norm_scale='one')
  ((file, found),) = recorded_conventions(str(tmp_path / 'out'))
  assert (found.norm_scale, found.rescale_logits) == ('one', True)
  checkpoint = open_checkpoint(tmp_path / 'out', stock=lambda: UNSCALED)
  assert checkpoint.config.norm_scale == 'one'
  assert checkpoint.conventions['rescale_logits'].value is True
  assert any(note.startswith('  rescale_logits is False by T5X') for note in checkpoint.notes)
  for content in ('{"model": {"mlp": 3}}', '{}', '['):
    (tmp_path / 'out' / 't5x_inference_ext.json').write_text(content)
    with pytest.raises(CheckpointError, match=f'{file} is damaged'):
      open_checkpoint(tmp_path / 'out')
  (tmp_path / 'out' / 't5x_inference_ext.json').unlink()
  (tmp_path / 'out' / 'config.gin').write_bytes(b'\xff')
  with pytest.raises(CheckpointError, match='is not UTF-8'):
    open_checkpoint(tmp_path / 'out')
