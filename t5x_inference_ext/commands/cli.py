"""What the commands of this package share: flags, gin as T5X's own commands take it, and errors in one line.

A command's module has

  def define_flags(flags): ...    # plain flags, on a FlagValues of its own, so that commands don't clash in one process
  def main(flags): ...            # raises UserError for what the user can mend
  def run(argv=None):             # the entry point; returns the exit code: 0, or 2 after `error: ...` on stderr
    return command.run(main, __doc__, define_flags, argv)

and ends with `sys.exit(run())` under `if __name__ == '__main__'`. With gin, main() calls

  command.configure(function)     # the function with the arguments that gin binds

Gin flags are T5X's: --gin_file=FILE (repeatable), --gin.NAME=VALUE, --gin_bindings='NAME = VALUE',
--gin_search_paths.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
import copy
import functools
import importlib.util  # gin uses it for files inside packages, but imports only importlib
import inspect
import logging
import os
import re
import signal
import sys
import types
import typing
from typing import Any

from absl import flags as absl_flags
from absl import logging as absl_logging
import gin

from t5x_inference_ext.errors import UserError

Main = Callable[[absl_flags.FlagValues], Any]

assert (
  importlib.util and absl_logging
)  # imported for what importing them does: for gin, and for absl's logging flags


def run(
  main: Main,
  doc: str,
  define_flags: Callable[[absl_flags.FlagValues], None],
  argv: Sequence[str] | None = None,
) -> int:
  """Parses flags, calls main(flags), and turns what went wrong into a line of text.

  Args:
    main: the command. What it returns is ignored.
    doc: printed by --help, before the flags.
    define_flags: defines the command's own flags on the given FlagValues.
    argv: sys.argv by default; argv[0] is the command's name.

  Returns:
    The exit code: 0, 2 for a UserError or a wrong flag (one line `error: ...` on stderr), 130 after Ctrl-C.
  """
  argv = list(sys.argv if argv is None else argv)
  flags = absl_flags.FlagValues()
  define_flags(flags)
  _define_gin_flags(flags)
  try:
    try:
      # What this command does not know is absl's: logging flags like --alsologtostderr.
      unknown = flags(rewrite_gin_flags(argv), known_only=True)
      if flags.help:
        print(f'{inspect.cleandoc(doc)}\n\nFlags:\n\n{_flags_help(flags)}')
        return 0
      extra = absl_flags.FLAGS(unknown)[1:]
    except absl_flags.Error as e:
      raise UserError(f'{e} (--help lists the flags)') from e
    if extra:
      raise UserError(f'unexpected argument {extra[0]!r}: flags are written --name=value')
    main(flags)
  except UserError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    return 130
  return 0


def print_line(line: str) -> None:
  """Prints a line of a command's output, at once.

  Raises:
    SystemExit: nobody reads any more, as behind `| head`. The status is a shell's for SIGPIPE.
    UserError: it can't be written.
  """
  try:
    print(line, flush=True)
  except BrokenPipeError:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # Python flushes once more when it ends
    raise SystemExit(128 + signal.SIGPIPE) from None
  except OSError as e:
    raise UserError(f"can't write to standard output: {e.strerror}") from e


def rewrite_gin_flags(argv: Sequence[str]) -> list[str]:
  """--gin.NAME=VALUE as --gin_bindings=NAME = VALUE, which keeps everything gin-specific in one flag."""
  rewritten = []
  for arg in argv:
    name, equals, value = arg.partition('=')
    bare = name.lstrip('-')
    if name.startswith('-') and bare.startswith('gin.'):
      if not equals:
        raise UserError(f'{arg}: write --{bare}=VALUE')
      arg = f'--gin_bindings={bare.removeprefix("gin.")} = {value}'
    rewritten.append(arg)
  return rewritten


def uses_gin(flags: absl_flags.FlagValues) -> bool:
  return bool(flags.gin_file or flags.gin_bindings)


def check_unmixed(
  flags: absl_flags.FlagValues, names: Iterable[str], example: str, gin_file: str
) -> None:
  """Raises UserError for any of a command's plain flags beside gin, with a binding such as to use and where macros are."""
  given = [name for name in names if flags[name].present]
  if given:
    raise UserError(
      f"--{given[0]} and gin flags can't be mixed: with gin, bind macros such as --gin.{example} "
      f'({gin_file} lists them)'
    )


def parse_gin(flags: absl_flags.FlagValues) -> str:
  """Parses the gin files and then the bindings of the command line, and finalizes the configuration.

  Returns:
    The whole configuration as gin text, for a record of the run.

  Raises:
    UserError: a file that is not found, a binding of what does not exist (a macro that no file defines or uses,
      too: gin itself would ignore a misspelt one), a required macro that is not set.
  """
  # The package is found as a gin search path, whatever directory the command is started from.
  package_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  gin.clear_config()
  for path in [*flags.gin_search_paths, package_root]:
    gin.add_config_file_search_path(path)
  # gin logs an error for each place where a file is not, though it may be in the next.
  quiet = lambda record: not str(record.msg).startswith('Path not found')
  logging.getLogger().addFilter(quiet)
  try:
    gin.parse_config_files_and_bindings(flags.gin_file, None, finalize_config=False)
    for binding in flags.gin_bindings:
      _check_macro(binding)
      gin.parse_config(binding)
    gin.finalize()
    return gin.config_str()
  except UserError:
    raise
  except (
    Exception
  ) as e:  # gin raises ValueError, SyntaxError, OSError, and whatever importing a module raises
    message = ' '.join(str(e).split())
    hint = ''
    if '%gin.REQUIRED' in message:
      name = message.partition('/')[0]
      message, hint = (
        f'{name} has no value',
        f': set it with --gin.{name}=VALUE, strings as --gin.{name}=\\"text\\"',
      )
    elif isinstance(e, SyntaxError):
      hint = ' (a string needs quotes that the shell keeps: --gin.NAME=\\"text\\")'
    raise UserError(f'gin: {message or type(e).__name__}{hint}') from e
  finally:
    logging.getLogger().removeFilter(quiet)


