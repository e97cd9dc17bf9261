"""Text to token ids and back, without TensorFlow: bytes and SentencePiece models, with the ids that seqio gives."""

from collections.abc import Sequence
import dataclasses
import functools
import os
from typing import Any, Protocol

from t5x_inference_ext.errors import RequestError

BYTE_ROWS = 384  # the embedding of a model trained on bytes: 259 ids, padded to a multiple of 128


class Vocabulary(Protocol):
  """Anything that encodes and decodes.

  Attributes:
    name: for people.
    size: ids are below it.
    eos_id: the id that ends a row.
  """

  name: str
  size: int
  eos_id: int

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without EOS. Raises ValueError for text that has none (a lone surrogate)."""

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids, up to the first EOS."""


@dataclasses.dataclass(frozen=True)
class ByteVocabulary:
  """UTF-8 bytes: 0 padding, 1 EOS, 2 unknown, byte b is b + 3 (seqio.ByteVocabulary's ids)."""

  name: str = 'bytes'
  size: int = 259
  eos_id: int = 1

  def encode(self, text: str) -> list[int]:
    return [b + 3 for b in text.encode('utf-8')]

  def decode(self, ids: Sequence[int]) -> str:
    """Bytes that are no UTF-8 (a character cut short by a limit) and ids above the bytes are left out."""
    return bytes(i - 3 for i in _until(ids, self.eos_id) if 3 <= i < self.size).decode(
      'utf-8', errors='ignore'
    )


@dataclasses.dataclass(frozen=True)
class SentencePieceVocabulary:
  """A SentencePiece model file, as it is: seqio's extra_ids are not added."""

  name: str

  @functools.cached_property
  def _model(self):
    import sentencepiece  # pylint: disable=g-import-not-at-top  # needed by few runs

    try:
      return sentencepiece.SentencePieceProcessor(model_file=self.name)
    except (OSError, RuntimeError) as error:
      raise RequestError(f'{self.name} is not a SentencePiece model: {error}') from error

  @property
  def size(self) -> int:
    return self._model.get_piece_size()

  @property
  def eos_id(self) -> int:
    """The model's EOS, -1 (no token) where it has none."""
    return self._model.eos_id()

  def encode(self, text: str) -> list[int]:
    text.encode('utf-8')  # a lone surrogate is the caller's mistake to report
    return self._model.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    return self._model.decode([i for i in _until(ids, self.eos_id) if 0 < i < self.size])


def stop_sequences(vocabulary: Any, text: str) -> list[list[int]]:
  """The ids that write a text: where it begins a word and where it goes on from others, which SentencePiece tells apart.

  Args:
    vocabulary: a Vocabulary, or seqio's.
    text: that is to end rows.

  Raises:
    RequestError: the vocabulary can't write it: it has no ids for it, or they stand for another text.
  """
  among = vocabulary.decode(list(vocabulary.encode(f'a{text}a')))
  if text not in among:
    raise RequestError(
      f'stop={text!r} can\'t be written in the vocabulary: between two "a" it comes out as {among!r}; choose '
      'another text'
    )
  found = [list(vocabulary.encode(text))]
  for before in ('.', 'a', '\n'):
    start, both = (list(vocabulary.encode(t)) for t in (before, before + text))
    rest = both[len(start) :]
    if rest and both[: len(start)] == start and rest not in found:
      found.append(rest)
  return found


def _until(ids, end):
  ids = list(ids)
  return ids[: ids.index(end)] if end in ids else ids


def find_vocabulary(name: str | None, rows: int, *, needed: bool) -> tuple[Vocabulary | None, str]:
  """The vocabulary of a run, and where it comes from.

  Args:
    name: 'bytes', a SentencePiece .model file, or None for the default: bytes for a model of 384 rows.
    rows: V, of the model's embedding.
    needed: whether there is text to encode; without a vocabulary token ids still work.

  Returns:
    (vocabulary or None, 'given' or why it was chosen).

  Raises:
    RequestError: a vocabulary is needed and not known, is no vocabulary, or does not fit the model.
  """
  source = 'given'
  if name is None:
    if rows != BYTE_ROWS:
      if needed:
        raise RequestError(
          f'the prompts are text and the vocabulary of this model ({rows} rows) is not known: give '
          '--vocabulary=FILE.model (a SentencePiece model) or --vocabulary=bytes, or give token ids'
        )
      return None, f'not known for {rows} rows: completions have tokens only, no text'
    name, source = 'bytes', f'assumed from {rows} rows'
  if name == 'bytes':
    vocabulary = ByteVocabulary()
  else:
    if not os.path.isfile(name):
      raise RequestError(
        f'no vocabulary at {name}: --vocabulary is `bytes` or the path of a SentencePiece .model file'
      )
    vocabulary = SentencePieceVocabulary(name)
  if vocabulary.size > rows:
    raise RequestError(
      f'vocabulary {name} has {vocabulary.size} ids and the model {rows} rows: it is not the vocabulary that this '
      'model was trained with'
    )
  return vocabulary, source
