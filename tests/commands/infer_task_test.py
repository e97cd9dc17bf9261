"""The infer command over seqio tasks: T5X's rows and files, from gin."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from t5x_inference_ext.commands import infer
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.runs import loading

pytestmark = pytest.mark.usefixtures('quick_programs')

GIN_FILE = '--gin_file=t5x_inference_ext/configs/runs/infer.gin'
MODULE = """
import json
import numpy as np
import seqio
import tensorflow as tf

def rows(split, shuffle_files, seed=None):
  with open({golden!r}) as file:
    greedy = json.load(file)
  return tf.data.Dataset.from_tensor_slices({{
      'inputs': [row['prompt'] for row in greedy],
      'targets': [row['greedy_text'] for row in greedy]}})

vocabulary = seqio.ByteVocabulary()
for name, add_eos in (('golden_prompts', False), ('golden_prompts_eos', True)):
  seqio.TaskRegistry.add(
      name, source=seqio.FunctionDataSource(rows, splits=['test']),
      preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
      output_features={{'inputs': seqio.Feature(vocabulary, add_eos=False),
                       'targets': seqio.Feature(vocabulary, add_eos=add_eos)}})
seqio.TaskRegistry.add(
    'wide_vocabulary', source=seqio.FunctionDataSource(rows, splits=['test']),
    preprocessors=[seqio.preprocessors.tokenize],
    output_features={{name: seqio.Feature(seqio.ByteVocabulary(extra_ids=1000), add_eos=False)
                     for name in ('inputs', 'targets')}})

def ids(split, shuffle_files, seed=None):
  return tf.data.Dataset.from_tensor_slices({{
      'inputs': np.arange(3, 19, dtype=np.int32).reshape(2, 8),
      'targets': np.arange(40, 52, dtype=np.int32).reshape(2, 6)}})

seqio.TaskRegistry.add(
    'ids', source=seqio.FunctionDataSource(ids, splits=['test']), preprocessors=[],
    output_features={{name: seqio.Feature(seqio.PassThroughVocabulary(131), add_eos=False)
                     for name in ('inputs', 'targets')}})
seqio.MixtureRegistry.add(
    'golden_mixture', ['golden_prompts', 'golden_prompts_eos'], default_rate=1.0)
"""


@pytest.fixture(scope='module')
def greedy(golden):
  return json.loads((golden / 'greedy.json').read_text())


@pytest.fixture(scope='module')
def task_directory(golden, tmp_path_factory):
  directory = tmp_path_factory.mktemp('tasks')
  (directory / 'golden_tasks.py').write_text(MODULE.format(golden=str(golden / 'greedy.json')))
  return directory


@pytest.fixture
def command(task_directory, palm_tiny, tmp_path, capsys, monkeypatch):
  """Runs the command with gin macros; (exit code, stdout, stderr)."""
  monkeypatch.syspath_prepend(task_directory)
  defaults = {
    'CHECKPOINT_PATH': str(palm_tiny),
    'INFER_OUTPUT_DIR': str(tmp_path / 'out'),
    'DTYPE': 'float32',
    'MIXTURE_OR_TASK_NAME': 'golden_prompts',
    'MIXTURE_OR_TASK_MODULE': 'golden_tasks',
    'TASK_FEATURE_LENGTHS': {'inputs': 48, 'targets': 16},
    'BATCH_SIZE': 8,
    'MAX_NEW_TOKENS': 16,
  }

  def run(*flags, **macros):
    macros = {**defaults, **macros}
    code = infer.run(
      ['infer', GIN_FILE, *flags, *(f'--gin.{k}={v!r}' for k, v in macros.items() if v is not ...)]
    )
    return code, *capsys.readouterr()

  return run


def _rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_predict_writes_t5x_rows(task_directory, palm_tiny, greedy, repository, tmp_path):
  """As a user runs it, in a process. T5X's file (max_decode_steps=16) has the same bytes."""
  output = tmp_path / 'new' / 'out'
  macros = {
    'CHECKPOINT_PATH': str(palm_tiny),
    'INFER_OUTPUT_DIR': str(output),
    'DTYPE': 'float32',
    'MESH': '2x2x2',
    'MIXTURE_OR_TASK_NAME': 'golden_prompts',
    'MIXTURE_OR_TASK_MODULE': 'golden_tasks',
  }
  flags = [f'--gin.{name}="{value}"' for name, value in macros.items()]
  result = subprocess.run(
    [
      sys.executable,
      '-m',
      't5x_inference_ext.infer',
      GIN_FILE,
      *flags,
      '--gin.TASK_FEATURE_LENGTHS={"inputs": 48, "targets": 16}',
      '--gin.MAX_NEW_TOKENS=16',
    ],
    capture_output=True,
    text=True,
    timeout=120,
    cwd=repository,
    env={
      **os.environ,
      'PYTHONPATH': os.pathsep.join([str(task_directory), os.environ.get('PYTHONPATH', '')]),
    },
  )
  assert result.returncode == 0, result.stderr
  assert 'mesh: 2x2x2 (given)' in result.stdout and 'tokens/s' in result.stdout
  expected = ''.join(
    json.dumps(
      {
        'inputs': {
          'inputs_pretokenized': row['prompt'],
          'targets_pretokenized': row['greedy_text'],
        },
        'prediction': row['greedy_text'][:16],
      }
    )
    + '\n'
    for row in greedy
  )
  assert (output / 'golden_prompts-predict.jsonl-00000-of-00001').read_text() == expected
  assert (output / 'golden_prompts-predict.jsonl-00000-of-00001.COMPLETED').read_text() == ''
  assert "MIXTURE_OR_TASK_NAME = 'golden_prompts'" in (output / 'config.gin').read_text()
  record = json.loads((output / 'infer.config.json').read_text())
  assert record['mesh'] == '2x2x2'
  assert record['golden_prompts']['time']['tokens'] == 8 * 16


