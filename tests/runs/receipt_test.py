"""Receipts: made of a served request, run again on another mesh, refused when they are wrong."""

import copy
import dataclasses
import importlib.metadata
import json
import re

import pytest

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.checkpoints.convert import convert
from t5x_inference_ext.checkpoints.identity import weights_identity
from t5x_inference_ext.commands import infer
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.request import Request, SampleCollector
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.runs import loading
from t5x_inference_ext.runs.receipt import TOLD, make_receipt
from t5x_inference_ext.runs.receipt_file import read_receipt
from t5x_inference_ext.text.grammar import Grammar

pytestmark = pytest.mark.usefixtures('quick_programs')

SAMPLING = SamplingParams(
  temperature=0.8,
  top_p=0.95,
  frequency_penalty=0.1,
  logit_bias={13: -5.0, 35: -float('inf')},
  min_new_tokens=2,
  stop=((300, 301),),
)


@pytest.fixture(scope='module')
def served(palm_tiny):
  """An engine, a request with two samples, the samples, and their receipt."""
  engine = Engine.load(palm_tiny, mesh='2x2x2', dtype='float32')
  (request,) = engine.requests([[103, 104, 105, 35]], 12, SAMPLING, [7], samples=2)
  request = dataclasses.replace(
    request, end_ids=(1,), stop_texts=('\n\n\n',), text=True, top_log_probs=1, salt='tenant'
  )
  collector = SampleCollector()
  collector.expect(0, 2)
  with engine.core.streams([request]).open([request]) as stream:
    (samples,) = [each for each in map(collector.add, stream) if each]
  return engine, request, samples, make_receipt(engine, request, samples, 1.5)


@pytest.fixture
def receipt(served):
  return copy.deepcopy(served[-1])


@pytest.fixture
def replay(palm_tiny, tmp_path, capsys):
  """Replays a receipt, or text in its place: (exit code, stdout, stderr)."""

  def run(receipt, *flags, checkpoint=palm_tiny):
    path = tmp_path / 'receipt.json'
    data = receipt if isinstance(receipt, bytes) else json.dumps(receipt).encode()
    path.write_bytes(data)
    command = ['infer', f'--checkpoint={checkpoint}', f'--replay={path}']
    code = infer.run([*command, '--compilation_cache=', *flags])
    return code, *capsys.readouterr()

  return run


@pytest.fixture
def refusal(replay, monkeypatch):
  """The error of a receipt that is refused before weights are loaded."""

  def load(*_, **__):
    raise AssertionError('weights were loaded')

  monkeypatch.setattr(loading.Engine, 'load', load)

  def run(receipt, *flags, **options):
    code, _, error = replay(receipt, *flags, **options)
    assert code == 2 and error.startswith('error: ') and error.count('\n') == 1, error
    assert error.isascii() and error[:-1].isprintable()
    return error

  return run


def test_receipt_tells_all_that_made_the_tokens(served, receipt, palm_tiny):
  engine, request, samples, _ = served
  assert receipt['request']['tokens'] == [0, 103, 104, 105, 35]
  assert receipt['request']['seeds'] == [7, 8] and receipt['request']['end_ids'] == [1]
  assert receipt['request']['sampling']['logit_bias'] == {'13': -5.0, '35': '-Infinity'}
  assert receipt['engine'] == {
    'mesh': '2x2x2',
    'prefill_layout': 'ws_2d/batch',
    'decode_layout': 'ws_2d/batch',
    'dtype': 'float32',
    'cache': 'float32',
  }
  assert (receipt['seconds'], receipt['chips'], receipt['chip_seconds']) == (1.5, 8, 12.0)
  assert [each['tokens'] for each in receipt['samples']] == [each.tokens for each in samples]
  assert str(palm_tiny) not in json.dumps(receipt)  # no path of the server
  json.dumps(receipt, allow_nan=False)


def test_what_is_read_is_what_was_made(served, receipt, tmp_path):
  (tmp_path / 'r.json').write_text(json.dumps(receipt))
  found = read_receipt(str(tmp_path / 'r.json'))
  _, request, samples, _ = served
  assert found.request == dataclasses.replace(request, text=False, top_log_probs=0, salt=None)
  assert found.samples == [(each.tokens, each.finish_reason) for each in samples]


def test_tokens_are_equal_on_another_mesh_in_other_layouts(replay, receipt):
  flags = (
    '--mesh=1x1x1',
    '--prefill_layout=ws_2d/heads',
    '--decode_layout=wg_x/batch',
    '--norm_epsilon=1e-6',
  )
  code, out, _ = replay(receipt, *flags)
  assert code == 0, out
  assert 'mesh 2x2x2, now 1x1x1; prefill_layout ws_2d/batch, now ws_2d/heads' in out
  assert len(re.findall(r'sample \d: all 12 tokens are equal, and the end: length', out)) == 2


