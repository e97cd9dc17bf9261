"""Finding the vocabulary of a run or a conversion, and reading the files beside it."""

from collections.abc import Callable, Mapping
import dataclasses
import os
from typing import Any

from t5x_inference_ext import text_files
from t5x_inference_ext.errors import RequestError, printable
from t5x_inference_ext.text.sentencepiece_model import SentencePieceVocabulary
from t5x_inference_ext.text.settings import (
  DEFAULTS,
  TextSettings,
  assumed_settings,
  check_settings,
  settings_of_vocabulary,
)
from t5x_inference_ext.text.tokenizer_json import TOKENIZER_FILE, TokenizerVocabulary
from t5x_inference_ext.text.vocabulary import ByteVocabulary

# Reads a file of a directory; None if there is none.
ReadFile = Callable[[str], bytes | None]


def open_settings(name: str) -> TextSettings:
  """Return the settings that a vocabulary's file holds, with those of the files beside it.

  Args:
    name: 'bytes', a SentencePiece .model file, or a tokenizer.json. Beside a tokenizer.json,
      tokenizer_config.json, generation_config.json, config.json and chat_template.jinja are read.

  Raises:
    RequestError: There is no such file, or it is no vocabulary.
  """
  if name == 'bytes':
    return settings_of_vocabulary(ByteVocabulary())
  if not os.path.isfile(name):
    raise RequestError(
      f'no vocabulary at {name}: --vocabulary is `bytes`, or the path of a SentencePiece .model '
      'file or of a tokenizer.json'
    )
  directory = os.path.dirname(os.path.abspath(name))

  def read(file: str) -> bytes | None:
    path = os.path.join(directory, file)
    if not os.path.isfile(path):
      return None
    try:
      with open(path, 'rb') as f:
        return f.read()
    except OSError as error:
      raise RequestError(f"can't read {path}: {error.strerror}") from error

  data = read(os.path.basename(name))
  assert data is not None  # it is a file
  if name.endswith('.json'):
    return settings_of_tokenizer(name, data, read)
  return settings_of_vocabulary(SentencePieceVocabulary(name, data))


def settings_of_tokenizer(name: str, data: bytes, read: ReadFile) -> TextSettings:
  """Return the settings of a tokenizer.json and of the files that transformers keeps beside it.

  BOS is what the tokenizer puts in front of a text: add_bos_token of tokenizer_config.json, else
  what the tokenizer.json does. End tokens are those of generation_config.json, else of config.json,
  else of tokenizer_config.json.

  Args:
    name: Name of the tokenizer.json, for messages.
    data: Its content.
    read: Reads a file beside it.

  Raises:
    RequestError: A file is damaged.
  """
  vocabulary = TokenizerVocabulary(name, data)
  configs = {file: _read_json(file, read) for file in _CONFIGS}
  tokenizer = configs['tokenizer_config.json']
  bos = vocabulary.own_bos_id
  if tokenizer.get('add_bos_token') is False:
    bos = None
  elif tokenizer.get('add_bos_token') is True:
    bos = _token_id(vocabulary, tokenizer.get('bos_token'))
  ends: Any = None
  for file in ('generation_config.json', 'config.json'):
    ends = configs[file].get('eos_token_id') if ends is None else ends
  if ends is None:
    ends = _token_id(vocabulary, tokenizer.get('eos_token'))
  ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
  if not all(type(token) is int for token in ids):
    raise RequestError(f'eos_token_id beside {printable(name)} is {printable(repr(ends), 80)}')
  vocabulary.bos_id, vocabulary.end_ids = bos, tuple(ids)
  return settings_of_vocabulary(
    vocabulary,
    chat_template=_chat_template(tokenizer, read),
    generation_defaults=generation_defaults(configs['generation_config.json']),
  )


def generation_defaults(config: Mapping[str, Any]) -> dict[str, float]:
  """Return the sampling options that a generation_config.json recommends; none for greedy ones."""
  if not config.get('do_sample'):
    return {}
  return {
    name: config[name]
    for name in DEFAULTS
    if isinstance(config.get(name), (int, float)) and not isinstance(config[name], bool)
  }


def choose_settings(
  name: str | None, recorded: TextSettings | None, rows: int, *, needed: bool
) -> TextSettings | None:
  """Return the settings of a run.

  Args:
    name: The vocabulary that was asked for (see open_settings), or None: the checkpoint's own.
    recorded: The checkpoint's settings, if it has any.
    rows: V, rows of the model's embedding.
    needed: Whether there is text to encode. Token ids need no vocabulary.

  Returns:
    The settings, with the checkpoint's BOS; None if no vocabulary is known and none is needed.

  Raises:
    RequestError: A vocabulary is needed and not known, is no vocabulary, or has more ids than the
      model has rows.
  """
  found = recorded or assumed_settings(rows)
  if name is not None:
    # BOS is the model's, which started each row of its training with it: 0 in T5X.
    found = dataclasses.replace(open_settings(name), bos_id=recorded.bos_id if recorded else 0)
  if found is not None:
    check_settings(found, rows)
  elif needed:
    raise RequestError(
      f'the prompts are text and the vocabulary of this model ({rows} rows) is not known: give '
      '--vocabulary=FILE.model (a SentencePiece model), --vocabulary=FILE/tokenizer.json or '
      '--vocabulary=bytes, or give token ids'
    )
  return found


_CONFIGS = ('tokenizer_config.json', 'generation_config.json', 'config.json')


def _read_json(file: str, read: ReadFile) -> dict[str, Any]:
  """Return the object in a JSON file; empty if there is no such file."""
  data = read(file)
  if data is None:
    return {}
  try:
    value = text_files.parse_json(data.decode())
  except ValueError as error:
    raise RequestError(f'{file} beside {TOKENIZER_FILE} is damaged: {error}') from error
  if not isinstance(value, dict):
    raise RequestError(f'{file} beside {TOKENIZER_FILE} is damaged: it is not an object')
  return value


def _token_id(vocabulary: TokenizerVocabulary, token: Any) -> int | None:
  """Return the id of a token, which transformers writes as text or as an object; None for none."""
  if isinstance(token, dict):
    token = token.get('content')
  return vocabulary.token_id(token) if isinstance(token, str) else None


def _chat_template(tokenizer: Mapping[str, Any], read: ReadFile) -> str | None:
  """Return the chat template of a file of its own, or the default one of tokenizer_config.json."""
  data = read('chat_template.jinja')
  if data is not None:
    try:
      return data.decode()
    except UnicodeDecodeError as error:
      raise RequestError(f'chat_template.jinja is not UTF-8: {error}') from error
  template = tokenizer.get('chat_template')
  if isinstance(template, list):  # several, by name
    named = {each.get('name'): each.get('template') for each in template if isinstance(each, dict)}
    template = named.get('default')
  return template if isinstance(template, str) else None
