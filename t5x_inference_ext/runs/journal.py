"""Finished rows of a run, kept beside the output until all of it is written.

A run that ends early, whatever the reason, goes on from them.
"""

from collections.abc import Iterator
import contextlib
import fcntl
import hashlib
import json
import pathlib
from typing import IO, Any

from t5x_inference_ext import distributed
from t5x_inference_ext.errors import RequestError

FLUSH_ROWS = 64  # rows written together to a bucket: some stores rewrite a file that grows


class Journal:
  """A file with a line for each finished row. Of several processes, process 0 has the file.

  A local file is locked while it is open: two runs cannot write one output. It is only ever
  appended to, or emptied for another run, so that a kill at any moment loses no finished row.

  Args:
    path: The file, which exists only while rows are missing.
    run: All that decides which rows come out, with a telling repr. The file of another run is
      emptied.
    bucket_files: Opens, finds and removes files of a bucket, as tf.io.gfile does; needed for
      paths such as gs://.

  Attributes:
    done: Results by row; those of an earlier run of the same kind at first.

  Raises:
    RequestError: Another run has the file.
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
    """Keep the result of a row, JSON-ready. It is on its way to the disk when this returns."""
    self.done[row] = result
    if not distributed.is_main():
      return
    try:
      self._append(row, result)
    except OSError as error:
      raise RequestError(
        f"finished rows can't be kept in {self._path}: {error.strerror}; the same command goes on "
        'from those that are there'
      ) from error

  def _append(self, row: int, result: Any) -> None:
    if self._file is None:  # of a bucket: written anew, since stores do not append
      self._file = self._bucket_files.GFile(self._path, 'w')
      self._file.write(f'{self._run}\n')
      for each in self.done.items():
        self._write(*each)
    else:
      self._write(row, result)
    self._pending += 1
    if self._pending >= (FLUSH_ROWS if self._in_bucket else 1):
      self._file.flush()
      self._pending = 0

  def in_order(self) -> Iterator[Any]:
    """Yield the results in the order of their rows."""
    return (self.done[row] for row in sorted(self.done))

  def close(self) -> None:
    """Close the file; it stays if it holds a row."""
    if self._file is not None:
      if not self._in_bucket and not self.done:
        pathlib.Path(self._path).unlink(missing_ok=True)
      self._file.close()
      self._file = None

  @contextlib.contextmanager
  def closed_on_error(self) -> Iterator[None]:
    """Close the file if the block raises: a later run may then open it."""
    try:
      yield
    except BaseException:
      self.close()
      raise

  def remove(self) -> None:
    """Remove the file: the output is written."""
    if not distributed.is_main():
      return
    if not self._in_bucket:
      pathlib.Path(self._path).unlink(missing_ok=True)
    elif self._bucket_files.exists(self._path):
      self._bucket_files.remove(self._path)

  def _write(self, row: int, result: Any) -> None:
    assert self._file is not None
    self._file.write(json.dumps({'row': row, 'result': result}) + '\n')

  def _open(self) -> list[tuple[int, Any]]:
    """Open a local file, and return the rows of it, or of a bucket's, that this run may keep."""
    if self._in_bucket:
      if not self._bucket_files.exists(self._path):
        return []
      with self._bucket_files.GFile(self._path, 'r') as file:
        return self._rows(file.read())
    try:
      file = open(self._path, 'a+', encoding='utf-8')  # noqa: SIM115  # open while the run lasts
      self._file = file
    except OSError as error:
      raise RequestError(
        f"finished rows can't be kept beside the output, in {self._path}: {error.strerror}"
      ) from error
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      file.close()
      self._file = None
      raise RequestError(
        f'another run is writing this output (it has {self._path}): wait for it, or choose '
        'another output'
      ) from None
    file.seek(0)
    text = file.read()
    rows = self._rows(text)
    if not rows and text != f'{self._run}\n':
      file.truncate(0)
      file.write(f'{self._run}\n')
      file.flush()
    elif not text.endswith('\n'):  # the last line was not written whole
      file.write('\n')
    return rows

  def _rows(self, text: str) -> list[tuple[int, Any]]:
    """Return the rows of a journal's text; none of another run's, and no damaged line."""
    head, *lines = text.split('\n')
    if head != self._run:
      return []
    rows = []
    for line in lines:
      try:
        row = json.loads(line)
        rows.append((int(row['row']), row['result']))
      except (ValueError, TypeError, KeyError, RecursionError):
        continue  # cut off, or damaged: the row is made again
    return rows
