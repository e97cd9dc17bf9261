"""Files of safetensors and GGUF, written by hand: sound ones, and ones that lie."""

import json
import pathlib
import struct

import ml_dtypes
import numpy as np

SAFETENSORS_DTYPES = {
  'float32': 'F32',
  'float16': 'F16',
  'bfloat16': 'BF16',
  'float64': 'F64',
  'int64': 'I64',
  'bool': 'BOOL',
}
# ggml's numbers of types.
GGML = {'F32': 0, 'F16': 1, 'Q4_0': 2, 'Q4_1': 3, 'Q8_0': 8, 'Q4_K': 12, 'Q6_K': 14, 'BF16': 30}


def safetensors_header(arrays: dict[str, np.ndarray]) -> dict:
  """Return the header of a file with these arrays, one after another."""
  header, position = {'__metadata__': {'format': 'pt'}}, 0
  for name, values in arrays.items():
    end = position + values.nbytes
    header[name] = {
      'dtype': SAFETENSORS_DTYPES[values.dtype.name],
      'shape': list(values.shape),
      'data_offsets': [position, end],
    }
    position = end
  return header


def write_safetensors(
  path: pathlib.Path, arrays: dict[str, np.ndarray], header: dict | bytes | None = None
) -> pathlib.Path:
  """Write a file; `header` replaces the true one."""
  header = safetensors_header(arrays) if header is None else header
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(
    struct.pack('<Q', len(text)) + text + b''.join(x.tobytes() for x in arrays.values())
  )
  return path


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Return the arrays of a sound file: a reader of its own, for comparison."""
  data = path.read_bytes()
  (length,) = struct.unpack('<Q', data[:8])
  header = json.loads(data[8 : 8 + length])
  dtypes = {value: key for key, value in SAFETENSORS_DTYPES.items()}
  arrays = {}
  for name, entry in header.items():
    if name != '__metadata__':
      begin, end = (8 + length + i for i in entry['data_offsets'])
      dtype = dtypes[entry['dtype']]
      dtype = ml_dtypes.bfloat16 if dtype == 'bfloat16' else np.dtype(dtype)
      arrays[name] = np.frombuffer(data[begin:end], dtype).reshape(entry['shape'])
  return arrays


def gguf_string(text: str | bytes) -> bytes:
  data = text if isinstance(text, bytes) else text.encode()
  return struct.pack('<Q', len(data)) + data


def gguf_value(value) -> bytes:
  """Return a value with its type before it: float32, uint32, bool, string or an array of those."""
  if isinstance(value, bool):
    return struct.pack('<I?', 7, value)
  if isinstance(value, int):
    return struct.pack('<II', 4, value)
  if isinstance(value, float):
    return struct.pack('<If', 6, value)
  if isinstance(value, str):
    return struct.pack('<I', 8) + gguf_string(value)
  items = [gguf_value(item) for item in value]
  return (
    struct.pack('<I', 9)
    + items[0][:4]
    + struct.pack('<Q', len(items))
    + b''.join(item[4:] for item in items)
  )


def write_gguf(
  path: pathlib.Path,
  metadata: dict,
  arrays: dict[str, np.ndarray],
  *,
  types: dict[str, str] | None = None,
  shapes: dict[str, tuple[int, ...]] | None = None,
  offsets: dict[str, int] | None = None,
  version: int = 3,
  counts: tuple[int, int] | None = None,
  keys: bytes = b'',
  more_keys: int = 0,
) -> pathlib.Path:
  """Write a GGUF file.

  Args:
    path: The file.
    metadata: Values by key.
    arrays: The tensors; of a quantized type, its blocks as uint8 [..., bytes].
    types: Types of tensors that are not those of their dtype: a name of GGML.
    shapes: Shapes to write into the header, outermost axis first.
    offsets: Offsets to write into the header.
    version: The version to write.
    counts: The numbers of tensors and of keys to write.
    keys: Further bytes behind the keys.
    more_keys: How many keys `keys` holds.
  """
  plain = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}
  counts = counts or (len(arrays), len(metadata) + more_keys)
  header = b'GGUF' + struct.pack('<IQQ', version, *counts)
  header += b''.join(gguf_string(key) + gguf_value(value) for key, value in metadata.items()) + keys
  data = b''
  for name, values in arrays.items():
    kind = (types or {}).get(name) or plain[values.dtype.name]
    shape = (shapes or {}).get(name, values.shape)
    offset = (offsets or {}).get(name, len(data))
    number = GGML[kind] if isinstance(kind, str) else kind
    header += gguf_string(name) + struct.pack('<I', len(shape))
    header += b''.join(struct.pack('<Q', n) for n in shape[::-1])
    header += struct.pack('<IQ', number, offset)
    data += values.tobytes()
    data += bytes(-len(data) % 32)
  header += bytes(-len(header) % 32)
  path.write_bytes(header + data)
  return path
