"""The infer command: plain flags and gin, rows in and out, and errors."""

import errno
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import sentencepiece

from t5x_inference_ext.checkpoints import convert
from t5x_inference_ext.commands import convert_checkpoint, infer
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.runs import loading, memory, prompts_file
from t5x_inference_ext.text import settings as text_settings
from tests.text import vocabularies

pytestmark = pytest.mark.usefixtures('quick_programs')

FLAGS = ('--dtype=float32', '--max_new_tokens=48')


@pytest.fixture(scope='module')
def greedy(golden):
  return json.loads((golden / 'greedy.json').read_text())


@pytest.fixture
def command(capsys):
  """Runs the command in this process: (exit code, stdout, stderr)."""

  def run(*flags):
    code = infer.run(['infer', *map(str, flags)])
    return code, *capsys.readouterr()

  return run


@pytest.fixture
def complete(command, palm_tiny, tmp_path):
  """Runs rows through the plain command; (rows out, stdout)."""

  def run(rows, *flags, name='out.jsonl', checkpoint=palm_tiny):
    prompts = _write(tmp_path / 'prompts.jsonl', rows)
    code, out, err = command(
      f'--checkpoint={checkpoint}',
      f'--prompts={prompts}',
      f'--output={tmp_path / name}',
      '--dtype=float32',
      *flags,
    )
    assert code == 0, err
    return _read(tmp_path / name), out

  return run


@pytest.fixture
def complaint(command, palm_tiny, tmp_path, monkeypatch):
  """Errors of the plain command over a prompts file (text), before weights are loaded."""

  def load(*_, **__):
    raise AssertionError('weights were loaded')

  monkeypatch.setattr(loading.Engine, 'load', load)

  def run(text, *flags):
    prompts = tmp_path / 'prompts.jsonl'
    prompts.write_text(text, encoding='utf-8')
    code, _, err = command(
      f'--checkpoint={palm_tiny}',
      f'--prompts={prompts}',
      f'--output={tmp_path / "out.jsonl"}',
      *flags,
    )
    assert code == 2
    assert err.startswith('error: ')
    assert not (tmp_path / 'out.jsonl').exists()
    return err

  return run


def _write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
  return path


def _read(path):
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def test_plain_command_without_tensorflow(palm_tiny, greedy, tmp_path):
  """README's command, in a process of its own: T5X's tokens, and no framework imported."""
  output = tmp_path / 'completions.jsonl'
  prompts = _write(tmp_path / 'prompts.jsonl', [{'prompt': row['prompt']} for row in greedy])
  script = (
    'import runpy, sys\n'
    'try:\n'
    '  runpy.run_module("t5x_inference_ext.infer", run_name="__main__", alter_sys=True)\n'
    'except SystemExit as exit:\n'
    '  assert not {"tensorflow", "seqio", "t5x", "flax"} & set(sys.modules), "frameworks"\n'
    '  raise\n'
  )
  result = subprocess.run(
    [
      sys.executable,
      '-c',
      script,
      f'--checkpoint={palm_tiny}',
      f'--prompts={prompts}',
      f'--output={output}',
      *FLAGS,
      '--temperature=0',
      '--mesh=2x2x2',
    ],
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, 'JAX_DEFAULT_MATMUL_PRECISION': 'highest'},
  )
  assert result.returncode == 0, result.stderr
  rows = _read(output)
  assert [row['prompt'] for row in rows] == [row['prompt'] for row in greedy]
  assert [row['tokens'] for row in rows] == [row['greedy_tokens'] for row in greedy]
  assert [row['completion'] for row in rows] == [row['greedy_text'] for row in greedy]
  assert all(
    row.keys() == {'prompt', 'completion', 'tokens', 'score', 'finish_reason'} and row['score'] < 0
    for row in rows
  )
  for said in (
    'mesh: 2x2x2',
    "norm_scale: zero (assumed, PaLM's)",
    'vocabulary: bytes',
    'compiling: ',
    'tokens/s',
    'compilation',
    f'wrote {output}',
  ):
    assert said in result.stdout
  record = json.loads((tmp_path / 'completions.jsonl.config.json').read_text())
  assert record['mesh'] == '2x2x2'
  assert record['model']['norm_scale'] == 'zero'
  assert record['vocabulary']['name'] == 'bytes'
  assert record['time']['tokens'] == 8 * 48


def test_scoring_the_output_of_a_run_gives_its_scores(complete, greedy):
  rows, _ = complete([{'prompt': g['prompt']} for g in greedy], *FLAGS, '--mesh=2x2x2')
  assert [row['tokens'] for row in rows] == [g['greedy_tokens'] for g in greedy]
  scored, out = complete(rows, '--mode=score', '--mesh=2x2x2', name='scored.jsonl')
  assert '384 tokens scored' in out
  assert [row['score'] for row in scored] == pytest.approx([row['score'] for row in rows], rel=1e-5)
  assert [{**row, 'score': 0} for row in scored] == [{**row, 'score': 0} for row in rows]
  told, _ = complete(rows, '--mode=score', '--mesh=2x2x2', '--token_log_probs', name='told.jsonl')
  assert [len(row['log_probs']) for row in told] == [48] * 8
  assert [sum(row.pop('log_probs')) for row in told] == pytest.approx(
    [row['score'] for row in told], rel=1e-5
  )
  assert told == scored
  # Completions in text, where there are no tokens: these hold no EOS, so they are the same.
  texts = [{'prompt': row['prompt'], 'completion': row['completion']} for row in rows]
  rescored, _ = complete(texts, '--mode=score', '--mesh=2x2x2', name='rescored.jsonl')
  assert [row['score'] for row in rescored] == [row['score'] for row in scored]


