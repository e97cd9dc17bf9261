"""Files that a command writes beside what it prints."""

import os

from t5x_inference_ext.errors import RequestError


def check_writable(*paths: str | None) -> None:
  """Raises RequestError for a path that no file can be written to: before minutes of work, not after. None is none."""
  for path in filter(None, paths):
    directory = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(directory):
      raise RequestError(f'can\'t write {path}: there is no directory {directory}')
    if os.path.isdir(path):
      raise RequestError(f'can\'t write {path}: it is a directory')
    if not os.access(path if os.path.exists(path) else directory, os.W_OK):
      raise RequestError(f'can\'t write {path}: permission denied')


def write_text(path: str, text: str) -> None:
  """Writes a file of text. Raises RequestError, naming it."""
  try:
    with open(path, 'w', encoding='utf-8') as f:
      f.write(text)
  except OSError as e:
    raise RequestError(f'can\'t write {path}: {e.strerror}') from e
