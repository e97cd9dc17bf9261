"""The infer command with public models: ids in and out, their own BOS and end ids, no others."""

import json
import shutil

import numpy as np
import pytest

from t5x_inference_ext.checkpoints import convert
from t5x_inference_ext.commands import infer
from t5x_inference_ext.runs import loading
from tests.text import vocabularies

pytestmark = pytest.mark.usefixtures('quick_programs')

IDS = [17, 90, 4, 61, 33]


@pytest.fixture
def command(tmp_path, capsys):
  """Runs rows through the command in this process; returns (rows out, stdout), or the error."""

  def run(checkpoint, rows, *flags):
    prompts, output = tmp_path / 'prompts.jsonl', tmp_path / 'out.jsonl'
    prompts.write_text('\n'.join(map(json.dumps, rows)))
    code = infer.run(
      [
        'infer',
        f'--checkpoint={checkpoint}',
        f'--prompts={prompts}',
        f'--output={output}',
        '--overwrite',
        '--dtype=float32',
        '--mesh=1x1x1',
        *flags,
      ]
    )
    out, err = capsys.readouterr()
    if code:
      return err
    return [json.loads(line) for line in output.read_text().splitlines()], out

  return run


@pytest.fixture(scope='module')
def smollm2(testdata):
  """A model without a tokenizer, whose rows end with 2."""
  return testdata / 'families' / 'smollm2'


@pytest.fixture(scope='module')
def converted(smollm2, tmp_path_factory):
  path = tmp_path_factory.mktemp('converted') / 'model'
  convert.convert(str(smollm2), str(path), weights='bfloat16')
  return path


@pytest.fixture
def lettered(smollm2, tmp_path):
  """The model with a tokenizer beside it that puts 1 in front."""
  shutil.copytree(smollm2, tmp_path / 'lettered')
  (tmp_path / 'lettered' / 'tokenizer.json').write_bytes(vocabularies.letters_json())
  return tmp_path / 'lettered'


@pytest.fixture(scope='module')
def golden(smollm2):
  return np.load(smollm2 / 'golden.npz')


def _ended(tokens, ends):
  """Return tokens up to the first of `ends`, and why the row ends there."""
  place = next((i for i, token in enumerate(tokens) if token in ends), None)
  return (tokens, 'length') if place is None else (tokens[: place + 1], 'eos')


def _outcomes(rows):
  return [(row['tokens'], row['finish_reason']) for row in rows]


@pytest.mark.parametrize('batching', ['continuous', 'static'])
def test_ids_in_and_ids_out(command, smollm2, converted, golden, tmp_path, batching):
  """Tokens are transformers' of the ids as they are, from the source and from its conversion; a row
  ends with every end id of the model.
  """
  greedy = golden['greedy'].tolist()
  rows = [{'prompt': golden['prompt'].tolist()}, {'prompt': IDS}]
  flags = ('--max_new_tokens=24', f'--batching={batching}')
  found, out = command(smollm2, rows, *flags)
  assert _outcomes(found)[0] == _ended(greedy, [2])
  assert 'vocabulary: none (no tokenizer.json or tokenizer.model is beside the model): ' in out
  assert [row['completion'] for row in found] == [None, None]
  again, _ = command(converted, rows, *flags)
  assert _outcomes(again) == _outcomes(found)
  # Two other ids end rows: the later one in the list comes first in the row.
  shutil.copytree(smollm2, tmp_path / 'm')
  ends = [greedy[9], greedy[5]]
  (tmp_path / 'm' / 'generation_config.json').write_text(json.dumps({'eos_token_id': ends}))
  found, _ = command(tmp_path / 'm', rows, *flags)
  assert _outcomes(found)[0] == _ended(greedy, ends) and len(found[0]['tokens']) <= 6