def test_rows_of_every_kind(complete):
  """Text and ids, empty and not, with fields of the user's; a batch that the mesh rounds up."""
  ids = [b + 3 for b in b'def f(']
  rows, out = complete(
    [
      {'prompt': 'def f('},
      {'prompt': ids, 'id': 7},
      {'prompt': ''},
      {'prompt': []},
      {'prompt': 'é'},
    ],
    '--max_new_tokens=8',
    '--batch_size=5',
  )
  assert 'mesh: 2x2x2 (all that divide the model)' in out
  assert 'batch: 8 rows (5 does not divide over the mesh 2x2x2' in out
  assert rows[0]['tokens'] == rows[1]['tokens']
  assert rows[1]['prompt'] == ids and rows[1]['id'] == 7
  assert rows[2]['tokens'] == rows[3]['tokens'] and len(rows[2]['tokens']) == 8
  assert len(rows) == 5
  assert '5 rows, 40 tokens generated' in out


def test_a_rows_sample_depends_on_its_seed_and_place_alone(complete):
  """Not on the batch size, the mesh, nor on what else is in the batch."""
  prompts = [{'prompt': p} for p in ('def f(', 'def f(', 'import ', 'class A', 'for i in')]
  sampling = ('--max_new_tokens=8', '--temperature=1', '--top_k=50', '--top_p=0.9')
  one, _ = complete(prompts, *sampling, '--seed=3', '--mesh=2x2x2', name='1')
  assert one[0]['tokens'] != one[1]['tokens']
  two, out = complete(
    prompts[:3], *sampling, '--seed=3', '--mesh=2x1x1', '--batch_size=2', name='2'
  )
  assert 'batch: 2 rows' in out
  assert [row['tokens'] for row in two] == [row['tokens'] for row in one[:3]]
  other, _ = complete(prompts, *sampling, '--seed=4', '--mesh=2x2x2', name='3')
  assert all(a['tokens'] != b['tokens'] for a, b in zip(one, other))


def test_sentencepiece_vocabulary(complete, repository, tmp_path):
  text = (repository / 'LICENSE').read_text().splitlines()
  model = tmp_path / 'words'
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(text),
    model_prefix=str(model),
    vocab_size=300,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  rows, out = complete(
    [{'prompt': 'the License'}], '--max_new_tokens=8', f'--vocabulary={model}.model'
  )
  assert f'vocabulary: {model}.model (given)' in out
  processor = sentencepiece.SentencePieceProcessor(model_file=f'{model}.model')
  same, _ = complete(
    [{'prompt': processor.encode('the License')}],
    '--max_new_tokens=8',
    f'--vocabulary={model}.model',
    name='ids.jsonl',
  )
  assert same[0]['tokens'] == rows[0]['tokens']
  known = [t for t in rows[0]['tokens'] if 1 < t < 300]
  # Prompt and completion are the decoding of all ids together: the first space stays.
  prompt = processor.encode('the License')
  assert 'the License' + rows[0]['completion'] == processor.decode([*prompt, *known])
  assert rows[0]['completion'].startswith(' ')


@pytest.fixture(scope='module')
def with_tokenizer(palm_tiny, tmp_path_factory):
  """palm_tiny as a serving checkpoint with a byte-level tokenizer.json."""
  root = tmp_path_factory.mktemp('with_tokenizer')
  (root / 'tokenizer.json').write_bytes(vocabularies.byte_level_json())
  convert.convert(palm_tiny, root / 'out', vocabulary=str(root / 'tokenizer.json'))
  return root / 'out'


@pytest.mark.parametrize('batching', ['continuous', 'static'])
def test_a_stop_is_found_whatever_tokens_write_it(complete, with_tokenizer, batching):
  """The checkpoint's own vocabulary is taken. Every token is " the", so that the stop text "the t"
  comes as other tokens than those it is encoded into.
  """
  vocabulary = vocabularies.of_kind('byte_level')
  (the,) = vocabulary.encode(' the')
  assert vocabulary.encode('the t')[0] != the
  rows, out = complete(
    [{'prompt': 'of'}],
    *('--max_new_tokens=4', '--mesh=1x1x1', f'--batching={batching}', '--stop=the t'),
    f'--logit_bias={{"{the}": 1e9}}',
    checkpoint=with_tokenizer,
  )
  assert 'tokenizer.json (recorded)' in out
  assert rows[0]['completion'] == ' '
  # The score of a static batch is that of all its tokens.
  assert rows[0]['tokens'] == [the] * (2 if batching == 'continuous' else 4)


def test_text_to_score_is_encoded_with_its_prompt(complete, with_tokenizer):
  vocabulary = vocabularies.of_kind('byte_level')
  rows, _ = complete(
    [
      {'prompt': 'of t', 'completion': 'he License'},
      {'prompt': vocabulary.encode('of'), 'tokens': vocabulary.encode(' the License')},
    ],
    *('--mode=score', '--mesh=1x1x1'),
    checkpoint=with_tokenizer,
  )
  assert rows[0]['tokens'] == rows[1]['tokens'] == vocabulary.encode(' the License')
  assert rows[0]['score'] == rows[1]['score']
  assert rows[0]['completion'] == 'he License'


