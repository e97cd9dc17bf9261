"""Output files: complete or absent. With several processes, process 0 writes them."""

from collections.abc import Iterator
import contextlib
import json
import os
import stat
import tempfile
from typing import Any, TextIO

from t5x_inference_ext import distributed
from t5x_inference_ext.errors import RequestError

RECORD_SUFFIX = '.config.json'
# Bytes that the longest name of a temporary file, '.NAME.12345678.tmp', adds to NAME.
_ADDED_BYTES = 14


def check_output(path: str, *, overwrite: bool, source: str) -> None:
  """Raise RequestError if an output file can't be written; to be called before any work.

  Args:
    path: The output.
    overwrite: Whether to replace an existing file.
    source: File that the run reads, which the output must not replace.
  """
  if not distributed.is_main():
    return
  directory, name = os.path.split(os.path.abspath(path))
  if os.path.isdir(path):
    raise RequestError(
      f'the output {path} is a directory: --output names the file to write, e.g. '
      f'{os.path.join(path, "completions.jsonl")}'
    )
  if not os.path.isdir(directory):
    raise RequestError(
      f"the output's directory {directory} does not exist: make it first (mkdir -p)"
    )
  if not os.access(directory, os.W_OK):
    raise RequestError(f"the output's directory {directory} is not writable")
  longest = os.pathconf(directory, 'PC_NAME_MAX') - _ADDED_BYTES
  if len(os.fsencode(name)) > longest:
    raise RequestError(
      f"the output's name has {len(os.fsencode(name))} bytes; at most {longest} leave room for "
      'the names of the files beside it: choose a shorter name'
    )
  # Refuse links and devices, such as /dev/stdout: the output replaces the file by a rename.
  for each in (path, path + RECORD_SUFFIX):
    if os.path.lexists(each) and not stat.S_ISREG(os.lstat(each).st_mode):
      kind = 'a link' if os.path.islink(each) else 'not a regular file'
      raise RequestError(f"{each} can't be written, because it is {kind}: choose another --output")
  if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
    raise RequestError(f'the output {path} is also the file of prompts: choose another --output')
  if os.path.exists(path) and not overwrite:
    raise RequestError(
      f'the output {path} exists: remove it, choose another --output, or give --overwrite'
    )


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[TextIO]:
  """Context manager: open a temporary file for writing; rename it to `path` on exit.

  On an exception, no file is left. In processes other than 0, nothing is written.

  Raises:
    RequestError: The file can't be written, for example on a full disk.
  """
  if not distributed.is_main():
    with open(os.devnull, 'w', encoding='utf-8') as file:
      yield file
    return
  directory, name = os.path.split(os.path.abspath(path))
  temporary = None
  try:
    handle, temporary = tempfile.mkstemp(
      prefix=f'.{name}.', suffix='.tmp', dir=directory, text=True
    )
    with open(handle, 'w', encoding='utf-8') as file:
      yield file
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
    os.replace(temporary, path)
  except BaseException as error:
    if temporary is not None:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    if isinstance(error, OSError):
      raise RequestError(f"can't write {path}: {error.strerror}") from error
    raise


def write_record(path: str, record: dict[str, Any]) -> str:
  """Write a run's resolved settings beside its rows, to `path` + RECORD_SUFFIX; return the path."""
  with whole_file(path + RECORD_SUFFIX) as file:
    json.dump(record, file, indent=2)
    file.write('\n')
  return path + RECORD_SUFFIX
