"""Arrays of T5X's own format: zarr version 2, each chunk one gzip or zlib stream, decompressed here.

tensorstore would use zlib, which takes twice as long as igzip, and would stop where it has all values, without a look at
the checksum behind them.
"""

import collections
from collections.abc import Hashable, Iterable, Iterator
import concurrent.futures
import io
import itertools
import math
import os
import re
import threading
from typing import Any

from isal import isal_zlib
import numpy as np
import tensorstore as ts

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.pipeline import cores
from t5x_inference_ext.checkpoints.tensor import Bounds, Tensor
from t5x_inference_ext.errors import CheckpointError

# isal's windowBits, zlib's: of the stream that each zarr compressor writes.
_WINDOWS = {'gzip': 31, 'zlib': 15}
# Compressed bytes read and given to the decompressor at a time: what comes out is still in the processor's cache when it
# is copied.
_PIECE_BYTES = 2**19


class ChunkCache:
  """Decoded chunks, the least recently used of which go when there are more than so many bytes."""

  def __init__(self, nbytes: int):
    self._free, self._chunks, self._lock = nbytes, collections.OrderedDict(), threading.Lock()

  def get(self, key: Hashable) -> np.ndarray | None:
    with self._lock:
      if key in self._chunks:
        self._chunks.move_to_end(key)
      return self._chunks.get(key)

  def put(self, key: Hashable, values: np.ndarray) -> None:
    with self._lock:
      if key not in self._chunks:
        self._chunks[key] = values
        self._free -= values.nbytes
      while self._free < 0:
        self._free += self._chunks.popitem(last=False)[1].nbytes


