"""Generation: prefill once, then decode until every row has ended."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_inference_ext.decoding.model import Model
from t5x_inference_ext.decoding.sampling import Sampler
from t5x_inference_ext.weights import Weights


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


def generate(
    model: Model,
    weights: Weights,
    tokens: jax.Array,
    lengths: jax.Array,
    seeds: jax.Array,
    *,
    sampler: Sampler,
    max_new_tokens: int,
    eos_id: int,
    cache_size: int,
    max_length: int | None = None,
) -> Generation:
  """Generates for a batch; to be jitted, with the keyword arguments and `model` static.

  Args:
    model: decides mesh and layout.
    weights: on that mesh.
    tokens: [B, T] int32 model inputs: BOS, then the prompt, from the left.
    lengths: [B] int32, at least 1.
    seeds: [B] uint32.
    sampler: how to choose tokens.
    max_new_tokens: the limit for each row.
    eos_id: ends a row; -1 never does.
    cache_size: S; at least T and every row's length + max_new_tokens - 1 (the last token is not fed back).
    max_length: also ends a row when prompt and new tokens, BOS not counted, are this many: T5X's way to bound it.
  """
  rows = tokens.shape[0]
  logits, cache = model.prefill(weights, tokens, lengths, cache_size)

  def choose(logits, positions, ended):
    token = jnp.where(ended, 0, sampler(logits, seeds, positions))
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    return token, jnp.where(ended, 0.0, log_prob)

  def ends(token, counts):
    end = (token == eos_id) | (counts >= max_new_tokens)
    return end if max_length is None else end | (lengths - 1 + counts >= max_length)

  def step(state):
    i, token, ended, cache, out, counts, scores = state
    logits, cache = model.decode_step(weights, cache, token)
    token, log_prob = choose(logits, cache.lengths, ended)
    out = jax.lax.dynamic_update_slice(out, token[:, None], (0, i))
    counts = counts + ~ended
    return i + 1, token, ended | ends(token, counts), cache, out, counts, scores + log_prob

  def running(state):
    return ~jnp.all(state[2])

  nobody = jnp.zeros(rows, bool)
  token, score = choose(logits, lengths, nobody)
  out = jnp.zeros((rows, max_new_tokens), jnp.int32).at[:, 0].set(token)
  counts = jnp.ones(rows, jnp.int32)
  state = (1, token, ends(token, counts), cache, out, counts, score)
  _, _, _, _, out, counts, scores = jax.lax.while_loop(running, step, state)
  return Generation(out, counts, scores)
