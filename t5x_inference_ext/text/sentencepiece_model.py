"""SentencePiece model files as vocabularies."""

from collections.abc import Mapping, Sequence
import functools
import re
from typing import Any

from t5x_inference_ext.errors import RequestError, printable
from t5x_inference_ext.text.vocabulary import SPACE_SIGN, Vocabulary

MODEL_FILE = 'vocabulary.model'
_ALL = 2**31


class SentencePieceVocabulary(Vocabulary):
  """A SentencePiece model, without seqio's extra_ids.

  Args:
    name: Name for messages, such as the file's path.
    data: Content of the model file.
    bos_id: The id that is put in front of a prompt: 0 in T5X, where targets are shifted right.
    end_ids: The ids that end a row; None: the model's own EOS.

  Raises:
    RequestError: The data is not a SentencePiece model.
  """

  kind = 'sentencepiece'

  def __init__(
    self, name: str, data: bytes, bos_id: int | None = 0, end_ids: Sequence[int] | None = None
  ) -> None:
    self.name, self._data, self.bos_id = name, data, bos_id
    self.leading_spaces = self._dropped_spaces()
    own = self._model.eos_id()
    self.end_ids = (() if own < 0 else (own,)) if end_ids is None else tuple(end_ids)

  def __getstate__(self) -> dict[str, Any]:
    return {name: value for name, value in self.__dict__.items() if name != '_model'}

  @functools.cached_property
  def _model(self) -> Any:
    import sentencepiece  # imported here because few runs need it

    try:
      # The library accepts an empty file, and makes a processor without a model.
      model = sentencepiece.SentencePieceProcessor(model_proto=self._data or b'\0')
      if model.get_piece_size() > 0:
        return model
      reason = 'it has no pieces'
    except (OSError, RuntimeError) as error:
      # The library's message begins with a location in its source code; drop it.
      reason = re.sub(r'^\w+: \S+\(\d+\) ', '', str(error))
    raise RequestError(
      f'{printable(self.name)} is not a SentencePiece model, or only part of one: '
      f'{printable(reason)}'
    )

  @property
  def size(self) -> int:
    """Number of pieces."""
    return self._model.get_piece_size()

  @property
  def own_bos_id(self) -> int | None:
    """The model's BOS; None if it has none."""
    own = self._model.bos_id()
    return None if own < 0 else own

  def token_id(self, token: str) -> int | None:
    """Return the id of a piece, or None if there is no such piece."""
    found = self._model.piece_to_id(token)
    return found if self._model.id_to_piece(found) == token else None

  def encode(self, text: str) -> list[int]:
    """Return the ids of a text, without BOS and end. Raises UnicodeEncodeError for surrogates."""
    text.encode('utf-8')  # SentencePiece itself would replace a surrogate
    return self._model.encode(text)

  def piece(self, token: int, special: bool = False) -> bytes:
    """Return the bytes of a piece."""
    model = self._model
    if not 0 <= token < self.size:
      return b''
    if model.is_control(token):
      return model.id_to_piece(token).encode() if special else b''
    if model.is_unknown(token):
      return model.decode([token]).encode()  # the model's own text for the unknown token
    if model.is_byte(token):
      return bytes([int(model.id_to_piece(token)[3:5], 16)])  # a byte token such as <0xE9>
    return model.id_to_piece(token).replace(SPACE_SIGN, ' ').encode()

  def files(self) -> Mapping[str, bytes]:
    """Return the model file."""
    return {MODEL_FILE: self._data}

  def _dropped_spaces(self) -> int:
    """Return the number of leading spaces that the model's own decoding drops from a text."""
    model = self._model
    words = (i for i in range(self.size) if model.id_to_piece(i).startswith(SPACE_SIGN))
    word = next((i for i in words if len(model.id_to_piece(i)) > 1), None)
    if word is None or model.decode([word]).startswith(' '):
      return 0
    space = model.piece_to_id(SPACE_SIGN)
    if model.is_unknown(space) or model.decode([space, word]).startswith(' '):
      return 1
    return _ALL
