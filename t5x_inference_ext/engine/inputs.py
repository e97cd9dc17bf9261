"""Prompts as the model takes them, and what generation could not serve."""

from collections.abc import Sequence
import numbers
from typing import Any

import numpy as np

from t5x_inference_ext.errors import RequestError

BOS_ID = 0  # T5X shifts targets right and starts from 0
EOS_ID = 1


def model_inputs(prompts: Sequence[Sequence[int]], size: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts -> (BOS and prompt [B, size + 1] int32 from the left, lengths [B] int32 with BOS counted)."""
  tokens = np.full((len(prompts), size + 1), BOS_ID, np.int32)
  for row, prompt in zip(tokens, prompts):
    row[1 : len(prompt) + 1] = prompt
  return tokens, np.asarray([len(p) + 1 for p in prompts], np.int32)


def for_each(prompts: Sequence[Sequence[int]], what: str, value: Any) -> list:
  """What is given of all prompts, or in a sequence for each, as one for each. Raises RequestError for another number."""
  values = list(value) if isinstance(value, (Sequence, np.ndarray)) else [value] * len(prompts)
  if len(values) != len(prompts):
    raise RequestError(f'{len(prompts)} prompts need as many {what}, got {len(values)}')
  return values


def check_at_least(least: int, **values: Any) -> None:
  """Raises RequestError for a value that is no whole number, or below `least`, by its name."""
  for name, value in values.items():
    if not is_whole(value):
      raise RequestError(f'{name} must be a whole number, got {value!r}')
    if value < least:
      raise RequestError(f'{name} must be at least {least}, got {value}')


def check_tokens(what: str, tokens: Any, vocab_size: int) -> None:
  """Raises RequestError for what are no token ids of a vocabulary of so many, `what` being their name."""
  if isinstance(tokens, str) or not isinstance(tokens, (Sequence, np.ndarray)):
    raise RequestError(f'{what} must be token ids, got {tokens!r}')
  for token in tokens:
    if not is_whole(token):
      raise RequestError(f'{what} holds {token!r}: token ids are whole numbers')
    if not 0 <= token < vocab_size:
      raise RequestError(f'{what} holds token {token}, outside the vocabulary of {vocab_size}')


def check_pairs(pairs: Sequence[tuple[Any, Any]], vocab_size: int) -> None:
  """The same of (prompt, completion), naming the pair (counted from 0)."""
  for i, (prompt, completion) in enumerate(pairs):
    check_tokens(f'the prompt of pair {i}', prompt, vocab_size)
    check_tokens(f'the completion of pair {i}', completion, vocab_size)


def check_arrays(vocab_size: int, *ids: Any, weights: Any = None) -> None:
  """Raises RequestError for arrays of token ids, and weights of them, that are not [B, T] of one shape, or empty."""
  arrays = [np.asarray(x) for x in (*ids, *(() if weights is None else (weights,)))]
  shapes = [x.shape for x in arrays]
  if len(set(shapes)) > 1 or len(shapes[0]) != 2 or not arrays[0].size:
    raise RequestError(
      f'tokens must be arrays [B, T] of one shape, not empty, got {" and ".join(map(str, shapes))}'
    )
  for x in arrays[: len(ids)]:
    wrong = x[(x < 0) | (x >= vocab_size) | (x % 1 != 0)]
    if wrong.size:
      raise RequestError(
        f'the arrays hold token {wrong[0]}: ids are whole numbers, 0 to {vocab_size - 1}'
      )


def check_seeds(seeds: Sequence[Any]) -> None:
  """Raises RequestError for seeds that are not those of rows."""
  wrong = [seed for seed in seeds if not is_whole(seed) or not 0 <= seed < 2**32]
  if wrong:
    raise RequestError(f'seeds must be whole numbers from 0 to 2**32 - 1, got {wrong[0]!r}')


def is_whole(value: Any) -> bool:
  """Whether it is an integer, of Python or numpy."""
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_generation(
  prompts: Sequence[Sequence[int]],
  vocab_size: int,
  limits: Sequence[int],
  cache_size: int | None = None,
  prompt_size: int | None = None,
  max_length: int | None = None,
) -> None:
  """Raises RequestError for what generate could not serve, naming the prompt (counted from 0).

  Args:
    prompts: token ids without BOS.
    vocab_size: V.
    limits: of each prompt's new tokens. All caches have room for the highest.
    cache_size, prompt_size, max_length: as Engine.generate's.
  """
  if not len(prompts):
    raise RequestError('there are no prompts')
  for limit in limits:
    check_at_least(1, max_new_tokens=limit)
  max_new_tokens = max(limits)
  for i, prompt in enumerate(prompts):
    check_tokens(f'prompt {i}', prompt, vocab_size)
    if prompt_size is not None and len(prompt) > prompt_size:
      raise RequestError(
        f'prompt {i} has {len(prompt)} tokens, more than prompt_size={prompt_size}'
      )
    if max_length is not None and len(prompt) >= max_length:
      raise RequestError(
        f'prompt {i} has {len(prompt)} tokens: max_length={max_length} leaves no room for a new one'
      )
    # BOS takes a position, the last new token none.
    needed = (
      len(prompt) + max_new_tokens
      if max_length is None
      else min(len(prompt) + max_new_tokens, max_length)
    )
    if cache_size is not None and needed > cache_size:
      raise RequestError(
        f'prompt {i} is longer than the cache: {len(prompt)} tokens and {needed - len(prompt)} new ones need '
        f'{needed} positions, the cache has {cache_size}: raise cache_size, lower max_new_tokens, or shorten the prompt'
      )
