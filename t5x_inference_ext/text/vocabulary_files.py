"""Choose and read the vocabulary of a run or a conversion."""

import dataclasses
import os

from t5x_inference_ext.errors import RequestError, printable
from t5x_inference_ext.text.model_files import ModelFiles
from t5x_inference_ext.text.sentencepiece_model import SentencePieceVocabulary
from t5x_inference_ext.text.settings import (
  BOS_ID,
  EOS_ID,
  TextSettings,
  check_settings,
  settings_of_vocabulary,
)
from t5x_inference_ext.text.tokenizer_json import TOKENIZER_FILE, TokenizerVocabulary
from t5x_inference_ext.text.vocabulary import ByteVocabulary, Vocabulary
from t5x_inference_ext.text_files import read_bytes

# Names of vocabulary files in a model's directory, in order of preference.
PUBLIC_FILES = (TOKENIZER_FILE, 'tokenizer.model')


def vocabulary_of_file(name: str, data: bytes) -> Vocabulary:
  """Read a vocabulary file. BOS is the id that its library puts in front of a text.

  Args:
    name: Path of the file. A name that ends with .json means a tokenizer.json, any other name a
      SentencePiece model.
    data: Content of the file.

  Raises:
    RequestError: The data is not a vocabulary.
  """
  make = TokenizerVocabulary if name.endswith('.json') else SentencePieceVocabulary
  vocabulary = make(name, data)
  vocabulary.bos_id = vocabulary.own_bos_id
  return vocabulary


def open_settings(name: str) -> TextSettings:
  """Read the text settings from a vocabulary file and the config files beside it.

  Args:
    name: 'bytes', a SentencePiece .model file, or a tokenizer.json. Config files (model_files.py)
      are read only beside a file named tokenizer.json or tokenizer.model.

  Raises:
    RequestError: The file does not exist, or is not a vocabulary.
    CheckpointError: The file or one beside it can't be read, or one beside it is damaged.
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
    return read_bytes(os.path.join(directory, file))

  data = read(file)
  assert data is not None  # the file exists
  vocabulary = vocabulary_of_file(name, data)
  if not name.endswith('.json') and file not in PUBLIC_FILES:
    return settings_of_vocabulary(vocabulary)
  return ModelFiles.read(directory, read).settings(vocabulary)


def choose_settings(
  name: str | None, recorded: TextSettings, rows: int, *, needed: bool
) -> TextSettings:
  """Choose the text settings of a run.

  Args:
    name: The requested vocabulary (see open_settings); None: the checkpoint's own.
    recorded: The checkpoint's settings.
    rows: V, rows of the model's embedding.
    needed: Whether there is text to encode. Token ids need no vocabulary.

  Raises:
    RequestError: A vocabulary is needed but not known, the file is not a vocabulary, or it has more
      ids than the model has rows.
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
  """Combine the settings of a requested vocabulary with the checkpoint's own settings.

  The checkpoint's BOS is used, because the model was trained with it (0 in T5X). A public model
  whose vocabulary is unknown may state its end ids, and these are used too. If it states no BOS,
  the given vocabulary's is used.
  """
  is_t5x = (recorded.bos_id, recorded.end_ids) == (BOS_ID, (EOS_ID,))
  if recorded.kind != 'none' or is_t5x:
    return dataclasses.replace(given, bos_id=recorded.bos_id)
  return dataclasses.replace(
    given,
    bos_id=given.bos_id if recorded.bos_id is None else recorded.bos_id,
    end_ids=recorded.end_ids or given.end_ids,
    chat_template=given.chat_template or recorded.chat_template,
    generation_defaults=given.generation_defaults or recorded.generation_defaults,
  )
