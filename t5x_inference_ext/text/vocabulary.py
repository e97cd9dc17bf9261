"""The vocabularies' interface, and UTF-8 bytes as a vocabulary.

A vocabulary defines the bytes that each token adds to a text. To decode ids is to concatenate their
bytes and decode them as UTF-8. So decoding token by token gives the same text (detokenizer.py).
"""

import abc
import codecs
from collections.abc import Mapping, Sequence

import numpy as np

from t5x_inference_ext.errors import RequestError, UserError

# The character that SentencePiece, and tokenizers converted from it, use for a space.
SPACE_SIGN = '\u2581'
# Embedding rows of a model trained on bytes: 259 ids, padded to a multiple of 128.
BYTE_ROWS = 384


class Vocabulary(abc.ABC):
  """A vocabulary: encodes text to token ids, and decodes them. Picklable.

  Attributes:
    kind: A key of settings.KINDS other than 'none'.
    name: Name for messages: 'bytes', or the file's path.
    bos_id: The id that is put in front of a prompt; None: none is.
    end_ids: The ids that end a row.
    leading_spaces: Maximum number of leading spaces of a text that decoding drops. SentencePiece
      puts one before the first word.
  """

  kind: str
  name: str
  bos_id: int | None
  end_ids: tuple[int, ...]
  leading_spaces: int = 0

  @property
  @abc.abstractmethod
  def size(self) -> int:
    """Number of ids: all ids are below it."""

  @property
  def own_bos_id(self) -> int | None:
    """The id that the vocabulary's library puts in front of a text; None if it puts none.

    A checkpoint's settings take precedence.
    """
    return self.bos_id

  def token_id(self, token: str) -> int | None:
    """Return the id of a token by its name, or None if there is no such token."""
    return None

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """Return the ids of a text, without BOS and end.

    Raises:
      UnicodeEncodeError: The text has a lone surrogate.
    """

  @abc.abstractmethod
  def piece(self, token: int, special: bool = False) -> bytes:
    """Return the UTF-8 bytes that a token adds to a text; a token may hold part of a character.

    Args:
      token: Any id. An id outside the vocabulary adds nothing.
      special: Whether special tokens (BOS, EOS, chat roles) add their names. If False, they add
        nothing.
    """

  def files(self) -> Mapping[str, bytes]:
    """Return the files that hold the vocabulary: name -> content; {} for bytes."""
    return {}

  def decode(self, ids: Sequence[int], special: bool = False) -> str:
    """Return the text of ids. Bytes that are not UTF-8 become U+FFFD.

    Args:
      ids: Token ids.
      special: Whether to include the names of special tokens.
    """
    text = codecs.decode(b''.join(self.piece(i, special) for i in ids), 'utf-8', 'replace')
    return text[count_leading_spaces(text, self.leading_spaces) :]


class ByteVocabulary(Vocabulary):
  """UTF-8 bytes, with the ids of seqio: 0 is padding and BOS, 1 EOS, 2 unknown, byte b is b + 3."""

  kind = name = 'bytes'

  def __init__(self, bos_id: int | None = 0, end_ids: Sequence[int] = (1,)) -> None:
    self.bos_id, self.end_ids = bos_id, tuple(end_ids)

  @property
  def size(self) -> int:
    """259."""
    return 259

  def encode(self, text: str) -> list[int]:
    """Return the ids of a text, without BOS and end. Raises UnicodeEncodeError for surrogates."""
    return [b + 3 for b in text.encode('utf-8')]

  def piece(self, token: int, special: bool = False) -> bytes:
    """Return the byte of a token. Special tokens have no names."""
    return bytes([token - 3]) if 3 <= token < 259 else b''


def count_leading_spaces(text: str, most: int) -> int:
  """Return how many spaces `text` begins with, at most `most`."""
  return min(most, len(text) - len(text.lstrip(' ')))


def encode_pair(
  vocabulary: Vocabulary, prompt: str, completion: str
) -> tuple[list[int], list[int]]:
  """Return the ids of a prompt and of its completion, encoded together as one text.

  A token belongs to the completion if its text ends after the prompt's. This includes a token that
  spans the end of the prompt and the beginning of the completion.

  Raises:
    UnicodeEncodeError: The text has a lone surrogate.
  """
  boundary = sum(len(vocabulary.piece(i, special=True)) for i in vocabulary.encode(prompt))
  ids, end = vocabulary.encode(prompt + completion), 0
  for place, token in enumerate(ids):
    end += len(vocabulary.piece(token, special=True))
    if end > boundary:
      return ids[:place], ids[place:]
  return ids, []


def check_in_vocabulary(tokens: np.ndarray, where: str, rows: int) -> None:
  """Raise UserError if token ids are not in a vocabulary of `rows` rows.

  Args:
    tokens: [..] integers, at least one.
    where: What holds them, for the message.
    rows: Number of rows of the embedding.
  """
  for token in (int(tokens.max()), int(tokens.min())):
    if not 0 <= token < rows:
      raise UserError(f'{where} holds token {token}, outside the vocabulary of {rows}')


def check_size(vocabulary: Vocabulary, rows: int) -> None:
  """Raise RequestError if a vocabulary has more ids than the model's embedding has rows."""
  if vocabulary.size > rows:
    raise RequestError(
      f'vocabulary {vocabulary.name} has {vocabulary.size} ids and the model {rows} rows: it is '
      'not the vocabulary that this model was trained with'
    )