def test_without_a_vocabulary_ids_still_work(complete, monkeypatch):
  """As for any model that has not 384 rows, where no --vocabulary is given."""
  monkeypatch.setattr(text_settings, 'BYTE_ROWS', 0)
  rows, out = complete([{'prompt': [103, 104, 105]}], '--max_new_tokens=8')
  assert 'vocabulary: none (not known for 384 rows' in out
  assert rows[0]['completion'] is None and len(rows[0]['tokens']) == 8


def test_overwrite_replaces_and_a_failed_run_leaves_nothing(complete, tmp_path, monkeypatch):
  complete([{'prompt': 'a'}], '--max_new_tokens=8')
  rows, _ = complete([{'prompt': 'b'}], '--max_new_tokens=8', '--overwrite')
  assert [row['prompt'] for row in rows] == ['b']

  def fail(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(Scheduler, 'step', fail)
  before = sorted(os.listdir(tmp_path))
  with pytest.raises(AssertionError, match='interrupted'):
    complete([{'prompt': 'c'}], '--max_new_tokens=8', '--overwrite')
  assert _read(tmp_path / 'out.jsonl') == rows
  assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize('batching', ['continuous', 'static'])
def test_an_interrupted_run_goes_on_where_it_stopped(complete, tmp_path, monkeypatch, batching):
  """Rows that were done are not done again; another run does not take them for its own."""
  prompts = [{'prompt': 'def f('[:i]} for i in range(6)]
  flags = (
    '--max_new_tokens=6',
    '--batch_size=2',
    '--mesh=1x1x1',
    '--temperature=1',
    f'--batching={batching}',
  )
  whole, _ = complete(prompts, *flags, name='whole.jsonl')
  keep = prompts_file.Journal.keep

  def interrupted(self, row, result):
    keep(self, row, result)
    if len(self.done) == 4:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(prompts_file.Journal, 'keep', interrupted)
    with pytest.raises(AssertionError, match='interrupted'):
      complete(prompts, *flags)
  assert {p.name for p in tmp_path.glob('.*')} == {'.out.jsonl.unfinished'} and not (
    tmp_path / 'out.jsonl'
  ).exists()
  _, out = complete(prompts, *flags, '--seed=1', name='other.jsonl')
  assert 'resumed' not in out
  rows, out = complete(prompts, *flags)
  assert 'resumed: 4 of 6 rows were done' in out and '2 rows, 12 tokens generated' in out
  assert rows == whole
  assert not list(tmp_path.glob('.*'))


def test_batching_changes_no_row(complete):
  """With a prefix that most prompts share, short chunks, and one prompt between steps."""
  begin = 'import os\nimport sys\n\n\ndef '
  prompts = [{'prompt': begin + name} for name in ('main', 'f(x', 'read_', 'a')] + [
    {'prompt': 'x'},
    {'prompt': begin},
  ]
  flags = '--max_new_tokens=7', '--mesh=2x1x1', '--temperature=0.7', '--top_k=40', '--batch_size=4'
  static, out = complete(prompts, *flags, '--batching=static', name='static.jsonl')
  assert 'refilled' not in out
  rows, out = complete(prompts, *flags, '--prefill_chunk=16', '--prefill_budget=1')
  assert (
    'batch: 4 rows, refilled as they end' in out
    and 'programs, at most 7: first chunks of 16 tokens' in out
  )
  assert [{**r, 'score': 0} for r in rows] == [{**r, 'score': 0} for r in static]
  assert [r['score'] for r in rows] == pytest.approx([r['score'] for r in static], rel=1e-5)


def test_drafts_change_no_row(complete, palm_tiny, tmp_path):
  """Rows have equal tokens with both kinds of drafts, and the record counts drafts.

  As its own draft model, the model is right except at rows' ends.
  """
  rows = [{'prompt': 'x = [1, 1, 1, 1, 1, '}, {'prompt': 'import os\nimport sys\nimport '}]
  flags = ('--max_new_tokens=24', '--mesh=1x1x1', '--top_log_probs=2')
  plain, out = complete(rows, *flags, name='plain.jsonl')
  assert 'tokens a step' not in out
  for speculate in ('ngram:4', f'draft:{palm_tiny}:3'):
    found, out = complete(rows, *flags, f'--speculate={speculate}', '--overwrite')
    assert [row['tokens'] for row in found] == [row['tokens'] for row in plain]
    assert [row['score'] for row in found] == pytest.approx([row['score'] for row in plain])
    record = json.loads((tmp_path / 'out.jsonl.config.json').read_text())
    drafts = record['time']['drafts']
    assert record['speculate'] == speculate
    assert f'{drafts["accepted"]} of {drafts["drafted"]} draft tokens accepted' in out
    assert drafts['generated'] == 2 * 23 and drafts['accepted'] > 0
    assert drafts['tokens_per_step'] == drafts['generated'] / drafts['row_steps'] > 1


def test_drafts_that_cannot_be(complaint, tmp_path):
  prompt = '{"prompt": "a"}\n'
  assert 'a draft has 1 to 16 tokens' in complaint(prompt, '--speculate=ngram:99')
  assert 'no checkpoint' in complaint(prompt, f'--speculate=draft:{tmp_path}/none:4')
  assert 'speculate needs batching=continuous' in complaint(
    prompt, '--speculate=ngram:4', '--batching=static'
  )


def test_an_int8_cache(complete, tmp_path):
  """Both batchings give equal tokens; the run's record holds the dtype of the cache."""
  rows = [{'prompt': 'def f(x):\n'}, {'prompt': 'import '}]
  flags = ('--max_new_tokens=8', '--mesh=1x1x1')
  floats, _ = complete(rows, *flags, name='float.jsonl')
  found, out = complete(rows, *flags, '--cache=int8')
  static, _ = complete(rows, *flags, '--cache=int8', '--batching=static', name='static.jsonl')
  assert 'int8 cache' in out
  assert json.loads((tmp_path / 'out.jsonl.config.json').read_text())['cache'] == 'int8'
  assert [r['tokens'] for r in found] == [r['tokens'] for r in static]
  assert [r['score'] for r in found] != [r['score'] for r in floats]


def test_several_samples_of_each_prompt(complete):
  """Every sample has its own seed, in order; one sample of a row alone is the row's."""
  prompts = [{'prompt': 'def f(', 'id': 1}, {'prompt': 'import '}, {'prompt': 'def f('}]
  flags = '--max_new_tokens=6', '--temperature=1', '--mesh=2x1x1', '--batch_size=4'
  rows, out = complete(prompts, *flags, '--num_decodes=3')
  assert [row.keys() for row in rows] == [{'prompt', 'id', 'samples'}, *[{'prompt', 'samples'}] * 2]
  assert all(
    sample.keys() == {'completion', 'tokens', 'score', 'finish_reason'}
    for row in rows
    for sample in row['samples']
  )
  assert len({tuple(sample['tokens']) for row in rows for sample in row['samples']}) == 9
  assert '3 rows, 54 tokens generated' in out
  again, _ = complete(prompts[:1] * 3, *flags, '--batch_size=2', name='one.jsonl')
  # Samples have seeds as rows of a file would: the first prompt's three are those of three rows.
  assert [row['tokens'] for row in again] == [sample['tokens'] for sample in rows[0]['samples']]


def test_what_is_told_of_tokens(complete, greedy):
  """Log-probabilities of greedy tokens are those of the most likely; scoring gives the same."""
  prompts = [{'prompt': g['prompt']} for g in greedy[:3]]
  rows, _ = complete(prompts, '--max_new_tokens=5', '--top_log_probs=3', '--mesh=1x1x1')
  assert len(rows) == 3
  for row in rows:
    assert [len(top) for top in row['top_log_probs']] == [3] * 5
    assert [top[0] for top in row['top_log_probs']] == [
      list(pair) for pair in zip(row['tokens'], row['log_probs'])
    ]
    assert all(top[0][1] >= top[1][1] >= top[2][1] for top in row['top_log_probs'])
    assert row['score'] == pytest.approx(sum(row['log_probs']), rel=1e-6)
  scored, _ = complete(
    rows, '--mode=score', '--token_log_probs', '--mesh=1x1x1', name='scored.jsonl'
  )
  for row, told in zip(rows, scored):
    assert told['log_probs'] == pytest.approx(row['log_probs'], rel=1e-4)
  without, _ = complete(
    prompts, '--max_new_tokens=5', '--token_log_probs', '--mesh=1x1x1', name='without.jsonl'
  )
  assert without == [{k: v for k, v in row.items() if k != 'top_log_probs'} for row in rows]


@pytest.mark.parametrize('batching', ['continuous', 'static'])
def test_texts_end_rows_and_biases_move_them(complete, greedy, batching):
  """A row's text ends before the stop, its tokens with it."""
  flags = '--max_new_tokens=12', '--mesh=1x1x1', f'--batching={batching}'
  golden = greedy[0]['greedy_text'][:12]
  stop = golden[4:6]
  cut = golden.index(stop)
  rows, _ = complete([{'prompt': greedy[0]['prompt']}], *flags, f'--stop={stop}', '--stop=never')
  assert rows[0]['completion'] == golden[:cut]
  assert rows[0]['tokens'] == greedy[0]['greedy_tokens'][: cut + 2]
  first = greedy[0]['greedy_tokens'][0]
  rows, _ = complete(
    [{'prompt': greedy[0]['prompt']}],
    *flags,
    f'--logit_bias={{"{first}": -Infinity, "60": 1e9}}',
    name='biased.jsonl',
  )
  assert rows[0]['tokens'] == [60] * 12


def test_rows_that_say_themselves_how(complete, greedy):
  """Each as a run with its options would have it; what it says comes out with it."""
  prompt, flags = greedy[0]['prompt'], ('--max_new_tokens=8', '--mesh=1x1x1', '--seed=2')
  golden, stop = greedy[0]['greedy_text'], greedy[0]['greedy_text'][2]
  rows, _ = complete(
    [
      {'prompt': prompt},
      {'prompt': prompt, 'sampling': {'temperature': 1, 'top_k': 20, 'seed': 5}},
      {'prompt': prompt, 'sampling': {'max_new_tokens': 3}},
      {'prompt': prompt, 'sampling': {'stop': stop}},
      {'prompt': prompt, 'grammar': {'regex': '[0-9]{3}-[a-f]{2}'}},
      {
        'prompt': prompt,
        'sampling': {'stop': [[7, 7], golden[3:5]], 'logit_bias': {'60': 1e9}, 'max_new_tokens': 2},
      },
    ],
    *flags,
  )
  assert rows[0]['completion'] == golden[:8]
  assert rows[1]['sampling'] == {'temperature': 1, 'top_k': 20, 'seed': 5}
  alone, _ = complete(
    [{'prompt': prompt, 'sampling': {'seed': 5}}],
    *flags,
    '--temperature=1',
    '--top_k=20',
    name='alone',
  )
  assert rows[1]['tokens'] == alone[0]['tokens'] != rows[0]['tokens']
  assert rows[2]['completion'] == golden[:3]
  assert rows[3]['completion'] == golden[: golden.index(stop)]
  assert re.fullmatch('[0-9]{3}-[a-f]{2}', rows[4]['completion'])
  assert rows[5]['tokens'] == [60, 60]
  scored, _ = complete(rows[1:2], '--mode=score', '--mesh=1x1x1', name='scored')
  assert scored[0]['sampling'] == rows[1]['sampling']


@pytest.mark.parametrize(
  'sampling, says',
  [
    ('3', '"sampling" must be an object such as {"temperature": 0.7}, not the number 3'),
    (
      '{"temprature": 1}',
      "prompts.jsonl:1: `sampling` has 'temprature', but can only have temperature, top_k",
    ),
    ('{"temperature": "hot"}', "temperature must be a number, got 'hot'"),
    ('{"top_k": 1.5}', 'top_k must be a whole number, got 1.5'),
    ('{"top_p": 0}', 'top_p must be above 0'),
    ('{"max_new_tokens": 65}', "max_new_tokens must be 1 to 64, the run's, got 65"),
    ('{"seed": -1}', 'seed must be 0 to 2**32 - 1'),
    ('{"stop": [""]}', 'stop must be a text, or a list of texts'),
    ('{"stop": [[400]]}', 'logit_bias or stop holds token 400'),
    ('{"logit_bias": {"a": 1}}', 'logit_bias must be an object that maps token ids to numbers'),
    ('{"logit_bias": {"3": ' + '9' * 400 + '}}', 'prompts.jsonl:1: logit_bias must be an object'),
    ('{"logit_bias": {"3": true}}', 'logit_bias must be an object that maps token ids to numbers'),
    ('{"stop": "\\ud800"}', "prompts.jsonl:1: stop='\\ud800' is not valid Unicode"),
    ('{"temperature": ' + '9' * 400 + '}', 'temperature must be 0 or more and at most 3.4e+38'),
    ('{"max_new_tokens": "x"}', "max_new_tokens must be a whole number, got 'x'"),
    ('{"temprature' + 'x' * 10**5 + '": 1}', '...xxxx'),
    ('{"seed": 1, "seed": 1}', "'seed' is given twice"),
    ('{"logit_bias": {"03": 1}}', 'logit_bias must be an object that maps token ids to numbers'),
    ('{"logit_bias": {" 3": 1}}', 'logit_bias must be an object that maps token ids to numbers'),
    ('{"logit_bias": {"3": "1"}}', 'logit_bias must be an object that maps token ids to numbers'),
    ('{"logit_bias": {"3": NaN}}', 'it holds NaN'),
    ('{"seed": 1.5}', 'seed must be a whole number, got 1.5'),
  ],
)
def test_rows_that_say_it_wrong(complaint, sampling, says):
  assert says in complaint(f'{{"prompt": "a", "sampling": {sampling}}}\n')


@pytest.mark.parametrize(
  'grammar, says',
  [
    ('3', 'a grammar is an object with one of json_schema, json_object, regex and lark'),
    ('{"regex": "("}', 'prompts.jsonl:1: grammar: the regex is not one that can be used: unclosed'),
    ('{"json_schema": {"type": "\\u001b"}}', 'Invalid type: \\x1b'),
  ],
)
def test_rows_with_grammars_that_cannot_be_used(complaint, grammar, says):
  assert says in complaint(f'{{"prompt": "a", "grammar": {grammar}}}\n')


def test_a_static_batch_has_one_way_for_all(complaint):
  assert '`grammar` or `sampling`, which need batching=continuous' in complaint(
    '{"prompt": "a", "sampling": {"temperature": 1}}\n', '--batching=static'
  )


def test_the_tutorial_shows_what_explain_layout_prints(command, palm_tiny, repository, tmp_path):
  out = tmp_path / 'int8'
  arguments = f'--input={palm_tiny}', f'--output={out}', '--weights=int8'
  assert convert_checkpoint.run(['convert_checkpoint', *arguments]) == 0
  layouts = '--prefill_layout=wg_xyz/batch', '--decode_layout=ws_2d/batch'
  code, printed, _ = command(f'--checkpoint={out}', '--mesh=2x2x2', *layouts, '--explain_layout')
  assert code == 0
  tutorial = (repository / 'docs' / 'tutorial.md').read_text(encoding='utf-8')
  shown = re.search(r'^  tensor .*\n(?:  .+\n)+', tutorial, re.MULTILINE)[0]
  assert shown.count('\n') == 6 and shown in printed


def test_help_shows_examples_and_flags(command):
  """Flags stand in the order that a user needs them, and lines fit a terminal."""
  code, out, _ = command('--help')
  assert code == 0
  assert '--gin_file=t5x_inference_ext/configs/runs/infer.gin' in out
  assert '  --max_new_tokens: Maximum number of new tokens of each row. Default: 64.\n' in out
  assert re.findall(r'^[A-Z].*:$', out.partition('\nRequired:')[2], re.MULTILINE) == [
    'Common:',
    'Choosing tokens:',
    'Written for each token:',
    'Sharding, memory and compilation:',
    'Batching:',
    'Adapters:',
    'What the weights of a T5X checkpoint do not show:',
    'Several processes:',
    'Gin:',
  ]
  flags = re.findall(r'^  --(\w+)', out.partition('\nRequired:')[2], re.MULTILINE)
  wanted = ['checkpoint', 'prompts', 'output', 'replay', 'max_new_tokens']
  assert flags[:5] == wanted and len(flags) == 54
  assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
  'text, says',
  [
    ('{"prompt": "a"}\n{"prompt": "b"\n', 'prompts.jsonl:2: not JSON'),
    ('[1, 2]\n', 'prompts.jsonl:1: a row is an object such as {"prompt": "def f("}, not a list'),
    ('\n{"text": "a"}\n', 'prompts.jsonl:2: no "prompt" (it has \'text\')'),
    ('{"prompt": 3}\n', '"prompt" must be text or a list of token ids, not the number 3'),
    ('{"prompt": [3, 1.5]}\n', 'the list holds the number 1.5'),
    ('{"prompt": [true]}\n', 'the list holds true or false'),
    (
      '{"prompt": [4, 384]}\n',
      "prompts.jsonl:1: `prompt` holds token 384, outside the model's vocabulary: ids are 0 to 383",
    ),
    ('{"prompt": "\\ud800"}\n', 'prompts.jsonl:1: `prompt` is not valid Unicode'),
    ('\n\n', 'has no rows'),
    (
      '{"prompt": "a", "prompt": "b"}',
      "prompts.jsonl:1: not JSON that can be used ('prompt' is gi",
    ),
    (
      '{"prompt": "a"}\n{"prompt": "a", "x": NaN}',
      'prompts.jsonl:2: not JSON that can be used (it',
    ),
    ('\n{"' + 'k' * 10**5 + '": 1}', 'kkkk...kkkk'),
    ('{' + ','.join(f'"k{i}": 1' for i in range(99)) + '}', "'k11' and 87 more"),
    ('{"\\u001b[31m\\nerror: ": 1}', 'no "prompt" (it has \'\\x1b[31m\\nerror: \')'),
    ('{"prompt": "a"}\0', 'prompts.jsonl:1: not JSON'),
    ('{"prompt": ' + '[' * 100_000 + '\n', 'prompts.jsonl:1: not JSON that can be used (nested'),
    ('{"prompt": "a", "x": ' + '[' * 300 + ']' * 300 + '}\n', 'prompts.jsonl:1: not JSON that can'),
    ('{"prompt": [' + '9' * 5000 + ']}\n', 'not JSON that can be used (a number has too many'),
    ('{"prompt": [' + '9' * 400 + ']}\n', "outside the model's vocabulary: ids are 0 to 383"),
  ],
)
def test_bad_rows(complaint, text, says):
  assert says in complaint(text)


