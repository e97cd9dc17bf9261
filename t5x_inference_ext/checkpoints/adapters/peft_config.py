"""The settings of a PEFT adapter, adapter_config.json: checks, and the scale of a LoRA."""

from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.errors import CheckpointError, printable
from t5x_inference_ext.text_files import load_json_object

ADAPTER_CONFIG = 'adapter_config.json'
PEFT_KINDS = {'LORA': 'LoRA', 'IA3': '(IA)^3', 'PROMPT_TUNING': 'a soft prompt'}
# Settings that do not change what an adapter computes, or that are checked by themselves.
_COMMON = (
  *('auto_mapping', 'base_model_name_or_path', 'inference_mode', 'peft_type', 'peft_version'),
  *('revision', 'task_type', 'target_modules', 'exclude_modules'),
)
_READ = {
  'LORA': (
    *('r', 'lora_alpha', 'rank_pattern', 'alpha_pattern', 'use_rslora', 'init_lora_weights'),
    *('lora_dropout', 'fan_in_fan_out', 'layers_to_transform', 'layers_pattern', 'bias'),
    *('megatron_core', 'qalora_group_size', 'eva_config', 'ensure_weight_tying'),
  ),
  'IA3': ('feedforward_modules', 'fan_in_fan_out', 'init_ia3_weights'),
  'PROMPT_TUNING': (
    *('num_virtual_tokens', 'token_dim', 'num_transformer_submodules', 'num_attention_heads'),
    *('num_layers', 'prompt_tuning_init', 'prompt_tuning_init_text', 'tokenizer_kwargs'),
    'tokenizer_name_or_path',
  ),
}
# Initial values of a LoRA that leave the base model's own weights as they are.
_INITIAL = (None, True, False, 'gaussian', 'eva')
_MOST = 1e9  # largest rank or scale
_REPETITIONS = 4  # maximum number of repetitions in a pattern of module paths


@dataclasses.dataclass(frozen=True)
class PeftConfig:
  """The settings of one adapter.

  Attributes:
    path: Directory of the adapter.
    kind: Key of PEFT_KINDS.
    settings: Content of adapter_config.json.
  """

  path: str
  kind: str
  settings: Mapping[str, Any]

  @property
  def title(self) -> str:
    """The adapter in an error message, with the base model that it states."""
    base = printable(self.settings.get('base_model_name_or_path'), 120)
    return f'{self.path}, {PEFT_KINDS[self.kind]} for {base}'

  def rank(self, module: str) -> int:
    """Return the rank of a module's LoRA."""
    return self._by_module('rank_pattern', 'r', module)

  def scale(self, module: str) -> float:
    """Return the factor of a module's LoRA: alpha / rank, or alpha / sqrt(rank) if stabilized."""
    alpha, rank = self._by_module('alpha_pattern', 'lora_alpha', module), self.rank(module)
    return alpha / (math.sqrt(rank) if self.settings.get('use_rslora') else rank)

  def _by_module(self, patterns: str, default: str, module: str) -> Any:
    """Return a number from a table of patterns of module paths, or the default setting."""
    found = self.settings.get(default)
    for pattern, value in (self.settings.get(patterns) or {}).items():
      # Matching a repeated group of repetitions, or many repetitions, can take forever.
      if re.search(r'\)[*+{]', pattern) or len(re.findall(r'[*+{]', pattern)) > _REPETITIONS:
        raise CheckpointError(
          f'{self.path}/{ADAPTER_CONFIG}: {patterns} holds {printable(pattern)}, which repeats a '
          f'group or has more than {_REPETITIONS} repetitions: name the modules more plainly'
        )
      try:
        matches = re.match(rf'(.*\.)?({pattern})$', module)
      except re.error as e:
        raise CheckpointError(
          f'{self.path}/{ADAPTER_CONFIG}: {patterns} holds {printable(pattern)}, which is not a '
          f'regular expression: {e}'
        ) from e
      if matches:
        found = value
        break
    valid = isinstance(found, int | float) and not isinstance(found, bool) and 0 < found <= _MOST
    if not valid:
      raise CheckpointError(
        f'{self.path}/{ADAPTER_CONFIG}: {default} of {printable(module)} is '
        f'{printable(found, 80)}, not a positive number up to {_MOST:g}'
      )
    return found


def read_peft_config(path: str) -> PeftConfig:
  """Return the settings of the adapter in a directory, local or gs://.

  Raises:
    CheckpointError: There is no adapter, or it has an option that can't be served.
  """
  where = f'{path}/{ADAPTER_CONFIG}'
  data = storage.read_file(path, ADAPTER_CONFIG)
  if data is None:
    raise CheckpointError(
      f'{path} is not an adapter: a PEFT adapter is a directory with {ADAPTER_CONFIG} and '
      'adapter_model.safetensors, a saved prompt of T5X is a file of NumPy'
    )
  settings = load_json_object(data, where)
  kind, task = settings.get('peft_type'), settings.get('task_type')
  if not isinstance(kind, str) or kind not in PEFT_KINDS:
    raise CheckpointError(
      f'{where}: peft_type {printable(kind, 80)} is not served; served are {", ".join(PEFT_KINDS)}'
    )
  if task not in (None, 'CAUSAL_LM'):
    raise CheckpointError(
      f'{where}: task_type {printable(task, 80)} is not served: this package continues texts '
      '(CAUSAL_LM)'
    )
  for patterns in ('rank_pattern', 'alpha_pattern'):
    if not isinstance(settings.get(patterns) or {}, dict):
      raise CheckpointError(f'{where} is damaged: {patterns} is not a JSON object')
  _check_options(settings, kind, where)
  return PeftConfig(path, kind, settings)


def _check_options(settings: Mapping[str, Any], kind: str, where: str) -> None:
  """Raise CheckpointError for an option that changes an adapter in a way that is not served."""
  if settings.get('bias', 'none') != 'none':
    raise CheckpointError(
      f'{where}: bias={printable(settings["bias"], 80)} is not served: train with bias="none", or '
      'merge the adapter into its model with PEFT'
    )
  if kind == 'LORA' and settings.get('init_lora_weights') not in _INITIAL:
    raise CheckpointError(
      f'{where}: init_lora_weights={printable(settings["init_lora_weights"], 80)} changes the base '
      "model's own weights: save the adapter with PEFT's path_initial_model_for_weight_conversion"
    )
  for name, value in settings.items():
    if name not in _COMMON and name not in _READ[kind] and value not in (None, False, {}, [], ''):
      raise CheckpointError(
        f'{where}: the option {printable(name, 80)}={printable(value, 80)} is not served: merge '
        'the adapter into its model with PEFT, or train without the option'
      )
