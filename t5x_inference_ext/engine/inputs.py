"""Conversion of prompts to model inputs, and checks of what callers pass in."""

from collections.abc import Iterable, Mapping, Sequence
import reprlib
from typing import Any

import numpy as np

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.options import LARGEST_WHOLE, is_whole
from t5x_inference_ext.text.settings import BOS_ID


def _shown(value: Any) -> str:
  """Return a value for a message, cut to a few words."""
  try:
    return reprlib.repr(value)
  except ValueError:
    return 'a number of thousands of digits'  # Python refuses to convert so many to text


def model_inputs(
  prompts: Sequence[Sequence[int]], size: int, bos_id: int | None = BOS_ID
) -> tuple[np.ndarray, np.ndarray]:
  """Return prompts as model inputs.

  Args:
    prompts: Token ids without BOS.
    size: Least number of positions, BOS not counted.
    bos_id: Token in front of each prompt; None if the model has no BOS.

  Returns:
    Tokens [B, size + 1] int32: BOS, the prompt, then padding. Lengths [B] int32, BOS included.
    Without BOS the shapes are the same, so that saved programs serve both kinds of models.

  Raises:
    RequestError: A prompt has no token and there is no BOS.
  """
  bos = [] if bos_id is None else [bos_id]
  tokens = np.zeros((len(prompts), size + 1), np.int32)
  for i, (row, prompt) in enumerate(zip(tokens, prompts)):
    check_start(f'prompt {i}', prompt, bos_id)
    row[: len(bos) + len(prompt)] = [*bos, *prompt]
  return tokens, np.asarray([len(bos) + len(p) for p in prompts], np.int32)


def check_start(what: str, prompt: Sequence[int], bos_id: int | None) -> None:
  """Raise RequestError for a prompt without a token where there is no BOS.

  Args:
    what: Beginning of the message.
    prompt: Token ids without BOS.
    bos_id: Token in front of each prompt, or None.
  """
  if bos_id is None and not len(prompt):
    raise RequestError(f'{what} is empty, and this model has no BOS to start from')


def check_positions(what: str, tokens: int, config: ModelConfig) -> None:
  """Raise RequestError for more tokens than a model has learned positions.

  Args:
    what: Beginning of the message.
    tokens: Number of tokens that the model reads, BOS included.
    config: The model.
  """
  if config.num_positions is not None and tokens > config.num_positions:
    raise RequestError(
      f'{what} has {tokens} tokens to read, BOS included, and the model learned only '
      f'{config.num_positions} positions: shorten it'
    )


def room(limit: int, tokens: int, config: ModelConfig) -> int:
  """Return the maximum number of new tokens: `limit`, or fewer where learned positions end.

  Args:
    limit: Maximum number of new tokens that is requested.
    tokens: Number of tokens of the prompt, BOS included.
    config: The model.
  """
  if config.num_positions is None:
    return limit
  return min(limit, config.num_positions - tokens + 1)  # the last new token is not read


def end_ids_of(eos_id: int | Sequence[int]) -> tuple[int, ...]:
  """Return the ids that end rows as a tuple, given one id or several; negative ids are dropped.

  Raises:
    RequestError: An id is not a whole number of at least -1.
  """
  ids = plain(eos_id)
  ids = ids if isinstance(ids, list) else [ids]
  for token in ids:
    check_at_least(-1, eos_id=token)
  return tuple(int(token) for token in ids if token >= 0)


def plain(value: Any) -> Any:
  """Convert iterables, such as NumPy and JAX arrays, to lists; return anything else unchanged."""
  if hasattr(value, 'tolist') and hasattr(value, 'ndim'):
    value = np.asarray(value).tolist()
  if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, Iterable):
    return value
  # Items of a list may be JAX scalars, which Python does not accept as integers.
  return [np.asarray(x).item() if getattr(x, 'ndim', None) == 0 else x for x in value]


def plain_prompts(prompts: Any) -> list[Any]:
  """Convert prompts, any iterables or arrays, to a list of lists.

  Items that are not iterable are kept: check_tokens refuses them later.

  Raises:
    RequestError: `prompts` is not iterable, or is a text.
  """
  found = plain(prompts)
  if not isinstance(found, list):
    raise RequestError(f'prompts must be a list of prompts, got {_shown(prompts)}')
  return [plain(prompt) for prompt in found]


def for_each(prompts: Sequence[Sequence[int]], what: str, value: Any) -> list:
  """Return one value for each prompt: `value` itself, or the values of an iterable.

  Raises:
    RequestError: The iterable is not as long as `prompts`. The message calls its items `what`.
  """
  value = plain(value)
  values = value if isinstance(value, list) else [value] * len(prompts)
  if len(values) != len(prompts):
    raise RequestError(f'{len(prompts)} prompts need as many {what}, got {len(values)}')
  return values


def per_prompt(
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int | Sequence[int],
  sampling: SamplingParams | Sequence[SamplingParams],
  seeds: Sequence[int] | None,
) -> tuple[list[list[int]], list[int], list[SamplingParams], list[int]]:
  """Return lists of prompts, limits, sampling parameters and seeds (default 0), one per prompt.

  Raises:
    RequestError: A sequence is not as long as `prompts`, a seed is out of range, or a sampling
      argument is not SamplingParams.
  """
  prompts = plain_prompts(prompts)
  each_seed = for_each(prompts, 'seeds', 0 if seeds is None else seeds)
  check_seeds(each_seed)
  limits = for_each(prompts, 'limits', max_new_tokens)
  params = for_each(prompts, 'sampling parameters', sampling)
  for each in params:
    if not isinstance(each, SamplingParams):
      raise RequestError(f'sampling must be SamplingParams, got {_shown(each)}')
  return prompts, limits, params, each_seed


