"""Flags defined by the fields of dataclasses (options.option), and the text of --help."""

from collections.abc import Collection, Iterator, Sequence
import dataclasses
import inspect
import textwrap
import types
import typing
from typing import Any, TypeVar

from absl import flags as absl_flags

from t5x_inference_ext.errors import UserError

_WIDTH = 100  # columns of --help
_KINDS = {bool: 'boolean', int: 'integer', float: 'float', str: 'string'}
_T = TypeVar('_T')


def option_fields(
  options: type, *, skip: Collection[str] = (), named: Collection[str] | None = None
) -> Iterator[dataclasses.Field]:
  """Yield the option fields of a dataclass: all except `skip`, or only those in `named`."""
  for field in dataclasses.fields(options):
    if (
      'help' in field.metadata and field.name not in skip and (named is None or field.name in named)
    ):
      yield field


def option_names(*options: type) -> list[str]:
  """Return the names of the options of dataclasses; their flags have equal names."""
  return [field.name for each in options for field in option_fields(each)]


def define_options(
  flags: absl_flags.FlagValues,
  options: type,
  *,
  skip: Collection[str] = (),
  group: str = '',
  prefix: str = '',
) -> None:
  """Define a flag for each option of a dataclass, with its name, type, default and choices.

  Args:
    flags: FlagValues to add the flags to.
    options: Dataclass whose fields are made with options.option.
    skip: Names of fields that get no flag.
    group: Heading in --help; None: the headings of the fields.
    prefix: Text to put before each help text.
  """
  hints = typing.get_type_hints(options)
  for field in option_fields(options, skip=skip):
    default = None if field.default is dataclasses.MISSING else field.default
    define_flag(
      flags,
      field.name,
      hints[field.name],
      default,
      prefix + field.metadata['help'],
      group=group or field.metadata['group'],
      choices=field.metadata['choices'],
    )


def define_flag(
  flags: absl_flags.FlagValues,
  name: str,
  annotation: Any,
  default: Any,
  text: str,
  *,
  group: str = '',
  choices: Sequence[str] = (),
) -> None:
  """Define one flag.

  Args:
    flags: FlagValues to add the flag to.
    name: Name of the flag.
    annotation: Type: bool, int, float or str, each also with `| None`; or tuple[str, ...] for a
      flag that may be repeated.
    default: Value if the flag is not given.
    text: Help text.
    group: Heading in --help.
    choices: Allowed values of a text flag.
  """
  members = set(typing.get_args(annotation)) - {types.NoneType}
  kind: Any = annotation
  if typing.get_origin(annotation) is types.UnionType:
    kind = str if str in members else members.pop()  # int | str: a number with an optional unit
  # absl groups flags by module name: pass the heading of --help as the module name.
  arguments: dict[str, Any] = {'flag_values': flags, 'module_name': group or 'Flags'}
  if choices:
    absl_flags.DEFINE_enum(name, default, list(choices), text, **arguments)
  elif kind in _KINDS:
    getattr(absl_flags, f'DEFINE_{_KINDS[kind]}')(name, default, text, **arguments)
  else:
    absl_flags.DEFINE_multi_string(name, list(default), text, **arguments)


def read_options(
  flags: absl_flags.FlagValues, options: type[_T], *, skip: Collection[str] = (), **others: Any
) -> _T:
  """Return an instance of a dataclass with the values of its flags.

  Args:
    flags: Parsed flags.
    options: Dataclass whose flags define_options made.
    skip: As given to define_options.
    **others: Values of fields without flags.

  Raises:
    UserError: The dataclass rejects a value.
  """
  values = {field.name: flags[field.name].value for field in option_fields(options, skip=skip)}
  for name, value in values.items():
    if isinstance(value, list):
      values[name] = tuple(value)
  return options(**values, **others)


def check_given(flags: absl_flags.FlagValues, *names: str) -> None:
  """Raise UserError naming the required flags that are not given."""
  missing = [f'--{name}' for name in names if flags[name].value in (None, '')]
  if missing:
    raise UserError(f'{", ".join(missing)} not given; --help shows examples')


def help_text(doc: str, flags: absl_flags.FlagValues) -> str:
  """Return the text of --help: a command's docstring, then its flags by group, in order."""
  lines = [inspect.cleandoc(doc)]
  for group, members in flags.flags_by_module_dict().items():
    # absl's own flags have a module name as their group; it contains a dot, and headings do not.
    lines += ['', f'{"Flags" if "." in group else group}:', *map(_flag_text, members)]
  return '\n'.join(lines)


def _flag_text(flag: absl_flags.Flag) -> str:
  text = flag.help.partition(';\n')[0]  # absl appends a hint on repeating a flag
  if (
    isinstance(flag.default, (int, float, str)) and flag.default is not False and flag.default != ''
  ):
    text += f' Default: {flag.default}.'
  # absl puts the choices <A|B> of a flag in front of its text.
  text = f'={text}' if text[0] == '<' else f': {text}'
  return textwrap.fill(
    f'--{flag.name}{text}',
    _WIDTH,
    initial_indent='  ',
    subsequent_indent='      ',
    break_on_hyphens=False,
    break_long_words=False,
  )
