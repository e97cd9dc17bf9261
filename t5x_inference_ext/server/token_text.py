"""Texts of single tokens, and log-probabilities as the API's JSON objects."""

from collections.abc import Sequence
import functools
from typing import Any

from t5x_inference_ext.engine.request import TopLogProbs
from t5x_inference_ext.text.vocabulary import Vocabulary

_LEAST = -9999.0  # stands for minus infinity, which JSON can't express


class TokenTexts:
  """The texts of single tokens.

  Args:
    vocabulary: The vocabulary; None: ids are used as texts.
  """

  def __init__(self, vocabulary: Vocabulary | None) -> None:
    self._vocabulary = vocabulary
    self.data = functools.lru_cache(2**16)(self._data)
    self.text = functools.lru_cache(2**16)(self._text)

  def _data(self, token: int) -> bytes:
    """Return the bytes of a token; the name's bytes for a special token."""
    if self._vocabulary is None:
      return b'token_id:%d' % token
    return self._vocabulary.piece(token, special=True)

  def _text(self, token: int) -> str:
    r"""Return the text of a token; 'bytes:\xe2\x82' for a token with only part of a character."""
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
    """Return log-probabilities in the form of /v1/completions.

    Args:
      tokens: Token ids.
      log_probs: Log-probability of each token, or None.
      top: The most likely tokens at each position.
      offset: Character offset of the first token in the answer's text.
      wanted: Number of most likely tokens that were requested.
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
    """Return text -> log-probability of the most likely tokens and of the chosen token."""
    found: dict[str, float] = {}
    for other, value in [*likely, (token, log_prob)]:
      found.setdefault(self.text(other), _finite(value))
    return found

  def chat(
    self, tokens: Sequence[int], log_probs: Sequence[float], top: Sequence[TopLogProbs]
  ) -> dict[str, Any]:
    """Return log-probabilities in the form of /v1/chat/completions; see `completion`."""
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
