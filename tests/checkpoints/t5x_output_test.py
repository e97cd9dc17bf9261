"""T5X's format, written: round trips, in every arrangement of the tree."""

import numpy as np
import pytest

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import convert, open_checkpoint
from t5x_inference_ext.checkpoints.conversion import t5x_output
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError
from tests import reference
from tests.checkpoints import synthetic

BASE = dict(num_layers=2, d_model=16, d_ff=24, num_heads=4, d_head=6, vocab_size=12)
SERIAL = ModelConfig(
  **BASE, num_kv_heads=4, block='serial', mlp='gelu', norm='layer', norm_scale='one'
)
PARALLEL = ModelConfig(**BASE, num_kv_heads=4, norm_scale='one')
MULTIQUERY = ModelConfig(**BASE, block='serial')
# name: (the model, the scanned tree of its tensors, what else is done to the tree)
TREES = {
  'fused': (ModelConfig(**BASE), lambda t, c: synthetic.fused(t, c)),
  'fused, a subtree a layer': (
    ModelConfig(**BASE),
    lambda t, c: synthetic.per_layer(synthetic.fused(t, c)),
  ),
  'fused, layers first': (
    ModelConfig(**BASE),
    lambda t, c: synthetic.layers_first(synthetic.fused(t, c)),
  ),
  'serial': (SERIAL, lambda t, c: synthetic.separate(t, c)),
  'serial, split heads, qkv': (
    SERIAL,
    lambda t, c: synthetic.separate(t, c, split=True, attention='qkv'),
  ),
  'serial, kv and wi': (
    MULTIQUERY,
    lambda t, c: synthetic.separate(t, c, split=True, attention='kv', mlp='wi'),
  ),
  'parallel, split heads': (PARALLEL, lambda t, c: synthetic.separate(t, c, split=True)),
}


@pytest.fixture(params=TREES)
def tree(request, tmp_path, monkeypatch):
  """(config, its source checkpoint, its leaves)."""
  config, arrange = TREES[request.param]
  monkeypatch.setattr(t5x_output, 'CHUNK_BYTES', 500)  # many chunks
  leaves = arrange(reference.random_tensors(config), config)
  return config, synthetic.write_legacy(tmp_path / 'source', leaves, chunks=5), leaves


def read(path, config):
  told = {} if (path / 'serving_config.json').exists() else {'rescale_logits': True}
  return {
    name: t.read().astype(np.float32)
    for name, t in open_checkpoint(path, config=config, **told).tensors.items()
  }


def test_float_is_the_same_tree(tree, tmp_path):
  config, source, leaves = tree
  convert.convert(source, tmp_path / 'out', format='t5x_float', config=config, rescale_logits=True)
  checkpoint = open_checkpoint(tmp_path / 'out', config=config)
  assert (checkpoint.format, checkpoint.weights, checkpoint.step) == ('t5x', 'float32', 7)
  stored = {p.name for p in (tmp_path / 'out').iterdir() if p.is_dir()}
  assert stored == {f'target.{name.replace("/", ".")}' for name in leaves}
  for name, values in read(source, config).items():
    # 1/sqrt(2) is multiplied in and divided out again: one rounding each.
    tolerance = (
      1e-6 if 'output' in name and config.block == 'parallel' and config.num_kv_heads > 1 else 0
    )
    np.testing.assert_allclose(
      read(tmp_path / 'out', config)[name], values, rtol=tolerance, err_msg=name
    )


def test_there_and_back_is_within_the_rounding(tree, tmp_path):
  config, source, _ = tree
  convert.convert(source, tmp_path / 'int8', config=config, rescale_logits=True)
  convert.convert(tmp_path / 'int8', tmp_path / 'back', format='t5x_float')
  original, back, int8 = (read(tmp_path / n, config) for n in ('source', 'back', 'int8'))
  assert {p.name for p in (tmp_path / 'back').glob('target*')} == {
    p.name for p in source.glob('target*')
  }
  for name, p in params.parameters(config).items():
    if p.kind == 'matrix':
      step = int8[p.scale][:, None]
      assert (np.abs(back[name] - original[name]) <= 0.501 * step).all(), name
    else:
      np.testing.assert_allclose(
        back[name], original[name], rtol=2**-8 if p.kind == 'embedding' else 0, err_msg=name
      )


def test_int8_is_what_the_serving_checkpoint_has(tree, tmp_path):
  config, source, leaves = tree
  convert.convert(source, tmp_path / 'int8', config=config, rescale_logits=True)
  convert.convert(source, tmp_path / 't5x', format='t5x_int8', config=config, rescale_logits=True)
  names = {p.name for p in (tmp_path / 't5x').glob('target*')}
  assert names == {
    f'target.{name.replace("/", ".")}'.replace('.kernel', suffix)
    for name in leaves
    for suffix in ('.qkernel', '.qscale')
  }
  if config.block == 'parallel' and config.num_kv_heads > 1:
    with pytest.raises(CheckpointError, match='share one scale in a parallel block'):
      open_checkpoint(tmp_path / 't5x', config=config)
    return
  served, written = read(tmp_path / 'int8', config), read(tmp_path / 't5x', config)
  assert open_checkpoint(tmp_path / 't5x', config=config).weights == 'int8'
  for name, values in served.items():
    # Scales were stored as 1 / scale: a rounding each way.
    tolerance = 2**-8 if name == 'embedding' else 2e-7 if name.endswith('_scale') else 0
    np.testing.assert_allclose(written[name], values, rtol=tolerance, err_msg=name)


def test_a_tree_that_nobody_recorded(tmp_path):
  """Serving checkpoints of earlier versions do not say how their trees were arranged."""
  for config in (ModelConfig(**BASE), SERIAL, MULTIQUERY, PARALLEL):
    root = tmp_path / config.block / str(config.num_kv_heads)
    tensors = reference.random_tensors(config)
    leaves = (
      synthetic.separate if config.block == 'serial' or config.num_kv_heads > 1 else synthetic.fused
    )(tensors, config)
    source = synthetic.write_legacy(root / 'source', leaves)
    convert.convert(source, root / 'int8', config=config, rescale_logits=True)
    synthetic.rewrite_header(root / 'int8', lambda header: header['source'].pop('form'))
    convert.convert(root / 'int8', root / 'out', format='t5x_float')
    found = open_checkpoint(root / 'out')  # what the tree does not say, its manifest does
    assert found.config == config
    assert found.conventions['mlp'].source.endswith('/t5x_inference_ext.json')
    before, after = read(root / 'source', config), read(root / 'out', config)
    for name in before:
      np.testing.assert_allclose(
        after[name], before[name], atol=0.02 * np.abs(before[name]).max(), err_msg=name
      )


def test_no_layer_for_grouped_heads(tmp_path):
  config = ModelConfig(**BASE, num_kv_heads=2)
  with pytest.raises(CheckpointError, match='no layer with 4 query and 2 key/value heads'):
    t5x_output.usual_form(config)


@pytest.mark.parametrize(
  'shape,elements,expected',
  [
    ((2048, 33, 8, 2304), 2**24, (1024, 33, 8, 192)),
    ((8, 4), 64, (8, 4)),
    ((7, 3), 3, (1, 3)),
    ((6,), 1, (1,)),
  ],
)
def test_chunks_are_t5x_s(shape, elements, expected):
  chunk = t5x_output.t5x_chunk_shape(shape, elements)
  assert np.prod(chunk) <= elements and all(n % c == 0 for n, c in zip(shape, chunk))
  if shape[0] != 2048:
    assert chunk == expected
