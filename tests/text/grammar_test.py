"""Grammars as users write them, and the process that tries them before they are used."""

import pickle
import time

import pytest

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.text import grammar_check
from t5x_inference_ext.text.grammar import MAX_GRAMMAR, Grammar
from t5x_inference_ext.text.grammar_check import GrammarCheck
from t5x_inference_ext.text.grammar_compiler import (
  MAX_WHITESPACE,
  GrammarRefused,
  TokenBytes,
  build_tokenizer,
  compile_grammar,
)
from t5x_inference_ext.text.vocabulary import ByteVocabulary

TEXTS = TokenBytes.of(ByteVocabulary(), 384)
TOKENIZER = build_tokenizer(TEXTS)


@pytest.mark.parametrize(
  'value, kind, source',
  [
    ({'regex': 'a+'}, 'regex', 'a+'),
    ({'lark': 'start: "a"'}, 'lark', 'start: "a"'),
    ({'json_object': True}, 'json_object', ''),
    ({'json_schema': '{"type": "null"}'}, 'json_schema', '{"type": "null"}'),
    ({'json_schema': {'const': 'é'}}, 'json_schema', '{"const": "é"}'),
    ({'json_schema': True}, 'json_schema', 'true'),
  ],
)
def test_an_object_of_json_is_a_grammar(value, kind, source):
  grammar = Grammar.from_dict(value)
  assert grammar == Grammar(kind, source) == pickle.loads(pickle.dumps(grammar))
  assert hash(grammar) == hash(Grammar(kind, source))


@pytest.mark.parametrize(
  'value, says',
  [
    ('a+', 'a grammar is an object with one of json_schema, json_object, regex and lark'),
    ({}, 'such as {"regex": "[0-9]+"}, got {}'),
    ({'regex': 'a', 'lark': 'b'}, 'a grammar is an object with one of'),
    ({'re\x1b': 'a'}, 'json_schema, json_object, regex, lark, got "re\\x1b"'),
    ({'regex': 3}, 'grammar: the regex must be text, got 3'),
    ({'regex': ''}, 'grammar: the regex needs a source, got ""'),
    ({'json_object': 'x'}, 'grammar: the json_object needs no source, got "x"'),
    ({'json_object': False}, 'grammar: the json_object must be text, got False'),
    ({'regex': '\ud800'}, 'grammar: the regex is not valid Unicode (a lone surrogate)'),
    ({'lark': 'a' * (MAX_GRAMMAR + 1)}, f'at most {MAX_GRAMMAR} are allowed'),
    ({'json_schema': '{"type":'}, 'grammar: the json_schema is not JSON ('),
    ({'json_schema': '[' * 300 + ']' * 300}, 'nested too deeply'),
    ({'json_schema': {'const': float('inf')}}, 'grammar: the json_schema is not JSON: '),
    ({'json_schema': {'const': {1}}}, 'grammar: the json_schema is not JSON: '),
  ],
)
def test_what_is_no_grammar_is_refused_at_once(value, says):
  with pytest.raises(RequestError) as error:
    Grammar.from_dict(value)
  assert says in str(error.value)


@pytest.mark.parametrize(
  'kind, source, says',
  [
    ('regex', 'a(b', 'is not one that can be used: unclosed group'),
    ('regex', '(?=a)b', 'look-around, including look-ahead and look-behind, is not supported'),
    ('regex', '()', 'is satisfied by the empty text alone'),
    ('lark', 'start: x', 'line 1, column 8: unknown name: "x"'),
    ('lark', 'start: "a"\nb: "', 'is not one that can be used: line 2, column'),
    ('lark', ' {"grammars": []}', "begins with '{', which no rule can begin with"),
    ('json_schema', '{"type": "x\\u001b"}', 'is not one that can be used: Invalid type: x\\x1b'),
    ('json_schema', '{"type": "object", "not": {}}', 'Unimplemented keys: ["not"]'),
    ('json_schema', 'false', 'is not one that can be used: Unsatisfiable schema'),
    ('json_schema', '3', 'is not one that can be used: '),
    ('json_schema', '{"$ref": "#"}', 'no text satisfies it'),
    ('json_schema', '{"$ref": "file:///etc/passwd"}', 'is not one that can be used: Resource'),
    ('json_schema', '{"x-guidance": 3}', 'is not one that can be used: '),
  ],
)
def test_grammars_that_the_library_refuses(kind, source, says):
  with pytest.raises(GrammarRefused) as error:
    compile_grammar(Grammar(kind, source), TOKENIZER)
  assert says in str(error.value) and len(str(error.value)) < 300
  assert str(error.value).isprintable()