def test_without_a_limit_rows_fill_the_sequence(command, greedy, tmp_path):
  """As T5X: prompt and prediction together take inputs + targets."""
  code, _, err = command(MAX_NEW_TOKENS=None)
  assert code == 0, err
  rows = _rows(tmp_path / 'out' / 'golden_prompts-predict.jsonl-00000-of-00001')
  for row, g in zip(rows, greedy, strict=True):
    assert len(row['prediction']) == 64 - len(g['prompt_tokens'])
    assert row['prediction'][:48] == g['greedy_text'][: len(row['prediction'])]


def test_mixture_shards_and_completed_tasks(command, greedy, tmp_path):
  """One file a task; a completed task is not run again; shards divide the examples."""
  flags = dict(MIXTURE_OR_TASK_NAME='golden_mixture', MODE='predict_with_aux', NUM_SHARDS=2)
  code, _, err = command(**flags)
  assert code == 0, err
  code, _, err = command(**flags, SHARD_ID=1)
  assert code == 0, err
  out = tmp_path / 'out'
  halves = [_rows(out / f'golden_prompts-predict_with_aux.jsonl-0000{i}-of-00002') for i in (0, 1)]
  assert [row['prediction'] for row in halves[0]] == [g['greedy_text'][:16] for g in greedy[::2]]
  assert [row['prediction'] for row in halves[1]] == [g['greedy_text'][:16] for g in greedy[1::2]]
  assert all(row['aux']['scores'] < 0 for row in halves[0])
  eos = out / 'golden_prompts_eos-predict_with_aux.jsonl-00001-of-00002'
  assert _rows(eos) == halves[1]
  eos.write_text('kept')
  code, stdout, _ = command(**flags, SHARD_ID=1)
  assert code == 0
  assert stdout.count('skipped') == 2
  assert eos.read_text() == 'kept'


def test_several_predictions_come_from_the_worst_to_the_best(command, greedy, tmp_path):
  """As T5X's return_all_decodes has them; each ends before a text of STOP."""
  code, out, err = command(
    MODE='predict_with_aux', NUM_DECODES=3, TEMPERATURE=0.5, TOP_K=8, STOP=['e'], BATCH_SIZE=4
  )
  assert code == 0, err
  rows = _rows(tmp_path / 'out' / 'golden_prompts-predict_with_aux.jsonl-00000-of-00001')
  assert len(rows) == len(greedy) and '8 rows, ' in out
  for row in rows:
    assert len(row['prediction']) == 3 and row['aux']['scores'] == sorted(row['aux']['scores'])
    assert not any('e' in text for text in row['prediction'])
  assert any(len(text) < 16 for row in rows for text in row['prediction'])
  record = json.loads((tmp_path / 'out' / 'infer.config.json').read_text())
  assert record['num_decodes'] == 3 and record['sampling']['top_k'] == 8