@pytest.mark.parametrize('batching', ['continuous', 'static'])
def test_a_vocabulary_brings_its_bos(command, smollm2, lettered, batching):
  """Beside the model or given, alike; the model's rows still end with its own end id."""
  flags = ('--max_new_tokens=8', f'--batching={batching}')
  given, out = command(
    smollm2, [{'prompt': 'ab'}], *flags, f'--vocabulary={lettered}/tokenizer.json'
  )
  beside, _ = command(lettered, [{'prompt': 'ab'}], *flags)
  ids = [1, *(3 + ord(c) - 32 for c in 'ab')]
  plain, _ = command(smollm2, [{'prompt': ids}], *flags)
  assert _outcomes(given) == _outcomes(beside) == _outcomes(plain)
  assert 'tokenizer.json (given)' in out and isinstance(given[0]['completion'], str)


def test_scores_are_of_the_ids_as_they_are(command, smollm2, lettered, golden):
  """Beside transformers' logits. A BOS in front changes them."""
  ids = golden['input_ids'].tolist()
  logits = golden['logits'].astype(np.float64)
  log_probs = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
  wanted = np.take_along_axis(log_probs[:, :-1], golden['input_ids'][:, 1:, None], -1)[..., 0]
  rows = [{'prompt': row[:n], 'tokens': row[n:]} for row, n in zip(ids, (1, 5))]
  flags = ('--mode=score', '--token_log_probs')
  found, _ = command(smollm2, rows, *flags)
  for row, each, n in zip(found, wanted, (1, 5)):
    np.testing.assert_allclose(row['log_probs'], each[n - 1 :], rtol=1e-4, atol=1e-4)
    assert row['score'] == pytest.approx(each[n - 1 :].sum(), rel=1e-5)
  other, _ = command(lettered, rows, *flags)
  assert abs(other[0]['score'] - found[0]['score']) > 1e-3
  with_bos = [{**row, 'prompt': [1, *row['prompt']]} for row in rows]
  spelled, _ = command(smollm2, with_bos, *flags)
  np.testing.assert_allclose([r['score'] for r in other], [r['score'] for r in spelled], rtol=1e-5)


@pytest.fixture
def before_weights(monkeypatch):
  """Fails a run that would load weights."""

  def load(*_, **__):
    raise AssertionError('weights were loaded')

  monkeypatch.setattr(loading, 'load_engine', load)


@pytest.mark.parametrize('mode', ['predict', 'score'])
def test_an_empty_prompt_without_a_bos(command, smollm2, before_weights, mode):
  rows = [{'prompt': IDS, 'tokens': [5]}, {'prompt': [], 'tokens': [5]}]
  error = command(smollm2, rows, f'--mode={mode}')
  assert 'prompts.jsonl:2: `prompt` is empty, and this model has no BOS to start from' in error


@pytest.mark.parametrize('mode', ['predict', 'score'])
def test_a_prompt_beyond_learned_positions(command, testdata, before_weights, mode):
  rows = [{'prompt': [5] * n, 'tokens': [5]} for n in (256, 257)]
  error = command(testdata / 'families' / 'gpt2', rows, f'--mode={mode}')
  assert 'prompts.jsonl:2: ' in error and 'prompts.jsonl:1: ' not in error
  assert '257 tokens to read, BOS included, and the model learned only 256 positions' in error


@pytest.mark.parametrize('batching', ['continuous', 'static'])
def test_a_row_ends_with_the_learned_positions(command, testdata, batching):
  """No row fails, and one that comes to its end is as long as there are positions."""
  rng = np.random.default_rng(0)
  rows = [{'prompt': rng.integers(3, 131, n).tolist()} for n in (250, 256, 20)]
  found, _ = command(
    testdata / 'families' / 'gpt2', rows, '--max_new_tokens=12', f'--batching={batching}'
  )
  assert all(row['finish_reason'] != 'error' for row in found)
  for row, most in zip(found, (7, 1, 12)):
    assert row['finish_reason'] == 'eos' or len(row['tokens']) == most