@pytest.mark.parametrize('before, line', [(b'', 1), (b'\r\n', 2), (b'{"prompt": "a"}\n\r', 3)])
def test_a_row_that_is_not_utf8(complaint, tmp_path, before, line):
  """The line is named, far from the file's beginning too."""
  path = tmp_path / 'latin.jsonl'
  for padding in (0, 40_000):
    path.write_bytes(before + b'{"prompt": "' + b' ' * padding + b'\xe9"}\n')
    assert f'latin.jsonl:{line}: the line is not UTF-8' in complaint('', f'--prompts={path}')


def test_every_bad_row_is_listed(complaint):
  error = complaint('{"prompt": "a"}\nx\n' + '{}\n' * 20)
  assert "21 row(s) of the prompts file can't be used" in error
  assert (
    'prompts.jsonl:2: not JSON' in error and 'prompts.jsonl:11: no "prompt" (it is empty)' in error
  )
  assert '... and 11 more rows' in error


@pytest.mark.parametrize(
  'flags, says',
  [
    (
      ['--cache_length=64'],
      'prompts.jsonl:2: the prompt is longer than the cache: 17 tokens, and there is room for 0',
    ),
    (
      ['--cache_length=80'],
      'there is room for 16 beside the new ones: shorten it, raise --cache_length',
    ),
    (['--cache_length=63'], 'cache_length=63 has no room for max_new_tokens=64'),
    (['--mode=score'], 'prompts.jsonl:1: no "completion" to score'),
    (['--mesh=4x4x1'], 'mesh 4x4x1 needs 16 devices and there are 8'),
    (['--mesh=3x1x1'], 'd_model=256 does not divide over the 3 devices of the mesh 3x1x1'),
    (['--mesh=' + '9' * 5000 + 'x1x1'], 'a mesh is written XxYxZ'),
    (['--mesh=99999x9x9'], 'mesh 99999x9x9 needs 8099919 devices and there are 8'),
    (['--mesh=2x2'], 'a mesh is written XxYxZ'),
    (['--checkpoint=/nowhere/checkpoint_1'], 'no checkpoint at /nowhere/checkpoint_1'),
    (['--prompts=/nowhere.jsonl'], 'no prompts file at /nowhere.jsonl'),
    (['--output=/nowhere/out.jsonl'], "the output's directory /nowhere does not exist"),
    (['--vocabulary=nowhere.model'], 'no vocabulary at nowhere.model'),
    (['--temperature=-1'], 'temperature must be 0 or more, got -1.0'),
    (['--top_p=0'], 'top_p must be above 0'),
    (['--max_new_tokens=0'], 'max_new_tokens must be a whole number, 1 or more, got 0'),
    (['--batch_size=0'], 'batch_size must be a whole number, 1 or more'),
    (['--seed=-1'], 'seed must be a whole number, 0 or more'),
    (['--dtype=float16'], '--dtype'),
    (['--token_log_probs', '--batching=static'], 'token_log_probs needs batching=continuous'),
    (
      ['--num_decodes=2', '--batching=static'],
      'num_decodes needs batching=continuous: a static batch gives one sample',
    ),
    (
      ['--num_decodes=2', '--executable=there'],
      "num_decodes can't be used with the executable there",
    ),
    (['--num_decodes=2', '--mode=score'], 'num_decodes is for runs that generate'),
    (['--top_log_probs=2', '--mode=score'], 'top_log_probs is for runs that generate'),
    (['--stop=x', '--mode=score'], 'stop is for runs that generate'),
    (['--logit_bias={"1": 2}', '--mode=score'], 'logit_bias is for runs that generate'),
    (['--num_decodes=0'], 'num_decodes must be a whole number, 1 or more'),
    (['--top_log_probs=385'], 'top_log_probs=385 is more than the vocabulary of 384'),
    (['--stop='], 'stop must be texts that are not empty'),
    (['--logit_bias={1: 2}'], 'logit_bias is not JSON'),
    (['--logit_bias=[1, 2]'], 'logit_bias must be an object that maps token ids to numbers'),
    (['--logit_bias=' + '[' * 100_000], 'logit_bias is not JSON that can be used (nested'),
    (['--logit_bias={"1": ' + '9' * 5000 + '}'], 'a number has too many digits'),
    (['--logit_bias={"1": ' + '9' * 400 + '}'], 'logit_bias must be an object that maps token ids'),
    (['--stop=\udcff'], "stop='\\udcff' is not valid Unicode (a lone surrogate)"),
    (['--max_new_tokens=99999999999999999999'], 'max_new_tokens must be a whole number, 1 to 2147'),
    (['--cache_length=1000000000000'], 'cache_length must be a whole number, 1 to 2147483647'),
    (['--num_decodes=2000000000'], 'num_decodes must be a whole number, 1 to 1000000'),
    ([f'--output={"x" * 250}'], "the output's name has 250 bytes; at most 241 leave room for"),
    (
      ['--logit_bias={"384": 2}'],
      'logit_bias or stop holds token 384, outside the vocabulary of 384',
    ),
    (['--prefill_chunk=0'], 'prefill_chunk must be a whole number, 1 or more'),
    (['--repetition_penalty=0'], 'repetition_penalty must be above 0'),
    (['--prompt=x'], "Unknown command line flag 'prompt'"),
    (['--output='], '--output not given'),
    (['--gin.MESH="2x2x2"'], "--checkpoint and gin flags can't be mixed"),
  ],
)
def test_bad_flags(complaint, flags, says):
  assert says in complaint('{"prompt": ""}\n{"prompt": "seventeen letters"}\n', *flags)


