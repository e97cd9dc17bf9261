"""Text of reports: tables, and wrapped lines."""

from collections.abc import Sequence
import textwrap

WIDTH = 120


def table(rows: Sequence[Sequence[str]], left: int = 1, indent: str = '') -> list[str]:
  """Return the lines of a table with columns two spaces apart.

  Args:
    rows: Cells of each row, the header first.
    left: Number of leading columns that are left-aligned; the others are right-aligned.
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
  """Break a text into lines of at most WIDTH columns; `indent` precedes all but the first."""
  return textwrap.wrap(
    text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
  )
