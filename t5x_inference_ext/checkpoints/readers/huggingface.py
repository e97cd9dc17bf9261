"""Reader of models saved by transformers: config.json, and weights as safetensors."""

from collections.abc import Iterable, Mapping
import os
from typing import Any
import zlib

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.families.lucidrains import (
  LUCIDRAINS_NOTE,
  is_lucidrains,
  lucidrains_model,
)
from t5x_inference_ext.checkpoints.families.module_map import ModuleMap
from t5x_inference_ext.checkpoints.families.registry import family_model, family_of
from t5x_inference_ext.checkpoints.families.settings import Settings
from t5x_inference_ext.checkpoints.readers.public_model import PublicModel
from t5x_inference_ext.checkpoints.readers.safetensors import read_safetensors
from t5x_inference_ext.checkpoints.source_text import settings_of_directory
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.errors import CheckpointError, name_list
from t5x_inference_ext.text_files import load_json_object

HUGGINGFACE_CONFIG = 'config.json'
# Names of pickle files. Opening a pickle can run any program in it.
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')


def read_huggingface(path: str, norm_scale: str | None = None) -> PublicModel | None:
  """Return the model in a directory with config.json and safetensors; None if there is none.

  Args:
    path: The directory, local or gs://.
    norm_scale: How norm scales are stored, for a model without config.json (lucidrains.py).

  Raises:
    CheckpointError: The model's family is unknown, the model can't be served, is damaged, or has
      its weights in pickles.
  """
  found = read_safetensors(path)
  data, content = _config(path)
  if found is None:
    _check_pickles(path, is_model=content is not None)
    return None
  if content is None and is_lucidrains(found[0]):
    return _lucidrains(path, *found, norm_scale)
  if content is None:
    raise CheckpointError(
      f'{path} holds safetensors but no {HUGGINGFACE_CONFIG}, which describes the model'
    )
  stored, crc = found
  settings = Settings(content, f'{path}/{HUGGINGFACE_CONFIG}')
  model = family_model(settings)
  prefix = family_of(settings).prefix
  unread = sorted(settings.unread())
  notes = (
    f'unknown settings in {HUGGINGFACE_CONFIG}, which have no effect: '
    f'{name_list(unread, len(unread))}',
  )
  return PublicModel.of_family(
    path,
    'safetensors',
    model,
    _with_prefix(stored, prefix, model.modules['head']),
    settings_of_directory(path, model.config.vocab_size),
    zlib.crc32(data, crc),
    title=f'model of the family {settings.value("model_type")} at {path}',
    notes=notes if unread else (),
    module_map=ModuleMap.of(model),
  )


def _lucidrains(
  path: str, stored: Mapping[str, Tensor], crc: int, norm_scale: str | None
) -> PublicModel:
  """Return a model of palm_rlhf_pytorch, which has no settings."""
  model = lucidrains_model(stored, norm_scale, path)
  return PublicModel.of_family(
    path,
    'safetensors',
    model,
    stored,
    settings_of_directory(path, model.config.vocab_size),
    crc,
    title=f"PaLM of lucidrains' palm_rlhf_pytorch at {path}",
    notes=(f'norm scales: stored around {norm_scale} (given)', LUCIDRAINS_NOTE),
  )


def _with_prefix(stored: Mapping[str, Tensor], prefix: str, head: str) -> dict[str, Tensor]:
  """Add a family's prefix to all tensor names except the head's, unless the file has it."""
  if any(name.startswith(prefix) for name in stored):
    return dict(stored)
  return {n if n.startswith(f'{head}.') else f'{prefix}{n}': t for n, t in stored.items()}


def _config(path: str) -> tuple[bytes, dict[str, Any] | None]:
  """Return the bytes of a directory's config.json, and its parsed content (None: no such file)."""
  data = storage.read_file(path, HUGGINGFACE_CONFIG)
  if data is None:
    return b'', None
  return data, load_json_object(data, f'{path}/{HUGGINGFACE_CONFIG}', nan=True)


def _check_pickles(path: str, is_model: bool) -> None:
  """Raise CheckpointError if a directory holds the weights of a model as pickles."""
  if storage.is_remote(path) or not os.path.isdir(path):
    return
  names = sorted(os.listdir(path))
  pickles = pickle_names(names)
  if pickles and (is_model or len(pickles) == len(names)):
    raise CheckpointError(
      f'{path} holds its weights in {name_list(pickles, len(pickles), 3)}: such files are pickles, '
      f'which can run any program when they are opened; {PICKLE_ADVICE}'
    )
  others = [name for name in names if name.endswith('.safetensors')]
  if others and is_model:
    raise CheckpointError(
      f'{path} holds {name_list(others, len(others), 3)}, but neither model.safetensors nor '
      'model.safetensors.index.json'
    )


PICKLE_ADVICE = (
  'convert them where you trust them, with transformers: '
  'AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) writes safetensors'
)


def pickle_names(names: Iterable[str]) -> list[str]:
  """Return the names of pickles, or of an index of pickles, among `names`."""
  return [n for n in names if n.endswith(PICKLES) or n.endswith('.bin.index.json')]
