"""Compilation of grammars by llguidance, within limits. Needs the extra [structured].

The module imports nothing large, because the subprocess that tries untrusted grammars imports it,
too (grammar_check.py).
"""

from collections.abc import Sequence
import dataclasses
import json
import re
from typing import Any

from t5x_inference_ext.errors import printable
from t5x_inference_ext.text.grammar import Grammar
from t5x_inference_ext.text.vocabulary import Vocabulary
from t5x_inference_ext.text_files import check_extra

# Limits for the library, so that no grammar can use up time or memory. Each comment gives the
# library's default, then what the limit counts.
GRAMMAR_LIMITS: dict[str, Any] = {
  'max_items_in_row': 1000,  # 2000. Parser items kept for one position
  'initial_lexer_fuel': 1_000_000,  # 1,000,000. Work to compile regular expressions
  'step_lexer_fuel': 100_000,  # 200,000. Work of the lexer for one mask
  'step_max_items': 10_000,  # 50,000. Work of the parser for one mask
  'max_lexer_states': 50_000,  # 250,000. Memory of a row's lexer, about 0.5 kB each
  'max_grammar_size': 500_000,  # 500,000. Symbols of all rules
}
# White space allowed in JSON: enough for indentation, but limited.
MAX_WHITESPACE = 20
_WHITESPACE = f'[\\x20\\x0A\\x0D\\x09]{{1,{MAX_WHITESPACE}}}'
# Allow every way to split a text into tokens. The library could enforce the tokenizer's own way,
# but the time for that has no bound.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'
_MAX_REASON = 200  # maximum number of characters of the library's message to show


class GrammarRefused(Exception):
  """The grammar can't be used. Messages continue "the regex ..." (Grammar.noun)."""


@dataclasses.dataclass(frozen=True)
class TokenBytes:
  """The bytes of a model's tokens. Picklable.

  Attributes:
    pieces: V + 1 byte strings: the bytes of each token (empty for tokens without text), then those
      of an extra end token.
    special: Ids of special tokens, whose pieces are their names. A grammar's text never matches
      them.
  """

  pieces: list[bytes]
  special: list[int]

  @classmethod
  def of(cls, vocabulary: Vocabulary, vocab_size: int) -> 'TokenBytes':
    """Collect the bytes of a vocabulary's tokens.

    Args:
      vocabulary: The vocabulary.
      vocab_size: V, rows of the model's embedding; ids beyond the vocabulary have no text.
    """
    pieces = [vocabulary.piece(token, special=True) for token in range(vocab_size)]
    special = [i for i, piece in enumerate(pieces) if piece and not vocabulary.piece(i)]
    # End tokens differ between requests, so the library gets only the extra end token.
    return cls([*pieces, b'<end>'], [*special, vocab_size])


def check_library() -> None:
  """Raise UserError if the extra [structured] is not installed."""
  check_extra('structured', 'grammars need llguidance', 'llguidance')


def build_tokenizer(texts: TokenBytes) -> Any:
  """Return a model's tokens as an llguidance.LLTokenizer, in a tenth of a second."""
  import llguidance

  end = len(texts.pieces) - 1
  tokens: Any = _Tokens(texts, end)
  return llguidance.LLTokenizer(tokens, n_vocab=end + 1, eos_token=end)


class _Tokens:
  """Describes tokens in the form that llguidance needs."""

  is_tokenizer_wrapper = True
  bos_token_id = None

  def __init__(self, texts: TokenBytes, end: int) -> None:
    self.tokens, self.special_token_ids, self.eos_token_id = texts.pieces, texts.special, end

  def __call__(self, text: str) -> Sequence[int]:
    raise AssertionError('llguidance encodes only texts that a grammar forces: no_forcing is set')


def compile_grammar(grammar: Grammar, tokenizer: Any) -> Any:
  """Compile a grammar; return an llguidance.LLMatcher in its start state.

  Raises:
    GrammarRefused: The library refuses the grammar, or the vocabulary can't write any text that
      satisfies it.
  """
  import llguidance

  limits = llguidance.LLParserLimits(verbose_errors=False, **GRAMMAR_LIMITS)
  source = _library_source(grammar)
  matcher = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=limits)
  first = b'' if matcher.is_error() else matcher.compute_bitmask()
  if matcher.is_error():
    lark = grammar.kind == 'lark'
    raise GrammarRefused(f'is not one that can be used: {match_error(matcher, line=lark)}')
  end = tokenizer.vocab_size - 1
  if not any(first[: end // 8]) and not first[end // 8] & ((1 << end % 8) - 1):
    if matcher.is_accepting():
      raise GrammarRefused('is satisfied by the empty text alone')
    raise GrammarRefused('is satisfied by no text that the vocabulary can write')
  return matcher


def match_error(matcher: Any, *, line: bool = False) -> str:
  """Return the library's message on why a matcher failed, escaped and cut to _MAX_REASON.

  Args:
    matcher: An llguidance.LLMatcher with an error.
    line: Whether to include line and column of the error in the grammar.
  """
  text, _, rest = matcher.get_error().partition('\n')
  if text.startswith('NoExtensionBias'):
    return 'no text satisfies it'
  place = re.match(r'(?:at )?(\d+)\((\d+)\): (failed to compile JSON schema: )?', text)
  if place is not None:
    text = text[place.end() :]
  if found := re.search(r'^ *error: (.*)', rest, re.MULTILINE):  # message of the regex parser
    text = found[1]
  if place is not None and line:
    text = f'line {place[1]}, column {place[2]}: {text}'
  return printable(text, _MAX_REASON)


def _library_source(grammar: Grammar) -> str:
  """Convert a grammar to the source that the library reads."""
  import llguidance

  if grammar.kind == 'lark':
    if grammar.source.lstrip().startswith('{'):  # the library's own format has no such limits
      raise GrammarRefused("begins with '{', which no rule can begin with")
    return grammar.source + _OPTIONS
  if grammar.kind == 'regex':
    listed = json.loads(llguidance.LLMatcher.grammar_from_regex(grammar.source))
    return listed['grammars'][0]['lark_grammar'] + _OPTIONS
  schema = json.loads(grammar.source or '{"type": "object"}')
  if schema is True:
    schema = {}
  if isinstance(schema, dict):
    own = schema.get('x-guidance', {})
    if isinstance(own, dict) and 'whitespace_flexible' not in own:  # would override the pattern
      schema['x-guidance'] = {'whitespace_pattern': _WHITESPACE, **own}
  return f'start: %json {json.dumps(schema)}{_OPTIONS}'
