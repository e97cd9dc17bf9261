"""Prompts as the model takes them, and what generation could not serve."""

from typing import Any, Sequence

import numpy as np

from t5x_inference_ext.errors import RequestError

BOS_ID = 0  # T5X shifts targets right and starts from 0
EOS_ID = 1


def model_inputs(prompts: Sequence[Sequence[int]], size: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts -> (BOS and prompt [B, size + 1] int32 from the left, lengths [B] int32 with BOS counted)."""
  tokens = np.full((len(prompts), size + 1), BOS_ID, np.int32)
  for row, prompt in zip(tokens, prompts):
    row[1:len(prompt) + 1] = prompt
  return tokens, np.asarray([len(p) + 1 for p in prompts], np.int32)


def for_each(prompts: Sequence[Sequence[int]], what: str, value: Any) -> list:
  """What is given of all prompts, or in a sequence for each, as one for each. Raises RequestError for another number."""
  values = list(value) if isinstance(value, (Sequence, np.ndarray)) else [value] * len(prompts)
  if len(values) != len(prompts):
    raise RequestError(f'{len(prompts)} prompts need as many {what}, got {len(values)}')
  return values


def check_generation(
    prompts: Sequence[Sequence[int]], vocab_size: int, limits: Sequence[int], cache_size: int | None = None,
    prompt_size: int | None = None, max_length: int | None = None) -> None:
  """Raises RequestError for what generate could not serve, naming the prompt (counted from 0).

  Args:
    prompts: token ids without BOS.
    vocab_size: V.
    limits: of each prompt's new tokens. All caches have room for the highest.
    cache_size, prompt_size, max_length: as Engine.generate's.
  """
  if not len(prompts):
    raise RequestError('there are no prompts')
  if min(limits) < 1:
    raise RequestError(f'max_new_tokens must be at least 1, got {min(limits)}')
  max_new_tokens = max(limits)
  for i, prompt in enumerate(prompts):
    wrong = [t for t in prompt if not 0 <= t < vocab_size]
    if wrong:
      raise RequestError(f'prompt {i} holds token {wrong[0]}, outside the vocabulary of {vocab_size}')
    if prompt_size is not None and len(prompt) > prompt_size:
      raise RequestError(f'prompt {i} has {len(prompt)} tokens, more than prompt_size={prompt_size}')
    if max_length is not None and len(prompt) >= max_length:
      raise RequestError(f'prompt {i} has {len(prompt)} tokens: max_length={max_length} leaves no room for a new one')
    # BOS takes a position, the last new token none.
    needed = len(prompt) + max_new_tokens if max_length is None else min(len(prompt) + max_new_tokens, max_length)
    if cache_size is not None and needed > cache_size:
      raise RequestError(
          f'prompt {i} is longer than the cache: {len(prompt)} tokens and {needed - len(prompt)} new ones need '
          f'{needed} positions, the cache has {cache_size}: raise cache_size, lower max_new_tokens, or shorten the prompt')
