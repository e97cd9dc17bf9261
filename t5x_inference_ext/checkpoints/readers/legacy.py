"""Reader of T5X's own checkpoint format: a msgpack index, and one zarr array per parameter."""

from collections.abc import Iterator
import os
import reprlib
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import numpy.typing as npt

from t5x_inference_ext.checkpoints.readers import zarr_arrays
from t5x_inference_ext.checkpoints.readers.tree import Tree, step_number
from t5x_inference_ext.checkpoints.tensor import InMemory, Tensor
from t5x_inference_ext.errors import CheckpointError, printable

INDEX = 'checkpoint'

# flax's msgpack extension types, and the key of an array that flax cut into pieces, because a
# msgpack value has at most 4 GiB.
_NDARRAY, _SCALAR = 1, 3
_CHUNKED = '__msgpack_chunked_array__'


def read_legacy(path: str, index: bytes) -> Tree:
  """Return the parameters of the checkpoint directory `path`, whose msgpack file holds `index`.

  Raises:
    CheckpointError: The file is not an index of T5X, an array is missing, or its shape differs from
      the index.
  """
  where = f'{path}/{INDEX}'
  content = parse_index(index, where)
  # T5X has written {'optimizer': {'target', 'state'}} since its first version; other writers leave
  # out 'optimizer'.
  content = content.get('optimizer', content) if isinstance(content, dict) else None
  if not isinstance(content, dict) or not isinstance(content.get('target'), dict):
    raise CheckpointError(
      f'{where} is not a T5X checkpoint index: it holds no optimizer/target or target'
    )
  leaves: dict[str, Tensor] = {}
  opening = {}
  for keys, leaf in flat_leaves(content['target']):
    name = '/'.join(keys)
    parameter = f'target/{printable(name)}'
    if _is_reference(leaf):
      directory = os.path.join(path, _directory_name(leaf, parameter))
      opening[name] = zarr_arrays.open_array(parameter, directory), _recorded_shape(leaf)
    elif isinstance(leaf, np.ndarray):
      leaves[name] = InMemory(leaf, where)
    else:
      raise CheckpointError(
        f'{parameter} in {where} is neither an array nor a reference to one: {reprlib.repr(leaf)}'
      )
  for name, (array, shape) in opening.items():
    leaves[name] = stored = array.tensor()
    if shape is not None and shape != list(stored.shape):
      raise CheckpointError(
        f'{stored.name}: {stored.path} has shape {list(stored.shape)}, but {where} says '
        f'{reprlib.repr(shape)}: the files come from different checkpoints'
      )
  return Tree(path, 'T5X checkpoint', leaves, _step(content.get('state')))


def parse_index(data: bytes, path: str) -> Any:
  """Return the content of a msgpack file written by flax: nested dicts with numpy arrays.

  Raises:
    CheckpointError: The data is not msgpack, is damaged, or is nested too deeply to be read.
  """
  try:
    return msgpack.unpackb(
      data, ext_hook=_extension, raw=False, strict_map_key=False, object_hook=_join_chunks
    )
  except (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    RecursionError,
    MemoryError,
    msgpack.UnpackException,
  ) as e:
    raise CheckpointError(
      f'{path} is not a T5X checkpoint index, or is damaged: {type(e).__name__} {e!s:.200}'
    ) from e


def pack_array(values: npt.ArrayLike) -> msgpack.ExtType:
  """Encode a small array as flax does inside an index; parse_index decodes it."""
  values = np.asarray(values)
  content = values.shape, values.dtype.name, values.tobytes()
  return msgpack.ExtType(_NDARRAY, msgpack.packb(content, use_bin_type=True))


def flat_leaves(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
  """Yield the keys and value of each leaf (a reference to an array, or any value but a dict)."""
  pending: list[tuple[tuple[str, ...], Any]] = [((), tree)]
  while pending:  # no recursion: a damaged index may be nested too deeply
    keys, node = pending.pop()
    if isinstance(node, dict) and not _is_reference(node):
      pending += [((*keys, str(key)), child) for key, child in reversed(node.items())]
    else:
      yield keys, node


def _extension(code: int, data: bytes) -> Any:
  """Decode a value of one of flax's msgpack extension types."""
  if code not in (_NDARRAY, _SCALAR):
    return msgpack.ExtType(code, data)
  shape, dtype_name, buffer = msgpack.unpackb(data, raw=True)
  name = dtype_name.decode()
  dtype = np.dtype(ml_dtypes.bfloat16) if name == 'bfloat16' else np.dtype(name)
  return np.frombuffer(buffer, dtype).reshape(shape)


def _join_chunks(node: dict) -> Any:
  """Join the pieces of an array that flax divided; return other nodes unchanged."""
  if not node.get(_CHUNKED):
    return node
  chunks, shape = (
    [node[field][str(i)] for i in range(len(node[field]))] for field in ('chunks', 'shape')
  )
  return np.concatenate([c.ravel() for c in chunks]).reshape([int(n) for n in shape])


def _is_reference(node: Any) -> bool:
  """Return whether a node of the index refers to a zarr array."""
  return isinstance(node, dict) and 'driver' in node and ('kvstore' in node or 'path' in node)


def _directory_name(spec: dict, parameter: str) -> str:
  """Return the name of an array's directory: the last component of the path in the index."""
  kvstore = spec.get('kvstore')
  path = (kvstore.get('path') if isinstance(kvstore, dict) else None) or spec.get('path')
  if spec['driver'] != 'zarr' or not isinstance(path, str) or not path.strip('/'):
    raise CheckpointError(
      f'{parameter}: the checkpoint index refers to it in a form that T5X does not write: '
      f'{reprlib.repr(spec)}'
    )
  return path.rstrip('/').rpartition('/')[2]


def _recorded_shape(spec: dict) -> Any:
  """Return an array's shape from the index, or None if the index does not have it."""
  metadata = spec.get('metadata')
  return metadata.get('shape') if isinstance(metadata, dict) else None


def _step(state: Any) -> int | None:
  step = state.get('step') if isinstance(state, dict) else None
  return step_number(step) if isinstance(step, (int, np.ndarray)) else None