def test_a_token_that_differs_is_told(replay, receipt):
  tokens = receipt['samples'][1]['tokens']
  right = tokens[4]
  tokens[4] = (right + 1) % 384
  receipt['samples'][0]['tokens'].pop()
  code, out, _ = replay(receipt, '--mesh=1x1x1')
  assert code == 1
  last = int(re.search(r'sample 0: token 11 differs: none in the receipt, (\d+) now', out)[1])
  assert last < 384
  assert f'sample 1: token 4 differs: {tokens[4]} in the receipt, {right} now' in out


def test_a_receipt_tells_every_field_that_chooses_tokens():
  fields = {field.name for field in dataclasses.fields(Request)}
  assert fields == {*TOLD, 'text', 'top_log_probs', 'salt', 'cache_reply'}


@pytest.fixture(scope='module')
def constrained(palm_tiny):
  """The receipt of a request with a grammar."""
  engine = Engine.load(palm_tiny, mesh='1x1x1', dtype='float32')
  (request,) = engine.requests([[103, 104, 105, 35]], 12, SamplingParams(0.9), [3])
  request = dataclasses.replace(request, grammar=Grammar('regex', '[0-9]{3}-[a-f]{2}'))
  collector = SampleCollector()
  collector.expect(0, 1)
  with engine.core.streams([request]).open([request]) as stream:
    (samples,) = [each for each in map(collector.add, stream) if each]
  return make_receipt(engine, request, samples, 1.0)


def test_a_grammar_is_told_and_followed_again(constrained, replay, tmp_path):
  told = constrained['request']['grammar']
  assert told == {'kind': 'regex', 'source': '[0-9]{3}-[a-f]{2}'}
  assert constrained['versions']['llguidance'] == importlib.metadata.version('llguidance')
  (sample,) = constrained['samples']
  text = bytes(token - 3 for token in sample['tokens'] if token > 2).decode()
  assert re.fullmatch(told['source'], text)
  code, out, _ = replay(constrained)
  assert code == 0 and f'all {len(sample["tokens"])} tokens are equal, and the end: ' in out, out
  # The tokens follow from the grammar: those of another one differ.
  constrained = copy.deepcopy(constrained)
  constrained['request']['grammar']['source'] = '[g-z]+'
  constrained['versions']['llguidance'] = '0.1'
  code, out, _ = replay(constrained, '--mesh=1x1x1')
  assert code == 1 and 'sample 0: token 0 differs' in out
  assert 'made with llguidance 0.1, now ' in out


@pytest.mark.parametrize(
  ('grammar', 'words'),
  [
    ('[0-9]', "request.grammar is '[0-9]', not an object with kind, source"),
    ({'kind': 'regex'}, "request.grammar has no 'source'"),
    ({'kind': 'ebnf', 'source': 'x'}, 'must be one of json_schema'),
    ({'kind': 'regex', 'source': 'x' * (2**18 + 1)}, 'at most 262144'),
    ({'kind': 'regex', 'source': '(' * 9}, 'grammar: the regex'),
    ({'kind': 'json_schema', 'source': '{'}, 'grammar: the json_schema is'),
    (None, "versions has 'llguidance', which no receipt has"),
  ],
  ids=['text', 'half', 'kind', 'long', 'malformed', 'json', 'none'],
)
def test_wrong_grammars_of_receipts_are_refused(refusal, constrained, grammar, words):
  constrained = copy.deepcopy(constrained)
  _set('request.grammar', grammar)(constrained)
  assert words in refusal(constrained, '--mesh=1x1x1')


def test_identity_depends_on_values_and_not_on_the_place(palm_tiny, testdata, tmp_path):
  t5x, orbax = (
    weights_identity(open_checkpoint(path))
    for path in (palm_tiny, testdata / 'palm_tiny_orbax' / 'checkpoint_1000')
  )
  other = weights_identity(open_checkpoint(testdata / 'palm_unscanned' / 'checkpoint_0'))
  assert t5x == orbax != other and t5x.covers == 'norms'
  found = []
  for name in 'ab':
    convert(str(palm_tiny), str(tmp_path / name))
    found.append(weights_identity(open_checkpoint(tmp_path / name)))
  assert found[0] == found[1] != t5x and found[0].covers == 'chunks'
  # One value of one matrix: the chunk's checksum changes.
  checksums = json.loads((tmp_path / 'a' / 'checksums.json').read_text())
  checksums['query'][0] = '00000000'
  (tmp_path / 'a' / 'checksums.json').write_text(json.dumps(checksums))
  assert weights_identity(open_checkpoint(tmp_path / 'a')) != found[0]


def test_other_weights_are_refused(refusal, receipt, testdata):
  checkpoint = testdata / 'palm_unscanned' / 'checkpoint_0'
  assert 'made with other weights' in refusal(receipt, '--mesh=1x1x1', checkpoint=checkpoint)
  receipt['weights']['sha256'] = '0' * 64
  assert 'SHA-256 000000000000 of their norms; those of ' in refusal(receipt)