class GzipArray(Tensor):
  """Missing chunks are errors, whatever the fill value."""

  def __init__(self, name: str, path: str, store: ts.TensorStore, cache: ChunkCache | None = None):
    """Args:
    name: the parameter, for messages.
    path: its directory.
    store: the array, opened.
    cache: of decoded chunks; None keeps none and decodes in the calling thread alone.
    """
    super().__init__(store.shape, store.dtype.numpy_dtype, path)
    metadata = _metadata(store)
    self.name, self.chunk = name, tuple(min(c, n) for c, n in zip(metadata['chunks'], self.shape))
    self._store, self._cache = store, cache
    self._stored_chunk, self._order = tuple(metadata['chunks']), metadata['order']
    self._stored_dtype = (
      self.dtype if metadata['dtype'] == 'bfloat16' else np.dtype(metadata['dtype'])
    )
    self._separator = metadata.get('dimension_separator', '.')
    self._window = _WINDOWS[metadata['compressor']['id']]
    self._local = store.kvstore.spec().to_json()['driver'] == 'file'

  @staticmethod
  def supports(store: ts.TensorStore) -> bool:
    """Whether an opened array of zarr version 2 is one of these."""
    metadata = _metadata(store)
    return (
      (metadata.get('compressor') or {}).get('id') in _WINDOWS
      and not metadata.get('filters')
      and re.fullmatch(r'bfloat16|[<>|][iuf][1248]', str(metadata['dtype'])) is not None
    )

  def uncached(self):
    return GzipArray(self.name, self.path, self._store)

  def _read(self, bounds):
    ranges = (
      range(begin // c, -(-end // c)) for (begin, end), c in zip(bounds, self._stored_chunk)
    )
    places = list(itertools.product(*ranges))
    if self._cache is None:
      # A block of a conversion is little more than a chunk: all of it is on its way before the first is decoded.
      fetched = [self._fetch(place) for place in places]
      chunks = (self._decode(place, future) for place, future in zip(places, fetched))
      if (
        len(places) == 1
        and self._stored_dtype == self.dtype
        and math.prod(end - begin for begin, end in bounds) == math.prod(self._stored_chunk)
      ):
        return next(chunks)
      return self._assemble(bounds, places, chunks)
    if len(places) == 1:
      return self._assemble(bounds, places, map(self._cached, places))
    with concurrent.futures.ThreadPoolExecutor(min(len(places), cores())) as pool:
      return self._assemble(bounds, places, pool.map(self._cached, places))

  def _assemble(
    self, bounds: Bounds, places: list[tuple[int, ...]], chunks: Iterator[np.ndarray]
  ) -> np.ndarray:
    out = np.empty([end - begin for begin, end in bounds], self.dtype)
    for place, values in zip(places, chunks):
      spans = [
        (max(b, p * c), min(e, (p + 1) * c))
        for p, c, (b, e) in zip(place, self._stored_chunk, bounds)
      ]
      inside = tuple(
        slice(b - p * c, e - p * c) for p, c, (b, e) in zip(place, self._stored_chunk, spans)
      )
      out[tuple(slice(b - first, e - first) for (b, e), (first, _) in zip(spans, bounds))] = values[
        inside
      ]
    return out

  def _key(self, place: tuple[int, ...]) -> str:
    return self._separator.join(map(str, place)) or '0'

  def _cached(self, place: tuple[int, ...]) -> np.ndarray:
    values = self._cache.get((self, place))
    if values is None:
      values = self._decode(place, self._fetch(place))
      self._cache.put((self, place), values)
    return values

  def _fetch(self, place: tuple[int, ...]) -> ts.Future | None:
    """What is stored of a chunk, on its way; None for a file, which is read while it is decompressed."""
    return None if self._local else self._store.kvstore.read(self._key(place))

  def _decode(self, place: tuple[int, ...], fetched: ts.Future | None) -> np.ndarray:
    """The values of a chunk, padding included."""

    def damaged(why):
      return CheckpointError(f'{self.name}: damaged data in {self.path}/{self._key(place)}: {why}')

    size = math.prod(self._stored_chunk) * self._stored_dtype.itemsize
    try:
      if fetched is None:
        with open(os.path.join(self.path, self._key(place)), 'rb', buffering=0) as f:
          data = decompress(_file_pieces(f), self._window, size)
      elif (result := fetched.result()).state == 'value':
        data = decompress(_pieces(result.value), self._window, size)
      else:
        raise damaged('the chunk is missing')
    except MemoryError:
      raise damaged(
        f'the array says that its chunks are {list(self._stored_chunk)}, {size / 1e9:.0f} GB each'
      ) from None
    except FileNotFoundError:
      raise damaged('the chunk is missing') from None
    except OSError as e:
      raise damaged(e.strerror) from e
    except isal_zlib.error as e:
      raise damaged(e) from e
    except CheckpointError:
      raise
    except ValueError as e:  # tensorstore's
      raise damaged(storage.reason(e)) from e
    return data.view(self._stored_dtype).reshape(self._stored_chunk, order=self._order)


def decompress(pieces: Iterable[memoryview], window: int, size: int) -> np.ndarray:
  """The `size` bytes [size] uint8 of one whole stream, its checksum compared. Raises isal_zlib.error: it is another."""
  out, done, stream = np.empty(size, np.uint8), 0, isal_zlib.decompressobj(window)
  for piece in pieces:
    if stream.eof:
      raise isal_zlib.error('there is something behind its end')
    values = stream.decompress(piece)
    if len(values) > size - done:
      raise isal_zlib.error(f'it holds more than {size} bytes')
    out[done : done + len(values)] = np.frombuffer(values, np.uint8)
    done += len(values)
  if stream.unused_data:
    raise isal_zlib.error('there is something behind its end')
  if not stream.eof:
    raise isal_zlib.error('the end of the file is not there')
  if done != size:
    raise isal_zlib.error(f'it holds {done} bytes, expected {size}')
  return out


def _pieces(data: bytes) -> Iterator[memoryview]:
  for begin in range(0, len(data), _PIECE_BYTES):
    yield memoryview(data)[begin : begin + _PIECE_BYTES]


def _file_pieces(file: io.RawIOBase) -> Iterator[memoryview]:
  """Each is overwritten by the next."""
  buffer = memoryview(bytearray(_PIECE_BYTES))
  while length := file.readinto(buffer):
    yield buffer[:length]


def _metadata(store: ts.TensorStore) -> dict[str, Any]:
  return store.spec().to_json()['metadata']
