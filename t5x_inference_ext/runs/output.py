"""Output files that appear whole or not at all. Of several processes, process 0 alone has them."""

from collections.abc import Iterator
import contextlib
import json
import os
import tempfile
from typing import Any, TextIO

from t5x_inference_ext import distributed
from t5x_inference_ext.errors import RequestError

RECORD_SUFFIX = '.config.json'


def check_output(path: str, *, overwrite: bool) -> None:
  """Raises RequestError for a file that could not be written in the end, before hours are spent on its contents."""
  if not distributed.is_main():
    return
  directory = os.path.dirname(os.path.abspath(path))
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
  if os.path.exists(path) and not overwrite:
    raise RequestError(
      f'the output {path} exists: remove it, choose another --output, or give --overwrite'
    )


def open_text(path: str, mode: str) -> TextIO:
  return open(path, mode, encoding='utf-8')


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[TextIO]:
  """A file to write that takes its name only when all of it is written; on an exception nothing is left."""
  if not distributed.is_main():
    with open(os.devnull, 'w', encoding='utf-8') as file:
      yield file
    return
  directory, name = os.path.split(os.path.abspath(path))
  handle, temporary = tempfile.mkstemp(prefix=f'.{name}.', suffix='.tmp', dir=directory, text=True)
  try:
    with open(handle, 'w', encoding='utf-8') as file:
      yield file
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)  # mkstemp's own mode is for secrets
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)
    raise


def write_record(path: str, record: dict[str, Any]) -> str:
  """Writes what a run resolved beside its rows, as path + RECORD_SUFFIX, and returns that name."""
  with whole_file(path + RECORD_SUFFIX) as file:
    json.dump(record, file, indent=2)
    file.write('\n')
  return path + RECORD_SUFFIX
