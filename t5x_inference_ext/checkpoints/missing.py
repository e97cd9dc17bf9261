"""Error messages for paths that hold no checkpoint."""

import os

from t5x_inference_ext.checkpoints import serving, storage, unfinished
from t5x_inference_ext.checkpoints.adapters.peft_config import ADAPTER_CONFIG
from t5x_inference_ext.checkpoints.readers import legacy, orbax
from t5x_inference_ext.checkpoints.readers.huggingface import HUGGINGFACE_CONFIG
from t5x_inference_ext.checkpoints.readers.safetensors import SAFETENSORS, SAFETENSORS_INDEX
from t5x_inference_ext.errors import name_list


def missing_checkpoint(path: str) -> str:
  """Return a message that says what `path` holds instead, and which path is probably meant."""
  expected = (
    f'a checkpoint directory holds {legacy.INDEX} (T5X), {orbax.STATE}/{orbax.METADATA} (Orbax), '
    f'{serving.CONFIG} (made by convert_checkpoint) or {HUGGINGFACE_CONFIG} and {SAFETENSORS} (a '
    'public model; or a GGUF file)'
  )
  if storage.is_remote(path):
    if storage.read_file(path, unfinished.MARKER) is not None:
      return (
        f'{path} is not a checkpoint but an unfinished upload: run the same '
        'convert_checkpoint command again to finish it'
      )
    return f'no checkpoint at {path}: {expected}'
  if not os.path.lexists(path):
    parent = os.path.dirname(path)
    while not os.path.exists(parent):
      parent = os.path.dirname(parent)
    return f'no checkpoint at {path}: there is no such directory' + _hint(parent)
  if not os.path.isdir(path):
    return f'{path} is not a checkpoint: {expected}; this is a file'
  if not os.access(path, os.R_OK | os.X_OK):
    return f"can't read {path}: permission denied"
  if os.path.isfile(os.path.join(path, ADAPTER_CONFIG)):
    return (
      f'{path} is an adapter, not a checkpoint: give it beside the checkpoint of its model, with '
      '--adapters=NAME=DIR'
    )
  return f'{path} is not a checkpoint: {expected}' + (
    _hint(path) or '; this one holds ' + (_listing(os.listdir(path)) or 'nothing')
  )


def _hint(directory: str) -> str:
  """Return a hint that lists the checkpoints inside a directory; '' if there are none."""
  headers = (
    *(legacy.INDEX, serving.CONFIG, orbax.METADATA, f'{orbax.STATE}/{orbax.METADATA}'),
    *(SAFETENSORS, SAFETENSORS_INDEX),
  )
  names = [
    name
    for name in os.listdir(directory)
    if any(os.path.isfile(os.path.join(directory, name, header)) for header in headers)
  ]
  if not names:
    return ''
  which = 'that one' if len(names) == 1 else 'the one you mean'
  return f'; {directory} holds {_listing(names)}: pass {which}'


def _listing(names: list[str]) -> str:
  return name_list(sorted(names), len(names), limit=8)
