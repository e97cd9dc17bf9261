"""Calibrations: the inputs they record, what they make, kills, and texts that can't be used."""

import functools

import numpy as np
import pytest

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import convert, open_checkpoint
from t5x_inference_ext.checkpoints.calibration import passes
from t5x_inference_ext.checkpoints.calibration.rows import read_calibration
from t5x_inference_ext.checkpoints.conversion import files
from t5x_inference_ext.checkpoints.conversion.verify import verify
from t5x_inference_ext.checkpoints.load import load_weights
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError, UserError
from tests import reference
from tests.checkpoints import synthetic

BASE = dict(num_layers=2, d_model=16, d_ff=24, num_heads=4, d_head=6, vocab_size=40)
MODELS = {
  'parallel': dict(),
  'two norms': dict(parallel_norms=2, num_kv_heads=2, norm='layer', mlp='gelu'),
  'serial, local': dict(
    block='serial', num_kv_heads=2, window=3, layer_pattern=('local', 'global')
  ),
  'norms around, relative': dict(
    block='serial', num_kv_heads=4, norm_position='both', positions='relative', relative_buckets=8
  ),
}
ROWS, LENGTH = 3, 8
SMALL = ModelConfig(**BASE)


class Recorder:
  """A matrix that notes what it is multiplied by."""

  __array_ufunc__ = None

  def __init__(self, matrix):
    self.matrix, self.inputs = matrix, []

  def __rmatmul__(self, x):
    self.inputs.append(x)
    return x @ self.matrix


def recorded_by_the_reference(config, tensors, tokens, monkeypatch):
  """Inputs [tokens, inputs] of each matrix, for each layer."""
  matrices = [name for name, p in params.parameters(config).items() if p.kind == 'matrix']
  found = [{} for _ in range(config.num_layers)]

  def recording(original, names, y, t, *rest):
    own = {name: Recorder(t[name]) for name in matrices if name in t and name in names}
    out = original(y, {**t, **own}, *rest)
    layer = next(layer for layer in found if not set(own) & set(layer))
    layer.update({n: r.inputs[0].reshape(-1, r.inputs[0].shape[-1]) for n, r in own.items()})
    return out

  attention = ('query', 'key', 'value', 'attention_output')
  mlp = ('gate', 'linear', 'mlp_output')
  for function, names in ('_attention', attention), ('_mlp', mlp):
    original = getattr(reference, function)
    monkeypatch.setattr(reference, function, functools.partial(recording, original, names))
  reference.logits(config, tensors, tokens)
  return found


@pytest.mark.parametrize('model', MODELS)
def test_recorded_inputs_are_those_of_the_reference(model, monkeypatch):
  config = ModelConfig(**BASE, **MODELS[model])
  tensors = reference.random_tensors(config)
  tokens = np.random.default_rng(0).integers(0, 40, (ROWS, LENGTH)).astype(np.int32)
  expected = recorded_by_the_reference(config, tensors, tokens, monkeypatch)
  on_device = passes.one_device_model(config)
  weights = load_weights(reference.MemoryCheckpoint.of(config, tensors), on_device, stacked=False)
  x = passes.embed_tokens(on_device, weights, tokens)
  counted = np.ones(tokens.shape, bool)
  counted[1, 5:] = False
  for layer in range(config.num_layers):
    run = functools.partial(
      passes.run_layer,
      on_device,
      config.local_layers[layer],
      weights=weights.layers[layer],
      relative_bias=weights.relative_bias,
      x=x,
      counted=counted,
    )
    of_matrix, names = {}, []
    for part in config.block_parts:
      if part.mlp:
        of_matrix |= dict.fromkeys(config.mlp_inputs, f'{part.name}/w_in')
      if part.attention:
        where = 'attention' if config.has_two_norms(part) else 'w_in'
        of_matrix |= dict.fromkeys(('query', 'key', 'value'), f'{part.name}/{where}')
      names.append(f'{part.name}/w_out')
    hessians = run(recorded=(*dict.fromkeys(of_matrix.values()), *names))[1]
    for name, product in of_matrix.items():
      inputs = expected[layer][name][counted.ravel()]
      np.testing.assert_allclose(hessians[product], inputs.T @ inputs, rtol=1e-4, atol=1e-3)
    for part in config.block_parts:
      matrices = ['mlp_output'] * part.mlp + ['attention_output'] * part.attention
      inputs = np.concatenate([expected[layer][n] for n in matrices], 1)[counted.ravel()]
      found = hessians[f'{part.name}/w_out']
      np.testing.assert_allclose(found, inputs.T @ inputs, rtol=1e-4, atol=1e-3)
    x = run(recorded=())[0]


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
  """A file of token ids."""
  path = tmp_path_factory.mktemp('tokens') / 'tokens.npy'
  np.save(path, np.random.default_rng(0).integers(1, 40, (24, 16)))
  return path


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  leaves = synthetic.fused(reference.random_tensors(SMALL), SMALL)
  return synthetic.write_legacy(tmp_path_factory.mktemp('source') / 'checkpoint_1', leaves)


