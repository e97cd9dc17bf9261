"""Search for the stop texts that end a row."""

from collections.abc import Sequence
from typing import Any

from t5x_inference_ext.errors import RequestError


class StopTexts:
  """Finds stop texts in a text that arrives in pieces. Picklable.

  The stop text that ends first is found; of several that end at one position, the longest. The
  result does not depend on how the text is divided into pieces. `push` takes time in proportion to
  its number of characters times the number of stop texts.

  Args:
    texts: The stop texts.

  Raises:
    RequestError: A stop text is not text, is empty, or is not valid Unicode.
  """

  def __init__(self, texts: Sequence[str]) -> None:
    check_stop_texts(texts)
    self._texts = tuple(dict.fromkeys(texts))
    self._borders = [_borders(text) for text in self._texts]
    self._matched = [0] * len(self._texts)  # matched length of each stop text
    self._held = ''

  def push(self, delta: str, may_stop: bool = True) -> tuple[str, str | None]:
    """Append a piece; return (text to release, stop text found or None).

    Args:
      delta: The next piece of text.
      may_stop: Whether a stop text may end in this piece. If False, the piece is ordinary text.

    Returns:
      The text to release can no longer become part of a stop text. Text from the beginning of the
      stop text on is never released.
    """
    held = self._held + delta
    for place, character in enumerate(delta):
      found = None
      for i, text in enumerate(self._texts):
        self._matched[i] = self._advanced(i, character)
        if self._matched[i] == len(text) and len(text) > len(found or ''):
          found = text
      if found and may_stop:
        end = len(self._held) + place + 1
        self._held = ''
        return held[: end - len(found)], found
    keep = max(map(self._kept, range(len(self._texts))), default=0)
    self._held = held[len(held) - keep :]
    return held[: len(held) - keep], None

  def finish(self) -> str:
    """Return the text that was held back; call it when a row ends without a stop text."""
    held, self._held = self._held, ''
    return held

  def _kept(self, i: int) -> int:
    """Return the number of last characters that may still become part of stop text `i`."""
    matched = self._matched[i]
    return matched if matched < len(self._texts[i]) else self._borders[i][-1]

  def _advanced(self, i: int, character: str) -> int:
    """Return the matched length of stop text `i` after one more character."""
    text, borders, matched = self._texts[i], self._borders[i], self._matched[i]
    while matched == len(text) or (matched and text[matched] != character):
      matched = borders[matched - 1]
    return matched + (text[matched] == character)


def check_stop_texts(texts: Sequence[str]) -> None:
  """Raise RequestError for a stop text that is not text, is empty, or is not valid Unicode."""
  if isinstance(texts, str) or not all(isinstance(text, str) and text for text in texts):
    raise RequestError(
      f'stop must be texts that are not empty, got {texts!r}; SamplingParams.stop takes ids'
    )
  for text in texts:
    try:
      text.encode('utf-8')
    except UnicodeEncodeError:
      raise RequestError(
        f'stop={text!r} is not valid Unicode (a lone surrogate): choose another text'
      ) from None


def cut_at_stop(text: str, stops: Sequence[str], begin: int = 0) -> str:
  """Cut a text before its first stop text, ignoring those that end within `begin` characters."""
  finder = StopTexts(stops)
  first, _ = finder.push(text[:begin], may_stop=False)
  rest, found = finder.push(text[begin:])
  return first + rest + ('' if found else finder.finish())


def likely_stop_ids(vocabulary: Any, text: str) -> list[list[int]]:
  """Return id sequences that usually encode a stop text.

  A static batch on the devices can compare only ids. With these sequences it ends most rows soon
  after their stop text; StopTexts then finds the exact position. A stop text has several sequences,
  because SentencePiece splits it differently at the beginning of a word and inside one.

  Args:
    vocabulary: A Vocabulary, or one of seqio.
    text: A stop text.

  Returns:
    The sequences; [] if they are not decoded to the stop text, for example because of
    normalization.
  """
  if text not in vocabulary.decode(list(vocabulary.encode(f'a{text}a'))):
    return []
  found = [list(vocabulary.encode(text))]
  for before in ('.', 'a', '\n'):
    prefix, whole = list(vocabulary.encode(before)), list(vocabulary.encode(before + text))
    rest = whole[len(prefix) :]
    if rest and whole[: len(prefix)] == prefix and rest not in found:
      found.append(rest)
  return [ids for ids in found if text in vocabulary.decode(ids)]


def _borders(text: str) -> list[int]:
  """Return, for each prefix of a text, the length of its longest border (Knuth-Morris-Pratt).

  A border is a proper prefix that is also a suffix.
  """
  borders, matched = [0], 0
  for character in text[1:]:
    while matched and text[matched] != character:
      matched = borders[matched - 1]
    matched += text[matched] == character
    borders.append(matched)
  return borders