def _set(path, value):
  """Returns a function that sets a field, given as 'a.b.0', or removes it (value None)."""

  def change(receipt):
    *parents, last = path.split('.')
    for name in parents:
      receipt = receipt[int(name) if name.isdecimal() else name]
    if value is None:
      del receipt[last]
    else:
      receipt[int(last) if last.isdecimal() else last] = value

  return change


HOSTILE = 'x\x1b[31m\n' * 1000
WRONG = [
  ('format', 'other', "format and version are 'other' and 1"),
  ('version', 2, 'and 2, not'),
  ('version', True, 'and True, not'),
  ('request', [], 'request is [], not an object'),
  ('request.tokens', None, "request has no 'tokens'"),
  ('request.more', 1, "request has 'more', which no receipt has"),
  (f'request.{HOSTILE}', 1, 'which no receipt has'),
  ('request.tokens', [], 'request.tokens is empty'),
  ('request.tokens', [0, -1], 'not a list of token ids'),
  ('request.tokens', [0, 10**30], 'not a list of token ids'),
  ('request.tokens', [0, True], 'not a list of token ids'),
  ('request.tokens', [0, 384], 'outside the vocabulary of 384'),
  ('request.seeds', [], 'not a list of seeds'),
  ('request.seeds', [2**32, 1], 'seeds must be whole numbers'),
  ('request.limit', 0, 'request.limit is 0'),
  ('request.limit', 2**40, 'request.limit is 1099511627776'),
  ('request.limit', 2**31 - 1, 'too little memory'),
  ('request.end_ids', [1, 2, 3, 4, 5], 'at most 4'),
  ('request.stop_texts', ['\ud800'], 'stop'),
  ('request.stop_texts', 'END', 'not a list of texts'),
  ('request.sampling', 1, 'request.sampling is 1'),
  ('request.sampling.top_p', 2, 'top_p must be above 0'),
  ('request.sampling.top_p', HOSTILE, 'top_p must be'),
  ('request.sampling.logit_bias', {'999': 1}, 'logit_bias'),
  ('request.sampling.logit_bias', [[1, 2]], 'logit_bias must be an object'),
  ('request.sampling.stop', [[]], 'empty sequence'),
  ('weights.dtype', 'float8', 'weights.dtype'),
  ('weights.covers', {}, 'weights.covers'),
  ('weights.sha256', 'A' * 64, '64 hexadecimal digits'),
  ('engine.mesh', '2x2', 'a mesh is written XxYxZ'),
  ('engine.mesh', HOSTILE, 'not a line of text'),
  ('engine.prefill_layout', 'ws_3d/batch', 'unknown layout part'),
  ('engine.dtype', 'float64', 'engine.dtype'),
  ('engine.cache', None, "engine has no 'cache'"),
  ('versions.jax', '1\n2', 'not a line of text'),
  ('seconds', -1, 'seconds is -1'),
  ('chip_seconds', float('inf'), 'chip_seconds is inf'),
  ('samples', [], 'one for each of 2 seeds'),
  ('samples.0.tokens', [1] * 13, 'the limit is 12'),
  ('samples.0.score', 'low', 'not a number'),
  ('samples.0.finish_reason', 'cancelled', 'samples[0].finish_reason'),
]


@pytest.mark.parametrize(('path', 'value', 'words'), WRONG, ids=lambda each: str(each)[:24])
def test_wrong_receipts_are_refused_by_their_field(refusal, receipt, path, value, words):
  if HOSTILE in path:
    receipt['request'][HOSTILE] = value
  else:
    _set(path, value)(receipt)
  assert words in refusal(receipt, '--mesh=1x1x1')


@pytest.mark.parametrize(
  ('data', 'words'),
  [
    (b'', 'not JSON'),
    (b'\xff\xfe', 'not UTF-8'),
    (b'[' * 100_000, 'nested too deeply'),
    (b'{"format": 1, "format": 2}', 'given twice'),
    (b'[]', 'it is [], not an object'),
    (b'{}', "it has no 'format'"),
    (b' ' * (64 * 2**20 + 1), 'more than 67108864 bytes'),
  ],
  ids=['empty', 'bytes', 'deep', 'twice', 'list', 'nothing', 'large'],
)
def test_what_is_no_receipt_is_refused(refusal, data, words):
  assert words in refusal(data)


@pytest.mark.parametrize(
  ('flag', 'words'),
  [
    ('--prompts=x', '--prompts does not go with --replay'),
    ('--temperature=1', '--temperature does not go with --replay'),
    ('--gin.MESH="1x1x1"', 'takes no gin flags'),
    ('--replay=/nowhere/receipt.json', "can't be read: No such file"),
    ('--mesh=64x1x1', 'needs 64 devices'),
  ],
)
def test_flags_that_do_not_go_with_a_replay(refusal, receipt, flag, words):
  assert words in refusal(receipt, flag)
