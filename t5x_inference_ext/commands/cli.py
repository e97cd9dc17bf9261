"""Parts that all commands share: a session (flags, one-line errors, exit code) and gin flags.

A command's module has

  def define_flags(flags): ...      # on its own FlagValues, so that commands can share a process

  def run(argv=None) -> int:        # the entry point; returns the exit code
    with cli.Session(__doc__, define_flags, argv) as session:
      flags = session.parse()
      ...                           # raises UserError for errors that the user can fix
    return session.code

With gin flags the block calls `parse_gin(flags)` and then `configure(function)()`. Gin flags are
those of T5X: --gin_file=FILE (repeatable), --gin.NAME=VALUE, --gin_bindings='NAME = VALUE',
--gin_search_paths.
"""

from collections.abc import Callable, Iterable, Sequence
import functools
import importlib.util
import inspect
import io
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

from t5x_inference_ext.commands import option_flags
from t5x_inference_ext.errors import UserError, printable
from t5x_inference_ext.options import has_type, type_text

# Imported for side effects: gin uses importlib.util without importing it, and absl.logging defines
# absl's flags.
assert importlib.util and absl_logging

_GIN_GROUP = 'Gin'
_PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class HelpShown(Exception):
  """Raised by Session.parse after it has printed --help: the command is done."""


class Session:
  """One run of a command: its flags, and an exit code however the command ends.

  Context manager. Errors that the user can fix (UserError, a full disk, too little memory) become
  one line `error: ...` on stderr and exit code 2. Ctrl-C gives code 130. If the reader of a pipe
  has ended, as with `| head`, the code is the one that shells use for SIGPIPE. Other exceptions
  keep their traceback. Lines are printed without buffering, even into a file.

  Args:
    doc: Text that --help prints before the flags.
    define_flags: Defines the command's own flags on the FlagValues given to it.
    argv: Command line, beginning with the command's name; sys.argv by default.

  Attributes:
    code: Exit code of the process. A command may set it.
  """

  def __init__(
    self,
    doc: str | None,
    define_flags: Callable[[absl_flags.FlagValues], None],
    argv: Sequence[str] | None = None,
  ) -> None:
    self.code = 0
    self._doc, self._define_flags = doc or '', define_flags
    self._argv = list(sys.argv if argv is None else argv)

  def __enter__(self) -> 'Session':
    if isinstance(sys.stdout, io.TextIOWrapper):
      # A path on the command line may have bytes that are not UTF-8, which are printed as escapes.
      sys.stdout.reconfigure(line_buffering=True, errors='backslashreplace')
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: types.TracebackType | None,
  ) -> bool:
    if isinstance(error, HelpShown):
      return True
    if isinstance(error, KeyboardInterrupt):
      print('interrupted', file=sys.stderr)
      self.code = 130
    elif isinstance(error, BrokenPipeError):
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, sys.stdout.fileno())  # Python flushes again at exit
      self.code = 128 + signal.SIGPIPE
    elif error is not None and (message := _user_message(error)):
      # Paths may have control characters, which would write over the terminal.
      lines = (printable(line, len(line)) for line in message.split('\n'))
      print('error: ' + '\n'.join(lines), file=sys.stderr)
      self.code = 2
    return self.code != 0

  def parse(self) -> absl_flags.FlagValues:
    """Return the parsed flags.

    Raises:
      UserError: A flag is unknown or has a wrong value, or an argument is not a flag.
      HelpShown: --help was given, and has been printed.
    """
    flags = absl_flags.FlagValues()
    self._define_flags(flags)
    _define_gin_flags(flags)
    try:
      # Other flags may be absl's own, such as --alsologtostderr.
      unknown = flags(rewrite_gin_flags(self._argv), known_only=True)
      if flags.help:
        print(option_flags.help_text(self._doc, flags))
        raise HelpShown
      extra = absl_flags.FLAGS(unknown)[1:]
    except absl_flags.Error as e:
      raise UserError(f'{e} (--help lists the flags)') from e
    if extra:
      raise UserError(f'unexpected argument {extra[0]!r}: flags are written --name=value')
    return flags


def _user_message(error: BaseException) -> str:
  """Return one line for an error that the user can fix; '' for a bug of this package."""
  if isinstance(error, UserError):
    return str(error)
  # A FileNotFoundError may be a bug of this package. Other OSErrors are due to the machine.
  if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and error.strerror:
    return f'{error.strerror}: {error.filename}' if error.filename else error.strerror
  # Compare the name of jax's error class, since some commands run without importing jax.
  if isinstance(error, MemoryError) or str(error).startswith('RESOURCE_EXHAUSTED'):
    why = str(error).removeprefix('RESOURCE_EXHAUSTED: ').partition('\n')[0] or 'MemoryError'
    return f'too little memory ({why}): take fewer or shorter rows, or more devices'
  return ''


def rewrite_gin_flags(argv: Sequence[str]) -> list[str]:
  """Rewrite `--gin.NAME=VALUE` in a command line as `--gin_bindings=NAME = VALUE`."""
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
  """Return whether a gin file or binding was given."""
  return bool(flags.gin_file or flags.gin_bindings)


