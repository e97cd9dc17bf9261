"""Reading of an adapter in any supported format."""

import os

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.adapters.adapter import Adapter
from t5x_inference_ext.checkpoints.adapters.peft import read_peft
from t5x_inference_ext.checkpoints.adapters.peft_config import ADAPTER_CONFIG
from t5x_inference_ext.checkpoints.adapters.soft_prompts import read_saved_prompt
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.errors import CheckpointError, printable


def read_adapter(path: str | os.PathLike, base: Checkpoint) -> Adapter:
  """Read an adapter for a model.

  Args:
    path: A directory that PEFT saved, or a prompt that T5X's prompt tuning saved; local or gs://.
    base: Checkpoint of the model.

  Raises:
    CheckpointError: There is no adapter, it is damaged, or it does not fit the model. The message
      names both.
  """
  if storage.is_on_hub(os.fspath(path)):
    raise CheckpointError(
      f'{printable(os.fspath(path))}: adapters are not fetched from a hub: download it, and name '
      'its directory'
    )
  path = storage.normalize(path)
  if storage.has_file(path, ADAPTER_CONFIG):
    return read_peft(path, base)
  return read_saved_prompt(path, base) or read_peft(path, base)
