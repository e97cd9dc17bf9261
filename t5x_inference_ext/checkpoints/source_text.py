"""What the files of a model in a public format say about text, as TextSettings."""

import os
from typing import Any

from t5x_inference_ext.checkpoints.readers.public_model import SourceText
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.text.gguf_lists import vocabulary_of_lists
from t5x_inference_ext.text.sentencepiece_model import MODEL_FILE
from t5x_inference_ext.text.settings import TextSettings, settings_of_vocabulary
from t5x_inference_ext.text.tokenizer_json import TOKENIZER_FILE
from t5x_inference_ext.text.vocabulary_files import open_settings

# The SentencePiece model beside safetensors.
_PUBLIC_MODEL_FILE = 'tokenizer.model'


def settings_of_source(
  name: str, source: SourceText
) -> tuple[TextSettings | None, tuple[str, ...]]:
  """Return the settings of a model, and notes for commands to print.

  Without a vocabulary that can be used, the settings are None: the model still takes token ids.

  Args:
    name: Path of the model, for messages.
    source: What its reader found.
  """
  try:
    settings = _of_directory(source) if source.directory else _of_lists(name, source)
  except UserError as error:
    return None, (f"the model's own vocabulary can't be used: {error}",)
  if settings is None:
    return None, ('no vocabulary is beside the model: prompts are token ids, or give --vocabulary',)
  return settings, ()


def _of_directory(source: SourceText) -> TextSettings | None:
  assert source.directory is not None
  for name in (TOKENIZER_FILE, _PUBLIC_MODEL_FILE, MODEL_FILE):
    path = os.path.join(source.directory, name)
    if os.path.isfile(path):
      return open_settings(path)
  return None


def _of_lists(name: str, source: SourceText) -> TextSettings | None:
  lists = source.lists
  tokens = lists.get('ggml.tokens')
  if tokens is None:
    return None
  adds_bos = lists.get('ggml.add_bos_token', lists.get('ggml.model') == 'llama')
  options: dict[str, Any] = {}
  for option, key in (('model', 'ggml.model'), ('pre', 'ggml.pre')):
    if key in lists:
      options[option] = lists[key]
  vocabulary = vocabulary_of_lists(
    name,
    tokens,
    [int(kind) for kind in lists.get('ggml.token_type', ())],
    merges=lists.get('ggml.merges', ()),
    scores=[float(score) for score in lists.get('ggml.scores', ())],
    bos_id=source.bos_id if adds_bos else None,
    end_ids=source.eos_ids,
    add_space_prefix=bool(lists.get('ggml.add_space_prefix', True)),
    **options,
  )
  return settings_of_vocabulary(vocabulary, chat_template=lists.get('chat_template'))
