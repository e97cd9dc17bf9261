"""Generation of a static batch: prefill once, then decode until every row has ended."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_inference_ext.engine.sampling import SamplingArrays, SamplingParams, stack_params
from t5x_inference_ext.engine.slots import replicated
from t5x_inference_ext.engine.state import RowParams, advance, initial_state
from t5x_inference_ext.model.chunks import prefill_in_chunks
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights


class Generation(NamedTuple):
  """What generate returns.

  Attributes:
    tokens: [B, max_new_tokens] int32, 0 after a row's end.
    lengths: [B] int32, how many of them were generated, EOS included.
    scores: [B] float32, the sum of their log-probabilities under the model's own distribution (temperature 1, nothing
      dropped).
  """

  tokens: jax.Array
  lengths: jax.Array
  scores: jax.Array


def generate_batch(
  model: Model,
  weights: Weights,
  tokens: jax.Array,
  lengths: jax.Array,
  seeds: jax.Array,
  sampling_arrays: SamplingArrays | None = None,
  limits: jax.Array | None = None,
  *,
  sampling: SamplingParams = SamplingParams(),
  max_new_tokens: int,
  eos_id: int,
  cache_size: int,
  max_length: int | None = None,
  prefill_chunk: int | None = None,
) -> Generation:
  """Generates for a batch; to be jitted, with the keyword arguments and `model` static.

  Args:
    model: decides mesh and layout.
    weights: on that mesh.
    tokens: [B, T] int32 model inputs: BOS, then the prompt, from the left.
    lengths: [B] int32, at least 1.
    seeds: [B] uint32.
    samplers: how each row chooses tokens, or None: all as `sampler` says.
    limits: [B] int32, of each row's new tokens, or None: max_new_tokens, which is the highest, of all.
    sampler: compiled in; without effect beside `samplers`.
    max_new_tokens: the limit for each row.
    eos_id: ends a row; -1 never does.
    cache_size: S; at least T and every row's length + max_new_tokens - 1 (the last token is not fed back).
    max_length: also ends a row when prompt and new tokens, BOS not counted, are this many: T5X's way to bound it.
    prefill_chunk: positions of the prompts that one pass takes; None: all.
  """
  count = tokens.shape[0]
  if sampling_arrays is None:
    sampling_arrays = stack_params([sampling] * count, model.config.vocab_size)
  limits = jnp.full(count, max_new_tokens) if limits is None else limits
  if max_length is not None:
    limits = jnp.minimum(limits, max_length - (lengths - 1))
  rows = RowParams(sampling_arrays, seeds, limits, eos_id)
  if prefill_chunk is None:
    logits, cache = model.prefill(weights, tokens, lengths, cache_size)
  else:
    logits, cache = prefill_in_chunks(model, weights, tokens, lengths, cache_size, prefill_chunk)

  def step(state):
    i, progress, cache, out, scores = state
    logits, cache = model.decode_step(weights, cache, progress.tokens)
    progress, chosen = advance(rows, progress, logits, cache.lengths)
    out = jax.lax.dynamic_update_slice(out, chosen.tokens[:, None], (0, i))
    return i + 1, progress, cache, out, scores + chosen.log_probs

  def running(state):
    return ~jnp.all(state[1].ended)

  progress, chosen = advance(
    rows, initial_state(rows, tokens, lengths, model.config.vocab_size), logits, lengths
  )
  out = jnp.zeros((count, max_new_tokens), jnp.int32).at[:, 0].set(chosen.tokens)
  _, progress, _, out, scores = jax.lax.while_loop(
    running, step, (1, progress, cache, out, chosen.log_probs)
  )
  return replicated(model, Generation(out, progress.counts, scores))
