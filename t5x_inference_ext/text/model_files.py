"""Read BOS, end tokens and chat template from the config files of a public model."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from t5x_inference_ext.errors import CheckpointError, printable
from t5x_inference_ext.text.settings import (
  DEFAULTS,
  TextSettings,
  settings_of_vocabulary,
  unknown_vocabulary,
)
from t5x_inference_ext.text.vocabulary import Vocabulary
from t5x_inference_ext.text_files import load_json_object

# Function from a file's name to its content; None if the file does not exist.
ReadFile = Callable[[str], bytes | None]
_TOKENIZER, _GENERATION, _MODEL = 'tokenizer_config.json', 'generation_config.json', 'config.json'
_TEMPLATE = 'chat_template.jinja'


@dataclasses.dataclass(frozen=True)
class ModelFiles:
  """The text-related config files of a transformers model. The vocabulary is separate.

  Attributes:
    directory: The directory, for messages.
    configs: File name -> parsed content of tokenizer_config.json, generation_config.json and
      config.json; {} for a missing file.
    template: Content of chat_template.jinja, or None.
  """

  directory: str
  configs: Mapping[str, Mapping[str, Any]]
  template: str | None

  @classmethod
  def read(cls, directory: str, read: ReadFile) -> 'ModelFiles':
    """Read the files of a directory, each of which may be missing.

    Raises:
      CheckpointError: A file is damaged.
    """
    configs = {
      file: _read_json(directory, file, read) for file in (_TOKENIZER, _GENERATION, _MODEL)
    }
    data = read(_TEMPLATE)
    try:
      return cls(directory, configs, None if data is None else data.decode())
    except UnicodeDecodeError as error:
      raise CheckpointError(f'{directory}/{_TEMPLATE} is not UTF-8: {error}') from error

  def settings(self, vocabulary: Vocabulary | None, source: str = 'given') -> TextSettings:
    """Return the text settings of these files, with a vocabulary.

    Args:
      vocabulary: The vocabulary. None: it is unknown, and the settings get the kind 'none'.
      source: Where the vocabulary comes from, or why it is unknown.

    Raises:
      CheckpointError: A file gives an id that is not a whole number.
    """
    fields: dict[str, Any] = {
      'source': source,
      'chat_template': self._chat_template(),
      'generation_defaults': generation_defaults(self.configs[_GENERATION]),
    }
    bos_id, end_ids = self._bos_id(vocabulary), self._end_ids(vocabulary)
    if vocabulary is None:
      return unknown_vocabulary(bos_id=bos_id, end_ids=end_ids, **fields)
    vocabulary.bos_id, vocabulary.end_ids = bos_id, end_ids
    return settings_of_vocabulary(vocabulary, **fields)

  def _bos_id(self, vocabulary: Vocabulary | None) -> int | None:
    """Return the BOS of prompts, by add_bos_token of tokenizer_config.json, else the vocabulary.

    If neither says that prompts begin with BOS, return None, even if the model has a BOS token.
    """
    adds = self.configs[_TOKENIZER].get('add_bos_token')
    own = None if vocabulary is None or adds is False else vocabulary.own_bos_id
    if adds is not True:
      return own
    named = self._named_id(vocabulary, 'bos_token')
    return next(iter(self._listed_ids('bos_token_id')), own) if named is None else named

  def _end_ids(self, vocabulary: Vocabulary | None) -> tuple[int, ...]:
    """Return the ids that end rows.

    The first of these that names any is used: generation_config.json, config.json,
    tokenizer_config.json, the vocabulary.
    """
    listed = self._listed_ids('eos_token_id')
    if listed:
      return listed
    named = self._named_id(vocabulary, 'eos_token')
    return (named,) if named is not None else vocabulary.end_ids if vocabulary else ()

  def _listed_ids(self, name: str) -> tuple[int, ...]:
    """Return the ids in a setting of generation_config.json, else of config.json."""
    for file in (_GENERATION, _MODEL):
      value = self.configs[file].get(name)
      if value is None:
        continue
      values = value if isinstance(value, list) else [value]
      if not all(type(i) is int and 0 <= i < 2**31 for i in values):
        raise CheckpointError(
          f'{self.directory}/{file}: {name} is {printable(value, 80)}, not an id'
        )
      return tuple(values)
    return ()

  def _named_id(self, vocabulary: Vocabulary | None, name: str) -> int | None:
    """Return the id of a token that tokenizer_config.json names, as text or as an object."""
    token = self.configs[_TOKENIZER].get(name)
    if isinstance(token, dict):
      token = token.get('content')
    if not isinstance(token, str):
      return None
    if vocabulary is not None:
      return vocabulary.token_id(token)
    added = self.configs[_TOKENIZER].get('added_tokens_decoder')
    for key, entry in added.items() if isinstance(added, dict) else ():
      if isinstance(entry, dict) and entry.get('content') == token and key.isdecimal():
        return int(key) if len(key) <= 10 else None
    return None

  def _chat_template(self) -> str | None:
    """Return the template in chat_template.jinja, else the default one in tokenizer_config.json."""
    if self.template is not None:
      return self.template
    found = self.configs[_TOKENIZER].get('chat_template')
    if isinstance(found, list):  # several templates, by name
      named = {each.get('name'): each.get('template') for each in found if isinstance(each, dict)}
      found = named.get('default')
    return found if isinstance(found, str) else None


def generation_defaults(config: Mapping[str, Any]) -> dict[str, float]:
  """Return the sampling options that generation_config.json recommends; {} if it is greedy."""
  if not config.get('do_sample'):
    return {}
  return {
    name: config[name]
    for name in DEFAULTS
    if isinstance(config.get(name), (int, float)) and not isinstance(config[name], bool)
  }


def _read_json(directory: str, file: str, read: ReadFile) -> dict[str, Any]:
  """Return the object in a JSON file; {} if the file does not exist."""
  data = read(file)
  return {} if data is None else load_json_object(data, f'{directory}/{file}', nan=True)
