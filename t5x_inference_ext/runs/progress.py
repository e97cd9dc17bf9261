"""What a run says, in process 0 alone, and how far its long steps are."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from t5x_inference_ext import distributed
from t5x_inference_ext.progress_bar import ProgressBar

_T = TypeVar('_T')


def print_on_main(text: str) -> None:
  """Print a line at once, in process 0."""
  if distributed.is_main():
    print(text, flush=True)


class Progress(ProgressBar):
  """How many items are done, shown by process 0.

  Args:
    what: Name of the step.
    total: Number of items, or None where it is not known.
  """

  def __init__(self, what: str, total: int | None = None) -> None:
    super().__init__(what, total, shown=distributed.is_main())


def progress(items: Iterable[_T], what: str, total: int | None = None) -> Iterator[_T]:
  """Yield the items, showing how many of `total` (None: unknown) are done."""
  shown = Progress(what, total)
  try:
    for item in items:
      yield item
      shown.advance()
  finally:
    shown.close()
