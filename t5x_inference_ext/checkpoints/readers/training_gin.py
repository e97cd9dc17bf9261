"""Conventions from the config.gin that T5X writes into the directory of a training run.

The file is only parsed, so modules that it imports need not be installed. If a binding refers to a
class, the class's unbound options have flaxformer's defaults.
"""

from collections.abc import Iterator, Mapping, Set
import dataclasses
import tokenize
from typing import Any

from t5x_inference_ext.checkpoints.conventions import Conventions
from t5x_inference_ext.checkpoints.readers.stock_modules import (
  DECODER_ONLY,
  DECODER_ONLY_MODULES,
  FLAXFORMER,
  OPTIONS,
  StockModule,
  conventions_of,
)
from t5x_inference_ext.errors import CheckpointError, RequestError

CONFIG_GIN = 'config.gin'
# decoder_only's options are fields of one class; other properties are fixed in its code.
_DECODER_ONLY = f'{DECODER_ONLY}network.TransformerConfig'
_DECODER_ONLY_DEFAULTS: Mapping[str, Any] = {'mlp_activations': ('relu',), 'num_heads': 8}
_DECODER_ONLY_OPTIONS = {
  'mlp_activations': ('MlpBlock', 'activations'),
  'num_heads': ('MultiHeadDotProductAttention', 'num_heads'),
}


@dataclasses.dataclass(frozen=True)
class _Reference:
  """@scope/name or @scope/name() in a gin file."""

  scope: str
  name: str


@dataclasses.dataclass(frozen=True)
class _Macro:
  """%name in a gin file."""

  name: str


# Stands for a value that is not a literal, such as a macro bound to a reference.
_UNKNOWN = object()


def training_conventions(text: str, where: str) -> Conventions:
  """Return the conventions in a run's gin file; empty ones if it configures no known model.

  Args:
    text: Content of the file.
    where: The file, for messages.

  Raises:
    CheckpointError: The file is not a gin file, or its model can't be served.
  """
  bindings, imports = _parse(text, where)
  macros = {
    name: value for (scope, name, argument), value in bindings.items() if not (scope or argument)
  }
  # Class -> the scopes of the references to it; class -> option -> scope -> value.
  scopes: dict[str, set[str]] = {}
  bound: dict[str, dict[str, dict[str, Any]]] = {}
  for (scope, selector, argument), value in bindings.items():
    for reference in _references(value):
      scopes.setdefault(_qualified(reference.name, imports), set()).add(reference.scope)
    if argument:
      options = bound.setdefault(_qualified(selector, imports), {})
      options.setdefault(argument, {})[scope] = _resolved(value, macros)
  modules: list[StockModule] = []
  for name in sorted(scopes):
    short = name.rpartition('.')[2]
    if name == _DECODER_ONLY:
      modules += DECODER_ONLY_MODULES
      for option, value in _values(bound.get(name, {}), _DECODER_ONLY_DEFAULTS, scopes[name]):
        modules.append(StockModule(*_DECODER_ONLY_OPTIONS[option], value))
    elif name.startswith(FLAXFORMER) and short in OPTIONS:
      for option, value in _values(bound.get(name, {}), OPTIONS[short], scopes[name]):
        modules.append(StockModule(short, option, value))
  try:
    return conventions_of(modules, where, exact=False)
  except RequestError as e:  # a value of the wrong type
    raise CheckpointError(f'{where}: {e}') from e


def _parse(text: str, where: str) -> tuple[dict[tuple[str, str, str], Any], dict[str, str]]:
  """Return a file's bindings by (scope, selector, argument), and its imported modules by name."""
  from gin import config_parser  # imported here: slow, and rarely needed

  class Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> _Reference:
      scope, _, name = scoped_configurable_name.rpartition('/')
      return _Reference(scope, name)

    def macro(self, macro_name: str) -> _Macro:
      return _Macro(macro_name)

  bindings: dict[tuple[str, str, str], Any] = {}
  imports: dict[str, str] = {}
  try:
    for statement in config_parser.ConfigParser(text, Delegate()):
      if isinstance(statement, config_parser.BindingStatement):
        bindings[statement.scope, statement.selector, statement.arg_name] = statement.value
      elif isinstance(statement, config_parser.ImportStatement):
        name = statement.bound_name()
        imports[name] = statement.module if statement.is_from or statement.alias else name
  except (SyntaxError, tokenize.TokenError, ValueError, RecursionError) as e:
    raise CheckpointError(f'{where} is no gin file, or is damaged: {e!s:.200}') from e
  return bindings, imports


def _qualified(selector: str, imports: Mapping[str, str]) -> str:
  """Return the full name of a class, given the modules that a file imports."""
  first, dot, rest = selector.partition('.')
  return f'{imports[first]}{dot}{rest}' if first in imports else selector


def _references(value: Any) -> Iterator[_Reference]:
  """Yield the references in a value."""
  if isinstance(value, _Reference):
    yield value
  elif isinstance(value, dict):
    for item in value.items():
      yield from _references(item)
  elif isinstance(value, (list, tuple)):
    for item in value:
      yield from _references(item)


def _resolved(value: Any, macros: Mapping[str, Any], depth: int = 8) -> Any:
  """Replace macros by their values; return _UNKNOWN if the result is not a literal."""
  if isinstance(value, _Macro):
    return _resolved(macros.get(value.name, _UNKNOWN), macros, depth - 1) if depth else _UNKNOWN
  if isinstance(value, (list, tuple)):
    items = tuple(_resolved(item, macros, depth) for item in value)
    return _UNKNOWN if _UNKNOWN in items else items
  return value if isinstance(value, (str, bool, int, float, type(None))) else _UNKNOWN


def _values(
  bound: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any], scopes: Set[str]
) -> Iterator[tuple[str, Any]]:
  """Yield (option, value) for each value that an option of a class may have.

  Args:
    bound: Option -> scope -> value in a gin file.
    defaults: Option -> value where the file binds none.
    scopes: Scopes of the references to the class. A reference without a scope may run in any scope.
  """
  for option, default in defaults.items():
    by_scope = {'': default, **bound.get(option, {})}
    values = []
    for scope in scopes:
      parts = scope.split('/')
      path = ['', *('/'.join(parts[: i + 1]) for i in range(len(parts)))]
      values += (
        list(by_scope.values())
        if not scope
        else [[by_scope[place] for place in path if place in by_scope][-1]]
      )
    if _UNKNOWN not in values:
      yield from ((option, value) for value in values)
