"""Generation of a static batch from Python: checks arguments, runs one program, returns rows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.adapters import NO_ADAPTERS, AdapterNames
from t5x_inference_ext.engine.inputs import (
  check_at_least,
  check_generation,
  check_positions,
  model_inputs,
  per_prompt,
  room,
)
from t5x_inference_ext.engine.request import Completion, finish_reason
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.sampling_arrays import end_id_array, stack_params
from t5x_inference_ext.engine.saved_generation import GenerationShape, SavedGeneration
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.options import is_whole

# Cache positions and new tokens are rounded up to a multiple of this. On v4, a cache of any other
# size takes up to 1.7 times as long to read; and similar limits then share a program.
SIZE_MULTIPLE = 8


class StaticOptions(NamedTuple):
  """Options of a static batch; see Engine.generate.

  Attributes:
    bos_id: Token that is put in front of each prompt; None: no token is.
    end_ids: Tokens that end a row.
    cache_size: Cache positions of each row; None: as many as needed.
    prompt_size: Length that prompts are padded to, or None.
    max_length: Maximum number of tokens of prompt and completion together, or None.
    prefill_chunk: Maximum number of prompt positions in one pass; None: all.
  """

  bos_id: int | None
  end_ids: tuple[int, ...]
  cache_size: int | None = None
  prompt_size: int | None = None
  max_length: int | None = None
  prefill_chunk: int | None = None


def generate_static(
  model: Model,
  weights: Weights,
  executable: SavedGeneration | None,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int | Sequence[int],
  sampling: SamplingParams | Sequence[SamplingParams],
  seeds: Sequence[int] | None,
  options: StaticOptions,
  names: AdapterNames = NO_ADAPTERS,
  adapter: str | None | Sequence[str | None] = None,
) -> list[Completion]:
  """Generate for a batch of prompts; arguments and errors are those of Engine.generate.

  Args:
    model: Decides mesh and layouts.
    weights: Weights on that mesh.
    executable: A saved program to run, or None.
    prompts: Token ids without BOS.
    max_new_tokens: See Engine.generate.
    sampling: See Engine.generate.
    seeds: See Engine.generate.
    options: The other options.
    names: Names of the adapters beside the weights.
    adapter: See Engine.generate.
  """
  prompts, limits, params, seeds = per_prompt(prompts, max_new_tokens, sampling, seeds)
  vocab_size = model.config.vocab_size
  check_generation(
    prompts, vocab_size, limits, options.cache_size, options.prompt_size, options.max_length
  )
  if options.prefill_chunk is not None:
    check_at_least(1, prefill_chunk=options.prefill_chunk)
  model.decode_sharding(len(prompts))
  longest = options.prompt_size or max(map(len, prompts))
  rows = names.of_rows(adapter, len(prompts))
  if executable is not None and any(rows):
    raise RequestError(
      f'the executable {executable.path} was compiled without adapters: run without it'
    )
  tokens, lengths = model_inputs(prompts, longest, options.bos_id)
  if any(map(names.prompt, rows)):
    tokens, lengths = names.inputs(tokens, lengths, rows)
  if executable is None:
    weights = names.weights_for(weights, model, rows)
  for i, length in enumerate(lengths.tolist()):
    check_positions(f'prompt {i}', length, model.config)
  stacked = stack_params(params, vocab_size)  # checks ids, too
  per_row = not is_whole(max_new_tokens) or not isinstance(sampling, SamplingParams)
  # The last generated token is never fed back, so it takes no position.
  size = max(tokens.shape[1], options.cache_size or tokens.shape[1] + max(limits) - 1)
  own: dict[str, Any] = {}
  if executable is None:  # one program, whatever the values of its array arguments
    own = dict(
      sampling_arrays=stacked,
      end_ids=end_id_array(options.end_ids, len(prompts)),
      limits=np.asarray(
        [room(limit, int(length), model.config) for limit, length in zip(limits, lengths)], np.int32
      ),
    )
    compiled, ends, most = SamplingParams(), -1, _rounded(max(limits))
    size = size if options.cache_size else _rounded(size)
  else:
    if len(options.end_ids) > 1:
      raise RequestError(
        f'the executable {executable.path} supports one token that ends a row, not '
        f'{len(options.end_ids)}: give eos_id'
      )
    compiled, ends, most = params[0], [*options.end_ids, -1][0], max(limits)
  shape = GenerationShape(
    len(prompts), tokens.shape[1] - 1, size, most, compiled, ends, options.max_length
  )
  program = programs.generation_for(
    model, weights, shape, executable, per_row, options.prefill_chunk
  )
  *inputs, own = programs.put(model, tokens, lengths, np.asarray(seeds).astype(np.uint32), own)
  generation = jax.device_get(program(weights, *inputs, **own))
  completions = []
  for row, n, score, failed, each in zip(*generation, params, strict=True):
    found = row[:n].tolist()
    reason = finish_reason(found, each, options.end_ids, bool(failed))
    completions.append(Completion(found, float(score), reason))
  return completions


def _rounded(size: int) -> int:
  return -(-size // SIZE_MULTIPLE) * SIZE_MULTIPLE
