"""Finding the vocabulary of a run or a conversion."""

import dataclasses
import os

from t5x_inference_ext.errors import RequestError, printable
from t5x_inference_ext.text.model_files import ModelFiles
from t5x_inference_ext.text.sentencepiece_model import SentencePieceVocabulary
from t5x_inference_ext.text.settings import TextSettings, check_settings, settings_of_vocabulary
from t5x_inference_ext.text.tokenizer_json import TOKENIZER_FILE, TokenizerVocabulary
from t5x_inference_ext.text.vocabulary import ByteVocabulary, Vocabulary

# The vocabularies that transformers keeps in a model's directory, the first of which is taken.
PUBLIC_FILES = (TOKENIZER_FILE, 'tokenizer.model')


def vocabulary_of_file(name: str, data: bytes) -> Vocabulary:
  """Return the vocabulary in a file, with the BOS that its own library puts in front.

  Args:
    name: Path of the file: one that ends with .json is a tokenizer.json, another one a
      SentencePiece model.
    data: Its content.

  Raises:
    RequestError: The data is no vocabulary.
  """
  make = TokenizerVocabulary if name.endswith('.json') else SentencePieceVocabulary
  vocabulary = make(name, data)
  vocabulary.bos_id = vocabulary.own_bos_id
  return vocabulary


def open_settings(name: str) -> TextSettings:
  """Return the settings that a vocabulary's file holds, with those of the files beside it.

  Args:
    name: 'bytes', a SentencePiece .model file, or a tokenizer.json. Beside a file that has a name
      of transformers, tokenizer.json or tokenizer.model, further files are read (model_files.py).

  Raises:
    RequestError: There is no such file, or it is no vocabulary.
    CheckpointError: A file beside it is damaged.
  """
  if name == 'bytes':
    return settings_of_vocabulary(ByteVocabulary())
  if not os.path.isfile(name):
    raise RequestError(
      f'no vocabulary at {name}: --vocabulary is `bytes`, or the path of a SentencePiece .model '
      'file or of a tokenizer.json'
    )
  directory, file = os.path.split(os.path.abspath(name))

  def read(file: str) -> bytes | None:
    path = os.path.join(directory, file)
    if not os.path.isfile(path):
      return None
    try:
      with open(path, 'rb') as f:
        return f.read()
    except OSError as error:
      raise RequestError(f"can't read {path}: {error.strerror}") from error

  data = read(file)
  assert data is not None  # it is a file
  vocabulary = vocabulary_of_file(name, data)
  if not name.endswith('.json') and file not in PUBLIC_FILES:
    return settings_of_vocabulary(vocabulary)
  return ModelFiles.read(directory, read).settings(vocabulary)


def choose_settings(
  name: str | None, recorded: TextSettings, rows: int, *, needed: bool
) -> TextSettings:
  """Return the settings of a run.

  Args:
    name: The vocabulary that was asked for (see open_settings), or None: the checkpoint's own.
    recorded: The checkpoint's settings.
    rows: V, rows of the model's embedding.
    needed: Whether there is text to encode. Token ids need no vocabulary.

  Raises:
    RequestError: A vocabulary is needed and not known, is no vocabulary, or has more ids than the
      model has rows.
    CheckpointError: A file beside the vocabulary is damaged.
  """
  found = recorded if name is None else _given(open_settings(name), recorded)
  check_settings(found, rows)
  if needed and found.vocabulary is None:
    raise RequestError(
      f'the prompts are text and the vocabulary of this model is not known '
      f'({printable(found.source)}): give --vocabulary=FILE.model (a SentencePiece model), '
      '--vocabulary=FILE/tokenizer.json or --vocabulary=bytes, or give token ids'
    )
  return found


def _given(given: TextSettings, recorded: TextSettings) -> TextSettings:
  """Return the settings of a vocabulary that was asked for, with what the checkpoint says itself.

  BOS is the model's, which started each row of its training with it: 0 in T5X. A public model of
  which no vocabulary is known may say which ids end its rows; its BOS is the vocabulary's, unless
  it says that too.
  """
  if recorded.kind != 'none' or recorded.is_only_t5x:
    return dataclasses.replace(given, bos_id=recorded.bos_id)
  return dataclasses.replace(
    given,
    bos_id=given.bos_id if recorded.bos_id is None else recorded.bos_id,
    end_ids=recorded.end_ids or given.end_ids,
    chat_template=given.chat_template or recorded.chat_template,
    generation_defaults=given.generation_defaults or recorded.generation_defaults,
  )