@pytest.mark.parametrize(
  'flags',
  [
    ['--cache_length=2147483647', '--batch_size=1'],
    ['--max_new_tokens=2147483647'],
    ['--max_new_tokens=2147483647', '--batching=static'],
    ['--batch_size=2147483647', '--num_decodes=1000000', '--max_new_tokens=1000'],
    ['--cache_length=2147483647', '--cache=int8'],
  ],
)
def test_more_memory_than_there_is(complaint, flags):
  """Said before weights load. On CPU the system would kill a run that takes all memory."""
  error = complaint('{"prompt": "a"}\n', '--mesh=1x1x1', *flags)
  assert re.search(r'too little memory: a cache of \d+ rows .* and the devices have', error)


def test_memory_counts_a_draft_model(complaint, palm_tiny, monkeypatch):
  """8 MB of bfloat16 weights fit into 10 MB, and those of a draft model not beside them."""
  prompt, flags = '{"prompt": "a"}\n', ('--mesh=1x1x1', '--max_new_tokens=9')
  monkeypatch.setattr(memory, '_memory', lambda mesh: 10_000_000)
  error = complaint(prompt, *flags, f'--speculate=draft:{palm_tiny}:4')
  assert re.search(
    r'a cache of 1 rows with 10 positions each needs [\d.]+ [kM]?B beside weights of 7.7 MB, the '
    rf'draft model {re.escape(str(palm_tiny))} [\d.]+ [kM]?B beside 7.7 MB, and the devices have '
    '10.0 MB: take a smaller draft model, ',
    error,
  )
  with pytest.raises(AssertionError, match='weights were loaded'):
    complaint(prompt, *flags)
  monkeypatch.setattr(memory, '_memory', lambda mesh: 7_000_000)
  assert 'beside weights of 7.7 MB, and the devices have 7.0 MB' in complaint(prompt, *flags)


