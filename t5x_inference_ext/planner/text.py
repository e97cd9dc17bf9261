"""Text of reports: tables, durations and byte counts."""

from collections.abc import Sequence
import math
import textwrap

WIDTH = 120


def table(rows: Sequence[Sequence[str]], left: int = 1, indent: str = '') -> list[str]:
  """Return the lines of a table with columns two spaces apart.

  Args:
    rows: Cells of each row, the header first.
    left: Number of columns, from the first, that are aligned to the left; the others are aligned to
      the right.
    indent: Text before each line.
  """
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = []
  for row in rows:
    cells = [
      cell.ljust(width) if i < left else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths))
    ]
    lines.append((indent + '  '.join(cells)).rstrip())
  return lines


def wrap(text: str, indent: str = '') -> list[str]:
  """Return lines of at most WIDTH columns, those after the first behind an indent."""
  return textwrap.wrap(
    text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
  )


def gib(count: float) -> str:
  """Return bytes in GiB, without the unit: 34_359_738_368 -> '32.00'."""
  return f'{count / 2**30:.2f}'


def binary_bytes(count: float) -> str:
  """Return bytes in powers of 1024: 1536 -> '1.50 KiB'. GiB is the largest unit."""
  if count < 1024:
    return f'{count:.0f} B'
  size = min(int(math.log2(count)) // 10, 3)
  return f'{count / 1024**size:.2f} {("KiB", "MiB", "GiB")[size - 1]}'


def seconds_text(seconds: float) -> str:
  """Return a computed duration in the unit that suits it: 0.0123 -> '12.30 ms', '4.213 s'."""
  if seconds == 0:
    return '0'
  if seconds >= 1:
    return f'{seconds:.3f} s' if seconds < 100 else f'{seconds:.1f} s'
  return f'{seconds * 1e3:.2f} ms' if seconds >= 1e-4 else f'{seconds * 1e6:.1f} us'
