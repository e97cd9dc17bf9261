"""Decoders that T5X users train, as T5X wrote them: their logits, once their conventions are told.

They are T5X's examples/decoder_only, and variants of flaxformer's DecoderLayer.
"""

import numpy as np
import pytest

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.checkpoints.conversion.verify import verify
from t5x_inference_ext.checkpoints.convert import convert
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.errors import CheckpointError
from tests import reference
from tests.checkpoints.families_test import logits_of

NORM = dict(norm_scale='one', norm_epsilon=1e-6)
ROTARY = dict(NORM, positions='rotary', rope_max_timescale=1e4)
RELATIVE = dict(NORM, relative_max_distance=128)
FAMILIES = {
  'decoder_only_tied': dict(RELATIVE, mlp='geglu', rescale_logits=False),
  'decoder_only_untied': dict(RELATIVE, mlp='geglu', rescale_logits=False),
  'flaxformer_relpos_geglu': dict(RELATIVE, mlp='geglu', rescale_logits=True),
  'flaxformer_rotary_geglu': dict(ROTARY, mlp='geglu', rescale_logits=True),
  'flaxformer_rotary_untied': dict(ROTARY, mlp='swiglu', rescale_logits=True),
  'flaxformer_split_unscaled': dict(ROTARY, mlp='swiglu', rescale_logits=False),
}
# (mesh, prefill, decode)
PAIRS = (
  ('2x2x2', 'wg_xyz/batch', 'ws_2d/batch'),
  ('2x2x2', 'ws_2d/heads', 'ws_2d/heads'),
  ('1x2x2', 'ws_1d/heads', 'ws_1d/batch'),
)


@pytest.fixture(params=FAMILIES)
def family(request, testdata):
  """(directory of a checkpoint, what its weights do not show, golden tokens, golden logits)."""
  directory = testdata / 't5x_families' / request.param
  with np.load(directory / 'golden.npz') as golden:
    tokens, logits = golden['input_tokens'], golden['logits']
  return directory / 'checkpoint_0', FAMILIES[request.param], tokens, logits


def _error(checkpoint, tokens, logits) -> float:
  tensors = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
  return float(np.abs(reference.logits(checkpoint.config, tensors, tokens) - logits).max())


def test_logits_are_t5xs(family):
  path, told, tokens, logits = family
  checkpoint = open_checkpoint(path, **told)
  assert _error(checkpoint, tokens, logits) < 1e-4
  assert {name: said.value for name, said in checkpoint.conventions.items()} == told


def test_nobody_says_them(family):
  """Every convention is asked for by name; each that is told is asked for no more."""
  path, told, _, _ = family
  with pytest.raises(CheckpointError) as caught:
    open_checkpoint(path)
  assert _asked(caught.value) == set(told)
  assert 'swiglu, geglu' in str(caught.value) and 'MODEL_CONFIG' in str(caught.value)
  for name in told:
    rest = {key: value for key, value in told.items() if key != name}
    with pytest.raises(CheckpointError) as caught:
      open_checkpoint(path, **rest)
    assert _asked(caught.value) == {name}


def _asked(error) -> set[str]:
  """The conventions that a message asks for."""
  listed = str(error).split('weights do not show ')[1].split('. ')[0]
  return {question.split()[0].rstrip(',') for question in listed.split('; ')}


def test_other_conventions_are_another_model(family):
  path, told, tokens, logits = family
  for change in (
    {'mlp': {'geglu': 'swiglu', 'swiglu': 'geglu'}[told['mlp']]},
    {'rescale_logits': not told['rescale_logits']},
    {'norm_scale': 'zero'},
  ):
    assert _error(open_checkpoint(path, **{**told, **change}), tokens, logits) > 0.05, change


@pytest.mark.parametrize('pair', PAIRS, ids=' '.join)
def test_the_program_computes_them(pair, testdata):
  """One family for each pair of layouts: a relative bias untied, rotary untied, unscaled."""
  name = dict(zip(PAIRS, ('decoder_only_untied', 'flaxformer_rotary_untied', 'decoder_only_tied')))
  directory = testdata / 't5x_families' / name[pair]
  mesh, prefill, decode = pair
  engine = Engine.load(
    directory / 'checkpoint_0',
    mesh=mesh,
    dtype='float32',
    prefill_layout=prefill,
    decode_layout=decode,
    scan_layers=True,
    **FAMILIES[name[pair]],
  )
  with np.load(directory / 'golden.npz') as golden:
    tokens, logits = golden['input_tokens'], golden['logits']
  rows = np.concatenate([tokens] * 4)
  found = np.asarray(logits_of(engine.model, engine.weights, rows))
  assert np.abs(found[: len(tokens)] - logits).max() < 1e-4
  prompt = tokens[0, 1:9].tolist()
  (row,) = engine.generate([prompt], max_new_tokens=6, eos_id=-1)
  assert list(row.tokens) == _greedy(directory, name[pair], prompt, 6)


def _greedy(directory, name, prompt, steps):
  """Greedy tokens by whole passes of the reference."""
  checkpoint = open_checkpoint(directory / 'checkpoint_0', **FAMILIES[name])
  tensors = {n: tensor.read() for n, tensor in checkpoint.tensors.items()}
  ids = [0, *prompt]
  for _ in range(steps):
    ids.append(int(reference.logits(checkpoint.config, tensors, np.array([ids]))[0, -1].argmax()))
  return ids[1 + len(prompt) :]


def test_a_serving_checkpoint_records_them_with_their_source(family, tmp_path):
  path, told, tokens, logits = family
  convert(str(path), str(tmp_path / 'out'), 'bfloat16', **told)
  checkpoint = open_checkpoint(tmp_path / 'out')
  assert {n: said.value for n, said in checkpoint.conventions.items()} == told
  assert {said.source for said in checkpoint.conventions.values()} == {'recorded: given'}
  assert 0 < _error(checkpoint, tokens, logits) < 0.05 * np.abs(logits).max()
  verify(str(tmp_path / 'out'), str(path))


def test_trees_that_are_not_written(testdata, tmp_path):
  for name in ('decoder_only_untied', 'flaxformer_rotary_geglu'):
    path = testdata / 't5x_families' / name / 'checkpoint_0'
    with pytest.raises(CheckpointError, match='not written as a T5X checkpoint'):
      convert(str(path), str(tmp_path / name), format='t5x_float', **FAMILIES[name])
