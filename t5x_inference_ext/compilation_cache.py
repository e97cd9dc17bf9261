"""The commands' persistent compilation cache: compiled programs in files, for later runs.

jax finds a program by a hash of its code, the compiler's options and the versions. But jax's own
files are not written atomically and have no checksum, so a truncated file makes every later run
fail. Here each file has a checksum, is renamed to its final name when it is complete, and is
removed if it is damaged. Errors of the directory do not end a run.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import platform
import tempfile
from typing import Any
import warnings

from t5x_inference_ext.options import check_options, option
from t5x_inference_ext.text_format import decimal_bytes

MOST_BYTES = 4 * 10**9  # maximum total bytes; beyond, the least recently used files are removed
LEAST_SECONDS = 0.1  # programs that compile in less time are not kept
GROUP = 'Sharding, memory and compilation'
_SUFFIX = '.program'
_CHECKSUM_BYTES = 32  # SHA-256, at the beginning of a file


@dataclasses.dataclass(frozen=True)
class CacheOptions:
  """Where compiled programs are kept between runs."""

  compilation_cache: str | None = option(
    None,
    help='Directory that keeps compiled programs for later runs; empty: none. Its files are run as '
    'code. By default JAX_COMPILATION_CACHE_DIR, else a directory in XDG_CACHE_HOME or ~/.cache. '
    'Also works with gin flags.',
    group=GROUP,
  )

  def __post_init__(self) -> None:
    check_options(self)


class ProgramFiles:
  """Compiled programs in a directory: an implementation of jax's CacheInterface.

  Several processes may use the directory at once.

  Args:
    directory: The directory; made if it does not exist.
    warn: Function that prints one line if the directory can't be used.

  Attributes:
    count: Number of programs found in the directory.
    size: Total bytes of the programs found.
    failed: Whether the directory can't be used. `warn` was then called.
  """

  def __init__(self, directory: str, warn: Callable[[str], None]) -> None:
    # jax reads the attribute _path for its messages.
    self._path = self._directory = pathlib.Path(directory)
    self._warn, self.failed = warn, False
    self.count = self.size = 0
    with self._errors('used'):
      self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
      self._remove_oldest()

  def get(self, key: str) -> bytes | None:
    """Return a program, or None if it is missing or damaged."""
    path = self._directory / (key + _SUFFIX)
    try:
      data = path.read_bytes()
    except FileNotFoundError:
      return None
    except OSError as error:
      self._say('read', error)
      return None
    checksum, program = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
    with contextlib.suppress(OSError):
      if hashlib.sha256(program).digest() != checksum:
        path.unlink()
        return None
      os.utime(path)  # record the time of the file's last use
    return program if hashlib.sha256(program).digest() == checksum else None

  def put(self, key: str, value: bytes) -> None:
    """Store a program."""
    with self._errors('written'):
      handle, temporary = tempfile.mkstemp(suffix='.tmp', dir=self._directory)
      try:
        with open(handle, 'wb') as file:
          file.write(hashlib.sha256(value).digest() + value)
        os.replace(temporary, self._directory / (key + _SUFFIX))
      except BaseException:
        os.unlink(temporary)
        raise

  def clear(self) -> None:
    """Do nothing. Only jax's own tests clear a cache."""

  def _remove_oldest(self) -> None:
    """Remove the least recently used programs beyond MOST_BYTES; set count and size of the rest."""
    found = []
    for path in self._directory.glob(f'*{_SUFFIX}'):
      with contextlib.suppress(FileNotFoundError):  # another process removed it
        stat = path.stat()
        found.append((stat.st_mtime, stat.st_size, path))
    for _, size, path in sorted(found, reverse=True):
      if self.size + size > MOST_BYTES:
        path.unlink(missing_ok=True)
      else:
        self.count, self.size = self.count + 1, self.size + size

  @contextlib.contextmanager
  def _errors(self, verb: str) -> Any:
    try:
      yield
    except OSError as error:
      self._say(verb, error)

  def _say(self, verb: str, error: OSError) -> None:
    """Warn about the directory, only once, since it will keep failing."""
    if not self.failed:
      self.failed = True
      self._warn(
        f"warning: the compilation cache {self._directory} can't be {verb} ({error.strerror}): "
        'programs are compiled anew'
      )


def use_compilation_cache(options: CacheOptions, say: Callable[[str], None]) -> None:
  """Make jax store this process's compiled programs in a directory, and print its path.

  It changes jax's global configuration, which only commands may do. JAX_ENABLE_COMPILATION_CACHE=0
  turns the cache off.

  Args:
    options: Gives the directory; '' turns the cache off.
    say: Prints a line.
  """
  import jax

  config: Any = jax.config
  given = options.compilation_cache
  directory = given if given is not None else config.jax_compilation_cache_dir
  if directory == '' or not config.jax_enable_compilation_cache:
    jax.config.update('jax_enable_compilation_cache', False)
    say('compilation cache: none')
    return
  directory = os.path.abspath(directory or default_directory())
  # A CPU program has instructions of one kind of processor, but machines with different processors
  # may share a home directory: so the processor is part of the path.
  directory = os.path.join(directory, f'jax-{jax.__version__}-{_processor()}')
  files = ProgramFiles(directory, say)
  jax.config.update('jax_compilation_cache_dir', directory)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', LEAST_SECONDS)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  _install(files)
  if files.failed:
    return  # the warning has already been printed
  say(
    f'compilation cache: {directory}, {files.count} programs, {decimal_bytes(files.size)} '
    '(--compilation_cache= turns it off)'
  )


def default_directory() -> str:
  """Return the user's directory for compiled programs."""
  home = os.environ.get('XDG_CACHE_HOME', '')
  if not os.path.isabs(home):  # the XDG specification says to ignore relative paths
    home = os.path.join(os.path.expanduser('~'), '.cache')
  return os.path.join(home, 't5x_inference_ext', 'programs')


def _install(files: ProgramFiles) -> None:
  """Make jax use `files`. A version of jax without this hook keeps using its own files."""
  with contextlib.suppress(ImportError, AttributeError):
    import jax._src.compilation_cache as module

    cache: Any = module
    cache.get_file_cache  # noqa: B018  # an AttributeError, if there is none
    cache.reset_cache()
    cache.get_file_cache = lambda path: (files, path)
  # A program that can't be loaded is compiled. Silence jax's long warning about it.
  warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache entry')


def _processor() -> str:
  """Return a short name of this processor's kind and instructions."""
  try:
    with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file:
      # The entry of the first core.
      lines = file.read().partition('\n\n')[0].splitlines()
  except OSError:
    lines = [platform.processor()]
  # Other fields, such as the clock, differ between cores and change.
  kinds = ('model name', 'flags', 'Features', 'CPU part')
  kept = [line for line in lines if line.startswith(kinds)] or lines
  return hashlib.sha256('\n'.join(kept).encode()).hexdigest()[:8]