def follows(grammar, text):
  """How many bytes of a text a grammar takes, and whether it is satisfied then."""
  matcher = compile_grammar(grammar, TOKENIZER)
  for i, byte in enumerate(text.encode()):
    if not matcher.validate_tokens([byte + 3]):
      return i, matcher.is_accepting()
    assert matcher.consume_token(byte + 3)
  return len(text.encode()), matcher.is_accepting()


def test_json_has_little_white_space_unless_the_schema_says_otherwise():
  schema = Grammar('json_schema', '{"type": "array", "items": {"type": "integer"}}')
  assert follows(schema, '[' + ' ' * MAX_WHITESPACE + '1]') == (MAX_WHITESPACE + 3, True)
  assert follows(schema, '[' + ' ' * (MAX_WHITESPACE + 1)) == (MAX_WHITESPACE + 1, False)
  compact = '{"type": "array", "x-guidance": {"whitespace_flexible": false}}'
  assert follows(Grammar('json_schema', compact), '[1,2, ') == (5, False)
  own = '{"type": "array", "x-guidance": {"whitespace_pattern": "[ ]{1,30}"}}'
  assert follows(Grammar('json_schema', own), '[' + ' ' * 30 + ']') == (32, True)


def test_the_end_of_a_lark_grammar_is_no_place_to_hide():
  """Options are added at the end: neither a comment nor an open line there swallows them."""
  for source in ('start: "a" // x', 'start: "b"\n  | "a"', 'start: "a"\n%llguidance {}'):
    assert follows(Grammar('lark', source), 'a') == (1, True)


HANGS = Grammar('json_schema', '{"type": "integer", "multipleOf": 99999989}')
CRASHES = Grammar(
  'lark',
  'start: r0\n' + '\n'.join(f'r{i}: r{i + 1} | "x" r{i + 1}' for i in range(9000)) + '\nr9000: "z"',
)


def test_grammars_that_hang_or_crash_are_refused_and_others_served(monkeypatch):
  monkeypatch.setattr(grammar_check, 'GRAMMAR_SECONDS', 1.0)
  check, good = GrammarCheck(TEXTS), Grammar('regex', '[0-9]{3}')
  check.check(good)
  for hostile, says in (
    (CRASHES, 'takes too much memory to compile, or is nested too deeply'),
    (HANGS, 'takes more than 1 s to compile'),
  ):
    start = time.perf_counter()
    with pytest.raises(GrammarRefused, match=says):
      check.check(hostile)
    assert time.perf_counter() - start < 5
    check.check(good)
    with pytest.raises(GrammarRefused, match='unclosed group'):
      check.check(Grammar('regex', '('))
  child = check._child
  check.close()
  assert child.poll() is not None and child.stdin.closed and child.stdout.closed


def test_the_process_ends_with_its_owner():
  check = GrammarCheck(TEXTS)
  check.check(Grammar('json_object'))
  child = check._child
  del check
  assert child.poll() is not None


def test_a_grammar_waits_no_longer_than_told(monkeypatch):
  monkeypatch.setattr(grammar_check, 'CHECK_WAIT_SECONDS', 0.01)
  check = GrammarCheck(TEXTS)
  with check._lock, pytest.raises(RequestError, match='being checked, for more than 0.01 s'):
    check.check(Grammar('json_object'))


def test_a_process_that_does_not_start_says_so(monkeypatch):
  monkeypatch.setattr(grammar_check.sys, 'executable', '/bin/false')
  with pytest.raises(RequestError, match='the process that checks grammars did not start'):
    GrammarCheck(TEXTS).check(Grammar('json_object'))
