"""The header of a GGUF file: metadata by key, and the list of tensors.

  magic 'GGUF', version, number of tensors, number of keys
  each key:     name, type, value                           an array has a type, a length, values
  each tensor:  name, number of sizes, sizes (innermost first), type, offset

A header is not trusted: before each read, the length is compared with a limit and with the bytes
that are left in the file.
"""

from collections.abc import Callable
import dataclasses
import struct
from typing import Any
import zlib

import numpy as np

from t5x_inference_ext.checkpoints.readers.stored_bytes import StoredBytes
from t5x_inference_ext.errors import CheckpointError, printable

GGUF_MAGIC = b'GGUF'
_VERSIONS = (2, 3)
_PIECE_BYTES = 2**20  # the header is read in pieces of this size
# The largest known vocabulary has 262,144 tokens, the largest known chat template 20 kB.
_MAX_KEYS, _MAX_TENSORS = 2**16, 2**20
_MAX_STRING, _MAX_ARRAY, _MAX_HEADER = 2**24, 2**21, 2**28
_MAX_AXES = 4
_SCALARS = {
  0: '<B',
  1: '<b',
  2: '<H',
  3: '<h',
  4: '<I',
  5: '<i',
  6: '<f',
  7: '<?',
  10: '<Q',
  11: '<q',
  12: '<d',
}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class GgufEntry:
  """One tensor in the list of a header.

  Attributes:
    sizes: Sizes of the axes, the innermost first.
    type_number: ggml's number of the type of the values.
    offset: First byte, relative to the beginning of the data.
  """

  sizes: tuple[int, ...]
  type_number: int
  offset: int


@dataclasses.dataclass(frozen=True)
class GgufHeader:
  """A header.

  Attributes:
    metadata: Values by key: int, float, bool, str, a list of str, or an array of numbers.
    entries: Tensors, by name.
    size: Bytes of the header.
    crc: CRC-32 of the header.
  """

  metadata: dict[str, Any]
  entries: dict[str, GgufEntry]
  size: int
  crc: int


def read_gguf_header(file: StoredBytes) -> GgufHeader:
  """Return the header of a GGUF file.

  Raises:
    CheckpointError: The file is not a GGUF file, has an unknown version, or is damaged.
  """
  reader = _Reader(file)
  if file.size < len(GGUF_MAGIC) or reader.take(len(GGUF_MAGIC)) != GGUF_MAGIC:
    raise CheckpointError(f'{file.path} is not a GGUF file: it does not begin with GGUF')
  version = reader.number('<I')
  if version not in _VERSIONS:
    swapped = struct.unpack('>I', struct.pack('<I', version))[0] in _VERSIONS
    raise CheckpointError(
      f'{file.path} has GGUF version {version}'
      + (', so it is big-endian, which can not be read' if swapped else '')
      + f'; versions {" and ".join(map(str, _VERSIONS))} are read: convert the model again'
    )
  num_tensors = reader.count('tensors', '<Q', _MAX_TENSORS, 24)
  num_keys = reader.count('metadata keys', '<Q', _MAX_KEYS, 13)
  metadata = reader.named(num_keys, 'the key', reader.value)
  entries = reader.named(num_tensors, 'the tensor', reader.entry)
  return GgufHeader(metadata, entries, reader.position, reader.crc)


class _Reader:
  """Reads a header from its beginning to its end.

  Attributes:
    position: Number of bytes taken so far.
    crc: CRC-32 of the bytes taken so far.
  """

  def __init__(self, file: StoredBytes) -> None:
    self._file, self._piece, self._place = file, b'', 0
    self.position = self.crc = 0

  def take(self, size: int) -> bytes:
    """Return the next `size` bytes; raise CheckpointError if the file or a limit has fewer."""
    if self.position + size > min(self._file.size, _MAX_HEADER):
      raise CheckpointError(
        f'{self._file.path} is cut off, or damaged: byte {self.position} of its header needs '
        f'{size} bytes more, but the file has {self._file.size}, and no header has more than '
        f'{_MAX_HEADER}'
      )
    if self._place + size > len(self._piece):
      left = self._piece[self._place :]
      begin = self.position + len(left)
      more = self._file.read_ahead(begin, size - len(left), _PIECE_BYTES)
      self._piece, self._place = left + more.tobytes(), 0
    taken = self._piece[self._place : self._place + size]
    self._place += size
    self.position += size
    self.crc = zlib.crc32(taken, self.crc)
    return taken

  def number(self, form: str) -> Any:
    """Return the next number, as a Python number."""
    (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
    # Take the shortest decimal that rounds to this float32: 1e-5, not 9.99999974e-6.
    return float(str(np.float32(value))) if form == '<f' else value

  def count(self, what: str, form: str, limit: int, least_bytes: int) -> int:
    """Read a count of items, and refuse one that the rest of the file is too short for.

    Args:
      what: The items, as errors name them.
      form: The count's struct format.
      limit: Largest count that is accepted.
      least_bytes: Bytes that an item takes at least.

    Raises:
      CheckpointError: The count is too large.
    """
    count = self.number(form)
    if count > limit or count * least_bytes > self._file.size - self.position:
      raise CheckpointError(
        f'{self._file.path} is damaged: its header lists {count} {what} at byte {self.position}, '
        f'more than a file of {self._file.size} bytes has, or than {limit}'
      )
    return count

  def text(self) -> str:
    """Return the next string."""
    data = self.take(self.count('characters', '<Q', _MAX_STRING, 1))
    try:
      return data.decode()
    except UnicodeDecodeError:
      return data.decode('utf-8', 'surrogateescape')  # tokens of some vocabularies are not UTF-8

  def named(self, count: int, what: str, read: Callable[[], Any]) -> dict[str, Any]:
    """Read `count` items, each after its name; return name -> item."""
    found: dict[str, Any] = {}
    for _ in range(count):
      name = self.text()
      if name in found:
        raise CheckpointError(
          f'{self._file.path} is damaged: it has {what} {printable(name)} twice'
        )
      found[name] = read()
    return found

  def value(self) -> Any:
    """Return the value of a metadata entry, whose type comes first."""
    kind = self.number('<I')
    if kind == _STRING:
      return self.text()
    if kind != _ARRAY:
      return self.number(self._format(kind))
    kind = self.number('<I')
    if kind == _STRING:
      return [self.text() for _ in range(self.count('strings', '<Q', _MAX_ARRAY, 8))]
    dtype = np.dtype(self._format(kind))
    count = self.count('numbers', '<Q', _MAX_ARRAY, dtype.itemsize)
    return np.frombuffer(self.take(count * dtype.itemsize), dtype)

  def entry(self) -> GgufEntry:
    """Return the next tensor's entry, without its name."""
    axes = self.count('axes', '<I', _MAX_AXES, 8)
    sizes = tuple(self.number('<Q') for _ in range(axes))
    return GgufEntry(sizes, self.number('<I'), self.number('<Q'))

  def _format(self, kind: int) -> str:
    if kind not in _SCALARS:
      raise CheckpointError(
        f'{self._file.path} is damaged: a key has the unknown type {kind} before byte '
        f'{self.position} of the header'
      )
    return _SCALARS[kind]
