"""Texts of single tokens, and their log-probabilities in the forms of the API."""

from collections.abc import Sequence
import functools
from typing import Any

from t5x_inference_ext.engine.request import TopLogProbs
from t5x_inference_ext.text.vocabulary import Vocabulary

_LEAST = -9999.0  # in place of minus infinity, which JSON has not


class TokenTexts:
  """The texts of single tokens.

  Args:
    vocabulary: The vocabulary; None: tokens are told by their ids.
  """

  def __init__(self, vocabulary: Vocabulary | None) -> None:
    self._vocabulary = vocabulary
    self.data = functools.lru_cache(2**16)(self._data)
    self.text = functools.lru_cache(2**16)(self._text)

  def _data(self, token: int) -> bytes:
    """Return the bytes of a token; special tokens have those of their names."""
    if self._vocabulary is None:
      return b'token_id:%d' % token
    return self._vocabulary.piece(token, special=True)

  def _text(self, token: int) -> str:
    r"""Return the text of a token; 'bytes:\xe2\x82' for one that holds part of a character."""
    data = self.data(token)
    try:
      return data.decode()
    except UnicodeDecodeError:
      return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in data)

  def completion(
    self,
    tokens: Sequence[int],
    log_probs: Sequence[float | None],
    top: Sequence[TopLogProbs | None],
    offset: int,
    wanted: int,
  ) -> dict[str, Any]:
    """Return log-probabilities as completions tell them.

    Args:
      tokens: Token ids.
      log_probs: Log-probability of each; None for one that has none.
      top: The most likely tokens at each place.
      offset: Place in the answer's text where the first token begins.
      wanted: How many of the most likely tokens were asked for.
    """
    offsets = []
    for token in tokens:
      offsets.append(offset)
      offset += len(self.text(token))
    return {
      'tokens': [self.text(token) for token in tokens],
      'token_logprobs': [None if value is None else _finite(value) for value in log_probs],
      'top_logprobs': [
        None if value is None else self._top(token, value, likely or [])
        for token, value, likely in zip(tokens, log_probs, top)
      ]
      if wanted
      else None,
      'text_offset': offsets,
    }

  def _top(self, token: int, log_prob: float, likely: TopLogProbs) -> dict[str, float]:
    """Return the most likely tokens by their texts, and the token that was chosen."""
    found: dict[str, float] = {}
    for other, value in [*likely, (token, log_prob)]:
      found.setdefault(self.text(other), _finite(value))
    return found

  def chat(
    self, tokens: Sequence[int], log_probs: Sequence[float], top: Sequence[TopLogProbs]
  ) -> dict[str, Any]:
    """Return log-probabilities as chats tell them; see `completion`."""
    return {
      'content': [
        {**self._entry(token, value), 'top_logprobs': [self._entry(*other) for other in likely]}
        for token, value, likely in zip(tokens, log_probs, top)
      ],
      'refusal': None,
    }

  def _entry(self, token: int, log_prob: float) -> dict[str, Any]:
    return {
      'token': self.data(token).decode(errors='replace'),
      'logprob': _finite(log_prob),
      'bytes': list(self.data(token)),
    }


def _finite(value: float) -> float:
  return max(value, _LEAST)
