"""Vocabularies without TensorFlow: UTF-8 bytes and SentencePiece models, with the ids of seqio."""

from collections.abc import Sequence
import dataclasses
import functools
import os
from typing import Any, Protocol

from t5x_inference_ext.errors import RequestError

# Embedding rows of a model trained on bytes: 259 ids, padded to a multiple of 128.
BYTE_ROWS = 384


class Vocabulary(Protocol):
  """An object that encodes text to token ids, and decodes them."""

  @property
  def name(self) -> str:
    """Name for messages."""

  @property
  def size(self) -> int:
    """Number of ids: each id is below it."""

  @property
  def eos_id(self) -> int:
    """The id that ends a row."""

  def encode(self, text: str) -> list[int]:
    """Return the ids of a text, without EOS. Raises UnicodeEncodeError for a lone surrogate."""

  def decode(self, ids: Sequence[int]) -> str:
    """Return the text of ids, up to the first EOS."""


@dataclasses.dataclass(frozen=True)
class ByteVocabulary:
  """UTF-8 bytes, with the ids of seqio: 0 is padding, 1 EOS, 2 unknown, byte b is b + 3."""

  name: str = 'bytes'
  size: int = 259
  eos_id: int = 1

  def encode(self, text: str) -> list[int]:
    """Return the ids of a text, without EOS. Raises UnicodeEncodeError for a lone surrogate."""
    return [b + 3 for b in text.encode('utf-8')]

  def decode(self, ids: Sequence[int]) -> str:
    """Return the text of ids, up to the first EOS.

    Ids above the bytes are left out, and so are bytes that are not UTF-8 (a limit may cut a
    character short).
    """
    data = bytes(i - 3 for i in _before(ids, self.eos_id) if 3 <= i < self.size)
    return data.decode('utf-8', errors='ignore')


@dataclasses.dataclass(frozen=True)
class SentencePieceVocabulary:
  """A SentencePiece model file as it is; seqio's extra_ids are not added.

  Attributes:
    name: Path of the file.
  """

  name: str

  @functools.cached_property
  def _model(self) -> Any:
    import sentencepiece  # needed by few runs

    try:
      return sentencepiece.SentencePieceProcessor(model_file=self.name)
    except (OSError, RuntimeError) as error:
      raise RequestError(f'{self.name} is not a SentencePiece model: {error}') from error

  @property
  def size(self) -> int:
    """Number of ids."""
    return self._model.get_piece_size()

  @property
  def eos_id(self) -> int:
    """The model's EOS, or -1 (no token) if it has none."""
    return self._model.eos_id()

  def encode(self, text: str) -> list[int]:
    """Return the ids of a text, without EOS. Raises UnicodeEncodeError for a lone surrogate."""
    text.encode('utf-8')  # SentencePiece itself would replace a surrogate
    return self._model.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    """Return the text of ids, up to the first EOS."""
    return self._model.decode([i for i in _before(ids, self.eos_id) if 0 < i < self.size])


def stop_sequences(vocabulary: Any, text: str) -> list[list[int]]:
  """Return the id sequences that write a text, so that rows can end with any of them.

  A text has several: SentencePiece divides a text into other tokens at the beginning of a word than
  after other letters.

  Args:
    vocabulary: A Vocabulary, or one of seqio.
    text: Text that ends a row.

  Raises:
    RequestError: The vocabulary has no ids for the text, or ids that decode to another text.
  """
  try:
    among = vocabulary.decode(list(vocabulary.encode(f'a{text}a')))
  except UnicodeEncodeError:
    raise RequestError(
      f'stop={text!r} is not valid Unicode (a lone surrogate): choose another text'
    ) from None
  if text not in among:
    raise RequestError(
      f'stop={text!r} can\'t be written in the vocabulary: between two "a" it comes out as '
      f'{among!r}; choose another text'
    )
  found = [list(vocabulary.encode(text))]
  for before in ('.', 'a', '\n'):
    prefix, whole = list(vocabulary.encode(before)), list(vocabulary.encode(before + text))
    rest = whole[len(prefix) :]
    if rest and whole[: len(prefix)] == prefix and rest not in found:
      found.append(rest)
  return found


def _before(ids: Sequence[int], end: int) -> list[int]:
  """Return the ids before the first `end`."""
  ids = list(ids)
  return ids[: ids.index(end)] if end in ids else ids


def find_vocabulary(
  name: str | None, vocab_size: int, *, needed: bool
) -> tuple[Vocabulary | None, str]:
  """Return the vocabulary of a run, and the reason for choosing it.

  Args:
    name: 'bytes', a SentencePiece .model file, or None for the default: bytes for a model of 384
      rows.
    vocab_size: V, rows of the model's embedding.
    needed: Whether there is text to encode. Token ids need no vocabulary.

  Returns:
    (vocabulary or None, 'given' or the reason for the choice).

  Raises:
    RequestError: A vocabulary is needed and not known, is no vocabulary, or has more ids than the
      model has rows.
  """
  source = 'given'
  if name is None:
    if vocab_size != BYTE_ROWS:
      if needed:
        raise RequestError(
          f'the prompts are text and the vocabulary of this model ({vocab_size} rows) is not '
          'known: give --vocabulary=FILE.model (a SentencePiece model) or --vocabulary=bytes, or '
          'give token ids'
        )
      return None, f'not known for {vocab_size} rows: completions have tokens only, no text'
    name, source = 'bytes', f'assumed from {vocab_size} rows'
  vocabulary: Vocabulary = ByteVocabulary()
  if name != 'bytes':
    if not os.path.isfile(name):
      raise RequestError(
        f'no vocabulary at {name}: --vocabulary is `bytes` or the path of a SentencePiece .model '
        'file'
      )
    vocabulary = SentencePieceVocabulary(name)
  if vocabulary.size > vocab_size:
    raise RequestError(
      f'vocabulary {name} has {vocabulary.size} ids and the model {vocab_size} rows: it is not the '
      'vocabulary that this model was trained with'
    )
  return vocabulary, source
