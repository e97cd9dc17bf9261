"""What an interrupted run had done: rows are kept as they finish, beside the output, until all of it is written."""

from collections.abc import Callable, Iterable, Iterator
import hashlib
import json
from typing import Any, TypeVar

from t5x_inference_ext import distributed

_T = TypeVar('T')
FLUSH_ROWS = 64  # written together to a bucket: some stores rewrite a file that grows


class Journal:
  """Finished rows of a run, by their place in it. Of several processes, process 0 has the file.

  Args:
    path: of the file, which exists only while rows are missing.
    run: all that decides what rows come out, with a telling repr. Another run's file is written over.
    files: opens, renames and removes files: runs.output's for local files, a gfile for others.
  """

  def __init__(self, path: str, run: Any, files: 'FileSystem'):
    self._path, self._files, self._file, self._pending = path, files, None, 0
    # A process that is killed has written what it flushed: of a local file every row.
    self._each = FLUSH_ROWS if '://' in path else 1
    self._run = hashlib.sha256(repr(run).encode()).hexdigest()
    found = distributed.from_main(self._read)
    self.done: dict[int, Any] = {int(row): result for row, result in found}

  def keep(self, results: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Yields results (JSON-ready) after keeping them. They stay kept when the run ends early, whatever the reason."""
    try:
      for row, result in results:
        self.done[row] = result
        self._write({'row': row, 'result': result})
        yield row, result
    finally:
      if self._file is not None:
        self._file.close()

  def in_order(self, count: int | None = None) -> Iterator[Any]:
    """The results, in the order of their rows."""
    return (self.done[row] for row in (range(count) if count is not None else sorted(self.done)))

  def remove(self) -> None:
    """Ends it: the output is written."""
    if distributed.is_main() and self._files.exists(self._path):
      self._files.remove(self._path)

  def _read(self) -> list[tuple[int, Any]]:
    if not self._files.exists(self._path):
      return []
    with self._files.open(self._path, 'r') as file:
      lines = file.read().split('\n')[
        :-1
      ]  # what follows the last end of line was not written whole
    if not lines or lines[0] != self._run:
      return []
    rows = map(json.loads, lines[1:])
    return [(row['row'], row['result']) for row in rows]

  def _write(self, line: dict[str, Any]) -> None:
    if not distributed.is_main():
      return
    if self._file is None:
      self._file = self._files.open(self._path, 'w')
      self._file.write(f'{self._run}\n')
      for row, result in self.done.items():
        self._file.write(json.dumps({'row': row, 'result': result}) + '\n')
    else:
      self._file.write(json.dumps(line) + '\n')
    self._pending += 1
    if self._pending >= self._each:
      self._file.flush()
      self._pending = 0


class FileSystem:
  """How files are opened, found and removed.

  Args:
    open, exists, remove: as builtin open and os.path.exists and os.remove.
  """

  def __init__(self, open: Callable, exists: Callable, remove: Callable):  # pylint: disable=redefined-builtin
    self.open, self.exists, self.remove = open, exists, remove
