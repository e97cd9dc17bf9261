"""Job: a prepared run with its work, its journal of finished rows, and its output."""

from collections.abc import Callable, Iterator
import contextlib
from typing import Any

from t5x_inference_ext import distributed
from t5x_inference_ext.runs.journal import Journal
from t5x_inference_ext.runs.progress import Progress
from t5x_inference_ext.runs.work import Work


class Job:
  """A prepared run, which has passed all checks of its options and files.

    with job.running():
      while not job.work.finished:
        job.keep(job.work.step())
      job.write()

  Args:
    work: Serves the rows.
    journal: Keeps finished rows until the output is written.
    to_json: Function from (row, result of `work`) to the JSON-ready data to keep and write.
    write: Function that writes the output from the journal's rows.
    progress: Progress bar of the rows.

  If one of several processes raises in `with job.running()`, all processes end.
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

  @contextlib.contextmanager
  def running(self) -> Iterator[None]:
    """Context manager: close journal and progress bar at the end of the block."""
    closing = contextlib.closing
    with distributed.together(), closing(self._journal), closing(self._progress):
      yield