def difference(path, source, tokens):
  """Mean square of the change of the logits."""
  inputs = np.load(tokens)[:, :-1]
  arrays = [{n: t.read() for n, t in open_checkpoint(p).tensors.items()} for p in (source, path)]
  arrays[1] = reference.dequantized(SMALL, arrays[1])
  before, after = (reference.logits(SMALL, each, inputs) for each in arrays)
  return np.square(after - before).mean()


@pytest.mark.parametrize('bits', [None, 'embedding:8,mlp_output:8'])
def test_a_calibrated_checkpoint(source, tokens, tmp_path, bits, monkeypatch):
  """The layers are calibrated for the embedding that is served."""
  calibrated, rounded = tmp_path / 'calibrated', tmp_path / 'rounded'
  embed, seen = passes.embed_tokens, []

  def embed_tokens(model, weights, tokens):
    seen.append(np.asarray(weights.embedding))
    return embed(model, weights, tokens)

  monkeypatch.setattr(passes, 'embed_tokens', embed_tokens)
  report = convert.convert(source, calibrated, 'int4', bits=bits, calibration=str(tokens))
  convert.convert(source, rounded, 'int4', bits=bits)
  assert difference(calibrated, source, tokens) < 0.9 * difference(rounded, source, tokens)
  found = open_checkpoint(calibrated)
  assert found.weights == open_checkpoint(rounded).weights
  assert report.errors['query'].relative > 0.05 and report.errors['mlp_output'].norm > 0
  served = reference.dequantized(SMALL, {n: t.read() for n, t in found.tensors.items()})
  if bits is not None:
    np.testing.assert_array_equal(seen[0][: SMALL.vocab_size], served['embedding'], strict=True)
  assert verify(calibrated)
  with pytest.raises(CheckpointError, match='was made with a calibration text'):
    verify(calibrated, str(source))
  assert [p.name for p in tmp_path.iterdir()] == ['calibrated', 'rounded']


def test_public_models_and_serving_checkpoints_as_sources(testdata, tokens, tmp_path):
  """Two kinds of layers, norms around both block parts, soft caps; from float32 and bfloat16."""
  family, floats = testdata / 'families' / 'gemma2', tmp_path / 'floats'
  convert.convert(family, floats, 'bfloat16')
  scales = []
  for number, path in enumerate((family, floats)):
    convert.convert(path, tmp_path / str(number), 'int4', calibration=str(tokens))
    found = open_checkpoint(tmp_path / str(number))
    assert found.weights == 'int4'
    scales.append(found.tensors['mlp_output_scale'].read())
  assert np.isfinite(scales).all() and np.abs(scales).min() > 0
  # Nearly the same weights have nearly the same scales, but for some signs.
  assert np.isclose(*np.abs(scales), rtol=0.1).mean() > 0.8


def test_rows_of_a_text(palm_tiny, tmp_path):
  path, checkpoint = tmp_path / 'text', open_checkpoint(palm_tiny)
  text = 'def main():\n  return 1\n' * 60  # 1380 bytes: two whole rows
  path.write_text(text, encoding='utf-8')
  rows = read_calibration(str(path), checkpoint)
  ids = np.reshape(checkpoint.vocabulary.encode(text)[:1024], (2, 512))
  np.testing.assert_array_equal(rows.inputs[:, 1:], ids[:, :-1])
  assert (rows.inputs[:, 0] == checkpoint.bos_id).all() and rows.counted.all()
  path.write_text('short', encoding='utf-8')
  assert read_calibration(str(path), checkpoint).inputs.shape == (1, 5)


def test_zeros_at_the_end_of_a_row_do_not_count(palm_tiny, tmp_path):
  np.save(tmp_path / 'ids.npy', [[5, 0, 7, 0, 0], [0] * 5, [1, 2, 3, 4, 0]])
  rows = read_calibration(str(tmp_path / 'ids.npy'), open_checkpoint(palm_tiny))
  np.testing.assert_array_equal(rows.inputs, [[0, 5, 0, 7], [0, 1, 2, 3]])
  np.testing.assert_array_equal(rows.counted, [[1, 1, 1, 0], [1, 1, 1, 1]])