def check_at_least(least: int, **values: Any) -> None:
  """Raise RequestError, naming the argument, unless each is a whole number of at least `least`.

  Numbers beyond int32 are refused, too: no size here is as large.
  """
  for name, value in values.items():
    if not is_whole(value):
      raise RequestError(f'{name} must be a whole number, got {_shown(value)}')
    if value < least:
      raise RequestError(f'{name} must be at least {least}, got {_shown(int(value))}')
    if value > LARGEST_WHOLE:
      raise RequestError(f'{name} must be at most {LARGEST_WHOLE}, got {_shown(int(value))}')


def check_tokens(what: str, tokens: Any, vocab_size: int) -> None:
  """Raise RequestError unless `tokens` are ids below vocab_size. The message begins with `what`."""
  # Bytes are a sequence of whole numbers too, but their ids depend on the vocabulary.
  if isinstance(tokens, (str, bytes, bytearray)) or not isinstance(tokens, (Sequence, np.ndarray)):
    raise RequestError(f'{what} must be token ids, got {_shown(tokens)}')
  for token in tokens:
    if not is_whole(token):
      raise RequestError(f'{what} holds {_shown(token)}: token ids are whole numbers')
    if not 0 <= token < vocab_size:
      raise RequestError(
        f'{what} holds token {_shown(int(token))}, outside the vocabulary of {vocab_size}'
      )


def plain_pairs(pairs: Any, vocab_size: int) -> list[tuple[list[int], list[int]]]:
  """Return pairs (prompt, completion) as lists of token ids.

  Raises:
    RequestError: An item is not a pair of lists of token ids. The message gives its index, from 0.
  """
  found = []
  for i, pair in enumerate(plain_prompts(pairs)):
    if not isinstance(pair, list) or len(pair) != 2:
      raise RequestError(f'pair {i} must be (prompt, completion), got {_shown(pair)}')
    prompt, completion = map(plain, pair)
    check_tokens(f'the prompt of pair {i}', prompt, vocab_size)
    check_tokens(f'the completion of pair {i}', completion, vocab_size)
    found.append((prompt, completion))
  return found


def check_arrays(vocab_size: int, *ids: Any, weights: Any = None) -> None:
  """Raise RequestError unless arrays of token ids, and tokens' `weights`, have one shape [B, T].

  Empty arrays, and ids outside the vocabulary, are refused too.
  """
  arrays = [_numbers(x, 'iuf') for x in ids]
  if weights is not None:
    arrays.append(_numbers(weights, 'iufb'))
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


def _numbers(values: Any, kinds: str) -> np.ndarray:
  """Return values as an array; raise RequestError unless its NumPy dtype.kind is in `kinds`."""
  try:
    found = np.asarray(values)
  except (ValueError, TypeError) as error:
    raise RequestError('tokens must be arrays [B, T], and rows here differ in length') from error
  if found.dtype.kind not in kinds:
    raise RequestError(f'tokens must be arrays [B, T] of numbers, got {found.dtype}')
  return found


def check_seeds(seeds: Sequence[Any]) -> None:
  """Raise RequestError for a seed that is not a whole number from 0 to 2**32 - 1."""
  wrong = [seed for seed in seeds if not is_whole(seed) or not 0 <= seed < 2**32]
  if wrong:
    raise RequestError(f'seeds must be whole numbers from 0 to 2**32 - 1, got {_shown(wrong[0])}')


def check_generation(
  prompts: Sequence[Sequence[int]],
  vocab_size: int,
  limits: Sequence[int],
  cache_size: int | None = None,
  prompt_size: int | None = None,
  max_length: int | None = None,
) -> None:
  """Raise RequestError for prompts that Engine.generate cannot serve.

  The error names the prompt, counted from 0.

  Args:
    prompts: Token ids without BOS.
    vocab_size: V.
    limits: Maximum number of new tokens of each prompt. Every row's cache has room for the highest.
    cache_size: See Engine.generate.
    prompt_size: See Engine.generate.
    max_length: See Engine.generate.
  """
  if not len(prompts):
    raise RequestError('there are no prompts')
  for limit in limits:
    check_at_least(1, max_new_tokens=limit)
  max_new_tokens = max(limits)
  for name, size in {'cache_size': cache_size, 'max_length': max_length}.items():
    if size is not None:
      check_at_least(1, **{name: size})
  if prompt_size is not None:
    check_at_least(0, prompt_size=prompt_size)
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
    # BOS takes a position; the last new token takes none.
    needed = (
      len(prompt) + max_new_tokens
      if max_length is None
      else min(len(prompt) + max_new_tokens, max_length)
    )
    if cache_size is not None and needed > cache_size:
      raise RequestError(
        f'prompt {i} is longer than the cache: {len(prompt)} tokens and {needed - len(prompt)} new '
        f'ones need {needed} positions, the cache has {cache_size}: raise cache_size, lower '
        'max_new_tokens, or shorten the prompt'
      )
