"""Random adapters as PEFT saves them, for any public family."""

import json
import pathlib

import numpy as np
import safetensors.numpy

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import Checkpoint


def module_sizes(base: Checkpoint) -> dict[str, tuple[int, int]]:
  """Return (inputs, outputs) of every module of a model, by path; {} stands for the layer."""
  matrices, found = params.parameters(base.config), {}
  for name, path in base.module_map.modules.items():
    _, inputs, outputs = matrices[name].shape
    found[path] = inputs, outputs + found.get(path, (0, 0))[1]
  return found


def write_adapter(
  directory: pathlib.Path, settings: dict, tensors: dict[str, np.ndarray]
) -> pathlib.Path:
  """Write an adapter's two files, and return the directory."""
  directory.mkdir(parents=True, exist_ok=True)
  common = {'base_model_name_or_path': 'someone/base', 'task_type': 'CAUSAL_LM'}
  (directory / 'adapter_config.json').write_text(json.dumps({**common, **settings}))
  contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
  safetensors.numpy.save_file(contiguous, directory / 'adapter_model.safetensors')
  return directory


def write_lora(
  directory: pathlib.Path,
  base: Checkpoint,
  *,
  rank: int = 2,
  alpha: float = 3.0,
  seed: int = 0,
  modules: tuple[str, ...] | None = None,
  size: float = 0.3,
) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
  """Write a random LoRA.

  Args:
    directory: Directory to make.
    base: The base model.
    rank: Rank of all modules.
    alpha: The setting lora_alpha.
    seed: Seed of the values.
    modules: Paths of the adapted modules; None: all.
    size: Standard deviation of the values.

  Returns:
    The directory, and module path -> its change [out, in] of the stored weight.
  """
  rng, tensors, changes = np.random.default_rng(seed), {}, {}
  for path, (inputs, outputs) in module_sizes(base).items():
    if modules is not None and path not in modules:
      continue
    for layer in range(base.config.num_layers):
      module = path.replace('{}', str(layer))
      a = (rng.normal(size=(rank, inputs)) * size).astype(np.float32)
      b = (rng.normal(size=(outputs, rank)) * size).astype(np.float32)
      tensors[f'base_model.model.{module}.lora_A.weight'] = a
      tensors[f'base_model.model.{module}.lora_B.weight'] = b
      changes[module] = b @ a * np.float32(alpha / rank)
  settings = {'peft_type': 'LORA', 'r': rank, 'lora_alpha': alpha}
  return write_adapter(directory, settings, tensors), changes
