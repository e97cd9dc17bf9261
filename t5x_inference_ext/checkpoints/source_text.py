"""Text settings of models in public formats, from their files."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import os
from typing import Any

import numpy as np

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.errors import CheckpointError, UserError, printable
from t5x_inference_ext.text.gguf_lists import vocabulary_of_lists
from t5x_inference_ext.text.model_files import ModelFiles
from t5x_inference_ext.text.sentencepiece_model import MODEL_FILE
from t5x_inference_ext.text.settings import TextSettings, settings_of_vocabulary, unknown_vocabulary
from t5x_inference_ext.text.vocabulary import Vocabulary, check_size
from t5x_inference_ext.text.vocabulary_files import PUBLIC_FILES, vocabulary_of_file


def settings_of_directory(path: str, rows: int) -> TextSettings:
  """Return the settings of a model in a directory, local or gs://.

  If the vocabulary is missing or can't be used, the settings have the kind 'none', and the model
  takes only token ids.

  Args:
    path: The directory.
    rows: V, rows of the model's embedding.

  Raises:
    CheckpointError: A file other than the vocabulary is damaged.
  """
  files = ModelFiles.read(path, functools.partial(storage.read_file, path))
  vocabulary, reason = None, f'no {" or ".join(PUBLIC_FILES)} is beside the model'
  for name in (*PUBLIC_FILES, MODEL_FILE):
    data = storage.read_file(path, name)
    if data is not None:
      make = functools.partial(vocabulary_of_file, os.path.join(path, name), data)
      vocabulary, reason = _usable(make, rows)
      break
  return _within(files.settings(vocabulary, reason), rows)


def settings_of_lists(path: str, lists: Mapping[str, Any], rows: int) -> TextSettings:
  """Return the settings of a model in a GGUF file; see settings_of_directory.

  Args:
    path: The file, for messages.
    lists: The file's metadata with keys `tokenizer.NAME`, by NAME.
    rows: V, rows of the model's embedding.

  Raises:
    CheckpointError: A value that should be an id or a text is not.
  """

  def token(name: str) -> int | None:
    value = lists.get(f'ggml.{name}_token_id')
    if value is not None and not (type(value) is int and 0 <= value < 2**31):
      raise CheckpointError(
        f'{path}: tokenizer.ggml.{name}_token_id is {printable(value, 80)}, not an id'
      )
    return value

  template = lists.get('chat_template')
  if not isinstance(template, str | None):
    raise CheckpointError(f'{path}: tokenizer.chat_template is not text')
  bos_id = token('bos')
  if not lists.get('ggml.add_bos_token', lists.get('ggml.model') == 'llama'):
    bos_id = None
  ends = tuple(dict.fromkeys(i for i in (token('eos'), token('eot')) if i is not None))
  vocabulary, reason = None, 'the file has no tokenizer.ggml.tokens'
  if 'ggml.tokens' in lists:
    make = functools.partial(_vocabulary_of_lists, path, lists, bos_id, ends)
    vocabulary, reason = _usable(make, rows)
  if vocabulary is not None:
    return _within(settings_of_vocabulary(vocabulary, chat_template=template), rows)
  return _within(
    unknown_vocabulary(source=reason, bos_id=bos_id, end_ids=ends, chat_template=template), rows
  )


def _usable(make: Callable[[], Vocabulary], rows: int) -> tuple[Vocabulary | None, str]:
  """Return (the vocabulary that `make` returns, 'given'), or (None, why it can't be used)."""
  try:
    vocabulary = make()
    check_size(vocabulary, rows)
    return vocabulary, 'given'
  except UserError as error:
    return None, f"the model's own can't be used: {error}"


def _within(settings: TextSettings, rows: int) -> TextSettings:
  """Drop BOS and end ids that are beyond the model's embedding rows."""
  ends = tuple(token for token in settings.end_ids if token < rows)
  bos_id = settings.bos_id
  if bos_id is not None and bos_id >= rows:
    bos_id = None
  if (bos_id, ends) == (settings.bos_id, settings.end_ids):
    return settings
  return dataclasses.replace(settings, bos_id=bos_id, end_ids=ends)


def _vocabulary_of_lists(
  name: str, lists: Mapping[str, Any], bos_id: int | None, end_ids: tuple[int, ...]
) -> Vocabulary:
  """Return the vocabulary in a GGUF file's metadata; raise UserError if it can't be used."""

  def value(key: str, kind: type, default: Any) -> Any:
    found = lists.get(key, default)
    if not isinstance(found, kind):
      raise CheckpointError(f'tokenizer.{key} is {printable(found, 80)}, not of the expected type')
    return found

  numbers = np.zeros(0)
  return vocabulary_of_lists(
    name,
    value('ggml.tokens', list, []),
    value('ggml.token_type', np.ndarray, numbers).astype(int).tolist(),
    merges=value('ggml.merges', list, []),
    scores=value('ggml.scores', np.ndarray, numbers).astype(float).tolist(),
    bos_id=bos_id,
    end_ids=end_ids,
    add_space_prefix=bool(lists.get('ggml.add_space_prefix', True)),
    **{key: value(f'ggml.{key}', str, '') for key in ('model', 'pre') if f'ggml.{key}' in lists},
  )