@pytest.mark.parametrize(
  'macros, says',
  [
    (dict(NUM_DECODES=2, BATCHING='static'), 'num_decodes needs batching=continuous'),
    (dict(NUM_DECODES=2, MODE='score'), 'num_decodes is for runs that generate'),
    (dict(STOP='ab'), "STOP must be a list, got 'ab'"),
    (dict(STOP=['']), "stop must be texts that are not empty, got ['']"),
    (dict(TEMPERATURE=-1.0), 'temperature must be 0 or more, got -1.0'),
    (dict(LOGIT_BIAS={400: 1.0}), 'logit_bias or stop holds token 400'),
  ],
)
def test_ways_to_choose_that_can_t_be(command, macros, says):
  code, _, err = command(**macros)
  assert code == 2 and err.startswith('error: ') and says in err and err.count('\n') == 1


def test_scores_are_those_of_the_targets_after_the_inputs(command, greedy, palm_tiny, tmp_path):
  """With and without EOS on the targets, which are trimmed to 16, EOS and all, as seqio does."""
  code, _, err = command(MIXTURE_OR_TASK_NAME='golden_mixture', MODE='score')
  assert code == 0, err
  inputs, targets = np.zeros((8, 64), np.int32), np.zeros((8, 64), np.int32)
  weights = np.zeros((8, 64), np.float32)
  for i, row in enumerate(greedy):
    prompt, target = row['prompt_tokens'][:48], row['greedy_tokens'][:16]
    targets[i, : len(prompt) + 16] = prompt + target
    weights[i, len(prompt) : len(prompt) + 16] = 1
  inputs[:, 1:] = targets[:, :-1]
  expected = Engine.load(palm_tiny, mesh='2x2x2', dtype='float32').score(inputs, targets, weights)
  for task in ('golden_prompts', 'golden_prompts_eos'):
    rows = _rows(tmp_path / 'out' / f'{task}-score.jsonl-00000-of-00001')
    assert [row['score'] for row in rows] == pytest.approx(expected.tolist(), rel=1e-5)
    assert rows[1].keys() == {'inputs', 'score'}


def test_targets_alone_are_scored_whole(command, greedy, palm_tiny, tmp_path):
  code, _, err = command(MODE='score', TASK_FEATURE_LENGTHS={'targets': 16})
  assert code == 0, err
  targets = np.array([row['greedy_tokens'][:16] for row in greedy])
  inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
  expected = Engine.load(palm_tiny, mesh='2x2x2', dtype='float32').score(inputs, targets)
  rows = _rows(tmp_path / 'out' / 'golden_prompts-score.jsonl-00000-of-00001')
  assert [row['score'] for row in rows] == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_public_model_has_its_own_bos_or_none(command, testdata, tmp_path):
  """Not T5X's, which seqio puts in front: predictions and scores are those of the ids alone."""
  family = testdata / 'families' / 'smollm2'
  lengths = {'inputs': 8, 'targets': 6}
  macros = {'CHECKPOINT_PATH': str(family), 'MIXTURE_OR_TASK_NAME': 'ids', 'MESH': '1x1x1'}
  macros |= {'TASK_FEATURE_LENGTHS': lengths, 'MAX_NEW_TOKENS': 6}

  def rows(mode):
    code, _, err = command(**macros, MODE=mode)
    assert code == 0, err
    return _rows(tmp_path / 'out' / f'ids-{mode}.jsonl-00000-of-00001')

  engine = Engine.load(family, mesh='1x1x1', dtype='float32')
  inputs = np.arange(3, 19).reshape(2, 8)
  targets = np.arange(40, 52).reshape(2, 6)
  wanted = [c.tokens for c in engine.generate(inputs, max_new_tokens=6, eos_id=1)]
  found = [row['prediction'] for row in rows('predict')]
  assert [each[: len(w)] for each, w in zip(found, wanted)] == wanted
  scored = [row['score'] for row in rows('score')]
  wanted = engine.score_completions(list(zip(inputs, targets)))
  np.testing.assert_allclose(scored, [sum(each) for each in wanted], rtol=1e-5)
  code, _, err = command(
    **{**macros, 'TASK_FEATURE_LENGTHS': {'targets': 6}, 'MODE': 'score'},
    INFER_OUTPUT_DIR=str(tmp_path / 'alone'),
  )
  assert code == 2 and 'no inputs in front of its targets, and this model has no BOS' in err


