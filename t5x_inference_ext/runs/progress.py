"""What a run says, in process 0 alone, and how far its long steps are."""

from collections.abc import Iterable, Iterator
import sys
import time
from typing import TypeVar

import tqdm

from t5x_inference_ext import distributed

LINE_SECONDS = 10  # between lines, where there is no terminal
_T = TypeVar('_T')


def print_on_main(text: str) -> None:
  """Print a line at once, in process 0."""
  if distributed.is_main():
    print(text, flush=True)


class Progress:
  """How many items are done: a bar on a terminal, a line on stderr now and then elsewhere.

  Args:
    what: Name of the step.
    total: Number of items, or None where it is not known.
  """

  def __init__(self, what: str, total: int | None = None) -> None:
    self._what, self._total, self._done = what, total, 0
    self._start = self._said = time.monotonic()
    self._bar: tqdm.tqdm | None = None
    if distributed.is_main() and sys.stderr.isatty():
      self._bar = tqdm.tqdm(desc=what, total=total, leave=False)

  def advance(self) -> None:
    """Count one more item."""
    self._done += 1
    if self._bar is not None:
      self._bar.update()
      return
    now = time.monotonic()
    if distributed.is_main() and now - self._said >= LINE_SECONDS:
      self._said = now
      of = '' if self._total is None else f' of {self._total}'
      line = f'{self._what}: {self._done}{of}, {now - self._start:.0f} s'
      print(line, file=sys.stderr, flush=True)

  def close(self) -> None:
    """Remove the bar."""
    if self._bar is not None:
      self._bar.close()


def progress(items: Iterable[_T], what: str, total: int | None = None) -> Iterator[_T]:
  """Yield the items, showing how many of `total` (None: unknown) are done."""
  shown = Progress(what, total)
  try:
    for item in items:
      yield item
      shown.advance()
  finally:
    shown.close()
