"""Grammar: a restriction of a row's text."""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any, Literal, get_args

from t5x_inference_ext import text_files
from t5x_inference_ext.errors import RequestError, printable

MAX_GRAMMAR = 2**18  # maximum number of characters of a grammar's source

# How a grammar is written:
#   json_schema: a JSON schema, as JSON. The row's text is JSON that is valid under the schema.
#   json_object: an empty source. The row's text is any JSON object.
#   regex: a regular expression (Rust's syntax, without look-around), which the whole text matches.
#   lark: a context-free grammar in the dialect of Lark that llguidance reads.
GrammarKind = Literal['json_schema', 'json_object', 'regex', 'lark']


@dataclasses.dataclass(frozen=True)
class Grammar:
  """A grammar that the new text of a row must satisfy. Hashable and picklable.

  Attributes:
    kind: How the grammar is written: 'json_schema', 'json_object', 'regex' or 'lark'.
    source: The grammar; empty for 'json_object'.

  Raises:
    RequestError: An unknown kind, a source that is too long, or a schema that is not JSON.
      Everything else is checked when a request with the grammar is submitted.
  """

  kind: GrammarKind
  source: str = ''

  def __post_init__(self) -> None:
    kinds = get_args(GrammarKind)
    if self.kind not in kinds:
      raise RequestError(
        f'the kind of a grammar must be one of {", ".join(kinds)}, got "{printable(self.kind, 80)}"'
      )
    if not isinstance(self.source, str):
      raise RequestError(f'grammar: {self.noun} must be text, got {printable(self.source, 80)}')
    if bool(self.source) == (self.kind == 'json_object'):
      raise RequestError(
        f'grammar: {self.noun} needs {"no source" if self.kind == "json_object" else "a source"}, '
        f'got "{printable(self.source, 80)}"'
      )
    if len(self.source) > MAX_GRAMMAR:
      raise RequestError(
        f'grammar: {self.noun} has {len(self.source)} characters: at most {MAX_GRAMMAR} are allowed'
      )
    try:
      self.source.encode('utf-8')
      if self.kind == 'json_schema':
        text_files.parse_json(self.source)
    except UnicodeEncodeError:
      raise RequestError(f'grammar: {self.noun} is not valid Unicode (a lone surrogate)') from None
    except ValueError as error:
      raise RequestError(f'grammar: the json_schema is {printable(str(error))}') from None

  @property
  def noun(self) -> str:
    """Name of the grammar's kind in messages, such as 'the regex'."""
    return 'the lark grammar' if self.kind == 'lark' else f'the {self.kind}'

  @classmethod
  def from_dict(cls, value: Any) -> 'Grammar':
    """Convert a JSON value to a grammar.

    Args:
      value: One of {'json_schema': SCHEMA}, {'json_object': True}, {'regex': TEXT} and
        {'lark': TEXT}. A schema is an object, or its JSON as text.

    Raises:
      RequestError: Any other value, or a grammar that is refused.
    """
    if not isinstance(value, Mapping) or len(value) != 1:
      raise RequestError(
        'a grammar is an object with one of json_schema, json_object, regex and lark, such as '
        f'{{"regex": "[0-9]+"}}, got {printable(value, 80)}'
      )
    ((kind, source),) = value.items()
    if kind == 'json_object' and source is True:
      source = ''
    elif kind == 'json_schema' and not isinstance(source, str):
      try:
        source = json.dumps(source, ensure_ascii=False, allow_nan=False)
      except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
          f'grammar: the json_schema is not JSON: {printable(str(error))}'
        ) from None
    return cls(kind, source)
