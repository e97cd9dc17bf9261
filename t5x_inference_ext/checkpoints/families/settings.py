"""Settings of a public model: the content of config.json, read with checks of types."""

from collections.abc import Iterator, Mapping
from typing import Any

from t5x_inference_ext.errors import CheckpointError, printable

# Numbers whose float32, and its inverse, is neither 0 nor infinite.
_LEAST, _MOST = 1e-37, 1e37
_MAX_INTEGER, _MAX_LAYERS = 2**31, 10_000
# Stands for "no default": the setting must be present.
REQUIRED: Any = object()

# Settings that do not affect the results of a decoder here: names, training, the cache, details of
# transformers' implementation. Other settings that no code reads are printed.
_IRRELEVANT = {
  '_name_or_path',
  'architectures',
  'auto_map',
  'torch_dtype',
  'dtype',
  'transformers_version',
  'use_cache',
  'cache_implementation',
  'pretraining_tp',
  'slow_but_exact',
  'skip_bias_add',
  'skip_bias_add_qkv',
  'init_std',
  'init_device',
  'classifier_dropout',
  'id2label',
  'label2id',
  'task_specific_params',
  'is_decoder',
  'bos_token_id',
  'eos_token_id',
  'pad_token_id',
  'unk_token_id',
  'sep_token_id',
  'tokenizer_class',
  'gradient_checkpointing',
  'torchscript',
  'prefix',
  'max_position_embeddings',
  'n_ctx',
  'n_positions',
  'seq_length',
  'max_window_layers',
  'attention_softmax_in_fp32',
  'scale_attention_softmax_in_fp32',
  'masked_softmax_fusion',
  'reorder_and_upcast_attn',
  'bias_dropout_fusion',
  'attn_impl',
  'model_type',
  'verbose',
  'summary_activation',
  'summary_first_dropout',
  'summary_proj_to_labels',
  'summary_type',
  'summary_use_proj',
}
_IRRELEVANT_PARTS = ('dropout', 'pdrop', 'initializer', 'layerdrop')


class Settings:
  """Settings by name, with a record of those that were read.

  Attributes:
    where: Path of the settings' file, for messages.
  """

  def __init__(self, content: Mapping[str, Any], where: str) -> None:
    self._content, self.where = content, where
    self._read: set[str] = set()

  def value(self, *names: str, default: Any = REQUIRED) -> Any:
    """Return the JSON value of the first of several names that is present.

    Raises:
      CheckpointError: No name is present, and there is no default.
    """
    self._read |= set(names)
    for name in names:
      if self._content.get(name) is not None:
        return self._content[name]
    if default is REQUIRED:
      raise CheckpointError(f'{self.where} lacks {" or ".join(names)}')
    return default

  def integer(self, *names: str, default: Any = REQUIRED) -> int:
    """Return a whole number above 0."""
    value = self.value(*names, default=default)
    if value is not default and not (type(value) is int and 0 < value < _MAX_INTEGER):
      raise self.error(names[0], value, f'it must be a whole number from 1 to {_MAX_INTEGER - 1}')
    return value

  def layers(self, *names: str) -> int:
    """Return the number of layers."""
    count = self.integer(*names)
    if count > _MAX_LAYERS:
      raise self.error(names[0], count, f'no model has more than {_MAX_LAYERS} layers')
    return count

  def number(self, *names: str, default: Any = REQUIRED) -> float:
    """Return a number above 0."""
    value = self.value(*names, default=default)
    is_number = type(value) in (int, float) and _LEAST < value < _MOST
    if value is not default and not is_number:
      raise self.error(names[0], value, 'it must be a number above 0, in the range of float32')
    return value if value is default else float(value)

  def whole(self, name: str, default: int) -> int:
    """Return a whole number from 0 on."""
    value = self.value(name, default=default)
    if not (type(value) is int and 0 <= value < _MAX_INTEGER):
      raise self.error(name, value, f'it must be a whole number from 0 to {_MAX_INTEGER - 1}')
    return value

  def cap(self, name: str, default: float | None) -> float | None:
    """Return a setting that is a number above 0, or None if it is null."""
    return None if self.is_null(name) else self.number(name, default=default)

  def flag(self, name: str, default: Any = REQUIRED) -> bool:
    """Return the value of a boolean setting."""
    value = self.value(name, default=default)
    if not isinstance(value, bool):
      raise self.error(name, value, 'it must be true or false')
    return value

  def choice(self, name: str, known: Mapping[str, Any], default: Any = REQUIRED) -> Any:
    """Return known[value] for a setting whose value must be a key of `known`."""
    value = self.value(name, default=default)
    if not isinstance(value, str) or value not in known:
      raise self.error(name, value, f'supported are {", ".join(known)}')
    return known[value]

  def group(self, name: str) -> 'Settings | None':
    """Return a nested object as Settings, or None if it is missing."""
    value = self.value(name, default=None)
    if value is None:
      return None
    if not isinstance(value, dict):
      raise self.error(name, value, 'it must be an object')
    return Settings(value, f'{name} in {self.where}')

  def is_null(self, name: str) -> bool:
    """Return whether a setting is present and null, as opposed to missing."""
    self._read.add(name)
    return self._content.get(name, name) is None

  def changed(self, **values: Any) -> 'Settings':
    """Return a copy with some values changed; it shares the record of settings that were read."""
    changed = Settings({**self._content, **values}, self.where)
    changed._read = self._read
    return changed

  def only(self, name: str, *supported: Any, default: Any = None) -> None:
    """Raise CheckpointError if a setting is present and has an unsupported value."""
    value = self.value(name, default=default)
    if value not in supported and value is not default:
      known = ' or '.join(map(str, supported))
      raise self.error(name, value, f"a model with this value can't be served; supported: {known}")

  def unread(self) -> Iterator[str]:
    """Yield the names of settings that no code has read but that may affect results."""
    for name, value in self._content.items():
      known = name in self._read or name in _IRRELEVANT or name.startswith('_')
      if not known and value and not any(part in name for part in _IRRELEVANT_PARTS):
        yield name

  def error(self, name: str, value: Any, advice: str) -> CheckpointError:
    """Return the error for the value of a setting."""
    return CheckpointError(f'{self.where}: {name} is {printable(value, 80)}: {advice}')
