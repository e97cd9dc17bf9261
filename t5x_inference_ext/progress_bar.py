"""Unbuffered lines on stdout. Progress on stderr: a bar on a terminal, else occasional lines."""

import contextlib
import sys
import time

import tqdm

from t5x_inference_ext.errors import UserError
from t5x_inference_ext.text_format import decimal_bytes

LINE_SECONDS = 10  # seconds between lines, without a terminal


def print_line(line: str) -> None:
  """Print a line of a command's output, unbuffered; raise UserError if it can't be written."""
  try:
    print(line, flush=True)
  except BrokenPipeError:
    raise  # the reader has closed the pipe: the command ends silently
  except OSError as e:
    raise UserError(f"can't write to standard output: {e.strerror}") from e


class ProgressBar:
  """The progress of one step, as a bar or as lines.

  Args:
    what: Name of the step.
    total: Number of items or bytes, or None if unknown.
    is_bytes: Whether the items are bytes. Then the bar stays on the terminal after the step.
    shown: Whether to show anything.
  """

  def __init__(
    self, what: str, total: int | None = None, *, is_bytes: bool = False, shown: bool = True
  ) -> None:
    self._what, self._total, self._done = what, total, 0
    self._text = decimal_bytes if is_bytes else str
    self._is_bytes, self._shown = is_bytes, shown and sys.stderr is not None
    self._start = self._said = time.monotonic()
    self._bar: tqdm.tqdm | None = None
    if self._shown and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        desc=what,
        total=total,
        leave=is_bytes,
        unit='B' if is_bytes else 'it',
        unit_scale=is_bytes,
        file=sys.stderr,
      )

  def advance(self, amount: int = 1) -> None:
    """Count more items or bytes."""
    self._done += amount
    with contextlib.suppress(OSError):  # a closed terminal must not end the run
      if self._bar is not None:
        self._bar.update(amount)
      elif self._shown:
        self._print_line()

  def _print_line(self) -> None:
    now = time.monotonic()
    last = self._is_bytes and self._done == self._total
    if now - self._said >= LINE_SECONDS or last:
      self._said = now
      of = '' if self._total is None else f' of {self._text(self._total)}'
      line = f'{self._what}: {self._text(self._done)}{of}, {now - self._start:.0f} s'
      print(line, file=sys.stderr, flush=True)

  def close(self) -> None:
    """End the bar."""
    if self._bar is not None:
      self._bar.close()


class PassProgress:
  """A progress bar for each pass over the data: calibrate, convert, verify, upload.

  Passes may overlap.
  """

  def __init__(self) -> None:
    self._bars: dict[str, ProgressBar] = {}

  def __call__(self, what: str, done: int, total: int) -> None:
    """Show that `done` of `total` bytes are done. `what` begins with the name of the pass."""
    name = next(
      (n for n in ('verify', 'upload', 'calibrate') if what.startswith(f'{n} ')), 'convert'
    )
    if name not in self._bars:
      self._bars[name] = ProgressBar(name, total, is_bytes=True)
    self._bars[name].advance(done)

  def close(self) -> None:
    """End the bars."""
    for bar in self._bars.values():
      bar.close()
