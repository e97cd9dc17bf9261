"""Texts that end a row, found in its text."""

from collections.abc import Sequence
from typing import Any

from t5x_inference_ext.errors import RequestError


class StopTexts:
  """Finds stop texts in a text that comes in pieces, whatever tokens write it. Picklable.

  The first place where any stop text ends counts; of several that end there, the longest. This does
  not depend on how the text is cut into pieces. A push costs the time of its own characters, times
  the number of stop texts.

  Args:
    texts: The stop texts.

  Raises:
    RequestError: A stop text is not text, is empty, or is not valid Unicode.
  """

  def __init__(self, texts: Sequence[str]) -> None:
    check_stop_texts(texts)
    self._texts = tuple(dict.fromkeys(texts))
    self._borders = [_borders(text) for text in self._texts]
    self._matched = [0] * len(self._texts)  # characters of each text that the end of the row has
    self._held = ''

  def push(self, delta: str, may_stop: bool = True) -> tuple[str, str | None]:
    """Return the text to release, and the stop text that was found.

    Args:
      delta: The text that follows.
      may_stop: Whether a stop text that ends in this piece counts; else it is text like any other.

    Returns:
      (text that is no part of a stop text, however the row goes on; the stop text found or None).
      The row ends before the stop text: nothing after it is released.
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
    """Return the text that was held back, at the end of a row without a stop text."""
    held, self._held = self._held, ''
    return held

  def _kept(self, i: int) -> int:
    """Return how many characters of the row's end may still become text `i`."""
    matched = self._matched[i]
    return matched if matched < len(self._texts[i]) else self._borders[i][-1]

  def _advanced(self, i: int, character: str) -> int:
    """Return how much of text `i` the row's end has after one more character."""
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
  """Return a whole text up to its first stop text that ends after the first `begin` characters."""
  finder = StopTexts(stops)
  first, _ = finder.push(text[:begin], may_stop=False)
  rest, found = finder.push(text[begin:])
  return first + rest + ('' if found else finder.finish())


def likely_stop_ids(vocabulary: Any, text: str) -> list[list[int]]:
  """Return id sequences that usually write a stop text.

  A batch that decodes on the devices sees ids, no text. With these it ends most rows where their
  text ends; StopTexts then finds the place. A text has several sequences: SentencePiece divides a
  text into other tokens at the beginning of a word than after other letters.

  Args:
    vocabulary: A Vocabulary, or one of seqio.
    text: A stop text.

  Returns:
    The sequences; none if the vocabulary writes the text differently, as after normalization.
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
  """Return, for each beginning of a text, the length of its longest border (Knuth-Morris-Pratt).

  A border is a beginning, not the whole, that is also an end.
  """
  borders, matched = [0], 0
  for character in text[1:]:
    while matched and text[matched] != character:
      matched = borders[matched - 1]
    matched += text[matched] == character
    borders.append(matched)
  return borders