def test_memory_that_runs_out_later(command, palm_tiny, tmp_path, monkeypatch):
  """A device's own error is one sentence, too."""
  prompts = _write(tmp_path / 'prompts.jsonl', [{'prompt': 'a'}])
  monkeypatch.setattr(memory, '_memory', lambda mesh: 1e15)
  code, _, err = command(
    f'--checkpoint={palm_tiny}',
    f'--prompts={prompts}',
    f'--output={tmp_path / "out.jsonl"}',
    '--mesh=1x1x1',
    '--cache_length=1000000000',
  )
  assert code == 2 and 'error: too little memory (Out of memory allocating ' in err


def test_a_disk_that_fills_up_keeps_finished_rows(complete, tmp_path, monkeypatch):
  """The error names the file; the same command goes on from the rows that are kept."""
  rows, flags = [{'prompt': 'a'}, {'prompt': 'b'}], ('--max_new_tokens=2', '--batch_size=1')

  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(prompts_file.output.os, 'replace', full)
    with pytest.raises(AssertionError, match="can't write .*out.jsonl: No space left on device"):
      complete(rows, *flags)
  _, out = complete(rows, *flags)
  assert 'resumed: 2 of 2 rows were done' in out
  with monkeypatch.context() as patch:
    patch.setattr(prompts_file.Journal, '_append', full)
    with pytest.raises(AssertionError, match='kept in .*unfinished: No space left on device'):
      complete(rows, *flags, '--overwrite')


