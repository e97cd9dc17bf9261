"""A prepared run: its work, the journal of its rows, and what writes them in the end."""

from collections.abc import Callable
import contextlib
from types import TracebackType
from typing import Any

from t5x_inference_ext import distributed
from t5x_inference_ext.runs.journal import Journal
from t5x_inference_ext.runs.progress import Progress
from t5x_inference_ext.runs.work import Work


class Job:
  """What is left to do of a run after everything that could be refused is checked.

    with job:
      while not job.work.finished:
        job.keep(job.work.step())
      job.write()

  Args:
    work: Serves the rows.
    journal: Keeps finished rows until the output is written.
    tell: Makes (row, result of `work`) what is kept and written, JSON-ready.
    write: Writes the output from the journal's rows.
    progress: Shows how many rows are done.

  An error in one of several processes, in the `with` block, ends all of them.
  """

  def __init__(
    self,
    work: Work,
    journal: Journal,
    tell: Callable[[int, Any], Any],
    write: Callable[[], None],
    progress: Progress,
  ) -> None:
    self.work, self._journal, self._tell, self._write = work, journal, tell, write
    self._progress = progress

  def keep(self, results: Any) -> None:
    """Put finished rows, (row, result) each, into the journal."""
    for row, result in results:
      self._journal.keep(row, self._tell(row, result))
      self._progress.advance()

  def write(self) -> None:
    """Write the output, and remove the journal."""
    self._progress.close()
    self._journal.close()
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