def test_model_config_and_limits(command, greedy, tmp_path):
  """A preset that the checkpoint agrees with, and a limit of the user's."""
  code, _, err = command(
    '--gin_file=t5x_inference_ext/configs/models/palm_tiny.gin', MAX_NEW_TOKENS=4
  )
  assert code == 0, err
  rows = _rows(tmp_path / 'out' / 'golden_prompts-predict.jsonl-00000-of-00001')
  assert [row['prediction'] for row in rows] == [g['greedy_text'][:4] for g in greedy]


@pytest.mark.parametrize(
  'macros, says',
  [
    (
      {'MIXTURE_OR_TASK_NAME': 'golden_prompt'},
      "no seqio task or mixture is called 'golden_prompt': did you mean golden_prompts or "
      'golden_prompts_eos',
    ),
    ({'MIXTURE_OR_TASK_NAME': 'xyzzy'}, "no seqio task or mixture is called 'xyzzy'"),
    (
      {'MIXTURE_OR_TASK_NAME': ...},
      'MIXTURE_OR_TASK_NAME has no value: set it with --gin.MIXTURE_OR_TASK_NAME=',
    ),
    (
      {'MIXTURE_OR_TASK_MODULE': 'no_such_tasks'},
      "MIXTURE_OR_TASK_MODULE=no_such_tasks can't be imported",
    ),
    (
      {'MIXTURE_OR_TASK_NAME': 'wide_vocabulary'},
      'the vocabulary of inputs of task wide_vocabulary has 1259 ids',
    ),
    ({'SPLIT': 'train'}, "task golden_prompts has no split 'train'; it has test"),
    ({'TASK_FEATURE_LENGTHS': {'targets': 16}}, "TASK_FEATURE_LENGTHS has no 'inputs'"),
    (
      {'TASK_FEATURE_LENGTHS': {'inputs': 16}},
      "must give positive lengths of 'inputs' and 'targets'",
    ),
    ({'TASK_FEATURE_LENGTHS': {'inputs': 16, 'targets': 16, 'extra': 2}}, "has no feature 'extra'"),
    ({'CHECKPOINT_PATH': '/nowhere'}, 'no checkpoint at /nowhere'),
    ({'MODE': 'generate'}, "mode must be one of predict, predict_with_aux, score, got 'generate'"),
    ({'SHARD_ID': 1}, 'shard_id must be 0 to num_shards - 1 = 0, got 1'),
    ({'MESH': '3x1x1'}, 'd_model=256 does not divide'),
    ({'BATCHSIZE': 8}, 'gin: nothing uses BATCHSIZE'),
    ({'infer.batches': 8}, "doesn't have a parameter named 'batches'"),
    ({'nonsense.batches': 8}, "No configurable matching 'nonsense'"),
  ],
)
def test_bad_macros(command, monkeypatch, tmp_path, macros, says):
  """Said before weights are loaded, or a directory made."""

  def load(*_, **__):
    raise AssertionError('weights were loaded')

  monkeypatch.setattr(loading.Engine, 'load', load)
  code, _, err = command(**macros)
  assert code == 2
  assert says in err
  assert not (tmp_path / 'out').exists()


def test_a_checkpoint_of_another_model(command):
  code, _, err = command('--gin_file=t5x_inference_ext/configs/models/palm_8b.gin')
  assert code == 2
  assert 'error: ' in err and '256128' in err
