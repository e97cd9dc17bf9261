"""Opening of models in public formats: directories of safetensors, and GGUF files."""

import dataclasses
import os

from t5x_inference_ext.checkpoints import hub, storage
from t5x_inference_ext.checkpoints.readers.gguf import GGUF_SUFFIX
from t5x_inference_ext.checkpoints.readers.gguf_model import read_gguf_model
from t5x_inference_ext.checkpoints.readers.huggingface import (
  PICKLE_ADVICE,
  pickle_names,
  read_huggingface,
)
from t5x_inference_ext.checkpoints.readers.public_model import PublicModel
from t5x_inference_ext.checkpoints.readers.safetensors import SAFETENSORS, SAFETENSORS_INDEX
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError, printable


def read_public(path: str, norm_scale: str | None = None) -> PublicModel | None:
  """Open the model at `path`; return None if it holds no model in a public format.

  Args:
    path: A directory with config.json and safetensors, or a file of it; or a GGUF file; or a
      directory with a single GGUF file; or an address on a hub (hub.py).
    norm_scale: See read_huggingface.

  Raises:
    CheckpointError: The model is damaged, or can't be served.
  """
  if storage.is_on_hub(path):
    local, address = hub.fetch(path)
    model = read_public(local, norm_scale)
    if model is None:
      raise CheckpointError(f'{address} holds no model that can be read; its files are in {local}')
    notes = (f'fetched {address} into {local}', *model.notes)
    return dataclasses.replace(model, path=address, notes=notes)
  directory, name = os.path.split(path)
  if name.endswith(GGUF_SUFFIX) and (storage.is_remote(path) or os.path.isfile(path)):
    return read_gguf_model(path)
  if not storage.is_remote(path) and os.path.isfile(path):
    if pickle_names([name]):
      raise CheckpointError(
        f'{printable(path)} is a pickle, which can run any program when it is opened; '
        f'{PICKLE_ADVICE}'
      )
    if name in (SAFETENSORS, SAFETENSORS_INDEX):
      return read_huggingface(directory, norm_scale)
    return None
  found = read_huggingface(path, norm_scale)
  if found is not None or storage.is_remote(path) or not os.path.isdir(path):
    return found
  files = sorted(name for name in os.listdir(path) if name.endswith(GGUF_SUFFIX))
  if len(files) > 1:
    raise CheckpointError(
      f'{path} holds {len(files)} GGUF files: name the one you mean, such as '
      f'{path}/{printable(files[0])}'
    )
  return read_gguf_model(os.path.join(path, files[0])) if files else None


def check_required(config: ModelConfig, model: PublicModel) -> None:
  """Raise CheckpointError if a model's settings differ from the model that the user requires."""
  for name, value in vars(config).items():
    if value != getattr(model.config, name):
      raise CheckpointError(
        f'{name}={value} was given, but {model.path} has {getattr(model.config, name)}'
      )
