"""Incremental decoding of tokens to text."""

import codecs
from collections.abc import Iterable, Sequence

from t5x_inference_ext.text.vocabulary import Vocabulary, count_leading_spaces

_LONGEST = 4  # number of bytes of the longest UTF-8 character


class Detokenizer:
  """Decodes a row's tokens one after another, and never splits a character. Picklable.

  `push` takes time in proportion to its own tokens, not to the row's length. The results of all
  pushes and of `finish`, concatenated, are the text of prompt and row decoded together, without the
  part that the prompt's ids alone determine. So the first space of a completion is kept, and a
  character that begins in the prompt is returned whole.

  Args:
    vocabulary: The vocabulary of the row.
    prompt_ids: Ids of the prompt that is continued.
  """

  def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int] = ()) -> None:
    self._vocabulary = vocabulary
    self._spaces = vocabulary.leading_spaces  # number of leading spaces still to drop
    self._incomplete = b''
    for token in prompt_ids:  # stops at the first token with text
      if not self._spaces:
        break
      self.push([token])
    # An incomplete character at the prompt's end is within its last three bytes.
    tail = b''
    for token in reversed(prompt_ids):
      tail = vocabulary.piece(token) + tail
      if len(tail) >= _LONGEST:
        break
    self._incomplete = b''
    self._decode(tail)

  def push(self, ids: Iterable[int]) -> str:
    """Append tokens; return the text that is complete now, possibly ''."""
    return self._kept(self._decode(b''.join(map(self._vocabulary.piece, ids))))

  def finish(self) -> str:
    """Return the remaining text: U+FFFD for an incomplete character, else ''."""
    return self._kept(self._decode(b'', final=True))

  def _decode(self, data: bytes, final: bool = False) -> str:
    data = self._incomplete + data
    text, used = codecs.utf_8_decode(data, 'replace', final)
    self._incomplete = data[used:]
    return text

  def _kept(self, text: str) -> str:
    """Return a text without the leading spaces that are still to be dropped."""
    if not self._spaces or not text:
      return text
    dropped = count_leading_spaces(text, self._spaces)
    self._spaces = self._spaces - dropped if dropped == len(text) else 0
    return text[dropped:]
