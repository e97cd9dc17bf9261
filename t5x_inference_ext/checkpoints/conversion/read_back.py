"""Verification of a conversion: what was written is read back from the disk.

Chunks are read back in groups. As soon as all chunks of a group are written and recorded, a
separate thread reads the group, while other slices are still being converted. The groups that are
left, such as those of earlier runs or of several shards, are read at the end.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import contextlib
import functools
import threading
from typing import Any

from t5x_inference_ext.checkpoints.conversion.raw_array import FINGERPRINTS, RawArray
from t5x_inference_ext.checkpoints.workers import run_jobs
from t5x_inference_ext.errors import CheckpointError

# Chunks are read back and recorded in groups of about this many bytes.
GROUP_BYTES = 128 * 2**20


class ReadBack:
  """Reads groups of chunks from the disk, and records their checksums and fingerprints."""

  def __init__(
    self,
    arrays: Iterable[RawArray],
    entries: Callable[[], Iterable[dict[str, Any]]],
    record: Callable[[dict[str, Any]], None],
    progress: Callable[[str, int, int], None],
  ) -> None:
    """Prepare reading.

    Args:
      arrays: All arrays that are written.
      entries: Returns the journal's entries. Groups in them are not read again.
      record: Adds an entry to the journal.
      progress: Called after each group.
    """
    self._entries, self._record, self._progress = entries, record, progress
    self._groups = [(array, chunks) for array in arrays for chunks in _groups(array)]
    self._total = sum(_values_bytes(*group) for group in self._groups)
    self._lock = threading.Lock()

  def run(self, workers: int, claim: Callable[[int], bool] | None = None) -> None:
    """Read all groups that are not in the journal.

    Args:
      workers: Number of threads.
      claim: Function from a group's index to whether this process is to read the group, if several
        processes read back. None: read all groups.
    """

    def read_group(number: int, array: RawArray, chunks: range) -> None:
      if claim is None or (claim(number) and (array.name, chunks[0]) not in _read(self._entries())):
        self._read_group(array, chunks)

    read = _read(self._entries())
    run_jobs(
      [
        functools.partial(read_group, number, array, chunks)
        for number, (array, chunks) in enumerate(self._groups)
        if (array.name, chunks[0]) not in read
      ],
      workers,
    )

  @contextlib.contextmanager
  def ahead(self) -> Iterator[Callable[[Counter[tuple[RawArray, int]]], None]]:
    """Context manager: read groups back while others are still being written.

    Yields:
      A function to call after a slice is recorded. The function's argument maps (array, chunk's
      index) to the bytes that the slice wrote. The function raises the error of a group that could
      not be read.
    """
    left = {group: _values_bytes(*group) for group in self._groups}
    groups = {(array, chunk): (array, chunks) for array, chunks in self._groups for chunk in chunks}
    running: list[concurrent.futures.Future[None]] = []

    def written(nbytes: Counter[tuple[RawArray, int]]) -> None:
      for future in running:
        if future.done():
          future.result()
      for place, n in nbytes.items():
        group = groups[place]
        left[group] -= n
        if not left[group]:
          running.append(pool.submit(self._read_group, *group))

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      try:
        yield written
      finally:
        pool.shutdown(cancel_futures=True)  # run() reads the rest
    for future in running:
      if not future.cancelled():
        future.result()

  def _read_group(self, array: RawArray, chunks: range) -> None:
    results = [array.read_back(chunk) for chunk in chunks]
    with self._lock:
      self._record(
        {
          'read_back': array.name,
          'first': chunks[0],
          'checksums': [crc for crc, _ in results],
          'fingerprint': sum(fingerprint for _, fingerprint in results) % FINGERPRINTS,
        }
      )
      self._progress(f'verify {array.name}', _values_bytes(array, chunks), self._total)


def checksums(
  arrays: Iterable[RawArray], slices: Iterable[dict[str, Any]], entries: Iterable[dict[str, Any]]
) -> dict[str, list[int]]:
  """Return the CRC-32 of all chunks, by array, after all have been read back.

  Args:
    arrays: All arrays that were written.
    slices: The records of all slices, with fingerprints of their writes.
    entries: The journal's entries.

  Raises:
    CheckpointError: A fingerprint read back differs from the one written.
  """
  slices, read = list(slices), _read(entries)
  result = {}
  for array in arrays:
    groups = [read[array.name, chunks[0]] for chunks in _groups(array)]
    written = sum(entry['fingerprints'].get(array.name, 0) for entry in slices)
    if (sum(group['fingerprint'] for group in groups) - written) % FINGERPRINTS:
      raise CheckpointError(
        f'{array.name}: damaged data in {array.path}: values read back from the disk differ from '
        f'those written: check the disk, remove the directory and convert again'
      )
    result[array.name] = [crc for group in groups for crc in group['checksums']]
  return result


def _read(entries: Iterable[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
  """Return the records of groups by (array, index of the group's first chunk)."""
  return {(e['read_back'], e['first']): e for e in entries if 'read_back' in e}


def _groups(array: RawArray) -> Iterator[range]:
  """Yield the indices of the chunks of each group."""
  chunks = array.chunks()
  step = max(1, GROUP_BYTES // array.chunk_bytes)
  return (chunks[i : i + step] for i in chunks[::step])


def _values_bytes(array: RawArray, chunks: range) -> int:
  return sum(map(array.values_bytes, chunks))
