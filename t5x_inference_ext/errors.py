"""Errors for users. A message is one sentence: the problem, its place and the fix.

Commands print the sentence and exit with 2.
"""

from collections.abc import Iterable
import itertools
import reprlib

# Maximum length of a message, to stay readable on a terminal; longer ones are cut.
_MAX_MESSAGE = 10_000


class UserError(ValueError):
  """A problem that the user can fix. Commands print its message without a traceback."""


class CheckpointError(UserError):
  """A checkpoint that can't be read, or does not fit the model.

  Messages quote text from a checkpoint's files, so control characters are escaped.
  """

  def __init__(self, message: str) -> None:
    super().__init__(printable(message, _MAX_MESSAGE))


class MeshError(UserError):
  """A mesh or layout that does not fit the devices, the model or the batch."""


class RequestError(UserError):
  """A prompt, batch or option that can't be served."""


def printable(text: object, limit: int = 300) -> str:
  """Return text from a file for a message, with control characters escaped, cut to `limit`."""
  if not isinstance(text, str):
    text = reprlib.repr(text)
  shown = ''.join(
    c if c.isprintable() else c.encode('unicode_escape').decode() for c in text[:limit]
  )
  return shown + ('...' if len(text) > limit else '')


def name_list(names: Iterable[str], count: int, limit: int = 12) -> str:
  """Return text for a message: the first `limit` of `count` names, and how many more there are."""
  first = ', '.join(map(printable, itertools.islice(names, limit)))
  return first + (f' and {count - limit} more' if count > limit else '')
