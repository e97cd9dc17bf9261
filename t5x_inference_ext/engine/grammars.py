"""Grammars of rows: masks of tokens that a row may get next. Needs the extra [structured]."""

import collections
from collections.abc import Sequence
import functools
import importlib.util
import threading
from typing import Any

import numpy as np

from t5x_inference_ext.engine.token_choice import TokenMasks
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.text.grammar import Grammar
from t5x_inference_ext.text.grammar_check import GrammarCheck
from t5x_inference_ext.text.grammar_compiler import (
  GrammarRefused,
  TokenBytes,
  build_tokenizer,
  check_library,
  compile_grammar,
  match_error,
)
from t5x_inference_ext.text.vocabulary import Vocabulary

_CHECKED = 1024  # number of recent grammars that are remembered as usable


class GrammarMatcher:
  """Follows one row's tokens through its grammar.

  Args:
    matcher: An llguidance.LLMatcher used for this row only: its limits count every use.
    tokenizer: The model's tokens, an llguidance.LLTokenizer.
    vocab_size: V.

  Attributes:
    error: The reason why no further token can be chosen; None while one can.
  """

  def __init__(self, matcher: Any, tokenizer: Any, vocab_size: int) -> None:
    self._matcher, self._tokenizer, self._vocab_size = matcher, tokenizer, vocab_size
    self.error: str | None = None

  @property
  def accepting(self) -> bool:
    """Whether the tokens so far satisfy the grammar."""
    return self._matcher.is_accepting()

  @property
  def complete(self) -> bool:
    """Whether the tokens so far satisfy the grammar, and no further token can follow."""
    return self._matcher.is_stopped() and not self._matcher.is_error() and self.accepting

  def push(self, token: int) -> None:
    """Advance by the row's next token, which `fill` must have allowed; not an end token."""
    if self.error is None and not self._matcher.consume_token(token):
      self._fail()

  def fill(self, masks: np.ndarray, row: int, end_ids: Sequence[int]) -> None:
    """Write the mask of the tokens that may come next. After an error, it allows no token.

    Args:
      masks: [B, W] uint32, as in TokenMasks, with W from `mask_words`.
      row: Row of the masks.
      end_ids: Tokens that end the row. They are allowed if the tokens so far satisfy the grammar.
    """
    from llguidance.numpy import fill_next_token_bitmask

    mask = masks[row]
    if self.error is None:
      fill_next_token_bitmask(self._matcher, masks.view(np.int32), row)
      if self._matcher.is_error():
        self._fail()
    if self.error is not None:
      mask[:] = 0
      return
    _set_bit(mask, self._vocab_size, False)  # the library's own end token
    accepting = self.accepting
    for token in end_ids:
      if 0 <= token < self._vocab_size:
        _set_bit(mask, token, accepting)

  def exhausted(self, end_ids: Sequence[int]) -> bool:
    """Return whether the text so far satisfies the grammar and neither token nor end can follow."""
    masks = np.zeros((1, mask_words(self._vocab_size)), np.uint32)
    self.fill(masks, 0, end_ids)
    return self.error is None and self.accepting and not masks.any()

  def draft(self, proposed: Sequence[int], most: int) -> tuple[list[int], bool]:
    """Return a draft of the next tokens, and whether the grammar forces their text.

    The draft is `proposed` up to the first token that the grammar forbids; or the text that the
    grammar forces, if that has more tokens. How the text is split into tokens is a guess.

    Args:
      proposed: Token ids of a draft that ignores the grammar.
      most: Maximum number of tokens.
    """
    if self.error is not None:
      return [], False
    walk = self._matcher.deep_copy()  # an error of a copy is none of the row
    kept = list(proposed[: walk.validate_tokens(list(proposed))])
    forced = walk.compute_ff_bytes().decode(errors='ignore')
    tokens = self._tokenizer.greedy_tokenize(forced) if forced else []
    return (tokens[:most], True) if len(tokens) > len(kept) else (kept[:most], False)

  def fill_draft(
    self, masks: np.ndarray, row: int, end_ids: Sequence[int], draft: Sequence[int]
  ) -> int:
    """Write the masks of the next token, and of the token after each token of a draft.

    Args:
      masks: [K + 1, B, W] uint32, with K at least the length of the draft. All zeros.
      row: Row of the masks.
      end_ids: See `fill`.
      draft: Token ids.

    Returns:
      The number of tokens of the draft up to which masks are known. The row can't go on after
      further tokens, or they are forbidden.
    """
    self.fill(masks[0], row, end_ids)
    if self.error is not None:
      return 0
    walk = GrammarMatcher(self._matcher.deep_copy(), self._tokenizer, self._vocab_size)
    for i, token in enumerate(draft):
      if token in end_ids or not masks[i, row, token // 32] >> np.uint32(token % 32) & 1:
        return i
      walk.push(token)
      if walk.complete:
        return i
      walk.fill(masks[i + 1], row, end_ids)
      if walk.error is not None:
        return i
    return len(draft)

  def _fail(self) -> None:
    self.error = f"the row's grammar can't be followed any further: {match_error(self._matcher)}"


def _set_bit(mask: np.ndarray, token: int, value: bool) -> None:
  bit = np.uint32(1 << token % 32)
  if value:
    mask[token // 32] |= bit
  else:
    mask[token // 32] &= ~bit


def mask_words(vocab_size: int) -> int:
  """Return W, the 32-bit words of a mask: V tokens, and last the library's own end token."""
  return vocab_size // 32 + 1


def masks_of(
  matchers: Sequence[tuple[GrammarMatcher, Sequence[int]] | None], vocab_size: int
) -> TokenMasks:
  """Return the masks of the tokens that may come next in each row.

  Args:
    matchers: For each row its matcher and its end tokens; None for a row without a grammar.
    vocab_size: V.
  """
  masks = np.zeros((len(matchers), mask_words(vocab_size)), np.uint32)
  for row, each in enumerate(matchers):
    if each is not None:
      matcher, end_ids = each
      matcher.fill(masks, row, end_ids)
  return TokenMasks(masks, np.asarray([each is not None for each in matchers]))


class Grammars:
  """Compiles grammars for one model. Thread-safe.

  Args:
    vocabulary: Vocabulary of the model; None: no grammar can be used.
    vocab_size: V, rows of the model's embedding.

  Attributes:
    available: Whether grammars can be used: there is a vocabulary, and the library is installed.
  """

  def __init__(self, vocabulary: Vocabulary | None, vocab_size: int) -> None:
    self._vocabulary, self._vocab_size = vocabulary, vocab_size
    self._lock = threading.Lock()
    self._checked: collections.OrderedDict[Grammar, None] = collections.OrderedDict()
    installed = importlib.util.find_spec('llguidance') is not None
    self.available = vocabulary is not None and installed

  def matchers(self, grammar: Grammar | None, samples: int) -> list[GrammarMatcher]:
    """Check a grammar, within about GRAMMAR_SECONDS; return a matcher for each sample.

    Raises:
      RequestError: There is no vocabulary, or the grammar can't be used.
      UserError: The extra [structured] is not installed.
    """
    if grammar is None:
      return []
    self._check(grammar)
    return self.compiled(grammar, samples)

  def compiled(self, grammar: Grammar, samples: int) -> list[GrammarMatcher]:
    """Return a matcher for each sample of a grammar that this or another process has checked."""
    return [
      GrammarMatcher(compile_grammar(grammar, self._tokenizer), self._tokenizer, self._vocab_size)
      for _ in range(samples)
    ]

  def _check(self, grammar: Grammar) -> None:
    if self._vocabulary is None:
      raise RequestError('a grammar needs a vocabulary, and this engine has none')
    check_library()
    with self._lock:
      if grammar in self._checked:
        self._checked.move_to_end(grammar)
        return
    try:
      self._process.check(grammar)
    except GrammarRefused as refused:
      raise RequestError(f'grammar: {grammar.noun} {refused}') from None
    with self._lock:
      self._checked[grammar] = None
      if len(self._checked) > _CHECKED:
        self._checked.popitem(last=False)

  def warm_up(self) -> None:
    """If grammars can be used, do now the setup that would delay the first grammar."""
    if self.available:
      self.matchers(Grammar('json_object'), 1)

  @functools.cached_property
  def _texts(self) -> TokenBytes:
    assert self._vocabulary is not None
    return TokenBytes.of(self._vocabulary, self._vocab_size)

  @functools.cached_property
  def _tokenizer(self) -> Any:
    return build_tokenizer(self._texts)

  @functools.cached_property
  def _process(self) -> GrammarCheck:
    return GrammarCheck(self._texts)
