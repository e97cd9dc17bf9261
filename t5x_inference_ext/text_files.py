"""JSON and text files; checks that files can be written and that extras are installed."""

import collections
import contextlib
import importlib.util
import json
import math
import os
import reprlib
from typing import Any

from t5x_inference_ext.errors import CheckpointError, RequestError, UserError

_MAX_DEPTH = 200  # maximum nesting; far below Python's recursion limit, so json can write it


class _Unusable(Exception):
  """A JSON text that this package does not accept, although json does. The message says why."""


def parse_json(text: str, *, nan: bool = False) -> Any:
  """Return the value of a JSON text.

  Args:
    text: The text.
    nan: Whether to accept NaN. Infinities are always accepted: a logit bias may be infinite.

  Raises:
    ValueError: The text is not JSON, holds a value that Python can't represent, or an object gives
      a name twice. The message continues "... is".
  """
  constant = float if nan else _constant
  try:
    value = json.loads(text, object_pairs_hook=_object, parse_constant=constant)
  except json.JSONDecodeError as error:
    raise ValueError(f'not JSON ({error.msg} at column {error.colno})') from None
  except RecursionError:
    raise ValueError('not JSON that can be used (nested too deeply)') from None
  except _Unusable as error:
    raise ValueError(f'not JSON that can be used ({error})') from None
  except ValueError:  # beyond Python's limit on digits
    raise ValueError('not JSON that can be used (a number has too many digits)') from None
  level, depth = [value], 0
  while level := [
    item
    for each in level
    if isinstance(each, (dict, list))
    for item in (each.values() if isinstance(each, dict) else each)
  ]:
    depth += 1
    if depth > _MAX_DEPTH:
      raise ValueError('not JSON that can be used (nested too deeply)')
  return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Return a JSON object; raise _Unusable for a repeated name, whose first value would be lost."""
  found = dict(pairs)
  if len(found) < len(pairs):
    (twice, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
    raise _Unusable(f'{reprlib.repr(twice)} is given twice')
  return found


def _constant(text: str) -> float:
  """Convert the name of an infinity to a float; raise _Unusable for NaN."""
  if text == 'NaN':
    raise _Unusable('it holds NaN')
  return float(text)


def load_json(data: bytes, where: str, *, nan: bool = False) -> Any:
  """Return the parsed content of a JSON file.

  Args:
    data: Content of the file.
    where: Name of the file, for messages.
    nan: Whether to accept NaN, which other programs may write.

  Raises:
    CheckpointError: The data is not JSON, gives a name of an object twice, or is nested too deeply.
  """
  try:
    return parse_json(data.decode(), nan=nan)
  except ValueError as e:
    raise CheckpointError(f'{where} is damaged: {e}') from e


def load_json_object(data: bytes, where: str, *, nan: bool = False) -> dict[str, Any]:
  """Return the JSON object in a file; arguments and errors are those of load_json."""
  value = load_json(data, where, nan=nan)
  if not isinstance(value, dict):
    raise CheckpointError(f'{where} is damaged: it is not a JSON object')
  return value


def read_bytes(path: str) -> bytes | None:
  """Return a local file's content, None if there is none; raise CheckpointError if unreadable."""
  if not os.path.isfile(path):
    return None
  try:
    with open(path, 'rb') as f:
      return f.read()
  except OSError as e:
    raise CheckpointError(f"can't read {path}: {e.strerror}") from e


def json_line(value: Any) -> str:
  """Return a value as JSON that all parsers read: NaN becomes null, an infinity a string."""
  try:
    return json.dumps(value, allow_nan=False)
  except ValueError:
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _finite(each) for name, each in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(each) for each in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None if math.isnan(value) else ('Infinity' if value > 0 else '-Infinity')
  return value


def check_writable(*paths: str | None) -> None:
  """Raise RequestError if a file can't be written; to be called before any work.

  Args:
    *paths: Files to write; None is ignored.
  """
  for path in filter(None, paths):
    directory = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(directory):
      raise RequestError(f"can't write {path}: there is no directory {directory}")
    if os.path.isdir(path):
      raise RequestError(f"can't write {path}: it is a directory")
    # A file is replaced, so its directory is written to; a device is written to itself.
    files = [path] if os.path.exists(path) else []
    if not files or os.path.isfile(path):
      files.append(os.path.dirname(os.path.realpath(path)))
    if not all(os.access(file, os.W_OK) for file in files):
      raise RequestError(f"can't write {path}: permission denied")


def check_extra(extra: str, what: str, *modules: str) -> None:
  """Raise UserError if a module of an optional extra is not installed.

  Args:
    extra: Name of the extra of this package that installs the modules.
    what: First part of the message, such as 'figures need matplotlib'.
    *modules: Top-level modules that are needed.
  """
  if any(importlib.util.find_spec(module) is None for module in modules):
    raise UserError(f"{what}: pip install 't5x_inference_ext[{extra}]'")


def check_plots() -> None:
  """Raise UserError if matplotlib is not installed."""
  check_extra('plots', 'figures need matplotlib', 'matplotlib')


def write_text(path: str, text: str) -> None:
  """Write a text file, or replace it; on failure raise RequestError, naming the file.

  After a failure, such as a full disk, the file is as it was. A device is written to as it is.
  """
  target = os.path.realpath(path)
  replaced = os.path.isfile(target) or not os.path.exists(target)
  written = f'{target}.{os.getpid()}.tmp' if replaced else path
  try:
    with open(written, 'w', encoding='utf-8') as f:
      f.write(text)
    if replaced:
      os.replace(written, target)
  except OSError as e:
    if replaced:
      with contextlib.suppress(OSError):
        os.unlink(written)
    raise RequestError(f"can't write {path}: {e.strerror}") from e
