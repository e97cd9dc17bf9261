"""Reader of safetensors files: a JSON header with the position of each array, then the arrays.

A model is one file, model.safetensors, or several with an index, model.safetensors.index.json:
{"weight_map": {name of an array: name of its file}}.

A header is not trusted: each array must lie within the file, have as many bytes as its shape and
dtype require, and share no byte with another array.
"""

from collections.abc import Iterable
import math
from typing import Any, TypeGuard
import zlib

import ml_dtypes
import numpy as np

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.readers.raw_tensor import RawTensor
from t5x_inference_ext.checkpoints.readers.stored_bytes import StoredBytes
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.errors import CheckpointError, name_list, printable
from t5x_inference_ext.text_files import load_json, load_json_object

SAFETENSORS = 'model.safetensors'
SAFETENSORS_INDEX = f'{SAFETENSORS}.index.json'
# Larger headers are refused. For 100,000 arrays a header has 12 MB.
MAX_HEADER_BYTES = 64 * 2**20
_LENGTH_BYTES = 8
_DTYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'F8_E4M3': ml_dtypes.float8_e4m3fn,
  'F8_E5M2': ml_dtypes.float8_e5m2,
  'I64': np.int64,
  'I32': np.int32,
  'I16': np.int16,
  'I8': np.int8,
  'U64': np.uint64,
  'U32': np.uint32,
  'U16': np.uint16,
  'U8': np.uint8,
  'BOOL': np.bool_,
}


def read_safetensors(directory: str) -> tuple[dict[str, Tensor], int] | None:
  """Return the arrays of a directory by name, and a CRC-32 of all headers.

  Args:
    directory: Directory of the files, local or gs://.

  Returns:
    None if the directory has neither model.safetensors nor an index.

  Raises:
    CheckpointError: A file is missing or damaged.
  """
  index = storage.read_file(directory, SAFETENSORS_INDEX)
  if index is None or storage.has_file(directory, SAFETENSORS):
    if not storage.has_file(directory, SAFETENSORS):
      return None
    return read_safetensors_file(directory, SAFETENSORS)
  where = f'{directory}/{SAFETENSORS_INDEX}'
  content = load_json(index, where)
  files = content.get('weight_map') if isinstance(content, dict) else None
  if not isinstance(files, dict) or not files:
    raise CheckpointError(f'{where} is damaged: it has no weight_map from arrays to files')
  _check_file_names(files.values(), where)
  names = sorted(set(files.values()))
  missing = [name for name in names if not storage.has_file(directory, name)]
  if missing:
    raise CheckpointError(
      f'{directory} lacks {name_list(missing, len(missing))}, which {SAFETENSORS_INDEX} lists: '
      'fetch the missing files again'
    )
  stored, crc = {}, zlib.crc32(index)
  for name in names:
    stored[name], header_crc = read_safetensors_file(directory, name)
    crc = zlib.crc32(header_crc.to_bytes(4, 'little'), crc)
  tensors = {}
  for name, file in files.items():
    if name not in stored[file]:
      raise CheckpointError(
        f'{directory}/{printable(file)} lacks {printable(name)}, which {SAFETENSORS_INDEX} places '
        'there'
      )
    tensors[name] = stored[file][name]
  unlisted = [(file, name) for file in names for name in stored[file] if files.get(name) != file]
  if unlisted:
    file, name = unlisted[0]
    raise CheckpointError(
      f'{directory}/{printable(file)} holds {printable(name)}, which {SAFETENSORS_INDEX} does not '
      'place there: the files come from different checkpoints'
    )
  return tensors, crc


