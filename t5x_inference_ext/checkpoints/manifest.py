"""The manifest of a finished checkpoint: the CRC-32 of each small file and of the manifest itself.

The manifest is serving_config.json in a serving checkpoint, t5x_inference_ext.json in a T5X
checkpoint. It is JSON with these fields:

  files    name: CRC-32, for all files except chunks and the manifest
  crc32    CRC-32 of the manifest itself, computed with these eight digits set to 0
"""

from collections.abc import Mapping
import json
from typing import Any
import zlib

import numpy as np

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.errors import CheckpointError

_UNKNOWN = '00000000'


def write(content: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
  """Return the manifest: `content` with the checksums of `files` and of the manifest itself."""
  content = {
    **content,
    'files': {name: _crc(data) for name, data in files.items()},
    'crc32': _UNKNOWN,
  }
  data = json.dumps(content, indent=2).encode() + b'\n'
  return _with_own(data, _UNKNOWN, _crc(data))


def check_manifest(path: str, name: str, manifest: Mapping[str, Any]) -> list[str]:
  """Check the small files of a checkpoint.

  Args:
    path: Directory of the checkpoint.
    name: Name of the file that holds the manifest.
    manifest: Content of that file.

  Returns:
    The names of the small files; empty for a manifest of an earlier version, which lists none.

  Raises:
    CheckpointError: A file has changed since it was written; the message names the first one.
  """
  if 'files' not in manifest and 'crc32' not in manifest:
    return []
  check_own_checksum(path, name, storage.read_file(path, name) or b'', manifest.get('crc32'))
  if not isinstance(manifest.get('files'), dict):
    raise CheckpointError(f'{path}/{name} is damaged: it lists no files; convert again')
  for file in manifest['files']:
    check_file(path, name, manifest, file)
  return list(manifest['files'])


def check_own_checksum(path: str, name: str, data: bytes, own: Any) -> None:
  """Raise CheckpointError unless a manifest has the checksum that it records for itself.

  Args:
    path: Directory of the checkpoint.
    name: Name of the manifest's file.
    data: Content of the file.
    own: The checksum that the manifest records for itself.
  """
  if not isinstance(own, str) or _crc(_with_own(data, own, _UNKNOWN)) != own:
    raise CheckpointError(
      f'{path}/{name} has changed since it was written: its checksum is not the recorded one; '
      'convert again'
    )


def check_file(path: str, name: str, manifest: Mapping[str, Any], file: str) -> bytes:
  """Read a small file of a checkpoint, and check its checksum.

  Args:
    path: Directory of the checkpoint.
    name: Name of the manifest's file.
    manifest: Content of the manifest.
    file: Name of the small file.

  Raises:
    CheckpointError: The file is missing, or has changed since it was written.
  """
  found, files = storage.read_file(path, file), manifest.get('files')
  recorded = files.get(file) if isinstance(files, dict) else None
  if found is None or _crc(found) != recorded:
    raise CheckpointError(
      f'{path}/{file} is {"missing" if found is None else "damaged"}: its checksum is not the '
      f'one recorded in {name}; convert again'
    )
  return found


def _crc(data: bytes) -> str:
  return f'{zlib.crc32(data):08x}'


def _with_own(data: bytes, old: str, new: str) -> bytes:
  """Replace the manifest's own checksum, which is its last field."""
  head, field, tail = data.rpartition(b'"crc32": "')
  return head + field + (new.encode() + tail[len(old) :] if tail.startswith(old.encode()) else tail)


def checksum(values: np.ndarray, before: int = 0) -> int:
  """Return the CRC-32 (zlib's) of an array's raw little-endian bytes in C order.

  Args:
    values: The array.
    before: CRC-32 of the bytes before the array.
  """
  return zlib.crc32(np.ascontiguousarray(values).view(np.uint8).data, before)
