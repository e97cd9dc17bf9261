"""The end of a conversion: all is put on the disk, read back from it, and compared with what was written."""

import math
import threading
from typing import Callable, Iterable

from t5x_inference_ext.checkpoints.pipeline import run_jobs
from t5x_inference_ext.checkpoints.raw_array import RawArray
from t5x_inference_ext.errors import CheckpointError

# Chunks are recorded as sealed so many bytes at a time.
GROUP_BYTES = 256 * 2**20


def seal(arrays: Iterable[RawArray], slices: Iterable[dict], entries: Iterable[dict], record: Callable[[dict], None],
         workers: int, progress: Callable[[str, int, int], None]) -> dict[str, list[int]]:
  """Checksums of all chunks, by array, as they are on the disk.

  Args:
    arrays: all that were written.
    slices: the records of all slices, with the sums of the bytes that each wrote.
    entries: of the journal; what is in them already is not read again.
    record: adds to the journal.
    workers: threads.
    progress: told after each group of chunks.

  Raises:
    CheckpointError: what was read back is not what was written.
  """
  arrays = list(arrays)
  written = {array.name: 0 for array in arrays}
  for entry in slices:
    for name, total in entry['sums'].items():
      written[name] += total
  total = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
  sealed = {(e['sealed'], e['first']): e for e in entries if 'sealed' in e}
  lock = threading.Lock()

  def one(array: RawArray, numbers: range) -> None:
    results = [array.seal(number) for number in numbers]
    entry = {'sealed': array.name, 'first': numbers[0], 'checksums': [c for c, _ in results],
             'sum': sum(s for _, s in results)}
    with lock:
      sealed[array.name, numbers[0]] = entry
      record(entry)
      progress(f'verify {array.name}', sum(array.values_bytes(number) for number in numbers), total)

  groups = {array.name: _groups(array) for array in arrays}
  todo = [(a, g) for a in arrays for g in groups[a.name] if (a.name, g[0]) not in sealed]
  run_jobs([lambda a=a, g=g: one(a, g) for a, g in todo], workers)
  checksums = {}
  for array in arrays:
    found = [sealed[array.name, group[0]] for group in groups[array.name]]
    if sum(e['sum'] for e in found) != written[array.name]:
      raise CheckpointError(f'{array.name}: damaged data in {array.path}: what was read back from the disk is not what '
                            'was written: check the disk, remove the directory and convert again')
    checksums[array.name] = [c for e in found for c in e['checksums']]
  return checksums


def _groups(array: RawArray) -> list[range]:
  numbers = list(array.chunks())
  step = max(1, GROUP_BYTES // array.chunk_bytes)
  return [range(i, min(i + step, len(numbers))) for i in range(0, len(numbers), step)]
