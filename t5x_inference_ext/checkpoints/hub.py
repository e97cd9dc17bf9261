"""Fetch models by address: hf:OWNER/NAME, hf:OWNER/NAME@REVISION, hf:OWNER/NAME/FILE.gguf.

Files are fetched by huggingface_hub (the extra `hub`) into its own cache. The library's environment
variables apply: HF_ENDPOINT, HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE.
"""

import os
import re
from typing import Any

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.readers.gguf import GGUF_SUFFIX
from t5x_inference_ext.checkpoints.readers.huggingface import PICKLE_ADVICE, pickle_names
from t5x_inference_ext.checkpoints.readers.safetensors import SAFETENSORS, SAFETENSORS_INDEX
from t5x_inference_ext.errors import CheckpointError, UserError, name_list, printable

_NAME = r'[A-Za-z0-9][\w.-]{0,95}'
_ADDRESS = re.compile(rf'hf:({_NAME}/{_NAME})(?:/([\w./-]+))?(?:@([\w./-]+))?')
# Files to fetch besides weights: settings and vocabularies.
_SMALL = ('.json', '.model', '.jinja', 'merges.txt')


def fetch(address: str) -> tuple[str, str]:
  """Fetch a model, unless it is in the cache.

  Args:
    address: Address that begins with hf:.

  Returns:
    The model's local directory or file, and its address with the fetched revision (a commit).

  Raises:
    CheckpointError: There is no such model, it can't be fetched, or its weights are pickles.
    UserError: huggingface_hub is not installed.
  """
  match = _ADDRESS.fullmatch(address)
  if match is None or '..' in address:
    raise CheckpointError(
      f'{printable(address)} is not an address on the hub: these are hf:OWNER/NAME, '
      'hf:OWNER/NAME@REVISION and hf:OWNER/NAME/FILE.gguf'
    )
  name, file, revision = match.groups()
  try:
    import huggingface_hub  # an extra
  except ImportError as e:
    raise UserError(
      f"{address} needs huggingface_hub: pip install 't5x_inference_ext[hub]', or download the "
      'model and name its directory'
    ) from e
  options: dict[str, Any] = {'endpoint': os.environ.get('HF_ENDPOINT')}
  try:
    info = huggingface_hub.HfApi(**options).model_info(name, revision=revision)
    wanted = _wanted([s.rfilename for s in info.siblings or []], file, address)
    directory = huggingface_hub.snapshot_download(
      name,
      revision=info.sha,
      allow_patterns=wanted,
      cache_dir=os.environ.get('HF_HUB_CACHE'),
      **options,
    )
  except CheckpointError:
    raise
  except Exception as e:  # those of the library, and of the HTTP library of its version
    reason = ' '.join(str(e).split()) or type(e).__name__
    raise CheckpointError(f"can't fetch {address}: {reason[:300]}") from e
  local = os.path.join(directory, file) if file else directory
  where = f'hf:{name}/{file}' if file else f'hf:{name}'
  return storage.normalize(local), f'{where}@{info.sha}'


def _wanted(names: list[str], file: str | None, address: str) -> list[str]:
  """Choose the files to fetch from the names of all files of a model."""
  if file is not None:
    if file not in names or not file.endswith(GGUF_SUFFIX):
      found = [name for name in names if name.endswith(GGUF_SUFFIX)]
      listed = name_list(found, len(found)) or 'none'
      raise CheckpointError(f'{address} names no GGUF file of this model; it has {listed}')
    return [file]
  root = [name for name in names if '/' not in name]
  small = [name for name in root if name.endswith(_SMALL) and not name.endswith('.bin.index.json')]
  if SAFETENSORS in root:
    return [SAFETENSORS, *(name for name in small if name != SAFETENSORS_INDEX)]
  if SAFETENSORS_INDEX in root:
    return [*small, *(name for name in root if name.endswith('.safetensors'))]
  pickles = pickle_names(root)
  if pickles:
    raise CheckpointError(
      f'{address} has its weights in {name_list(pickles, len(pickles), 3)}: such files are '
      f'pickles, which can run any program when they are opened; {PICKLE_ADVICE}'
    )
  ggufs = [name for name in root if name.endswith(GGUF_SUFFIX)]
  if ggufs:
    raise CheckpointError(
      f'{address} has GGUF files: name one of them, such as {address.partition("@")[0]}/'
      f'{printable(ggufs[0])}'
    )
  raise CheckpointError(f'{address} has neither {SAFETENSORS} nor {SAFETENSORS_INDEX}')