def read_safetensors_file(directory: str, name: str) -> tuple[dict[str, Tensor], int]:
  """Return the arrays of one file by name, and the CRC-32 of its header.

  Raises:
    CheckpointError: The file is damaged, or can't be read.
  """
  file = StoredBytes(directory, name)
  if file.size < _LENGTH_BYTES:
    raise CheckpointError(
      f'{file.path} is not a safetensors file: it has {file.size} bytes, fewer than the '
      f'{_LENGTH_BYTES} of a header length'
    )
  length = int(file.read(0, _LENGTH_BYTES).view('<u8')[0])
  begin = _LENGTH_BYTES + length
  if length > MAX_HEADER_BYTES or begin > file.size:
    raise CheckpointError(
      f'{file.path} is not a safetensors file, or is cut off: its first bytes give the header '
      f'{length} bytes, but the file has {file.size}, and no header has more than '
      f'{MAX_HEADER_BYTES}'
    )
  data = file.read(_LENGTH_BYTES, length).tobytes()
  header = load_json_object(data, f'the header of {file.path}')
  header.pop('__metadata__', None)
  tensors: dict[str, Tensor] = {}
  spans = []
  for tensor_name, entry in header.items():
    where = f'{printable(tensor_name)} in {file.path}'
    dtype, shape, (first, end) = _entry(entry, where)
    nbytes = math.prod(shape) * dtype.itemsize
    if end - first != nbytes:
      raise CheckpointError(
        f'{where}: {dtype.name} {printable(shape)} takes {nbytes} bytes, but its data_offsets '
        f'[{first}, {end}] give it {end - first}'
      )
    if begin + end > file.size:
      raise CheckpointError(
        f'{where} should end at byte {begin + end}, but the file has {file.size} bytes: it is cut '
        'off'
      )
    tensors[tensor_name] = RawTensor(file, begin + first, shape, dtype)
    spans.append((first, end, tensor_name))
  _check_spans(sorted(spans), file, begin)
  return tensors, zlib.crc32(data)


def _entry(entry: Any, where: str) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
  """Return the dtype, shape and data_offsets of an array's entry in a header."""
  if not isinstance(entry, dict):
    raise CheckpointError(f'{where}: its entry in the header is not an object')
  name, shape, offsets = entry.get('dtype'), entry.get('shape'), entry.get('data_offsets')
  if not isinstance(name, str) or name not in _DTYPES:
    raise CheckpointError(
      f'{where}: unknown dtype {printable(name, 80)}; known are {", ".join(_DTYPES)}'
    )
  if not _are_sizes(shape) or len(shape) > 8:
    raise CheckpointError(f'{where}: its shape {printable(shape, 80)} is not the shape of an array')
  if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
    raise CheckpointError(
      f'{where}: its data_offsets {printable(offsets, 80)} are not a begin and an end'
    )
  return np.dtype(_DTYPES[name]), tuple(shape), (offsets[0], offsets[1])


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
  """Return whether a value is a list of whole numbers in the range of offsets, from 0 on."""
  return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _check_spans(spans: list[tuple[int, int, str]], file: StoredBytes, begin: int) -> None:
  """Raise CheckpointError if arrays overlap, or do not fill their file."""
  position, previous = 0, ''
  for first, end, name in spans:
    if first < position:
      raise CheckpointError(
        f'{printable(name)} and {printable(previous)} in {file.path} overlap: both have byte '
        f'{first} of the data'
      )
    if first > position:
      raise CheckpointError(
        f'{file.path} is damaged: bytes {position} to {first} of the data belong to no array'
      )
    position, previous = end, name
  if math.isfinite(file.size) and begin + position != file.size:
    raise CheckpointError(
      f'{file.path} is damaged: its arrays end at byte {begin + position}, but the file has '
      f'{file.size} bytes'
    )


def _check_file_names(names: Iterable[Any], where: str) -> None:
  """Raise CheckpointError for a file name in an index that points outside the index's directory."""
  for name in names:
    if not isinstance(name, str) or not name or name in ('.', '..') or set(name) & set('/\\\0'):
      raise CheckpointError(
        f'{where} names the file {printable(name, 80)}, which is not a name in its own directory'
      )
