"""The option `speculate`: the kind of drafts that rows get, and their length; their acceptance."""

import dataclasses
import math

from t5x_inference_ext.errors import RequestError

MOST_DRAFT = 16  # maximum tokens of a draft; a page must have room for one more


@dataclasses.dataclass(frozen=True)
class Speculation:
  """A kind of drafts.

  Attributes:
    kind: 'ngram': the tokens that followed an earlier occurrence of the row's last tokens; 'draft':
      tokens that a second model samples.
    most: Maximum number of tokens of a draft. Each step checks as many as are worthwhile.
    path: Checkpoint of the second model; None for other kinds.
  """

  kind: str
  most: int
  path: str | None = None

  def __str__(self) -> str:
    return ':'.join(map(str, [self.kind, *([self.path] if self.path else []), self.most]))


def parse_speculation(text: str) -> Speculation:
  """Parse the option's value, such as 'ngram:8' or 'draft:DIR:4'.

  Raises:
    RequestError: The text names no kind of drafts, or a number of tokens out of its range.
  """
  kind, _, rest = text.partition(':')
  path, _, number = rest.rpartition(':')
  wanted = {'ngram': not path, 'draft': bool(path)}
  if not wanted.get(kind) or not number.isascii() or not number.isdigit():
    raise RequestError(f'speculate must be ngram:N or draft:DIR:N, such as ngram:8, got {text!r}')
  if not 1 <= int(number) <= MOST_DRAFT:
    raise RequestError(f'a draft has 1 to {MOST_DRAFT} tokens, got speculate={text}')
  return Speculation(kind, int(number), path or None)


def parse_acceptance(text: str) -> tuple[float, ...]:
  """Parse the option `acceptance`, such as '0.65' or '0.4,0.8'.

  Raises:
    RequestError: The text is not one or more numbers from 0 to 1.
  """
  try:
    found = tuple(float(part) for part in text.split(','))
  except ValueError:
    found = (math.nan,)
  if not all(0 <= share <= 1 for share in found):
    raise RequestError(
      f'acceptance must be probabilities from 0 to 1, separated by commas, got {text!r}'
    )
  return found


def check_acceptance(speculate: Speculation, acceptance: tuple[float, ...]) -> None:
  """Raise RequestError if the acceptance of simulated drafts is not given."""
  if not acceptance:
    raise RequestError(
      f'a trace does not show how often drafts ({speculate}) are right: give --acceptance, the '
      'probability that a draft token is, if those before it are'
    )
