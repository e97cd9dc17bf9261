"""Conversion of the request field `response_format` to a grammar."""

from collections.abc import Mapping
from typing import Any

from t5x_inference_ext.errors import RequestError, printable
from t5x_inference_ext.server.api_errors import ApiError, invalid
from t5x_inference_ext.text.grammar import Grammar

_FIELD = 'response_format'
_FORMS = (
  '{"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": '
  '{"name": TEXT, "schema": SCHEMA}}, {"type": "regex", "regex": TEXT} and '
  '{"type": "lark", "lark": TEXT}'
)
# Fields allowed beside the schema. Without a schema, any JSON object is valid.
_OF_SCHEMAS = {'name', 'description', 'strict', 'schema'}


def grammar_of(value: Mapping[str, Any] | None) -> Grammar | None:
  """Return the grammar of a `response_format`; None if any text is allowed.

  Raises:
    ApiError: The value has none of the allowed forms, or its grammar is malformed.
  """
  if value is None or value == {'type': 'text'}:
    return None
  kind, rest = value.get('type'), {k: v for k, v in value.items() if k != 'type'}
  if kind == 'json_object' and not rest:
    return Grammar('json_object')
  if not isinstance(kind, str) or set(rest) != {kind}:
    raise invalid(f'{_FIELD} is one of {_FORMS}, got {printable(value, 80)}', _FIELD)
  source = rest[kind]
  if kind == 'json_schema':
    if not isinstance(source, Mapping) or set(source) - _OF_SCHEMAS:
      raise invalid(
        f'{_FIELD}.json_schema is an object with name and schema, got {printable(source, 80)}',
        _FIELD,
      )
    source = source.get('schema', {'type': 'object'})
    if not isinstance(source, Mapping | bool):
      raise invalid(
        f'{_FIELD}.json_schema.schema is a JSON schema, got {printable(source, 80)}', _FIELD
      )
  elif kind not in ('regex', 'lark'):
    raise invalid(f'{_FIELD} is one of {_FORMS}, got {printable(value, 80)}', _FIELD)
  try:
    return Grammar.from_dict({kind: source})
  except RequestError as error:
    raise refused_grammar(error) from None


def refused_grammar(error: RequestError) -> ApiError:
  """Return the API's error for a grammar that the engine refuses."""
  message = str(error).removeprefix('grammar: ')
  return invalid(f'{_FIELD}: {message}', _FIELD, 'invalid_value')
