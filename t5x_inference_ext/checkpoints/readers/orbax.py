"""Checkpoints that T5X (or anyone) saves through Orbax: a `state` directory of zarr arrays, usually in one OCDBT store.

Read with tensorstore directly, so that slices can be read; Orbax itself is not needed.
"""

from collections.abc import Iterator
import json
import os
from typing import Any

import numpy as np

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.readers import legacy, zarr_arrays
from t5x_inference_ext.checkpoints.readers.tree import Tree, step_number
from t5x_inference_ext.checkpoints.tensor import InMemory, Tensor
from t5x_inference_ext.errors import CheckpointError

METADATA = '_METADATA'
STATE = 'state'
# T5X's name of the item is `state`; Orbax's own default is `default`.
_ITEMS = ('', STATE, 'default')
# The index of Orbax's first releases: a msgpack tree, as flax writes it, in which large leaves are strings.
_OLD_INDEX = 'checkpoint'
_PLACEHOLDER = 'PLACEHOLDER://'


def find_state(path: str) -> str | None:
  """The directory at or below `path` that holds an Orbax tree, or None."""
  for item in _ITEMS:
    directory = os.path.join(path, item).rstrip('/')
    if storage.read_file(directory, METADATA) is not None:
      return directory
  state = f'{path}/{STATE}'
  return state if storage.read_file(state, _OLD_INDEX) is not None else None


def read_orbax(path: str, directory: str) -> Tree:
  """The parameters of the Orbax checkpoint `path`, whose arrays are below `directory`. Raises CheckpointError."""
  metadata = storage.read_file(directory, METADATA)
  where = f'{directory}/{METADATA}'
  if metadata is None:
    where = f'{directory}/{_OLD_INDEX}'
    leaves = dict(
      _old_leaves(legacy.parse_index(storage.read_file(directory, _OLD_INDEX), where), where)
    )
    zarr3, zeros_are_stored = False, True
    ocdbt = storage.read_file(directory, 'manifest.ocdbt') is not None
  else:
    try:
      content = json.loads(metadata)
      leaves = dict(_leaves(content['tree_metadata']))
      zarr3, ocdbt = content.get('use_zarr3', False), content.get('use_ocdbt', True)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
      raise CheckpointError(f'{where} is damaged: {type(e).__name__} {e}') from e
    # zarr 2 arrays of Orbax have no fill value, and so always store zeros; zarr 3 arrays have one.
    zeros_are_stored = not zarr3 or bool(content.get('store_array_data_equal_to_fill_value'))
  if ocdbt and storage.read_file(directory, 'manifest.ocdbt') is None:
    raise CheckpointError(
      f'{directory} lacks manifest.ocdbt: the checkpoint was not finished, or only partly copied'
    )
  base = {'driver': 'ocdbt', 'base': storage.kvstore(directory)} if ocdbt else None

  def opening(keys: tuple[str, ...]):
    key = '.'.join(keys)
    return zarr_arrays.open_array(
      '/'.join(keys),
      f'{directory}/{key}',
      driver='zarr3' if zarr3 else 'zarr',
      base=base,
      key=key,
      zeros_are_stored=zeros_are_stored,
    )

  prefix = next(
    (
      p
      for p in (('target',), ('optimizer', 'target'))
      if any(keys[: len(p)] == p for keys in leaves)
    ),
    None,
  )
  if prefix is None:
    tops = sorted({keys[0] for keys in leaves})
    raise CheckpointError(
      f'{where} lists no parameters below target, as T5X has them; found: '
      f'{", ".join(tops) or "none"}'
    )
  target = {
    '/'.join(keys[len(prefix) :]): (leaf, keys)
    for keys, leaf in leaves.items()
    if keys[: len(prefix)] == prefix
  }
  started = {name: opening(keys) if leaf is None else leaf for name, (leaf, keys) in target.items()}
  tensors = {name: s if isinstance(s, Tensor) else s.tensor() for name, s in started.items()}
  return Tree(
    path,
    f'Orbax checkpoint ({"OCDBT, " if ocdbt else ""}zarr {3 if zarr3 else 2})',
    tensors,
    _step(leaves, prefix[:-1] + ('state', 'step'), opening),
  )


def _leaves(tree_metadata: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], None]]:
  """The place of every array in the tree."""
  for leaf in tree_metadata.values():
    if not leaf['value_metadata'].get('skip_deserialize', False):  # empty nodes
      yield tuple(str(k['key']) for k in leaf['key_metadata']), None


def _old_leaves(
  node: Any, where: str, keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Tensor | None]]:
  if isinstance(node, dict):
    for key, child in node.items():
      yield from _old_leaves(child, where, keys + (str(key),))
  elif isinstance(node, np.ndarray):
    yield keys, InMemory(node, where)
  elif isinstance(node, str) and node.startswith(_PLACEHOLDER):
    yield keys, None


def _step(leaves, keys, opening) -> int | None:
  if keys not in leaves:
    return None
  tensor = opening(keys).tensor() if leaves[keys] is None else leaves[keys]
  return step_number(tensor.read()) if tensor.shape == () else None
