"""Directories on a local disk or in a bucket (gs://), the latter through tensorstore."""

import os
import re

import tensorstore as ts

from t5x_inference_ext.errors import CheckpointError


def is_remote(path: str) -> bool:
  return path.startswith('gs://')


def normalize(path) -> str:
  """An absolute path without a trailing slash; gs:// addresses are only stripped."""
  path = os.fspath(path)
  return path.rstrip('/') if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def kvstore(path: str) -> dict:
  """tensorstore's spec of a directory."""
  if is_remote(path):
    bucket, _, key = path.removeprefix('gs://').partition('/')
    return {'driver': 'gcs', 'bucket': bucket, 'path': key and key.rstrip('/') + '/'}
  return {'driver': 'file', 'path': path.rstrip('/') + '/'}


def read_file(directory: str, name: str) -> bytes | None:
  """A whole small file, or None where there is none."""
  if not is_remote(directory):
    path = os.path.join(directory, name)
    if not os.path.isfile(path):
      return None
    try:
      with open(path, 'rb') as f:
        return f.read()
    except OSError as e:
      raise CheckpointError(f"can't read {path}: {e.strerror}") from e
  result = read_object(directory, name)
  return bytes(result.value) if result.state == 'value' else None


def read_object(directory: str, name: str, unless: bytes | None = None) -> ts.KvStore.ReadResult:
  """Of an object in a bucket: its value and generation; `unless` is a generation whose value is not wanted again."""
  try:
    return _open(directory).read(name, if_not_equal=unless).result()
  except ValueError as e:
    raise CheckpointError(f"can't read {directory}/{name}: {reason(e)}") from e


def write_object(directory: str, name: str, data: bytes) -> bytes:
  """Writes an object of a bucket, whole. Returns its generation, which no other value of that name will ever have."""
  try:
    return _open(directory).write(name, data).result().generation
  except ValueError as e:
    raise CheckpointError(f"can't write to {directory}/{name}: {reason(e)}") from e


def remove_object(directory: str, name: str) -> None:
  """Removes an object of a bucket, if it is there."""
  try:
    _open(directory).write(name, None).result()
  except ValueError as e:
    raise CheckpointError(f"can't remove {directory}/{name}: {reason(e)}") from e


def list_objects(directory: str) -> list[str]:
  """The names of all objects of a bucket below a directory."""
  try:
    return sorted(name.decode() for name in _open(directory).list().result())
  except ValueError as e:
    raise CheckpointError(f"can't list {directory}: {reason(e)}") from e


def list_files(directory: str) -> list[str]:
  """The names of all files below a directory."""
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
  """tensorstore's message without its status code and spec dump."""
  text = re.sub(r'\s*\[(tensorstore_spec|source locations)=.*', '', str(error), flags=re.DOTALL)
  return re.sub(r'^[A-Z_]+: ', '', text)
