"""Lines and progress bars that a run prints, in process 0 only."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from t5x_inference_ext import distributed
from t5x_inference_ext.progress_bar import ProgressBar, print_line

_T = TypeVar('_T')


def print_on_main(text: str) -> None:
  """Print a line, unbuffered, in process 0 only; raise UserError if it can't be written."""
  if distributed.is_main():
    print_line(text)


class Progress(ProgressBar):
  """A progress bar over items, shown by process 0.

  Args:
    what: Name of the step.
    total: Number of items, or None if unknown.
  """

  def __init__(self, what: str, total: int | None = None) -> None:
    super().__init__(what, total, shown=distributed.is_main())


def progress(items: Iterable[_T], what: str, total: int | None = None) -> Iterator[_T]:
  """Yield the items, and show how many of `total` (None: unknown) are done."""
  shown = Progress(what, total)
  try:
    for item in items:
      yield item
      shown.advance()
  finally:
    shown.close()