class Killed(BaseException):
  """Ends a process as a kill does: nothing is cleaned up."""


def test_killed_before_every_change_of_a_file(source, tokens, tmp_path, monkeypatch):
  run = functools.partial(
    convert.convert, source, weights='int4', calibration=str(tokens), workers=1
  )
  run(output_checkpoint=tmp_path / 'whole')
  expected = synthetic.contents(tmp_path / 'whole')
  names = ('write_file', 'allocate', 'write_blocks', 'publish', 'remove_file', 'append_line')
  originals = {name: getattr(files, name) for name in names}
  kills, out = 0, tmp_path / 'out'
  while not out.exists():
    calls = [0]

    def counting(name, *arguments, calls=calls, last=kills + 1):
      calls[0] += 1
      if calls[0] == last:
        raise Killed
      return originals[name](*arguments)

    for name in names:
      monkeypatch.setattr(files, name, functools.partial(counting, name))
    try:
      run(output_checkpoint=out)
    except Killed:
      kills += 1
      assert kills < 200
  for name, original in originals.items():
    monkeypatch.setattr(files, name, original)
  assert kills > 10
  assert synthetic.contents(out) == expected


HOSTILE = {
  'no file': (None, 'no file at calibration='),
  'empty': (np.zeros((0, 8), np.int32), 'holds no token other than 0'),
  'padding': (np.zeros((2, 8), np.int32), 'holds no token other than 0'),
  'floats': (np.ones((2, 8)), 'must hold whole numbers'),
  'one row': (np.ones(8, np.int32), r'must hold whole numbers \[rows, length\]'),
  'negative': (np.full((1, 4), -3), 'holds token -3, outside the vocabulary of 40'),
  'too large': (np.full((1, 4), 40), 'holds token 40, outside the vocabulary of 40'),
  'too long': (np.ones((1, 4097), np.int32), 'rows of 4097 tokens, and at most 4096'),
}


@pytest.mark.parametrize('kind', HOSTILE)
def test_token_files_that_cannot_be_used(source, tmp_path, kind):
  ids, message = HOSTILE[kind]
  path = tmp_path / 'tokens.npy'
  if ids is not None:
    np.save(path, ids)
  with pytest.raises(UserError, match=message):
    convert.convert(source, tmp_path / 'out', 'int4', calibration=str(path))
  assert not (tmp_path / 'out.unfinished').exists()


@pytest.mark.parametrize(
  'name, data, vocabulary, message',
  [
    ('text', b'', 'bytes', 'is empty'),
    ('text', b'\xff\xfe', 'bytes', r'is no UTF-8 text \(byte 0\)'),
    ('text', b'some text', None, 'has no vocabulary to read'),
    ('tokens.npy', b'some text', None, 'is no .npy file'),
  ],
)
def test_texts_that_cannot_be_used(palm_tiny, source, tmp_path, name, data, vocabulary, message):
  (tmp_path / name).write_bytes(data)
  path = source if vocabulary is None else palm_tiny
  with pytest.raises(UserError, match=message):
    convert.convert(path, tmp_path / 'out', 'int4', calibration=str(tmp_path / name))


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(weights='bfloat16'), 'is for int8 and int4 weights'),
    (dict(format='t5x_int8'), 'is for int8 and int4 weights of a serving checkpoint, not for t5x'),
    (dict(scale_search='mse'), 'is for rounding without a calibration'),
    (dict(num_shards=2), 'is done by one process'),
  ],
)
def test_options_that_exclude_a_calibration(source, tokens, tmp_path, options, message):
  with pytest.raises(UserError, match=message):
    convert.convert(
      source, tmp_path / 'out', calibration=str(tokens), **{'weights': 'int4', **options}
    )


def test_quantized_sources_are_not_rounded_again(source, tokens, tmp_path):
  convert.convert(source, tmp_path / 'int8', 'int8')
  with pytest.raises(UserError, match='holds int8 weights, which are rounded already'):
    convert.convert(tmp_path / 'int8', tmp_path / 'out', 'int8', calibration=str(tokens))


def test_activations_that_are_not_finite(tokens, tmp_path):
  arrays = reference.random_tensors(SMALL)
  arrays['mlp_output'][0] *= 1e30
  arrays['linear'][0] *= 1e30
  path = synthetic.write_legacy(tmp_path / 'checkpoint_1', synthetic.fused(arrays, SMALL))
  with pytest.raises(CheckpointError, match='NaN or infinite activations|too large for float32'):
    convert.convert(path, tmp_path / 'out', 'int4', calibration=str(tokens))
  assert not (tmp_path / 'out').exists()
