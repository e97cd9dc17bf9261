"""Options declared once, as fields of a frozen dataclass: type, default, help text and range.

A command makes its flags of these fields (commands/option_flags.py), gin binds them by name, and
`check_options` checks a value wherever it comes from: a flag, a gin file or Python.
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

LARGEST_WHOLE = 2**31 - 1  # what an int32 holds
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
    default: Value where none is given. An option without one has to be given.
    help: One or two sentences for `--help`.
    group: Heading that `--help` lists the option under.
    choices: The values allowed, beside None where the type allows that.
    least: Smallest value; for whole numbers alone.
    most: Largest value of an option with a smallest one.
  """
  metadata = {'help': help, 'group': group, 'choices': choices, 'range': (least, most)}
  return dataclasses.field(default=default, metadata=metadata)


def check_options(options: Any) -> None:
  """Check the fields of a dataclass made with `option`; to be called in its `__post_init__`.

  Raises:
    RequestError: A value of another type, not among the choices, or out of its range.
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
  """Return what a value must be and is not; None for a good one."""
  choices, (least, most) = metadata['choices'], metadata['range']
  got = f', got {reprlib.repr(value)}'
  if value is None and has_type(None, annotation):
    return None
  if choices:
    return None if value in choices else f'one of {", ".join(choices)}{got}'
  if least is None:
    return None if has_type(value, annotation) else type_text(annotation) + got
  if not has_type(value, int) or value < least:
    return f'a whole number, {least} or more{got}'
  return f'a whole number, {least} to {most}{got}' if value > most else None


def takes_options(
  options: type, *, skip: collections.abc.Collection[str] = ()
) -> collections.abc.Callable[[_Function], _Function]:
  """Return a decorator that spells out a function's `**options` in its signature.

  gin binds parameters by the names in a signature: it takes each option then, and refuses others.

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


def has_type(value: Any, annotation: Any) -> bool:
  """Whether a value has the annotated type. Of a container's items nothing is asked."""
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
  """Return whether a value is an integer, of Python or numpy; bool is none."""
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)