def check_unmixed(
  flags: absl_flags.FlagValues, names: Iterable[str], example: str, gin_file: str
) -> None:
  """Raise UserError if plain flags and gin flags are both given.

  Args:
    flags: Parsed flags.
    names: Plain flags of the command.
    example: A binding to use instead, such as 'BATCH=64'.
    gin_file: File that lists the command's macros.
  """
  given = [name for name in names if flags[name].present]
  if given:
    raise UserError(
      f"--{given[0]} and gin flags can't be mixed: with gin, bind macros such as "
      f'--gin.{example} ({gin_file} lists them)'
    )


def parse_gin(flags: absl_flags.FlagValues) -> str:
  """Parse the gin files, then the bindings of the command line, and finalize the configuration.

  Returns:
    The whole configuration as gin text, for a record of the run.

  Raises:
    UserError: A file is not found; a binding's target is unknown; a macro that no file defines or
      uses is bound (gin would ignore it); or a required macro is not set.
  """
  gin.clear_config()
  # The package's parent directory is a gin search path, so its gin files are found from everywhere.
  for path in [*flags.gin_search_paths, _PACKAGE_PARENT]:
    gin.add_config_file_search_path(path)
  logging.getLogger().addFilter(_is_no_search)
  try:
    gin.parse_config_files_and_bindings(flags.gin_file, None, finalize_config=False)
    for binding in flags.gin_bindings:
      _check_macro(binding)
      gin.parse_config(binding)
    gin.finalize()
    return gin.config_str()
  except UserError:
    raise
  except Exception as e:  # ValueError, SyntaxError, OSError, or any error of an import
    message = ' '.join(str(e).split())
    hint = ''
    if '%gin.REQUIRED' in message:
      name = message.partition('/')[0]
      message = f'{name} has no value'
      hint = f': set it with --gin.{name}=VALUE, strings as --gin.{name}=\\"text\\"'
    elif isinstance(e, SyntaxError):
      hint = ' (a string needs quotes that the shell keeps: --gin.NAME=\\"text\\")'
    raise UserError(f'gin: {message or type(e).__name__}{hint}') from e
  finally:
    logging.getLogger().removeFilter(_is_no_search)


def _is_no_search(record: logging.LogRecord) -> bool:
  """Drop gin's error for a search path that lacks a file, which another path may have."""
  return not str(record.msg).startswith('Path not found')


def configure(function: Callable[..., Any], **arguments: Any) -> Callable[[], Any]:
  """Return `function` with all its arguments bound: by gin, or given here.

  Raises:
    UserError: A parameter without a default is neither bound nor given, a value is not of the
      parameter's annotated type, or a bound object can't be made.
  """
  try:
    bound = gin.get_bindings(function)
    sources = gin.get_bindings(function, resolve_references=False)
  except (TypeError, ValueError) as e:
    message, call, _ = str(e).partition('\n  In call to configurable')
    if call or isinstance(e, UserError):  # raised while gin constructed an object
      raise UserError(message) from e
    bound, sources = {}, {}  # no gin file binds the function's parameters
  hints = typing.get_type_hints(function)
  for name, value in bound.items():
    if name in hints and not has_type(value, hints[name]):
      is_macro = isinstance(sources[name], gin.config.ConfigurableReference)
      label = str(sources[name]).removeprefix('%') if is_macro else name
      raise UserError(
        f'gin: {label} must be {type_text(hints[name])}, got {value!r}: text has quotes that the '
        'shell keeps, --gin.NAME=\\"text\\", and numbers have none'
      )
  arguments = {**bound, **arguments}
  try:
    inspect.signature(function).bind(**arguments)
  except TypeError as e:
    name = f'{function.__module__}.{function.__name__}'
    raise UserError(f'{name}: {e}: bind it in a gin file or with --gin.NAME=VALUE') from e
  return functools.partial(function, **arguments)


def _check_macro(binding: str) -> None:
  """Raise UserError if no parsed gin file defines or uses the macro of a binding."""
  name = binding.partition('=')[0].strip()
  if not name.isidentifier():
    return  # scope/module.function.parameter, which gin checks itself
  config = gin.config_str()
  known = sorted(set(re.findall(r'^(\w+) = ', config, re.MULTILINE)))
  if name not in known and not re.search(rf'%{name}\b', config):
    raise UserError(
      f'gin: nothing uses {name}; the gin files define {", ".join(known) or "no macro"}'
    )


def _define_gin_flags(flags: absl_flags.FlagValues) -> None:
  arguments: dict[str, Any] = {'flag_values': flags, 'module_name': _GIN_GROUP}
  absl_flags.DEFINE_multi_string('gin_file', [], 'A gin file; may be repeated.', **arguments)
  absl_flags.DEFINE_multi_string(
    'gin_bindings',
    [],
    'A gin binding, applied after the files; may be repeated. --gin.NAME=VALUE is short for it.',
    **arguments,
  )
  absl_flags.DEFINE_list(
    'gin_search_paths',
    ['.'],
    'Directories where gin files are looked for, separated by commas.',
    **arguments,
  )
  absl_flags.DEFINE_boolean('help', False, 'Print this.', short_name='h', **arguments)
