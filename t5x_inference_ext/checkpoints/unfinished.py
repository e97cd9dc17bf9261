"""The marker of a checkpoint that is still being written, by which every reader refuses it."""

import os

MARKER = 'UNFINISHED'


def is_unfinished(path: str) -> bool:
  """Return whether a local path is a conversion's work directory, or the payload in it."""
  return any(os.path.isfile(os.path.join(p, MARKER)) for p in (path, os.path.dirname(path)))
