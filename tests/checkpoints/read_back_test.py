"""Reading back what a conversion wrote, in groups of chunks, before all of it is written."""

from collections import Counter
import threading

import ml_dtypes
import numpy as np
import pytest

from t5x_inference_ext.checkpoints.conversion import raw_array, read_back
from t5x_inference_ext.checkpoints.conversion.raw_array import FINGERPRINTS, RawArray
from t5x_inference_ext.checkpoints.conversion.read_back import ReadBack
from t5x_inference_ext.checkpoints.manifest import checksum

CHUNK = 12  # bytes


@pytest.fixture
def arrays(tmp_path, monkeypatch) -> list[RawArray]:
  """Two arrays of three chunks, in groups of two chunks and one."""
  monkeypatch.setattr(read_back, 'GROUP_BYTES', 2 * CHUNK)
  arrays = [RawArray(str(tmp_path), name, (3, CHUNK), np.int8, (1, CHUNK)) for name in 'ab']
  for array in arrays:
    array.create()
    array.write([(((0, 3), (0, CHUNK)), np.arange(3 * CHUNK, dtype=np.int8).reshape(3, CHUNK))])
  return arrays


class Journal:
  """A journal in memory. `first` is set when there is an entry."""

  def __init__(self) -> None:
    self.lines, self.first = [], threading.Event()

  def record(self, entry) -> None:
    self.lines.append(entry)
    self.first.set()

  @property
  def groups(self) -> list[tuple[str, int]]:
    return [(entry['read_back'], entry['first']) for entry in self.lines]


def test_groups_are_read_as_soon_as_they_are_written(arrays):
  a, b = arrays
  journal, told = Journal(), []
  reading = ReadBack(arrays, lambda: journal.lines, journal.record, lambda *p: told.append(p))
  with reading.ahead() as written:
    written(Counter({(a, 0): CHUNK, (a, 1): CHUNK - 1, (b, 1): CHUNK}))
    assert journal.groups == []
    written(Counter({(a, 1): 1}))
    assert journal.first.wait(60)
    assert journal.groups == [('a', 0)]
  reading.run(workers=1)
  assert journal.groups == [('a', 0), ('a', 2), ('b', 0), ('b', 2)]
  assert [n for _, n, _ in told] == [2 * CHUNK, CHUNK, 2 * CHUNK, CHUNK]
  whole = ((0, 3), (0, CHUNK))
  sums = {a.name: a.fingerprint(whole, np.arange(3 * CHUNK, dtype=np.int8).reshape(3, CHUNK))}
  assert len(read_back.checksums([a], [{'fingerprints': sums}], journal.lines)['a']) == 3


@pytest.mark.parametrize('read', [1, 30, 2**22])
@pytest.mark.parametrize('shape,chunk', [((2, 10, 7), (1, 4, 5)), ((7,), (3,)), ((3, 1), (1, 1))])
def test_a_chunk_read_a_few_rows_at_a_time(tmp_path, monkeypatch, read, shape, chunk):
  """The padding of chunks at the end of an array does not count."""
  monkeypatch.setattr(raw_array, '_READ_BYTES', read)
  values = np.random.default_rng(0).standard_normal(shape).astype(ml_dtypes.bfloat16)
  array = RawArray(str(tmp_path), 'a', shape, values.dtype, chunk)
  whole = tuple((0, n) for n in shape)
  array.create()
  array.write([(whole, values)])
  found = [array.read_back(number) for number in array.chunks()]
  places = [np.unravel_index(number, array.grid) for number in array.chunks()]
  indices = [tuple(slice(p * c, (p + 1) * c) for p, c in zip(place, chunk)) for place in places]
  assert [crc for crc, _ in found] == [checksum(values[index]) for index in indices]
  assert sum(n for _, n in found) % FINGERPRINTS == array.fingerprint(whole, values)


def test_a_group_that_cannot_be_read_ends_the_conversion(arrays, monkeypatch):
  failed = threading.Event()

  def read(self, chunk):
    failed.set()
    raise OSError(5, 'disk says no')

  monkeypatch.setattr(RawArray, 'read_back', read)
  journal = Journal()
  reading = ReadBack(arrays, lambda: journal.lines, journal.record, lambda *_: None)
  with pytest.raises(OSError, match='disk says no'), reading.ahead() as written:
    written(Counter({(arrays[0], 2): CHUNK}))
    assert failed.wait(60)
  assert journal.lines == []