def test_outputs_that_are_no_files(complaint, tmp_path):
  """Each is refused before weights are loaded, also with --overwrite, and is left as it was."""
  os.mkfifo(tmp_path / 'fifo')
  (tmp_path / 'precious').write_text('precious')
  (tmp_path / 'link').symlink_to('precious')
  (tmp_path / 'dangling').symlink_to('nothing')
  (tmp_path / 'beside.config.json').mkdir()
  (tmp_path / '.kept.unfinished').symlink_to('precious')
  (tmp_path / 'directory').mkdir()
  row = '{"prompt": "a"}\n'
  for name, says in (
    ('fifo', "fifo can't be written, because it is not a regular file: choose another --output"),
    ('link', "link can't be written, because it is a link"),
    ('dangling', "dangling can't be written, because it is a link"),
    ('beside', "beside.config.json can't be written, because it is not a regular file"),
    ('kept', "finished rows can't be kept beside the output, in "),
    ('directory', 'is a directory: --output names the file to write'),
    ('prompts.jsonl', 'prompts.jsonl is also the file of prompts: choose another --output'),
    ('/dev/full', "/dev/full can't be written, because it is not a regular file"),
    ('/dev/stdout', "/dev/stdout can't be written, because it is a link"),
  ):
    assert says in complaint(row, f'--output={tmp_path / name}', '--overwrite')
  assert (tmp_path / 'precious').read_text() == 'precious'
  assert (tmp_path / 'prompts.jsonl').read_text() == row
  assert not (tmp_path / 'nothing').exists() and (tmp_path / 'dangling').is_symlink()


