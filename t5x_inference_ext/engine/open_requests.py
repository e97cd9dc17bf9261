"""The requests that a scheduler has taken and that have not ended, with their rows."""

from collections.abc import Sequence

from t5x_inference_ext.engine.request import RequestState
from t5x_inference_ext.engine.rows import Row


class OpenRequests:
  """Rows of unfinished requests, by the number of the request.

  Attributes:
    finished: Number of requests that have ended.
  """

  def __init__(self) -> None:
    self.finished = 0
    self._rows: dict[int, list[Row]] = {}

  def __len__(self) -> int:
    return len(self._rows)

  def add(self, rows: list[Row]) -> None:
    """Add the rows of a request."""
    self._rows[rows[0].handle.index] = rows

  def unfinished_rows(self, number: int) -> Sequence[Row]:
    """Return the rows of a request that have not ended; none if the request has ended."""
    return [row for row in self._rows.get(number, []) if not row.finished]

  def close(self, row: Row) -> None:
    """Forget the request of a row that has ended, once all of its rows have."""
    handle = row.handle
    if all(handle.finish_reasons):
      handle.state, handle.matchers = RequestState.FINISHED, ()
      del self._rows[handle.index]
      self.finished += 1
