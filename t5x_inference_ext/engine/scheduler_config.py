"""The sizes that a scheduler's programs are compiled for, and their choice for given requests."""

from collections.abc import Sequence
import dataclasses
import itertools
from typing import Any

from t5x_inference_ext.engine import shared_prefix
from t5x_inference_ext.engine.inputs import check_at_least
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.transformer import Model

SIZE_MULTIPLE = 16  # sizes are rounded up to it, so that similar runs share compilations
SMALLEST_CHUNK = 16  # a prompt's last chunk is padded to this, or to a power of two above


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
  """The sizes that a scheduler's programs are compiled for.

  Attributes:
    slots: B, rows decoded together. The mesh must be able to split it (Model.padded_batch).
    cache_size: S, cache positions of each slot, not counting the shared prefix: room for the rest
      of a prompt and all its new tokens except the last.
    prompt_size: Most tokens of a prompt, BOS included.
    rest_size: Most tokens of a prompt after the shared prefix.
    sampling_choices: Sampling parameters that requests may have.
    eos_id: Token that ends a row; -1 never does.
    prefill_chunk: Most positions of each prompt in one prefill pass.
    prefill_rows: R, prompts that are prefilled together.
    prefill_budget: Most positions prefilled between decode steps while rows decode.
    decode_steps: Decode steps in one call of the compiled loop, when no request waits.
    top_log_probs: How many of the most likely tokens are returned with each token.

  Raises:
    RequestError: A number that is too small.
  """

  slots: int
  cache_size: int
  prompt_size: int
  rest_size: int
  sampling_choices: tuple[SamplingParams, ...] = (SamplingParams(),)
  eos_id: int = 1
  prefill_chunk: int = 256
  prefill_rows: int = 1
  prefill_budget: int = 2048
  decode_steps: int = 16
  top_log_probs: int = 0

  def __post_init__(self) -> None:
    for name in (
      'slots',
      'cache_size',
      'prompt_size',
      'rest_size',
      'prefill_chunk',
      'prefill_rows',
      'prefill_budget',
      'decode_steps',
    ):
      if getattr(self, name) < 1:
        raise RequestError(f'{name} must be at least 1, got {getattr(self, name)}')


def chunk_sizes(config: SchedulerConfig) -> list[int]:
  """Return the sizes of prefill chunks: powers of two from SMALLEST_CHUNK, then the config's."""
  largest = min(config.prefill_chunk, _power_of_two(config.rest_size))
  powers = (SMALLEST_CHUNK << i for i in itertools.count())
  return [*itertools.takewhile(lambda size: size < largest, powers), largest]


def config_for(
  model: Model,
  requests: Sequence[Request],
  *,
  slots: int = 32,
  eos_id: int = 1,
  share: bool = True,
  prompt_size: int | None = None,
  cache_size: int | None = None,
  **options: Any,
) -> tuple[SchedulerConfig, tuple[int, ...]]:
  """Return a config that fits the requests, and the prefix that their prompts share.

  Args:
    model: Decides which numbers of rows the mesh can split.
    requests: All requests; or at least one of them, if `prompt_size` and `cache_size` cover the
      others.
    slots: Most rows decoded together. Fewer if there are fewer samples; rounded up for the mesh.
    eos_id: Token that ends a row; -1 never does.
    share: Whether to look for a prefix that prompts share.
    prompt_size: Room for a prompt, in tokens, at least.
    cache_size: Room for a prompt and its new tokens, in positions, at least.
    **options: Other fields of SchedulerConfig.

  Raises:
    RequestError: An option out of its range.
  """
  check_at_least(1, slots=slots)
  vocab_size = model.config.vocab_size
  top = options.get('top_log_probs', 0)
  if not 0 <= top <= vocab_size:
    raise RequestError(
      f'top_log_probs must be 0 to {vocab_size}, the size of the vocabulary, got {top}'
    )
  prefix = shared_prefix.find_shared_prefix([r.tokens for r in requests]) if share else ()
  rests = [len(r.tokens) - shared_prefix.common_length(prefix, r.tokens) for r in requests]
  longest = max(*(len(r.tokens) for r in requests), prompt_size or 0)
  rest = max(*rests, prompt_size or 0)
  positions = (n + r.limit - 1 for n, r in zip(rests, requests))
  size = max(*positions, cache_size or 0, rest)
  samples = sum(len(r.seeds) for r in requests)
  rows = model.padded_batch(slots if prompt_size is not None else min(slots, samples))
  config = SchedulerConfig(
    slots=rows,
    cache_size=_rounded(size),
    prompt_size=_rounded(longest),
    rest_size=_rounded(rest),
    sampling_choices=tuple(dict.fromkeys(r.sampling for r in requests)),
    eos_id=eos_id,
    **{'prefill_rows': model.prefilling.padded_batch(1), **options},
  )
  return config, prefix


def _power_of_two(least: int) -> int:
  return 1 << (least - 1).bit_length()


def _rounded(size: int) -> int:
  return -(-size // SIZE_MULTIPLE) * SIZE_MULTIPLE
