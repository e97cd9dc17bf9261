"""Options as fields of a frozen dataclass, which declare type, default, help text and range once.

Commands make flags from these fields (commands/option_flags.py), gin binds them by name, and
`check_options` checks values from flags, gin files and Python.
"""

import collections.abc
import dataclasses
import inspect
import numbers
import reprlib
import types
import typing
from typing import Any, TypeVar

from t5x_inference_ext.errors import RequestError

LARGEST_WHOLE = 2**31 - 1  # the largest int32
_WORDS = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}
_REQUIRED = dataclasses.MISSING
_Function = TypeVar('_Function', bound=collections.abc.Callable)


def option(
  default: Any = _REQUIRED,
  *,
  help: str,
  group: str = '',
  choices: collections.abc.Sequence[str] = (),
  least: int | None = None,
  most: float = LARGEST_WHOLE,
) -> Any:
  """Return a dataclass field that is an option.

  Args:
    default: Value if none is given. An option without a default is required.
    help: One or two sentences for `--help`.
    group: Heading that `--help` lists the option under.
    choices: The allowed values. None is allowed too if the type allows it.
    least: Smallest value, for whole numbers only.
    most: Largest value, for options with a smallest value.
  """
  metadata = {'help': help, 'group': group, 'choices': choices, 'range': (least, most)}
  return dataclasses.field(default=default, metadata=metadata)


def check_options(options: Any) -> None:
  """Check the fields of a dataclass made with `option`; called in the class's `__post_init__`.

  Raises:
    RequestError: A value has the wrong type, is not one of the choices, or is out of its range.
  """
  hints = typing.get_type_hints(type(options))
  for field in dataclasses.fields(options):
    if 'help' in field.metadata:
      message = _complaint(getattr(options, field.name), hints[field.name], field.metadata)
      if message:
        raise RequestError(f'{field.name} must be {message}')


def _complaint(
  value: Any, annotation: Any, metadata: collections.abc.Mapping[str, Any]
) -> str | None:
  """Return None if a value is valid, else a text with the valid values and the given one."""
  choices, (least, most) = metadata['choices'], metadata['range']
  got = f', got {short_repr(value)}'
  if value is None and has_type(None, annotation):
    return None
  if choices:
    return None if value in choices else f'one of {", ".join(choices)}{got}'
  if least is None:
    return None if has_type(value, annotation) else type_text(annotation) + got
  if not has_type(value, int) or value < least:
    return f'a whole number, {least} or more{got}'
  return f'a whole number, {least} to {most}{got}' if value > most else None


def short_repr(value: Any) -> str:
  """Return a value as one short line of text, for messages. Never raises."""
  try:
    return ' '.join(reprlib.repr(value).split())
  except ValueError:  # Python refuses to print integers of more than 4300 digits
    return f'a value of type {type(value).__name__} too long to print'


def takes_options(
  options: type, *, skip: collections.abc.Collection[str] = ()
) -> collections.abc.Callable[[_Function], _Function]:
  """Return a decorator that replaces `**options` in a function's signature by named options.

  gin binds parameters by the names in a signature, so it then accepts exactly these options.

  Args:
    options: Dataclass whose options are the parameters.
    skip: Options that the function does not take.
  """

  def decorate(function: _Function) -> _Function:
    own = inspect.signature(function)
    hints = typing.get_type_hints(options)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for field in dataclasses.fields(options):
      if 'help' in field.metadata and field.name not in skip:
        annotation = hints[field.name]
        function.__annotations__[field.name] = annotation
        parameters.append(
          inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation
          )
        )
    function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]  # what inspect reads
    return function

  return decorate


def pop_options(kind: Any, options: dict[str, Any]) -> Any:
  """Make a dataclass from the options that are its fields, and remove them from `options`."""
  names = [field.name for field in dataclasses.fields(kind) if field.name in options]
  return kind(**{name: options.pop(name) for name in names})


def has_type(value: Any, annotation: Any) -> bool:
  """Return whether a value has the annotated type, without checking items of containers."""
  if _is_union(annotation):
    return any(has_type(value, member) for member in typing.get_args(annotation))
  if annotation is Any:
    return True
  if annotation in (int, float):
    kind = numbers.Integral if annotation is int else numbers.Real
    return isinstance(value, kind) and not isinstance(value, bool)
  if typing.get_origin(annotation) is not None:
    return isinstance(value, collections.abc.Collection) and not isinstance(value, str)
  return isinstance(value, annotation)


def type_text(annotation: Any) -> str:
  """Return a type in words, such as 'a whole number or None'."""
  if _is_union(annotation):
    return ' or '.join(map(type_text, typing.get_args(annotation)))
  if annotation is types.NoneType:
    return 'None'
  if typing.get_origin(annotation) is not None:
    return 'a list'
  return _WORDS.get(annotation, getattr(annotation, '__name__', str(annotation)))


def _is_union(annotation: Any) -> bool:
  return typing.get_origin(annotation) in (types.UnionType, typing.Union)


def is_whole(value: Any) -> bool:
  """Return whether a value is an integer, of Python or numpy, but not a bool."""
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)
