"""Options declared once, as fields of a frozen dataclass: type, default, help text and range.

A command makes its flags of these fields (commands/option_flags.py), gin binds them by name, and
`check_options` checks a value wherever it comes from: a flag, a gin file or Python.
"""

import collections.abc
import dataclasses
import numbers
import types
import typing
from typing import Any

from t5x_inference_ext.errors import RequestError

LARGEST_WHOLE = 2**31 - 1  # what an int32 holds
_WORDS = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}
_REQUIRED = dataclasses.MISSING


def option(
  default: Any = _REQUIRED,
  *,
  help: str,
  group: str = '',
  choices: collections.abc.Sequence[str] = (),
  least: int | None = None,
) -> Any:
  """Return a dataclass field that is an option.

  Args:
    default: value where none is given. An option without one has to be given.
    help: one or two sentences for `--help`.
    group: heading that `--help` lists the option under.
    choices: the values allowed, beside None where the type allows that.
    least: smallest value of a whole number.
  """
  return dataclasses.field(
    default=default, metadata={'help': help, 'group': group, 'choices': choices, 'least': least}
  )


def check_options(options: Any) -> None:
  """Check the fields of a dataclass made with `option`; to be called in its `__post_init__`.

  Raises:
    RequestError: a value of another type, not among the choices, or below the least.
  """
  hints = typing.get_type_hints(type(options))
  for field in dataclasses.fields(options):
    if 'help' not in field.metadata:
      continue
    value, annotation = getattr(options, field.name), hints[field.name]
    choices, least = field.metadata['choices'], field.metadata['least']
    if value is None and has_type(None, annotation):
      continue
    if choices and value not in choices:
      raise RequestError(f'{field.name} must be one of {", ".join(choices)}, got {value!r}')
    if least is not None and not (has_type(value, annotation) and least <= value <= LARGEST_WHOLE):
      most = f' and at most {LARGEST_WHOLE}' if has_type(value, int) and value > least else ''
      raise RequestError(
        f'{field.name} must be a whole number, {least} or more{most}, got {value!r}'
      )
    if not has_type(value, annotation):
      raise RequestError(f'{field.name} must be {type_text(annotation)}, got {value!r}')


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
