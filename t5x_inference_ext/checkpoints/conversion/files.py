"""All functions with which a conversion changes files.

They raise OSError, with the file's name, if the disk is full or fails. A conversion opens files for
writing only in this module, and never through a symbolic link.
"""

from collections.abc import Iterator
import contextlib
import errno
import itertools
import json
import math
import mmap
import os
import shutil
import stat
from typing import IO, Any
import zlib

import numpy as np

from t5x_inference_ext.errors import CheckpointError

# (index, values): `array[index] = values`. The index is slices with explicit bounds.
IndexedValues = tuple[tuple[slice, ...], np.ndarray]
_ZEROS = 2**20


def open_no_link(path: str, flags: int) -> int:
  """Open a file, but not a symbolic link. An `opener` for open()."""
  return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def check_no_links(directory: str) -> None:
  """Raise CheckpointError if a write below `directory` could reach a file elsewhere.

  This is the case if the directory holds a symbolic or hard link, a device or a pipe.
  """
  for root, directories, names in os.walk(directory):
    for path in sorted(os.path.join(root, name) for name in (*directories, *names)):
      with contextlib.suppress(FileNotFoundError):  # another shard's temporary file may vanish
        found = os.lstat(path)
        only_here = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
        if not only_here and not stat.S_ISDIR(found.st_mode):
          raise CheckpointError(
            f'{path} is a link or not a regular file, and a write could damage something else: '
            f'remove it, or the whole directory {directory}'
          )


def allocate(path: str, size: int) -> None:
  """Make a file of `size` zero bytes, with all its disk blocks allocated."""
  with _opened(path, 'ab') as f:
    if hasattr(os, 'posix_fallocate'):
      os.posix_fallocate(f.fileno(), 0, size)
    else:  # macOS: write the zeros
      f.truncate(0)
      for begin in range(0, size, _ZEROS):
        f.write(bytes(min(_ZEROS, size - begin)))


def write_blocks(path: str, shape: tuple[int, ...], blocks: list[IndexedValues]) -> None:
  """Write values into the allocated file of one array, touching only the pages of these values.

  Args:
    path: The file, which holds the array in C order.
    shape: Shape of the array.
    blocks: Pairs (index, values). All values have one dtype.
  """
  axis = next((a for a, n in enumerate(shape) if n > 1), 0)  # the first axis longer than 1

  def rows(block: IndexedValues) -> tuple[int, int]:
    return block[0][axis].start, block[0][axis].stop

  with _opened(path, 'r+b') as f:
    for (first, last), same_rows in itertools.groupby(sorted(blocks, key=rows), rows):
      group = list(same_rows)
      if len(group) == 1 and _is_contiguous(group[0][1].shape, shape):
        _write_range(f, shape, *group[0])
      else:
        _write_mapped(f, shape, axis, first, last, group)


def _is_contiguous(part: tuple[int, ...], shape: tuple[int, ...]) -> bool:
  """Return whether the bytes of a part of an array of `shape` are contiguous."""
  varying = next((axis for axis, n in enumerate(part) if n > 1), 0)
  return part[varying + 1 :] == shape[varying + 1 :]


def _write_range(
  file: IO[bytes], shape: tuple[int, ...], index: tuple[slice, ...], values: np.ndarray
) -> None:
  begin = int(np.ravel_multi_index([s.start for s in index], shape)) * values.dtype.itemsize
  data = memoryview(np.ascontiguousarray(values).view(np.uint8).data).cast('B')
  while data:
    written = os.pwrite(file.fileno(), data, begin)
    # Linux then begins to write these pages to the disk: sync() has less to wait for.
    _forget(file.fileno(), begin, written)
    begin, data = begin + written, data[written:]


