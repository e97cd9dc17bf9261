"""Prompts as requests of a scheduler: the part of Engine that needs no scheduler."""

from collections.abc import Sequence
import dataclasses

from t5x_inference_ext.engine.inputs import (
  check_at_least,
  check_generation,
  check_start,
  end_ids_of,
  per_prompt,
)
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.sampling_arrays import stack_params
from t5x_inference_ext.engine.scorer import Scorer


@dataclasses.dataclass(frozen=True)
class RequestMaker(Scorer):
  """A model that makes requests of prompts, with its BOS and end ids."""

  @property
  def bos(self) -> tuple[int, ...]:
    """The tokens in front of each prompt: BOS, or none."""
    return () if self.checkpoint.bos_id is None else (self.checkpoint.bos_id,)

  def _end_ids(self, eos_id: int | Sequence[int] | None) -> tuple[int, ...]:
    return tuple(self.checkpoint.end_ids) if eos_id is None else end_ids_of(eos_id)

  def requests(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    seeds: Sequence[int] | None = None,
    samples: int = 1,
  ) -> list[Request]:
    """Return prompts as requests of a scheduler, with Engine.stream's arguments and errors."""
    prompts, limits, params, seeds = per_prompt(prompts, max_new_tokens, sampling, seeds)
    vocab_size = self.model.config.vocab_size
    check_generation(prompts, vocab_size, limits)
    stack_params(params, vocab_size)  # checks ids
    check_at_least(1, samples=samples)
    for i, prompt in enumerate(prompts):
      check_start(f'prompt {i}', prompt, self.checkpoint.bos_id)
    return [
      Request(
        (*self.bos, *prompt), tuple((int(seed) + i) % 2**32 for i in range(samples)), limit, each
      )
      for prompt, seed, limit, each in zip(prompts, seeds, limits, params)
    ]
