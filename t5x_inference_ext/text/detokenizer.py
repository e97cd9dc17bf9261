"""The text of tokens as they come."""

import codecs
from collections.abc import Iterable, Sequence

from t5x_inference_ext.text.vocabulary import Vocabulary, count_leading_spaces

_LONGEST = 4  # bytes of the longest UTF-8 character


class Detokenizer:
  """Decodes a row's tokens as they come, and never cuts a character. Picklable.

  A push costs the time of its own tokens, however long the row is. Joined, the texts of all pushes
  and of `finish` are what the prompt's and the row's ids decode to together, without the beginning
  that the prompt's ids alone decide. So the first space of a completion stays, and a character that
  begins in the prompt comes whole.

  Args:
    vocabulary: The vocabulary of the row.
    prompt_ids: Ids of the prompt that is continued.
  """

  def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int] = ()) -> None:
    self._vocabulary = vocabulary
    self._spaces = vocabulary.leading_spaces  # to drop still
    self._incomplete = b''
    for token in prompt_ids:  # to the first text: few tokens
      if not self._spaces:
        break
      self.push([token])
    # An incomplete character at the prompt's end lies in its last three bytes.
    tail = b''
    for token in reversed(prompt_ids):
      tail = vocabulary.piece(token) + tail
      if len(tail) >= _LONGEST:
        break
    self._incomplete = b''
    self._decode(tail)

  def push(self, ids: Iterable[int]) -> str:
    """Return the text that further tokens complete, possibly none."""
    return self._kept(self._decode(b''.join(map(self._vocabulary.piece, ids))))

  def finish(self) -> str:
    """Return the rest: U+FFFD for a character that stayed incomplete, else nothing."""
    return self._kept(self._decode(b'', final=True))

  def _decode(self, data: bytes, final: bool = False) -> str:
    data = self._incomplete + data
    text, used = codecs.utf_8_decode(data, 'replace', final)
    self._incomplete = data[used:]
    return text

  def _kept(self, text: str) -> str:
    """Return a text without the spaces that are still to drop from the row's beginning."""
    if not self._spaces or not text:
      return text
    dropped = count_leading_spaces(text, self._spaces)
    self._spaces = self._spaces - dropped if dropped == len(text) else 0
    return text[dropped:]
