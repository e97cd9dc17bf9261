"""T5X's own checkpoint format: an msgpack index, and one zarr array a parameter beside it."""

from collections.abc import Iterator
import os
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from t5x_inference_ext.checkpoints.readers import zarr_arrays
from t5x_inference_ext.checkpoints.readers.tree import Tree, step_number
from t5x_inference_ext.checkpoints.tensor import InMemory
from t5x_inference_ext.errors import CheckpointError

INDEX = 'checkpoint'

# flax's msgpack extension types, and the key of an array that it had to cut into pieces below msgpack's 4 GiB.
_NDARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_CHUNKED = '__msgpack_chunked_array__'


def read_legacy(path: str, index: bytes) -> Tree:
  """The parameters of the checkpoint directory `path`, whose msgpack file holds `index`.

  Raises:
    CheckpointError: an index of another kind, a missing array, or one whose shape is not the index's.
  """
  content = parse_index(index, f'{path}/{INDEX}')
  # {'optimizer': {'target', 'state'}} since T5X's first version; a bare {'target', 'state'} from other writers.
  content = content.get('optimizer', content) if isinstance(content, dict) else None
  if not isinstance(content, dict) or not isinstance(content.get('target'), dict):
    raise CheckpointError(
      f'{path}/{INDEX} is not a T5X checkpoint index: it holds no optimizer/target or target'
    )
  leaves, opening = {}, {}
  for keys, leaf in _leaves(content['target']):
    name = '/'.join(keys)
    if isinstance(leaf, dict):
      where = os.path.join(path, _relative(leaf, f'target/{name}'))
      opening[name] = zarr_arrays.open_array(f'target/{name}', where), _recorded_shape(leaf)
    elif isinstance(leaf, np.ndarray):
      leaves[name] = InMemory(leaf, f'{path}/{INDEX}')
    else:
      raise CheckpointError(
        f'target/{name} in {path}/{INDEX} is neither an array nor a reference to one: {leaf!r:.80}'
      )
  for name, (future, shape) in opening.items():
    leaves[name] = stored = future.tensor()
    if shape is not None and shape != list(stored.shape):
      raise CheckpointError(
        f'target/{name}: {stored.path} has shape {list(stored.shape)}, but {path}/{INDEX} says '
        f'{shape}: the files belong to different checkpoints'
      )
  return Tree(path, 'T5X checkpoint', leaves, _step(content.get('state')))


def parse_index(data: bytes, path: str) -> Any:
  """flax's msgpack: nested dicts with numpy arrays. Raises CheckpointError."""
  try:
    return msgpack.unpackb(
      data, ext_hook=_extension, raw=False, strict_map_key=False, object_hook=_join_chunks
    )
  except (ValueError, TypeError, AttributeError, KeyError, msgpack.UnpackException) as e:
    raise CheckpointError(
      f'{path} is not a T5X checkpoint index, or is damaged: {type(e).__name__} {e}'
    ) from e


def pack_array(values: np.ndarray) -> msgpack.ExtType:
  """A small array inside an index; the inverse of what parse does."""
  values = np.asarray(values)
  content = values.shape, values.dtype.name, values.tobytes()
  return msgpack.ExtType(_NDARRAY, msgpack.packb(content, use_bin_type=True))


def _extension(code: int, data: bytes) -> Any:
  if code not in (_NDARRAY, _SCALAR):
    return msgpack.ExtType(code, data)
  shape, dtype, buffer = msgpack.unpackb(data, raw=True)
  dtype = dtype.decode()
  dtype = np.dtype(getattr(ml_dtypes, dtype)) if dtype == 'bfloat16' else np.dtype(dtype)
  return np.frombuffer(buffer, dtype).reshape(shape)


def _join_chunks(node: dict) -> Any:
  if not node.get(_CHUNKED):
    return node
  chunks, shape = (
    [node[field][str(i)] for i in range(len(node[field]))] for field in ('chunks', 'shape')
  )
  return np.concatenate([c.ravel() for c in chunks]).reshape([int(n) for n in shape])


def _is_reference(node: Any) -> bool:
  return isinstance(node, dict) and 'driver' in node and ('kvstore' in node or 'path' in node)


def _leaves(node: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
  if isinstance(node, dict) and not _is_reference(node):
    for key, child in node.items():
      yield from _leaves(child, keys + (str(key),))
  else:
    yield keys, node


def _relative(spec: dict, name: str) -> str:
  """The array's place inside the checkpoint directory, whatever machine or bucket the writer had it on."""
  kvstore = spec.get('kvstore')
  path = (kvstore.get('path') if isinstance(kvstore, dict) else None) or spec.get('path')
  if spec['driver'] != 'zarr' or not isinstance(path, str) or not path.strip('/'):
    raise CheckpointError(
      f'{name}: the checkpoint index refers to it in a way that T5X does not write: {spec!r:.200}'
    )
  return path.rstrip('/').rpartition('/')[2]


def _recorded_shape(spec: dict) -> Any:
  """What the index says of an array's shape, if it does."""
  metadata = spec.get('metadata')
  return metadata.get('shape') if isinstance(metadata, dict) else None


def _step(state: Any) -> int | None:
  step = state.get('step') if isinstance(state, dict) else None
  return step_number(step) if isinstance(step, (int, np.ndarray)) else None
