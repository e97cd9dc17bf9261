"""Journal: the finished rows of a run, kept beside the output until all of it is written.

A run that was stopped, for whatever reason, continues from the journal.
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

FLUSH_ROWS = 64  # rows written at once to a bucket, where appending may rewrite the file


class Journal:
  """A file with one line for each finished row. With several processes, process 0 has the file.

  A local file is locked while it is open, so that two runs cannot write one output. The file is
  only appended to (or emptied, if another run wrote it), so that no kill loses a finished row.

  Args:
    path: The file, which exists only while rows are missing.
    run: All settings that determine the rows, with a readable repr. A file of a run with other
      settings is emptied.
    bucket_files: Opens, finds and removes files in a bucket, like tf.io.gfile; needed for paths
      such as gs://.

  Attributes:
    done: Results by row, at first those of an earlier run with equal settings.

  Raises:
    RequestError: Another run is using the file.
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
    """Keep the JSON-ready result of a row. On return it is being written to the disk."""
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
    if self._file is None:  # in a bucket: rewritten, since stores do not append
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
    """Yield the results in row order."""
    return (self.done[row] for row in sorted(self.done))

  def close(self) -> None:
    """Close the file. It stays if it holds a row."""
    if self._file is not None:
      if not self._in_bucket and not self.done:
        pathlib.Path(self._path).unlink(missing_ok=True)
      self._file.close()
      self._file = None

  @contextlib.contextmanager
  def closed_on_error(self) -> Iterator[None]:
    """Close the file if the block raises, so that a later run may open it."""
    try:
      yield
    except BaseException:
      self.close()
      raise

  def remove(self) -> None:
    """Remove the file, once the output is written."""
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
    """Open the file, unless it is in a bucket; return the rows that this run can keep from it."""
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
        f'another run is writing this output (it holds {self._path}): wait for it, or choose '
        'another output'
      ) from None
    file.seek(0)
    text = file.read()
    rows = self._rows(text)
    if not rows and text != f'{self._run}\n':
      file.truncate(0)
      file.write(f'{self._run}\n')
      file.flush()
    elif not text.endswith('\n'):  # the last line is incomplete
      file.write('\n')
    return rows

  def _rows(self, text: str) -> list[tuple[int, Any]]:
    """Return the undamaged rows in a journal's text; none if a run with other settings wrote it."""
    head, *lines = text.split('\n')
    if head != self._run:
      return []
    rows = []
    for line in lines:
      try:
        row = json.loads(line)
        rows.append((int(row['row']), row['result']))
      except (ValueError, TypeError, KeyError, RecursionError):
        continue  # cut off, or damaged: the row is computed again
    return rows
