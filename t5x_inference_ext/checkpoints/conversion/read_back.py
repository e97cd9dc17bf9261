"""Verification at the end of a conversion: reads the output back from the disk."""

from collections.abc import Callable, Iterable, Iterator
import functools
import math
import threading
from typing import Any

from t5x_inference_ext.checkpoints.conversion.raw_array import FINGERPRINTS, RawArray
from t5x_inference_ext.checkpoints.workers import run_jobs
from t5x_inference_ext.errors import CheckpointError

# Chunks are read back and recorded in groups of about this many bytes.
GROUP_BYTES = 256 * 2**20


def read_back(
  arrays: Iterable[RawArray],
  entries: Callable[[], Iterable[dict[str, Any]]],
  record: Callable[[dict[str, Any]], None],
  workers: int,
  progress: Callable[[str, int, int], None],
  claim: Callable[[int], bool] | None = None,
) -> None:
  """Read groups of chunks from the disk, and record their checksums and fingerprints.

  Args:
    arrays: All arrays that were written.
    entries: Function that returns the journal's entries. Groups recorded there are not read again.
    record: Function that adds an entry to the journal.
    workers: Number of threads.
    progress: Called after each group.
    claim: If several processes read back, a function that returns whether this process is to read
      the group with a given index. None: read all groups.
  """
  arrays = list(arrays)
  total = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
  lock = threading.Lock()

  def read_group(number: int, array: RawArray, chunks: range) -> None:
    if claim is not None and (not claim(number) or (array.name, chunks[0]) in _read(entries())):
      return
    results = [array.read_back(chunk) for chunk in chunks]
    with lock:
      record(
        {
          'read_back': array.name,
          'first': chunks[0],
          'checksums': [crc for crc, _ in results],
          'fingerprint': sum(fingerprint for _, fingerprint in results) % FINGERPRINTS,
        }
      )
      progress(f'verify {array.name}', sum(map(array.values_bytes, chunks)), total)

  read = _read(entries())
  groups = ((array, chunks) for array in arrays for chunks in _groups(array))
  run_jobs(
    [
      functools.partial(read_group, number, array, chunks)
      for number, (array, chunks) in enumerate(groups)
      if (array.name, chunks[0]) not in read
    ],
    workers,
  )


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
        f'{array.name}: damaged data in {array.path}: values read back from the disk are not those '
        'written: check the disk, remove the directory and convert again'
      )
    result[array.name] = [crc for group in groups for crc in group['checksums']]
  return result


def _read(entries: Iterable[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
  """Return the records of groups by (array, index of the group's first chunk)."""
  return {(e['read_back'], e['first']): e for e in entries if 'read_back' in e}


def _groups(array: RawArray) -> Iterator[range]:
  chunks = array.chunks()
  step = max(1, GROUP_BYTES // array.chunk_bytes)
  return (chunks[i : i + step] for i in chunks[::step])
