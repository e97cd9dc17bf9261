"""Reader of adapters saved by PEFT: a directory with adapter_config.json and safetensors.

The stored names are those of transformers' modules, the stored order of rows is that of its
matrices. The module map of the base model (families/module_map.py) leads from there to canonical
tensors, as it does for the matrices themselves.
"""

from collections.abc import Mapping
import os
import re

import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.adapters.adapter import Adapter, Floats, LowRank, finite_floats
from t5x_inference_ext.checkpoints.adapters.peft_config import PeftConfig, read_peft_config
from t5x_inference_ext.checkpoints.adapters.soft_prompts import checked_prompt
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.families.module_map import ModuleMap
from t5x_inference_ext.checkpoints.readers.huggingface import pickle_names
from t5x_inference_ext.checkpoints.readers.safetensors import read_safetensors_file
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.errors import CheckpointError, name_list, printable

ADAPTER_WEIGHTS = 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'
_A, _B, _SCALING = '.lora_A.weight', '.lora_B.weight', '.ia3_l'
# Matrices whose products (IA)^3 can multiply. It multiplies the input of 'mlp_output'.
_SCALED = ('query', 'key', 'value')


def read_peft(path: str, base: Checkpoint) -> Adapter:
  """Read an adapter for a model.

  Args:
    path: Directory of the adapter, local or gs://.
    base: The model's checkpoint.

  Raises:
    CheckpointError: The adapter is damaged, was made for a model of another family or shape, or has
      an option that can't be served.
  """
  config = read_peft_config(path)
  stored = _stored(path)
  if config.kind == 'PROMPT_TUNING':
    return Adapter(path, prompt=_prompt(config, stored, base))
  if base.module_map is None:
    advice = (
      'if that is a public model, convert it again with this version'
      if base.format == 'serving'
      else 'name the public model that it was made for'
    )
    raise CheckpointError(
      f'{config.title}, names modules of transformers, and {base.path} does not record which of '
      f'them its matrices come from: {advice}'
    )
  reader = _Modules(config, base, base.module_map)
  if config.kind == 'LORA':
    return Adapter(path, low_rank=_low_rank(reader, stored))
  return Adapter(path, scaling=_scaling(reader, stored))


def _stored(path: str) -> dict[str, Tensor]:
  """Return the adapter's tensors, by stored name."""
  if storage.has_file(path, ADAPTER_WEIGHTS):
    return read_safetensors_file(path, ADAPTER_WEIGHTS)[0]
  local = not storage.is_remote(path) and os.path.isdir(path)
  pickles = pickle_names(sorted(os.listdir(path))) if local else []
  if pickles:
    raise CheckpointError(
      f'{path} holds its weights in {name_list(pickles, len(pickles), 3)}, a pickle, which can run '
      'any program when it is opened: save it with PEFT as safetensors, where you trust it'
    )
  raise CheckpointError(f'{path} lacks {ADAPTER_WEIGHTS}, the weights of a PEFT adapter')


