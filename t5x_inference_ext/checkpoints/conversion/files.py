"""Every way in which a conversion changes the disk. Each raises OSError: a full disk, a failing device."""

from collections.abc import Iterator
import contextlib
import io
import itertools
import json
import math
import mmap
import os
import shutil
from typing import Any

import numpy as np

_ZEROS = 2**20


def allocate(path: str, size: int) -> None:
  """Makes a file of zeros whose blocks are reserved, so that no later write into it finds the disk full."""
  descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
  try:
    with _named(path):
      if hasattr(os, 'posix_fallocate'):
        os.posix_fallocate(descriptor, 0, size)
      else:  # not on macOS: zeros, written
        os.ftruncate(descriptor, 0)
        for begin in range(0, size, _ZEROS):
          os.write(descriptor, bytes(min(_ZEROS, size - begin)))
  finally:
    os.close(descriptor)


def write_blocks(
  path: str, shape: tuple[int, ...], blocks: list[tuple[tuple[slice, ...], np.ndarray]]
) -> None:
  """Writes values at indices into the allocated file of one array of `shape`, in C order, touching only their pages."""
  axis = next(
    (a for a, n in enumerate(shape) if n > 1), 0
  )  # the file is a sequence of rows along it
  with _named(path), open(path, 'r+b', buffering=0) as f:
    for _, group in itertools.groupby(
      sorted(blocks, key=lambda b: _rows(b, axis)), lambda b: _rows(b, axis)
    ):
      group = list(group)
      if len(group) == 1 and _is_one_range(group[0][1].shape, shape):
        _write_range(f, shape, *group[0])
      else:
        _write_mapped(f, shape, axis, group)


def _rows(block: tuple[tuple[slice, ...], np.ndarray], axis: int) -> tuple[int, int]:
  return block[0][axis].start, block[0][axis].stop


def _is_one_range(part: tuple[int, ...], shape: tuple[int, ...]) -> bool:
  """Whether the bytes of a part of an array of `shape` follow each other."""
  varying = next((axis for axis, n in enumerate(part) if n > 1), 0)
  return part[varying + 1 :] == shape[varying + 1 :]


def _write_range(
  file: io.RawIOBase, shape: tuple[int, ...], index: tuple[slice, ...], values: np.ndarray
) -> None:
  begin = int(np.ravel_multi_index([s.start for s in index], shape)) * values.dtype.itemsize
  data = memoryview(np.ascontiguousarray(values).view(np.uint8)).cast('B')
  while data:
    written = os.pwrite(file.fileno(), data, begin)
    begin, data = begin + written, data[written:]


def _write_mapped(
  file: io.RawIOBase,
  shape: tuple[int, ...],
  axis: int,
  blocks: list[tuple[tuple[slice, ...], np.ndarray]],
) -> None:
  """Blocks of the same rows."""
  (first, last), dtype = _rows(blocks[0], axis), blocks[0][1].dtype
  row_bytes = math.prod(shape[axis + 1 :]) * dtype.itemsize
  begin = first * row_bytes
  skipped = begin % mmap.ALLOCATIONGRANULARITY
  length = skipped + (last - first) * row_bytes
  # Pages are mapped one after the other as they are touched, or, where most will be, at once: that is quicker.
  runs = sum(values.size // values.shape[-1] for _, values in blocks)
  touched = runs * mmap.PAGESIZE + sum(values.nbytes for _, values in blocks)
  flags = getattr(mmap, 'MAP_POPULATE', 0) if 2 * touched >= length else 0
  with mmap.mmap(
    file.fileno(), length, flags=mmap.MAP_SHARED | flags, offset=begin - skipped
  ) as memory:
    rows = np.frombuffer(
      memory, dtype, (last - first) * row_bytes // dtype.itemsize, skipped
    ).reshape(*shape[:axis], last - first, *shape[axis + 1 :])
    for index, values in blocks:
      rows[*index[:axis], :, *index[axis + 1 :]] = values
    del rows  # before what it is a view of


def sync(path: str) -> None:
  """Waits until a file or a directory is on the disk, and forgets what is cached of it: the next read is the disk's."""
  descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
  try:
    with _named(path):
      os.fsync(descriptor)
      if not os.path.isdir(path) and hasattr(os, 'posix_fadvise'):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
  finally:
    os.close(descriptor)


def append_line(path: str, entry: Any) -> None:
  """Adds a line of JSON to a file, and waits until it is on the disk. A kill leaves it out, or torn."""
  descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
  try:
    with _named(path):
      line = b'\n' + json.dumps(entry).encode() + b'\n'  # the first ends what a kill may have torn
      if os.write(descriptor, line) != len(line):
        raise OSError(28, 'No space left on device')
      os.fsync(descriptor)
  finally:
    os.close(descriptor)


def read_lines(path: str) -> Iterator[dict[str, Any]]:
  """The objects that append_line added, without what a kill tore."""
  with open(path, 'rb') as f:
    for line in f.read().split(b'\n'):
      with contextlib.suppress(ValueError):
        entry = json.loads(line)
        if isinstance(entry, dict):
          yield entry


def write_file(path: str, data: bytes) -> None:
  """A whole small file that is there entirely or not at all."""
  temporary = f'{path}.new'
  with _named(path):
    with open(temporary, 'wb') as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    os.rename(temporary, path)
    sync(os.path.dirname(path))


def truncate(path: str) -> None:
  """Empties a file, which takes no space, not even for a moment."""
  with _named(path), open(path, 'wb') as f:
    os.fsync(f.fileno())


def publish(directory: str, path: str) -> None:
  """Renames a directory whose contents are on the disk to its final name, in one step."""
  with _named(path):
    for root, _, _ in os.walk(directory):
      sync(root)
    os.rename(directory, path)
    sync(os.path.dirname(path))


def remove(directory: str) -> None:
  """Removes a directory and all in it, if it is there."""
  if os.path.lexists(directory):
    shutil.rmtree(directory)


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
  """An OSError from here on names the file, which those of descriptors do not."""
  try:
    yield
  except OSError as e:
    if e.filename is None:
      raise type(e)(e.errno, e.strerror, path) from e
    raise