def configure(function: Callable[..., Any], **arguments) -> Callable[[], Any]:
  """`function` with what gin binds to its parameters, and `arguments`, ready to be called without any.

  A function that no gin file imports has no bindings. The gin files' names for it are its module and name.

  Raises:
    UserError: a parameter without a default that is neither bound nor given, a value of another type than the parameter
      is annotated with, or a bound object that can't be made.
  """
  try:
    _check_types(function)
    bound = gin.get_bindings(function)
  except (
    UserError
  ) as e:  # of an object that gin makes: it adds the call's place, for which users have no use
    raise UserError(str(e).partition('\n  In call to configurable')[0]) from e
  except ValueError as e:
    message, call, _ = str(e).partition('\n  In call to configurable')
    if call:
      raise UserError(message) from e
    bound = {}  # no gin file names it
  arguments = {**bound, **arguments}
  try:
    inspect.signature(function).bind(**arguments)
  except TypeError as e:
    name = f'{function.__module__}.{function.__name__}'
    raise UserError(f'{name}: {e}: bind it in a gin file or with --gin.NAME=VALUE') from e
  return functools.partial(function, **arguments)


def _check_types(function: Callable[..., Any]) -> None:
  """Raises UserError for a value that gin binds to a parameter of another type, here or in what makes an argument.

  Raises:
    ValueError: no gin file names the function.
  """
  annotated = typing.get_type_hints(function)
  for name, bound in gin.get_bindings(function, resolve_references=False).items():
    maker = _maker(bound)
    if maker:
      _check_types(maker)
    # gin evaluates macros as they are copied.
    elif name in annotated and not _has_type(value := copy.deepcopy(bound), annotated[name]):
      label = (
        str(bound).removeprefix('%')
        if isinstance(bound, gin.config.ConfigurableReference)
        else name
      )
      hint = ': text has quotes that the shell keeps, --gin.NAME=\\"text\\", and numbers have none'
      raise UserError(f'gin: {label} must be {_type_name(annotated[name])}, got {value!r}{hint}')


def _maker(bound: Any) -> Callable[..., Any] | None:
  """What gin calls for a bound value, itself or through macros; None where the value stands for itself."""
  while isinstance(bound, gin.config.ConfigurableReference) and bound.evaluate:
    made_by = bound.configurable.wrapped
    if made_by is not gin.config.macro:
      return made_by
    with gin.config_scope('/'.join(bound.scopes)):
      bound = gin.get_bindings(made_by, resolve_references=False).get('value')
  return None


def _has_type(value: Any, annotation: Any) -> bool:
  """Of containers only whether it is one: what is in them is the function's to check."""
  if typing.get_origin(annotation) in (types.UnionType, typing.Union):
    return any(_has_type(value, member) for member in typing.get_args(annotation))
  if typing.get_origin(annotation) is not None:
    return isinstance(value, Collection)
  return isinstance(value, (int, float) if annotation is float else annotation)


def _type_name(annotation: Any) -> str:
  if typing.get_origin(annotation) in (types.UnionType, typing.Union):
    return ' or '.join(map(_type_name, typing.get_args(annotation)))
  return (
    'None' if annotation is types.NoneType else getattr(annotation, '__name__', str(annotation))
  )


def _check_macro(binding: str) -> None:
  name = binding.partition('=')[0].strip()
  if not name.isidentifier():
    return  # scope/module.function.parameter: gin checks it
  config = gin.config_str()
  known = sorted(
    {
      line.partition(' = ')[0]
      for line in config.splitlines()
      if line.partition(' = ')[0].isidentifier()
    }
  )
  if name not in known and not re.search(rf'%{name}\b', config):
    raise UserError(
      f'gin: nothing uses {name}; the gin files define {", ".join(known) or "no macro"}'
    )


def _define_gin_flags(flags: absl_flags.FlagValues) -> None:
  absl_flags.DEFINE_boolean('help', False, 'Print this.', short_name='h', flag_values=flags)
  absl_flags.DEFINE_multi_string('gin_file', [], 'A gin file; may be repeated.', flag_values=flags)
  absl_flags.DEFINE_multi_string(
    'gin_bindings', [], 'A gin binding; --gin.NAME=VALUE says the same.', flag_values=flags
  )
  absl_flags.DEFINE_list(
    'gin_search_paths',
    ['.'],
    'Where gin files are looked for, separated by commas.',
    flag_values=flags,
  )


def _flags_help(flags: absl_flags.FlagValues) -> str:
  lines = []
  for name in sorted(set(flags) - {'h', 'gin_bindings'}):
    flag = flags[name]
    text = flag.help.partition(';\n')[0]  # absl adds how to repeat a flag
    default = (
      f' Default: {flag.default}.'
      if isinstance(flag.default, (int, float, str)) and flag.default
      else ''
    )
    lines.append(f'  --{name}: {text}{default}')
  return '\n'.join(lines + ['  --gin.NAME=VALUE: A gin binding, after the files; may be repeated.'])