class _Modules:
  """Finds the canonical matrices that stored tensors belong to, and cuts the tensors to them.

  Args:
    config: Settings of the adapter.
    base: Checkpoint of the base model.
    modules: Its module map.
  """

  def __init__(self, config: PeftConfig, base: Checkpoint, modules: ModuleMap) -> None:
    self.config, self.base, self.modules = config, base, modules
    self._matrices = params.parameters(base.config)

  def find(self, name: str, suffixes: tuple[str, ...]) -> tuple[str, int, tuple[str, ...], str]:
    """Return the path of a tensor's module, its layer, its matrices and the name's suffix."""
    suffix = next((s for s in suffixes if name.endswith(s)), None)
    if suffix is None or not name.startswith(_PREFIX):
      raise CheckpointError(
        f'{self.config.title}, holds {printable(name)}, which is not served; served are tensors '
        f'{_PREFIX}MODULE with {", ".join(suffixes)}'
      )
    path = name[len(_PREFIX) : -len(suffix)]
    number = re.search(r'\.(\d{1,6})\.', path)
    template = path if number is None else f'{path[: number.start()]}.{{}}.{path[number.end() :]}'
    matrices = self.modules.matrices(template)
    if not matrices or number is None:
      known = sorted(set(self.modules.modules.values()))
      raise CheckpointError(
        f'{self.config.title}, adapts {printable(path)}, which is not a matrix in the layers of '
        f'{self.base.path}: these are {name_list(known, len(known))}'
      )
    layer = int(number.group(1))
    if layer >= self.base.config.num_layers:
      raise CheckpointError(
        f'{self.config.title}, adapts layer {layer}, but {self.base.path} has layers 0 to '
        f'{self.base.config.num_layers - 1}'
      )
    return path, layer, matrices, suffix

  def sizes(self, matrices: tuple[str, ...]) -> tuple[int, int]:
    """Return the numbers of inputs and of outputs of a module that holds these matrices."""
    shapes = [self._matrices[name].shape for name in matrices]
    return shapes[0][1], sum(shape[2] for shape in shapes)

  def shape(self, matrix: str) -> tuple[int, int]:
    """Return the numbers of inputs and of outputs of one canonical matrix."""
    _, rows, columns = self._matrices[matrix].shape
    return rows, columns

  def read(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Floats:
    """Return a tensor's values, whose shape must be the one that the base model needs."""
    if tensor.shape != shape:
      raise CheckpointError(
        f'{self.config.title}, has {printable(name)} of shape {list(tensor.shape)}, but '
        f'{self.base.path} needs {list(shape)}'
      )
    return finite_floats(tensor.read(), printable(name), tensor.path)

  def outputs(self, values: Floats, matrix: str) -> Floats:
    """Return the rows of `values` [out, ..], a module's outputs, that are a matrix's columns."""
    order = self.modules.order(self.base.config, matrix)
    return values if order is None else values[order]


def _low_rank(modules: _Modules, stored: Mapping[str, Tensor]) -> dict[str, LowRank]:
  """Return the low-rank terms of all adapted matrices."""
  found: dict[str, dict[int, tuple[Floats, Floats]]] = {}
  for name in stored:
    path, layer, matrices, suffix = modules.find(name, (_A, _B))
    pair = f'{_PREFIX}{path}{_A}', f'{_PREFIX}{path}{_B}'
    if not all(each in stored for each in pair):
      raise CheckpointError(
        f'{modules.config.title}, holds only one of {_A[1:]} and {_B[1:]} of {printable(path)}'
      )
    if suffix == _B:
      continue
    inputs, outputs = modules.sizes(matrices)
    rank = modules.config.rank(path)
    a = modules.read(pair[0], stored[pair[0]], (rank, inputs)).T
    b = modules.read(pair[1], stored[pair[1]], (outputs, rank))
    for matrix in matrices:
      factor = modules.modules.query_factor if matrix == 'query' else 1.0
      with np.errstate(over='ignore'):  # checked next
        columns = modules.outputs(b, matrix).T * modules.config.scale(path) * factor
      scaled = f'{printable(pair[1])} times its scale'
      columns = finite_floats(columns, scaled, stored[pair[1]].path)
      found.setdefault(matrix, {})[layer] = a, columns
  if not found:
    raise CheckpointError(f'{modules.config.title}, holds no tensors')
  layers = modules.base.config.num_layers
  return {name: _stacked(by_layer, layers, modules.shape(name)) for name, by_layer in found.items()}


def _stacked(
  by_layer: Mapping[int, tuple[Floats, Floats]], layers: int, shape: tuple[int, int]
) -> LowRank:
  """Return one matrix's terms in all layers; missing ranks and layers are zeros."""
  rank = max(a.shape[1] for a, _ in by_layer.values())
  a = np.zeros((layers, shape[0], rank), np.float32)
  b = np.zeros((layers, rank, shape[1]), np.float32)
  for layer, (first, second) in by_layer.items():
    a[layer, :, : first.shape[1]], b[layer, : second.shape[0]] = first, second
  return LowRank(a, b)


def _scaling(modules: _Modules, stored: Mapping[str, Tensor]) -> dict[str, Floats]:
  """Return the factors of all adapted products."""
  found: dict[str, Floats] = {}
  for name, tensor in stored.items():
    path, layer, matrices, _ = modules.find(name, (_SCALING,))
    inputs, outputs = modules.sizes(matrices)
    of_inputs = tensor.shape[:1] == (1,)
    if not (matrices == ('mlp_output',) if of_inputs else set(matrices) <= set(_SCALED)):
      raise CheckpointError(
        f'{modules.config.title}, multiplies the {"inputs" if of_inputs else "outputs"} of '
        f'{printable(path)}; served are outputs of queries, keys and values, and inputs of '
        f'{modules.modules.modules["mlp_output"]}'
      )
    shape = (1, inputs) if of_inputs else (outputs, 1)
    values = modules.read(name, tensor, shape).reshape(-1)
    for matrix in matrices:
      columns = values if of_inputs else modules.outputs(values, matrix)
      ones = np.ones((modules.base.config.num_layers, len(columns)), np.float32)
      found.setdefault(matrix, ones)[layer] = columns
  if not found:
    raise CheckpointError(f'{modules.config.title}, holds no tensors')
  return found


def _prompt(config: PeftConfig, stored: Mapping[str, Tensor], base: Checkpoint) -> Floats:
  """Return the soft prompt of an adapter."""
  if list(stored) != ['prompt_embeddings']:
    names = name_list(sorted(stored), len(stored))
    raise CheckpointError(f'{config.title}, holds {names}; served is prompt_embeddings alone')
  count, tensor = config.settings.get('num_virtual_tokens'), stored['prompt_embeddings']
  if tensor.shape[:1] != (count,):
    raise CheckpointError(
      f'{config.title}, has prompt_embeddings of shape {list(tensor.shape)}, but its settings say '
      f'num_virtual_tokens={printable(count, 80)}'
    )
  return checked_prompt(tensor.read(), config.title, base)
