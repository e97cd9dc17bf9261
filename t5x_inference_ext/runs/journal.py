"""The journal: finished rows of a run, stored beside the output file until it is complete.

A run that was stopped for any reason continues from the journal.
"""

from collections.abc import Iterator
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import stat
from typing import IO, Any

from t5x_inference_ext import distributed
from t5x_inference_ext.errors import RequestError

FLUSH_ROWS = 64  # in a bucket, number of rows between writes: each write may rewrite the whole file


class Journal:
  """A file with one line for each finished row. With several processes, only process 0 writes it.

  A local file is locked while it is open, so that two runs can't write one output. The file is only
  appended to, or emptied if another run wrote it, so that a killed run loses no finished row. Each
  line has a checksum of its row and of the run's settings. If a line is damaged or belongs to
  another run, only that row is computed again.

  Args:
    path: The file. It exists only while rows are missing.
    run: All settings that determine the rows, with a readable repr. A file of a run with other
      settings is emptied.
    bucket_files: Module like tf.io.gfile, to open, find and remove files in a bucket; needed for
      paths such as gs://.

  Attributes:
    done: Row -> result; initially the results of an earlier run with equal settings.

  Raises:
    RequestError: Another run is using the file, or `path` is not a regular file.
  """

  def __init__(self, path: str, run: Any, bucket_files: Any = None) -> None:
    self._path, self._bucket_files = path, bucket_files
    self._in_bucket = '://' in path
    self._run = hashlib.sha256(repr(run).encode()).hexdigest()
    self._file: IO[str] | None = None
    self._pending = 0
    self.done: dict[int, Any] = {}
    found = distributed.from_main(self._open)
    self.done.update({int(row): result for row, result in found})

  def keep(self, row: int, result: Any) -> None:
    """Store the JSON-ready result of a row, and hand it to the system to write to disk."""
    self.done[row] = result
    if not distributed.is_main():
      return
    try:
      self._append(row, result)
    except OSError as error:
      raise RequestError(
        f"finished rows can't be kept in {self._path}: {error.strerror}; the same command goes on "
        'from the rows that were kept'
      ) from error

  def _append(self, row: int, result: Any) -> None:
    if self._file is None:  # in a bucket: rewrite the file, since object stores do not append
      self._file = self._bucket_files.GFile(self._path, 'w')
      self._file.write(f'{self._run}\n')
      for each in self.done.items():
        self._file.write(self._line(*each))
    else:
      self._file.write(self._line(row, result))
    self._pending += 1
    if self._pending >= (FLUSH_ROWS if self._in_bucket else 1):
      self._file.flush()
      self._pending = 0

  def in_order(self) -> Iterator[Any]:
    """Yield the results in row order."""
    return (self.done[row] for row in sorted(self.done))

  def close(self) -> None:
    """Close the file, and remove it if it holds no row."""
    if self._file is not None:
      if not self._in_bucket and not self.done:
        pathlib.Path(self._path).unlink(missing_ok=True)
      with contextlib.suppress(OSError):  # on a full disk, `keep` has already raised
        self._file.close()
      self._file = None

  @contextlib.contextmanager
  def closed_on_error(self) -> Iterator[None]:
    """Context manager: close the file if the block raises, so that a later run may open it."""
    try:
      yield
    except BaseException:
      self.close()
      raise

  def remove(self) -> None:
    """Remove the file, once the output is written."""
    if not distributed.is_main():
      return
    if not self._in_bucket:  # remove it while it is locked, so that no other run opens it
      pathlib.Path(self._path).unlink(missing_ok=True)
    self.close()
    if self._in_bucket and self._bucket_files.exists(self._path):
      self._bucket_files.remove(self._path)

  def _line(self, row: int, result: Any) -> str:
    text = json.dumps({'row': row, 'result': result})
    check = hashlib.sha256(f'{self._run} {text}'.encode()).hexdigest()[:16]
    return f'{text[:-1]}, "check": "{check}"}}\n'

  def _open(self) -> list[tuple[int, Any]]:
    """Open the file, unless it is in a bucket; return the rows of this run that it holds."""
    if self._in_bucket:
      if not self._bucket_files.exists(self._path):
        return []
      with self._bucket_files.GFile(self._path, 'r') as file:
        return self._rows(file.read())
    self._file = file = _locked_file(self._path)
    file.seek(0)
    text = file.read()
    rows = self._rows(text)
    try:
      if not rows and text != f'{self._run}\n':
        file.truncate(0)
        file.write(f'{self._run}\n')
        file.flush()
      elif not text.endswith('\n'):  # the last line is incomplete
        file.write('\n')
        file.flush()
    except OSError as error:
      self.close()
      raise _cannot_keep(self._path, error.strerror) from error
    return rows

  def _rows(self, text: str) -> list[tuple[int, Any]]:
    """Return the undamaged rows of this run in a journal's text."""
    rows = []
    for line in text.split('\n'):
      try:
        entry = json.loads(line)
        row, result = entry['row'], entry['result']
        if type(row) is int and self._line(row, result) == f'{line}\n':
          rows.append((row, result))
      except (ValueError, TypeError, KeyError, RecursionError):
        continue  # the line is cut off, damaged, or not a row
    return rows


def check_journal_path(path: str) -> None:
  """Raise RequestError if a local path can't be used for a journal. Create no file."""
  if distributed.is_main() and os.path.lexists(path):
    _locked_file(path).close()


def _cannot_keep(path: str, reason: str | None) -> RequestError:
  return RequestError(f"finished rows can't be kept beside the output, in {path}: {reason}")


def _locked_file(path: str) -> IO[str]:
  """Open a local file for reading and appending, and lock it.

  Raises:
    RequestError: The path can't be opened as a regular file, or another run has locked it.
  """
  while True:
    try:
      # Do not follow a link, and do not wait for a FIFO.
      flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
      handle = os.open(path, flags, 0o666)
    except OSError as error:
      link = os.path.islink(path)
      raise _cannot_keep(path, 'it is a link: remove it' if link else error.strerror) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
      os.close(handle)
      raise _cannot_keep(path, 'it is not a regular file: remove it')
    file = open(handle, 'a+', encoding='utf-8', errors='replace', newline='\n')  # noqa: SIM115  # open for the run
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if os.path.samestat(os.fstat(handle), os.lstat(path)):
        return file
    except FileNotFoundError:
      pass  # the previous run has removed the file
    except BlockingIOError:
      file.close()
      raise RequestError(
        f'another run is writing this output (it holds {path}): wait for it, or choose another '
        'output'
      ) from None
    except OSError:
      return file  # the file system has no locks
    file.close()
