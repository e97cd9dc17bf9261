"""Directories on a local disk or in a bucket (gs://), and small files in them."""

import os
import re
from typing import Any

import tensorstore as ts

from t5x_inference_ext import text_files
from t5x_inference_ext.errors import CheckpointError


def is_remote(path: str) -> bool:
  """Return whether a path is in a bucket."""
  return path.startswith('gs://')


def is_on_hub(path: str) -> bool:
  """Return whether a path is the address of a model on a hub (hub.py)."""
  return path.startswith('hf:')


def normalize(path: str | os.PathLike) -> str:
  """Drop a trailing slash; also make a local path absolute.

  Raises:
    CheckpointError: The path is an address that is neither in a bucket nor on a hub.
  """
  path = os.fspath(path)
  if is_on_hub(path):
    return path.rstrip('/')
  if (match := re.match(r'\w[\w+.-]*://', path)) and not is_remote(path):
    raise CheckpointError(
      f'{path}: {match[0]} is not supported: name a local directory, a gs:// address or '
      'hf:OWNER/NAME'
    )
  return path.rstrip('/') if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def kvstore(path: str) -> dict[str, Any]:
  """Return tensorstore's spec for a directory."""
  if is_remote(path):
    bucket, _, key = path.removeprefix('gs://').partition('/')
    return {'driver': 'gcs', 'bucket': bucket, 'path': key and key.rstrip('/') + '/'}
  return {'driver': 'file', 'path': path.rstrip('/') + '/'}


def read_file(directory: str, name: str) -> bytes | None:
  """Return the content of a small file, or None if it does not exist."""
  if not is_remote(directory):
    return text_files.read_bytes(os.path.join(directory, name))
  result = read_object(directory, name)
  return bytes(result.value) if result.state == 'value' else None


def has_file(directory: str, name: str) -> bool:
  """Return whether a directory holds a file, without reading the file."""
  if not is_remote(directory):
    return os.path.isfile(os.path.join(directory, name))
  try:
    found = _open(directory).list(ts.KvStore.KeyRange(name, name + '\0')).result()
  except ValueError as e:
    raise CheckpointError(f"can't list {directory}: {reason(e)}") from e
  return bool(found)


def read_object(directory: str, name: str, unless: bytes | None = None) -> ts.KvStore.ReadResult:
  """Return the value and generation of an object in a bucket.

  Args:
    directory: Directory of the object, a gs:// address.
    name: Name of the object within the directory.
    unless: A generation that the caller already has. If it is the current one, the value is not
      read and the result has none.
  """
  try:
    return _open(directory).read(name, if_not_equal=unless).result()
  except ValueError as e:
    raise CheckpointError(f"can't read {directory}/{name}: {reason(e)}") from e


def write_object(directory: str, name: str, data: bytes) -> bytes:
  """Write a whole object to a bucket.

  Returns:
    The object's generation. Later writes of the same name get other generations.
  """
  try:
    return _open(directory).write(name, data).result().generation
  except ValueError as e:
    raise CheckpointError(f"can't write to {directory}/{name}: {reason(e)}") from e


def remove_object(directory: str, name: str) -> None:
  """Remove an object of a bucket, if it is there."""
  try:
    _open(directory).write(name, None).result()
  except ValueError as e:
    raise CheckpointError(f"can't remove {directory}/{name}: {reason(e)}") from e


def list_objects(directory: str) -> list[str]:
  """Return the names of all objects of a bucket below a directory."""
  try:
    return sorted(name.decode() for name in _open(directory).list().result())
  except ValueError as e:
    raise CheckpointError(f"can't list {directory}: {reason(e)}") from e


def list_files(directory: str) -> list[str]:
  """Return the names of all files below a directory, local or in a bucket."""
  if is_remote(directory):
    return list_objects(directory)
  return sorted(
    os.path.relpath(os.path.join(root, name), directory)
    for root, _, names in os.walk(directory)
    for name in names
  )


def _open(directory: str) -> ts.KvStore:
  return ts.KvStore.open(kvstore(directory)).result()


def reason(error: Exception) -> str:
  """Return tensorstore's message without its status code and without the spec."""
  text = re.sub(r'\s*\[(tensorstore_spec|source locations)=.*', '', str(error), flags=re.DOTALL)
  return re.sub(r'^[A-Z_]+: ', '', text)
