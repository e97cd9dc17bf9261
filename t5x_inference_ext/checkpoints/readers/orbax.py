"""Reader of checkpoints that T5X, or any other program, saved through Orbax.

A `state` directory holds zarr arrays, usually in one OCDBT store. They are read through
tensorstore, which can read slices; Orbax itself is not needed.
"""

from collections.abc import Iterator, Mapping
import os
import re
from typing import Any, TypeAlias

import numpy as np

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.readers import legacy, zarr_arrays
from t5x_inference_ext.checkpoints.readers.tree import Tree, step_number
from t5x_inference_ext.checkpoints.tensor import InMemory, Tensor
from t5x_inference_ext.errors import CheckpointError, name_list, printable
from t5x_inference_ext.text_files import load_json

METADATA = '_METADATA'
STATE = 'state'
# Directory of the saved item: T5X names it `state`, Orbax's default is `default`.
_ITEMS = ('', STATE, 'default')
# The index of Orbax's first releases: a msgpack tree in flax's form, in which large leaves are
# strings.
_OLD_INDEX = 'checkpoint'
_PLACEHOLDER = 'PLACEHOLDER://'
# Orbax writes into a directory whose name contains this, and renames it when everything is written.
_UNFINISHED = re.compile(r'\.orbax-checkpoint-tmp\b[^/]*(/|$)')

# Keys in the tree -> leaf of the index; None: the leaf is an array in the store.
_Leaves: TypeAlias = dict[tuple[str, ...], Tensor | None]


def find_state(path: str) -> str | None:
  """Return the directory at or below `path` that holds an Orbax tree, or None.

  Raises:
    CheckpointError: Orbax has not finished writing the checkpoint.
  """
  for item in _ITEMS:
    directory = os.path.join(path, item).rstrip('/')
    if storage.read_file(directory, METADATA) is not None:
      return _finished(directory)
  state = f'{path}/{STATE}'
  return _finished(state) if storage.read_file(state, _OLD_INDEX) is not None else None


def read_orbax(path: str, directory: str) -> Tree:
  """Return the parameters of the Orbax checkpoint `path`.

  Args:
    path: Directory of the checkpoint.
    directory: Directory of the arrays: the result of find_state.

  Raises:
    CheckpointError: The checkpoint is damaged, or has no T5X parameters.
  """
  metadata = storage.read_file(directory, METADATA)
  if metadata is None:
    where = f'{directory}/{_OLD_INDEX}'
    index = storage.read_file(directory, _OLD_INDEX) or b''
    leaves = _old_leaves(legacy.parse_index(index, where), where)
    zarr3, zeros_are_stored = False, True
    ocdbt = storage.read_file(directory, 'manifest.ocdbt') is not None
  else:
    where = f'{directory}/{METADATA}'
    content = load_json(metadata, where)
    try:
      leaves = dict.fromkeys(_leaf_keys(content['tree_metadata']))
      zarr3, ocdbt = content.get('use_zarr3', False), content.get('use_ocdbt', True)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
      raise CheckpointError(f'{where} is damaged: {type(e).__name__} {e!s:.200}') from e
    # Orbax's zarr 2 arrays have no fill value, so zeros are always stored; its zarr 3 arrays have a
    # fill value, and chunks of zeros may be left out.
    zeros_are_stored = not zarr3 or bool(content.get('store_array_data_equal_to_fill_value'))
  if ocdbt and storage.read_file(directory, 'manifest.ocdbt') is None:
    raise CheckpointError(
      f'{directory} lacks manifest.ocdbt: the checkpoint was not finished, or only partly copied'
    )
  base = {'driver': 'ocdbt', 'base': storage.kvstore(directory)} if ocdbt else None

  def opening(keys: tuple[str, ...]) -> zarr_arrays.OpeningArray:
    key = '.'.join(keys)
    return zarr_arrays.open_array(
      printable('/'.join(keys)),
      f'{directory}/{key}',
      driver='zarr3' if zarr3 else 'zarr',
      base=base,
      key=key,
      zeros_are_stored=zeros_are_stored,
    )

  prefix = _target_prefix(leaves, where)
  started = {
    '/'.join(keys[len(prefix) :]): opening(keys) if leaf is None else leaf
    for keys, leaf in leaves.items()
    if keys[: len(prefix)] == prefix
  }
  tensors = {n: leaf if isinstance(leaf, Tensor) else leaf.tensor() for n, leaf in started.items()}
  step_keys = (*prefix[:-1], 'state', 'step')
  step = None
  if step_keys in leaves:
    stored_step = leaves[step_keys] or opening(step_keys).tensor()
    step = step_number(stored_step.read()) if stored_step.shape == () else None
  return Tree(
    path, f'Orbax checkpoint ({"OCDBT, " if ocdbt else ""}zarr {3 if zarr3 else 2})', tensors, step
  )


def _finished(directory: str) -> str:
  """Return the directory; raise CheckpointError if its name marks an unfinished save."""
  if _UNFINISHED.search(directory):
    raise CheckpointError(
      f'{directory} is not a checkpoint: Orbax is still writing it, or was interrupted; use an '
      'earlier step'
    )
  return directory


def _target_prefix(leaves: _Leaves, where: str) -> tuple[str, ...]:
  """Return the keys of the subtree of parameters; raise CheckpointError if there is none."""
  for prefix in (('target',), ('optimizer', 'target')):
    if any(keys[: len(prefix)] == prefix for keys in leaves):
      return prefix
  tops = sorted({keys[0] if keys else '' for keys in leaves})
  raise CheckpointError(
    f"{where} lists no parameters under `target`, T5X's key for them; found: "
    f'{name_list(tops, len(tops)) or "none"}'
  )


def _leaf_keys(tree_metadata: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
  """Yield the keys of every array in the tree."""
  for leaf in tree_metadata.values():
    if not leaf['value_metadata'].get('skip_deserialize', False):  # leave out empty nodes
      yield tuple(str(k['key']) for k in leaf['key_metadata'])


def _old_leaves(tree: Any, where: str) -> _Leaves:
  """Return the leaves of an index of Orbax's first releases."""
  leaves: _Leaves = {}
  for keys, leaf in legacy.flat_leaves(tree):
    if isinstance(leaf, np.ndarray):
      leaves[keys] = InMemory(leaf, where)
    elif isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
      leaves[keys] = None
  return leaves