def test_an_output_that_another_run_wrote_meanwhile(complete, palm_tiny, tmp_path, monkeypatch):
  """It is not replaced: it may be what the other run has just finished."""
  load = loading.load_engine

  def written(*arguments):
    (tmp_path / 'out.jsonl').write_text('theirs')
    return load(*arguments)

  monkeypatch.setattr(loading, 'load_engine', written)
  with pytest.raises(AssertionError, match='out.jsonl exists: remove it'):
    complete([{'prompt': 'a'}], '--max_new_tokens=2', '--mesh=1x1x1')
  assert (tmp_path / 'out.jsonl').read_text() == 'theirs'
  assert not list(tmp_path.glob('.*'))


def test_a_bucket_is_named_before_it_is_tried(command, tmp_path, monkeypatch):
  """Without credentials it may take minutes until the first error."""

  def fail(*_, **__):
    raise RequestError('no credentials')

  monkeypatch.setattr(loading, 'open_checkpoint', fail)
  prompts = _write(tmp_path / 'prompts.jsonl', [{'prompt': 'a'}])
  flags = f'--prompts={prompts}', f'--output={tmp_path / "out.jsonl"}'
  code, out, _ = command('--checkpoint=gs://bucket/checkpoint', *flags)
  assert code == 2 and 'opening gs://bucket/checkpoint' in out


def test_a_task_without_seqio_names_the_extra(command, monkeypatch):
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda name: None if name == 'seqio' else find_spec(name)
  )
  code, _, err = command('--gin_file=t5x_inference_ext/configs/runs/infer.gin')
  assert (code, err) == (
    2,
    "error: a run over a task needs seqio and tensorflow: pip install 't5x_inference_ext[seqio]'\n",
  )


def test_text_without_a_vocabulary(complaint, monkeypatch):
  monkeypatch.setattr(text_settings, 'BYTE_ROWS', 0)
  assert (
    'give --vocabulary=FILE.model (a SentencePiece model), --vocabulary=FILE/tokenizer.json or '
    '--vocabulary=bytes, or give token ids' in complaint('{"prompt": "a"}\n')
  )


def test_existing_output_is_refused(complaint, tmp_path):
  (tmp_path / 'taken.jsonl').write_text('precious')
  assert 'taken.jsonl exists: remove it, choose another --output, or give --overwrite' in complaint(
    '{"prompt": "a"}\n', f'--output={tmp_path / "taken.jsonl"}'
  )
  assert (tmp_path / 'taken.jsonl').read_text() == 'precious'
