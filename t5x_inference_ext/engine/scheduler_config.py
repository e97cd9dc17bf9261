"""What a run of requests needs: its slots, the sizes of its caches, and what its prompts share."""

from collections.abc import Sequence

from t5x_inference_ext.engine import shared_prefix
from t5x_inference_ext.engine.inputs import check_at_least
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.scheduler import Request, SchedulerConfig
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.transformer import Model

SIZE_MULTIPLE = 16  # sizes are rounded up to it, so that similar runs compile alike


def config_for(
  model: Model,
  requests: Sequence[Request],
  *,
  slots: int = 32,
  eos_id: int = 1,
  share: bool = True,
  prompt: int | None = None,
  size: int | None = None,
  **options,
) -> tuple[SchedulerConfig, tuple[int, ...]]:
  """A plan for requests, and the beginning that they share.

  Args:
    model: decides what the mesh takes.
    requests: all of them; or some, if `prompt` and `size` say what the others need. At least one.
    slots: rows decoded together; fewer for fewer samples, rounded up to what the mesh takes.
    eos_id: ends a row; -1 never does.
    share: whether to look for what prompts begin with.
    prompt, size: at least so many positions for prompts, and for prompts and new tokens.
    options: Plan's others: chunk, prompts, budget, steps, top.

  Raises:
    RequestError: an option out of its range.
  """
  check_at_least(1, slots=slots)
  top = options.get('top', 0)
  if not 0 <= top <= model.config.vocab_size:
    raise RequestError(
      f'top must be 0 to {model.config.vocab_size}, the tokens of the model, got {top}'
    )
  shared = shared_prefix.find_shared_prefix([r.tokens for r in requests]) if share else ()
  rests = [len(r.tokens) - shared_prefix.common_length(shared, r.tokens) for r in requests]
  longest = max(*(len(r.tokens) for r in requests), prompt or 0)
  rest = max(*rests, prompt or 0)
  size = max(*(n + r.limit - 1 for n, r in zip(rests, requests)), size or 0, rest)
  like: tuple[SamplingParams, ...] = tuple(dict.fromkeys(r.sampling for r in requests))
  samples = sum(len(r.seeds) for r in requests)
  options = {'prompts': model.prefilling.padded_batch(1), **options}
  rows = model.padded_batch(slots if prompt is not None else min(slots, samples))
  return SchedulerConfig(
    rows, _rounded(size), _rounded(longest), _rounded(rest), like, eos_id, **options
  ), shared


def _rounded(size: int) -> int:
  return -(-size // SIZE_MULTIPLE) * SIZE_MULTIPLE
