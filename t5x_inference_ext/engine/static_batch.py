"""Generation of a static batch: prefill once, then decode until every row has ended."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from t5x_inference_ext.engine.advance import advance, advance_on_shard
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.sampling_arrays import SamplingArrays, end_id_array, stack_params
from t5x_inference_ext.engine.slots import replicated
from t5x_inference_ext.engine.state import DecodeState, RowParams, initial_state
from t5x_inference_ext.engine.state_rows import constrain_state, state_specs
from t5x_inference_ext.model.cache import KVCache
from t5x_inference_ext.model.chunks import prefill_in_chunks
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights

# State of the loop in generate_batch: step, state, cache, tokens so far, scores so far.
_Carry = tuple[jax.Array, DecodeState, KVCache, jax.Array, jax.Array]


class Generation(NamedTuple):
  """The rows that a static batch generated.

  Attributes:
    tokens: [B, max_new_tokens] int32. Generated ids; 0 after a row's end.
    lengths: [B] int32. Number of generated ids, EOS included.
    scores: [B] float32. Sum of the ids' log-probabilities under the unmodified model: temperature
      1, without top_k, top_p, penalties or bias.
    failed: [B] bool. Whether the row ended early because no token could be chosen: its logits were
      not finite, or every token was forbidden.
  """

  tokens: jax.Array
  lengths: jax.Array
  scores: jax.Array
  failed: jax.Array


def generate_batch(
  model: Model,
  weights: Weights,
  tokens: jax.Array,
  lengths: jax.Array,
  seeds: jax.Array,
  sampling_arrays: SamplingArrays | None = None,
  limits: jax.Array | None = None,
  end_ids: jax.Array | None = None,
  *,
  sampling: SamplingParams = SamplingParams(),
  max_new_tokens: int,
  eos_id: int = -1,
  cache_size: int,
  max_length: int | None = None,
  prefill_chunk: int | None = None,
) -> Generation:
  """Generate for a batch of prompts. Under jit, `model` and the keyword arguments are static.

  Args:
    model: Decides mesh and layouts.
    weights: Weights on that mesh.
    tokens: [B, T] int32. Model inputs: BOS, then the prompt, then padding.
    lengths: [B] int32. Number of valid tokens in each row; at least 1.
    seeds: [B] uint32. Seed of each row's sampling noise.
    sampling_arrays: Sampling parameters of each row; None: `sampling` for all rows.
    limits: [B] int32. Maximum number of new tokens of each row, at most `max_new_tokens`; None:
      `max_new_tokens`.
    end_ids: [B, N] int32. Tokens that end each row, -1 for none; None: `eos_id` for all.
    sampling: Sampling parameters of all rows, constants of the program. Ignored if
      `sampling_arrays` is given.
    max_new_tokens: Maximum number of new tokens of any row.
    eos_id: Token that ends a row; -1 never does. Ignored if `end_ids` is given.
    cache_size: S, positions of each row's cache. At least T, and at least each row's length +
      max_new_tokens - 1: the last token is not fed back.
    max_length: A row also ends when its prompt and new tokens together, without BOS, reach this
      number, as in T5X.
    prefill_chunk: Maximum number of prompt positions in one pass; None: all.

  Returns:
    The generated rows, replicated on every device.
  """
  count = tokens.shape[0]
  if sampling_arrays is None:
    sampling_arrays = stack_params([sampling] * count, model.config.vocab_size)
  limits = jnp.full(count, max_new_tokens) if limits is None else limits
  if max_length is not None:
    limits = jnp.minimum(limits, max_length - (lengths - 1))
  if end_ids is None:
    end_ids = jnp.asarray(end_id_array(eos_id, count))
  rows = RowParams(sampling_arrays, seeds, limits, end_ids, jnp.zeros(count, jnp.int32))
  if prefill_chunk is None:
    logits, cache = model.prefill(weights, tokens, lengths, cache_size)
  else:
    logits, cache = prefill_in_chunks(model, weights, tokens, lengths, cache_size, prefill_chunk)

  soft, vocab_size = weights.soft_prompts is not None, model.config.vocab_size
  state = initial_state(rows, tokens, lengths, vocab_size, soft_prompts=soft)
  state = constrain_state(model, state)
  state, chosen = advance(rows, state, logits, lengths, model)
  out = jnp.zeros((count, max_new_tokens), jnp.int32).at[:, 0].set(chosen.tokens)
  attention, specs = model.decode_sharding(count), state_specs(model, state)
  # The loop runs on shards, as in slot_steps.decode_steps: no state of rows is split.
  run = jax.shard_map(
    functools.partial(_steps_on_shard, model),
    mesh=model.mesh,
    in_specs=(
      model.weight_specs(weights),
      model.cache_spec(attention, weights),
      P(),
      P(),
      specs,
      P(),
      P(),
    ),
    out_specs=(specs, P(), P()),
    check_vma=False,
  )
  state, out, scores = run(weights, cache, rows, lengths, state, out, chosen.log_probs)
  return replicated(model, Generation(out, state.counts, scores, state.failed))


def _steps_on_shard(
  model: Model,
  weights: Weights,
  cache: KVCache,
  rows: RowParams,
  lengths: jax.Array,
  state: DecodeState,
  out: jax.Array,
  scores: jax.Array,
) -> tuple[DecodeState, jax.Array, jax.Array]:
  """Decode until every row has ended, on one shard; return the last state, tokens and scores.

  Args:
    model: Decides mesh and layouts.
    weights: This shard's part of the weights.
    cache: This shard's part of the cache.
    rows: Parameters of all rows.
    lengths: [B] int32. Number of tokens of each prompt.
    state: State of all rows after the first token; of the history, the shard's rows.
    out: [B, max_new_tokens] int32. The first tokens, then zeros.
    scores: [B] float32. Log-probabilities of the first tokens.
  """

  def step(carry: _Carry) -> _Carry:
    i, state, cache, out, scores = carry
    logits, cache = model.decode_on_shard(weights, cache, state.tokens)
    state, chosen = advance_on_shard(rows, state, logits, lengths + i, model)
    out = jax.lax.dynamic_update_slice(out, chosen.tokens[:, None], (0, i))
    return i + 1, state, cache, out, scores + chosen.log_probs

  def running(carry: _Carry) -> jax.Array:
    return ~jnp.all(carry[1].ended)

  carry = jnp.asarray(1), state, cache, out, scores
  _, state, _, out, scores = jax.lax.while_loop(running, step, carry)
  return state, out, scores
