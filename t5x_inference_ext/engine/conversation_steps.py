"""Device functions of a conversation: prefill a turn, and choose a reply's first token."""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_inference_ext.engine.slots import Slots, replicated
from t5x_inference_ext.engine.state import ChosenTokens, RowParams, advance, initial_state
from t5x_inference_ext.engine.state_rows import constrain_state
from t5x_inference_ext.model.cache import KVCache
from t5x_inference_ext.model.chunks import constrain_cache
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights


def prefill_turn(
  model: Model,
  cache: KVCache,
  weights: Weights,
  cached: jax.Array,
  tokens: jax.Array,
  counts: jax.Array,
) -> tuple[jax.Array, KVCache]:
  """Keep the first `cached` positions of the cache, and run Model.prefill_chunk after them."""
  cache = dataclasses.replace(cache, lengths=jnp.full_like(cache.lengths, cached))
  return model.prefill_chunk(weights, constrain_cache(model, cache, weights), tokens, counts)


def begin_reply(
  model: Model,
  cache: KVCache,
  logits: jax.Array,
  rows: RowParams,
  prompts: jax.Array,
  lengths: jax.Array,
) -> tuple[Slots, ChosenTokens]:
  """Return slots whose row 0 is in use, and the first token of its reply.

  Args:
    model: Decides mesh and layouts.
    cache: Cache of the conversation.
    logits: [B, V] float32. Logits after the conversation so far.
    rows: Sampling parameters, seed and limit of the reply.
    prompts: [B, T] int32. The conversation so far, BOS first. Only penalties read it.
    lengths: [B] int32. Number of valid tokens in each row of `prompts`.
  """
  state = initial_state(rows, prompts, lengths, model.config.vocab_size)
  state = dataclasses.replace(state, ended=jnp.arange(len(lengths)) > 0)
  state, chosen = advance(rows, state, logits, lengths, model)
  slots = Slots(cache, replicated(model, rows), constrain_state(model, state))
  return slots, replicated(model, chosen)
