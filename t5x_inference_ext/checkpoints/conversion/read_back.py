"""The end of a conversion: all is put on the disk, read back from it, and compared with what was written."""

from collections.abc import Callable, Iterable
import math
import threading

from t5x_inference_ext.checkpoints.conversion.raw_array import RawArray
from t5x_inference_ext.checkpoints.workers import run_jobs
from t5x_inference_ext.errors import CheckpointError

# Chunks are recorded as sealed so many bytes at a time: a group.
GROUP_BYTES = 256 * 2**20


def read_back(
  arrays: Iterable[RawArray],
  entries: Callable[[], Iterable[dict]],
  record: Callable[[dict], None],
  workers: int,
  progress: Callable[[str, int, int], None],
  claim: Callable[[int], bool] | None = None,
) -> None:
  """Reads groups of chunks from the disk and records their checksums.

  Args:
    arrays: all that were written.
    entries: of the journal; what is in them already is not read again.
    record: adds to the journal.
    workers: threads.
    progress: told after each group.
    claim: whether this process may read the group of this number, where others do the same; None: all are its own.
  """
  arrays = list(arrays)
  total = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
  lock = threading.Lock()

  def one(number: int, array: RawArray, chunks: range) -> None:
    if claim is not None and (not claim(number) or (array.name, chunks[0]) in _sealed(entries())):
      return
    results = [array.seal(chunk) for chunk in chunks]
    with lock:
      record(
        {
          'sealed': array.name,
          'first': chunks[0],
          'checksums': [c for c, _ in results],
          'sum': sum(s for _, s in results),
        }
      )
      progress(f'verify {array.name}', sum(array.values_bytes(chunk) for chunk in chunks), total)

  groups = [(array, group) for array in arrays for group in _groups(array)]
  sealed = _sealed(entries())
  run_jobs(
    [
      lambda n=n, a=a, g=g: one(n, a, g)
      for n, (a, g) in enumerate(groups)
      if (a.name, g[0]) not in sealed
    ],
    workers,
  )


def checksums(
  arrays: Iterable[RawArray], slices: Iterable[dict], entries: Iterable[dict]
) -> dict[str, list[int]]:
  """Checksums of all chunks, by array, once all are read back.

  Args:
    arrays: all that were written.
    slices: the records of all slices, with the sums of the bytes that each wrote.
    entries: of the journal.

  Raises:
    CheckpointError: what was read back is not what was written.
  """
  arrays, sealed = list(arrays), _sealed(entries)
  written = {array.name: 0 for array in arrays}
  for entry in slices:
    for name, total in entry['sums'].items():
      written[name] += total
  result = {}
  for array in arrays:
    found = [sealed[array.name, group[0]] for group in _groups(array)]
    if sum(e['sum'] for e in found) != written[array.name]:
      raise CheckpointError(
        f'{array.name}: damaged data in {array.path}: what was read back from the disk is not what '
        'was written: check the disk, remove the directory and convert again'
      )
    result[array.name] = [c for e in found for c in e['checksums']]
  return result


def _sealed(entries: Iterable[dict]) -> dict[tuple[str, int], dict]:
  """Records of groups, by array and first chunk."""
  return {(e['sealed'], e['first']): e for e in entries if 'sealed' in e}


def _groups(array: RawArray) -> list[range]:
  numbers = list(array.chunks())
  step = max(1, GROUP_BYTES // array.chunk_bytes)
  return [range(i, min(i + step, len(numbers))) for i in range(0, len(numbers), step)]
