"""Files that a command writes beside what it prints, text and figures."""

import importlib.util
import os

from t5x_inference_ext.errors import RequestError, UserError


def check_writable(*paths: str | None) -> None:
  """Raises RequestError for a path where no file can be written: before minutes of work, not after. None is no path."""
  for path in filter(None, paths):
    directory = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(directory):
      raise RequestError(f"can't write {path}: there is no directory {directory}")
    if os.path.isdir(path):
      raise RequestError(f"can't write {path}: it is a directory")
    if not os.access(path if os.path.exists(path) else directory, os.W_OK):
      raise RequestError(f"can't write {path}: permission denied")


def check_plots() -> None:
  """Raises UserError where matplotlib is not installed, before anything is computed."""
  if importlib.util.find_spec('matplotlib') is None:
    raise UserError("figures need matplotlib: pip install 't5x_inference_ext[plots]'")


def write_text(path: str, text: str) -> None:
  """Writes a file of text. Raises RequestError, naming it."""
  try:
    with open(path, 'w', encoding='utf-8') as f:
      f.write(text)
  except OSError as e:
    raise RequestError(f"can't write {path}: {e.strerror}") from e
