"""Tensors of GGUF files, plain or quantized, read slice by slice."""

import math
import os

import ml_dtypes
import numpy as np

from t5x_inference_ext.checkpoints.readers.ggml_blocks import BLOCK_TYPES, BlockType
from t5x_inference_ext.checkpoints.readers.gguf_header import (
  GgufEntry,
  GgufHeader,
  read_gguf_header,
)
from t5x_inference_ext.checkpoints.readers.raw_tensor import RawTensor
from t5x_inference_ext.checkpoints.readers.stored_bytes import StoredBytes
from t5x_inference_ext.checkpoints.tensor import Bounds, Tensor
from t5x_inference_ext.errors import CheckpointError, printable

GGUF_SUFFIX = '.gguf'
_PLAIN = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'F64': np.float64}
# ggml's type number -> type name. Types that are neither plain nor in BLOCK_TYPES can't be read.
_TYPE_NAMES = {
  **dict(enumerate(('F32', 'F16', 'Q4_0', 'Q4_1'))),
  **dict(enumerate(('Q5_0', 'Q5_1', 'Q8_0', 'Q8_1'), 6)),
  **dict(enumerate(('Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K', 'Q8_K'), 10)),
  **dict(enumerate(('IQ2_XXS', 'IQ2_XS', 'IQ3_XXS', 'IQ1_S', 'IQ4_NL', 'IQ3_S', 'IQ2_S'), 16)),
  **dict(enumerate(('IQ4_XS', 'I8', 'I16', 'I32', 'I64', 'F64', 'IQ1_M', 'BF16'), 23)),
  34: 'TQ1_0',
  35: 'TQ2_0',
  39: 'MXFP4',
}
_DEFAULT_ALIGNMENT, _MAX_ALIGNMENT = 32, 2**16


class QuantizedTensor(Tensor):
  """A tensor [..., columns] of ggml's blocks, dequantized to float32 as it is read."""

  def __init__(self, blocks: Tensor, kind: BlockType) -> None:
    """Wrap the blocks of a tensor.

    Args:
      blocks: The bytes of each row's blocks, [..., blocks * kind.nbytes] uint8.
      kind: The kind of the blocks.
    """
    *rows, row_bytes = blocks.shape
    super().__init__((*rows, row_bytes // kind.nbytes * kind.values), np.float32, blocks.path)
    self._blocks, self._kind = blocks, kind
    self.chunk = (*(1 for _ in rows), self.shape[-1])

  def _read(self, bounds: Bounds) -> np.ndarray:
    *rows, (begin, end) = bounds
    values, nbytes = self._kind.values, self._kind.nbytes
    first, last = begin // values, -(-end // values)
    index = (*(slice(*b) for b in rows), slice(first * nbytes, last * nbytes))
    stored = self._blocks.read(index)
    with np.errstate(invalid='ignore'):  # 0 * infinity, with a damaged scale: callers check for NaN
      found = self._kind.dequantize(stored.reshape(-1, nbytes))
    found = found.reshape(*stored.shape[:-1], -1)
    return found[..., begin - first * values : end - first * values]


def read_gguf(path: str) -> tuple[GgufHeader, dict[str, Tensor], dict[str, str]]:
  """Return a GGUF file's header, tensors (outermost axis first) and their types, by name.

  Raises:
    CheckpointError: The file is damaged, or holds a type that can't be read.
  """
  file = StoredBytes(*os.path.split(path))
  header = read_gguf_header(file)
  parts = header.metadata.get('split.count', 1)
  if parts not in (0, 1):
    raise CheckpointError(
      f'{path} is one of {printable(parts)} files of a model: join them with llama-gguf-split '
      '--merge'
    )
  alignment = header.metadata.get('general.alignment', _DEFAULT_ALIGNMENT)
  if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT:
    raise CheckpointError(f'{path} is damaged: its general.alignment is {printable(alignment)}')
  data = -(-header.size // alignment) * alignment
  tensors, types, spans = {}, {}, []
  for name, entry in header.entries.items():
    where = f'{printable(name)} in {path}'
    types[name], tensors[name], nbytes = _tensor(file, data, entry, where)
    if entry.offset % alignment:
      raise CheckpointError(f'{where} begins at {entry.offset}, no multiple of {alignment} bytes')
    if data + entry.offset + nbytes > file.size:
      raise CheckpointError(
        f'{where} should end at byte {data + entry.offset + nbytes}, but the file has {file.size} '
        'bytes: it is cut off'
      )
    spans.append((entry.offset, entry.offset + nbytes, name))
  spans.sort()
  for (_, end, before), (begin, _, name) in zip(spans, spans[1:]):
    if begin < end:
      raise CheckpointError(
        f'{printable(name)} and {printable(before)} in {path} overlap at byte {begin} of the data'
      )
  return header, tensors, types


def _tensor(file: StoredBytes, data: int, entry: GgufEntry, where: str) -> tuple[str, Tensor, int]:
  """Return a tensor's type, the tensor, and its size in bytes.

  Args:
    file: The file.
    data: First byte of all tensors' data in the file.
    entry: The tensor's entry in the header.
    where: The tensor's name and file, for messages.
  """
  name = _TYPE_NAMES.get(entry.type_number, f'number {entry.type_number}')
  kind = BLOCK_TYPES.get(name)
  if name not in _PLAIN and kind is None:
    known = ', '.join(sorted({*_PLAIN, *BLOCK_TYPES}))
    raise CheckpointError(
      f'{where} has type {name}, and only {known} are read: quantize the model again, to Q8_0 for '
      'example'
    )
  shape = entry.sizes[::-1]
  count = math.prod(shape)
  if not shape or not 0 < count < 2**62:
    raise CheckpointError(f'{where} has the sizes {list(shape)}, which no tensor has')
  if kind is None:
    dtype = np.dtype(_PLAIN[name])
    return name, RawTensor(file, data + entry.offset, shape, dtype), count * dtype.itemsize
  if shape[-1] % kind.values:
    raise CheckpointError(
      f'{where} has rows of {shape[-1]} values, no multiple of the {kind.values} of a '
      f'block of {name}'
    )
  row_bytes = shape[-1] // kind.values * kind.nbytes
  blocks = RawTensor(file, data + entry.offset, (*shape[:-1], row_bytes), np.uint8)
  return name, QuantizedTensor(blocks, kind), math.prod(shape[:-1]) * row_bytes
