"""Soft prompts: embeddings in front of a row's tokens; and reader of those that T5X saved.

Prompt tuning in T5X writes each prompt as a file in NumPy's format (npy), [P, E], into
numpy_checkpoints/checkpoint_STEP, with a name such as decoder.prompt.prompt.prompt.
"""

import io
import os

import numpy as np

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.adapters.adapter import Adapter, Floats, finite_floats
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.errors import CheckpointError, name_list, printable

_MAGIC = b'\x93NUMPY'


def read_saved_prompt(path: str, base: Checkpoint) -> Adapter | None:
  """Read a prompt that T5X's prompt tuning saved; return None if `path` holds none.

  Args:
    path: The file, or a directory with that one file; local or gs://.
    base: Checkpoint of the model that the prompt is for.

  Raises:
    CheckpointError: The file is damaged, or the prompt does not fit the model.
  """
  directory, name = os.path.split(path)
  data = storage.read_file(directory, name)
  if data is None and (storage.is_remote(path) or os.path.isdir(path)):
    names = [name for name in storage.list_files(path) if '/' not in name]
    prompts = [name for name in names if name.endswith(('.npy', '.prompt'))]
    if len(prompts) > 1:
      raise CheckpointError(
        f'{path} holds several prompts, {name_list(prompts, len(prompts), 4)}: name the one you '
        'mean'
      )
    if prompts:
      path = f'{path}/{prompts[0]}'
      data = storage.read_file(os.path.dirname(path), prompts[0])
  if data is None or not data.startswith(_MAGIC):
    return None
  try:
    values = np.load(io.BytesIO(data), allow_pickle=False)
  except (ValueError, EOFError, OSError) as e:
    raise CheckpointError(f'{path} is damaged: {printable(str(e))}') from e
  if values.dtype.kind not in 'fV' or values.dtype.itemsize not in (2, 4, 8):
    raise CheckpointError(f'{path} holds {values.dtype}, not the floats of a soft prompt')
  if values.dtype.kind == 'V':  # NumPy has no name for bfloat16
    raise CheckpointError(f'{path} holds bfloat16, which npy files do not name: save float32')
  return Adapter(path, prompt=checked_prompt(values, f'{path}, a soft prompt', base))


def checked_prompt(values: np.ndarray, title: str, base: Checkpoint) -> Floats:
  """Return a soft prompt [P, E] as float32.

  Args:
    values: The stored prompt.
    title: The adapter, for messages.
    base: Checkpoint of the base model.

  Raises:
    CheckpointError: The prompt does not fit the model, or the model scales its embeddings.
  """
  width = base.config.d_model
  if values.ndim != 2 or not values.shape[0] or values.shape[1] != width:
    raise CheckpointError(
      f'{title}, has shape {list(values.shape)}, but {base.path} needs [tokens, {width}]'
    )
  if base.module_map is not None and base.module_map.embedding_scale != 1:
    raise CheckpointError(
      f"{title}, can't be served for {base.path}: this family multiplies embeddings by "
      f'{base.module_map.embedding_scale:g}, and versions of transformers differ in whether they '
      'do so for soft prompts'
    )
  return finite_floats(values, 'the soft prompt', title)
