"""The marker file of an unfinished checkpoint; readers refuse a directory that contains it."""

import os

MARKER = 'UNFINISHED'


def is_unfinished(path: str) -> bool:
  """Return whether a local path is a conversion's work directory, or the payload inside it."""
  return any(os.path.isfile(os.path.join(p, MARKER)) for p in (path, os.path.dirname(path)))