def _write_mapped(
  file: IO[bytes],
  shape: tuple[int, ...],
  axis: int,
  first: int,
  last: int,
  blocks: list[IndexedValues],
) -> None:
  """Write blocks that lie within rows [first, last) through one memory map."""
  dtype = blocks[0][1].dtype
  row_bytes = math.prod(shape[axis + 1 :]) * dtype.itemsize
  begin = first * row_bytes
  skipped = begin % mmap.ALLOCATIONGRANULARITY
  length = skipped + (last - first) * row_bytes
  # If most pages will be touched, mapping all at once is faster than a page fault for each.
  runs = sum(values.size // values.shape[-1] for _, values in blocks)
  touched = runs * mmap.PAGESIZE + sum(values.nbytes for _, values in blocks)
  flags = getattr(mmap, 'MAP_POPULATE', 0) if 2 * touched >= length else 0
  with mmap.mmap(
    file.fileno(), length, flags=mmap.MAP_SHARED | flags, offset=begin - skipped
  ) as memory:
    count = (last - first) * row_bytes // dtype.itemsize
    rows = np.frombuffer(memory, dtype, count, skipped)
    rows = rows.reshape(*shape[:axis], last - first, *shape[axis + 1 :])
    for index, values in blocks:
      rows[*index[:axis], :, *index[axis + 1 :]] = values
    del rows  # it is a view of `memory`, which can't be closed while the view exists


def write_bits(
  path: str, shape: tuple[int, ...], index: tuple[slice, ...], values: np.ndarray, mask: np.uint8
) -> None:
  """Write some bits of bytes in the allocated file of one array, and keep their other bits.

  Args:
    path: The file, which holds the array of bytes in C order.
    shape: Shape of the array.
    index: The bytes.
    values: Their values, whose bits outside the mask are zero.
    mask: The bits to write.
  """
  with _opened(path, 'r+b') as f, mmap.mmap(f.fileno(), 0, flags=mmap.MAP_SHARED) as memory:
    stored = np.frombuffer(memory, np.uint8).reshape(shape)
    stored[index] = stored[index] & ~mask | values
    del stored  # it is a view of `memory`, which can't be closed while the view exists


def sync(path: str) -> None:
  """Flush a file or directory to the disk, and drop it from the page cache."""
  descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
  try:
    with _named(path):
      os.fsync(descriptor)
      if not os.path.isdir(path):
        _forget(descriptor)
  finally:
    os.close(descriptor)


def _forget(descriptor: int, begin: int = 0, size: int = 0) -> None:
  """Drop bytes of a file from the page cache (posix_fadvise). Size 0: up to the end."""
  if hasattr(os, 'posix_fadvise'):
    os.posix_fadvise(descriptor, begin, size, os.POSIX_FADV_DONTNEED)


def append_line(path: str, entry: dict[str, Any]) -> None:
  """Append a JSON object with its CRC-32 as a line, and flush it to the disk."""
  data = json.dumps(entry).encode()
  line = b'\n%08x %s\n' % (zlib.crc32(data), data)  # the first \n ends a line that a kill cut off
  with _opened(path, 'ab') as f:
    if f.write(line) != len(line):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(f.fileno())


def read_lines(path: str) -> Iterator[dict[str, Any]]:
  """Yield the objects that append_line wrote, without lines that are cut off or damaged."""
  with open(path, 'rb') as f:
    for line in f.read().split(b'\n'):
      crc, _, data = line.partition(b' ')
      if crc == b'%08x' % zlib.crc32(data):
        yield json.loads(data)


def write_file(path: str, data: bytes) -> None:
  """Write a small file atomically: it has all of `data`, or does not exist."""
  temporary = f'{path}.new'
  with _opened(temporary, 'wb') as f:
    if f.write(data) != len(data):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(f.fileno())
  os.rename(temporary, path)
  sync(os.path.dirname(path))


def read_plan(path: str) -> dict[str, Any] | None:
  """Return the JSON object in a file; None if there is no such file, or it is not JSON."""
  try:
    with open(path, encoding='utf-8') as f:
      return json.load(f)
  except (OSError, ValueError):
    return None


def truncate(path: str) -> None:
  """Empty a file in place, which needs no disk space."""
  with _opened(path, 'wb') as f:
    os.fsync(f.fileno())


def publish(directory: str, path: str) -> None:
  """Rename a directory or file, whose content is on the disk, to its final name in one step."""
  for root, _, _ in os.walk(directory):
    sync(root)
  os.rename(directory, path)
  sync(os.path.dirname(path))


def remove(directory: str) -> None:
  """Remove a directory with everything in it, if it exists."""
  if os.path.lexists(directory):
    shutil.rmtree(directory)


def remove_file(path: str) -> None:
  """Remove a file, if it exists."""
  with contextlib.suppress(FileNotFoundError):
    os.remove(path)


@contextlib.contextmanager
def _opened(path: str, mode: str) -> Iterator[IO[bytes]]:
  """Context manager: open a file for writing, unbuffered, not through a link. Errors name it."""
  with _named(path), open(path, mode, buffering=0, opener=open_no_link) as f:
    yield f


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
  """Context manager: re-raise an OSError without a file name (from a descriptor) with `path`."""
  try:
    yield
  except OSError as e:
    if e.filename is None:
      raise OSError(e.errno, e.strerror, path) from e
    raise
