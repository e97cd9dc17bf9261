"""Files that a command writes beside what it prints."""

import os

from t5x_inference_ext.errors import RequestError


def check_writable(*paths: str | None) -> None:
  """Raises RequestError for a path in no directory: before minutes of work, not after. None is no path."""
  for path in filter(None, paths):
    directory = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(directory):
      raise RequestError(f'can\'t write {path}: there is no directory {directory}')


def write_text(path: str, text: str) -> None:
  """Writes a file of text. Raises RequestError, naming it."""
  try:
    with open(path, 'w', encoding='utf-8') as f:
      f.write(text)
  except OSError as e:
    raise RequestError(f'can\'t write {path}: {e.strerror}') from e
