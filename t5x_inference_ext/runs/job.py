"""Job: a prepared run with its work, its journal of finished rows, and its output."""

from collections.abc import Callable
import contextlib
from types import TracebackType
from typing import Any

from t5x_inference_ext import distributed
from t5x_inference_ext.runs.journal import Journal
from t5x_inference_ext.runs.progress import Progress
from t5x_inference_ext.runs.work import Work


class Job:
  """A prepared run, which has passed all checks of its options and files.

    with job:
      while not job.work.finished:
        job.keep(job.work.step())
      job.write()

  Args:
    work: Serves the rows.
    journal: Keeps finished rows until the output is written.
    to_json: Function from (row, result of `work`) to the JSON-ready data to keep and write.
    write: Function that writes the output from the journal's rows.
    progress: Progress bar of the rows.

  If one of several processes raises in the `with` block, all processes end.
  """

  def __init__(
    self,
    work: Work,
    journal: Journal,
    to_json: Callable[[int, Any], Any],
    write: Callable[[], None],
    progress: Progress,
  ) -> None:
    self.work, self._journal, self._to_json, self._write = work, journal, to_json, write
    self._progress = progress

  def keep(self, results: Any) -> None:
    """Put finished rows, each as (row, result), into the journal."""
    for row, result in results:
      self._journal.keep(row, self._to_json(row, result))
      self._progress.advance()

  def write(self) -> None:
    """Write the output, and remove the journal."""
    self._progress.close()
    self._write()
    self._journal.remove()

  def __enter__(self) -> 'Job':
    self._stack = contextlib.ExitStack()
    self._stack.enter_context(distributed.together())
    self._stack.callback(self._journal.close)
    self._stack.callback(self._progress.close)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> bool | None:
    return self._stack.__exit__(kind, error, traceback)
