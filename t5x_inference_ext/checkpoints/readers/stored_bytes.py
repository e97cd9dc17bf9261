"""Files of arrays, read by byte ranges; local or in a bucket."""

import math
import os
import weakref

import numpy as np
import tensorstore as ts

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.errors import CheckpointError, printable


class StoredBytes:
  """A file that is read by byte ranges. Threads may share it.

  A local file is read with `pread`, not through a memory map: mapped pages count as memory of the
  process, and if the file is truncated, the process is killed.

  Attributes:
    path: Address of the file, for messages.
    size: Bytes of the file; infinite in a bucket, where the size is unknown until it is read.
  """

  def __init__(self, directory: str, name: str) -> None:
    """Open a file.

    Args:
      directory: Directory of the file, local or gs://.
      name: Name of the file in the directory.

    Raises:
      CheckpointError: The file can't be read.
    """
    self.path = f'{directory}/{name}'
    self.size: float = math.inf
    self._descriptor: int | None = None
    if storage.is_remote(directory):
      self._store, self._name = ts.KvStore.open(storage.kvstore(directory)).result(), name
      return
    try:
      self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
      weakref.finalize(self, os.close, self._descriptor)
      self.size = os.fstat(self._descriptor).st_size
    except OSError as e:
      raise CheckpointError(f"can't read {printable(self.path)}: {e.strerror}") from e

  def read(self, begin: int, size: int) -> np.ndarray:
    """Return `size` bytes from `begin` on, as uint8; errors are those of `read_into`."""
    out = np.empty(size, np.uint8)
    self.read_into(begin, out)
    return out

  def read_ahead(self, begin: int, least: int, most: int) -> np.ndarray:
    """Return at least `least` bytes from `begin` on, and up to `most` if the file has them.

    Raises:
      CheckpointError: The file has fewer bytes, or can't be read.
    """
    size = int(max(least, min(most, self.size - begin)))
    # In a bucket the size may be unknown (infinite), and ranges beyond the end are refused.
    while size > least and math.isinf(self.size):
      try:
        return self.read(begin, size)
      except CheckpointError:
        size = max(least, size // 16)
    return self.read(begin, size)

  def read_into(self, begin: int, out: np.ndarray) -> None:
    """Fill a contiguous uint8 array with the bytes from `begin` on.

    Raises:
      CheckpointError: The file has fewer bytes, or can't be read.
    """
    if self._descriptor is None:
      out[:] = np.frombuffer(self._remote(begin, out.nbytes), np.uint8)
      return
    left = out.data
    while left:
      try:
        count = os.preadv(self._descriptor, [left], begin)
      except OSError as e:
        raise CheckpointError(f"can't read {printable(self.path)}: {e.strerror}") from e
      if not count:
        raise CheckpointError(
          f'{printable(self.path)} ends at byte {begin}, but {len(left)} more were expected there'
        )
      left, begin = left[count:], begin + count

  def _remote(self, begin: int, size: int) -> bytes:
    if not size:
      return b''
    try:
      found = self._store.read(self._name, byte_range=slice(begin, begin + size)).result()
    except ValueError as e:
      raise CheckpointError(f"can't read {self.path}: {storage.reason(e)}") from e
    if found.state != 'value':
      raise CheckpointError(f"can't read {self.path}: there is no such object")
    return found.value
