"""Per-row state of decoding, and the step from logits to each row's next token.

Static batches, slots and conversations all choose tokens with `advance`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from t5x_inference_ext.engine import selection
from t5x_inference_ext.engine.sampling_arrays import ANY, NOTHING, SamplingArrays, penalize, sample


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowParams:
  """Parameters of B rows that do not change while the rows decode.

  Attributes:
    sampling: Sampling parameters of each row.
    seeds: [B] uint32. Seed of each row's sampling noise.
    limits: [B] int32. Most new tokens of each row.
    eos_id: Token that ends a row; -1 never does. Static.
    top: How many of the most likely tokens are returned with each chosen token. Static.
  """

  sampling: SamplingArrays
  seeds: jax.Array | np.ndarray
  limits: jax.Array | np.ndarray
  eos_id: int = dataclasses.field(metadata=dict(static=True))
  top: int = dataclasses.field(default=0, metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """State of B rows that each decode step changes.

  Attributes:
    tokens: [B] int32. The last generated token; 0 after a row's end.
    counts: [B] int32. Tokens generated so far.
    ended: [B] bool. Whether the row has ended.
    recent: [B, M] int32. The last M generated tokens, where M is the length of the longest stop
      sequence that a row may have.
    in_prompt: [B, V] bool. Whether the prompt has the token; None without penalties.
    made: [B, V] int32. How often the row generated the token; None without penalties.
  """

  tokens: jax.Array
  counts: jax.Array
  ended: jax.Array
  recent: jax.Array
  in_prompt: jax.Array | None
  made: jax.Array | None


class ChosenTokens(NamedTuple):
  """The tokens that one step chose for B rows.

  Log-probabilities are the unmodified model's: at temperature 1, without top_k, top_p, penalties or
  bias.

  Attributes:
    tokens: [B] int32. Chosen ids.
    log_probs: [B] float32. Their log-probabilities.
    top_tokens: [B, top] int32. The most likely ids, in order.
    top_log_probs: [B, top] float32. Their log-probabilities.
  """

  tokens: jax.Array
  log_probs: jax.Array
  top_tokens: jax.Array
  top_log_probs: jax.Array


def initial_state(
  rows: RowParams, prompts: Int[Array, 'B T'], lengths: Int[Array, ' B'], vocab_size: int
) -> DecodeState:
  """Return the state of rows that have generated nothing.

  Args:
    rows: Parameters of the rows.
    prompts: [B, T] int32. Model inputs, BOS first. Penalties do not count BOS.
    lengths: [B] int32. Number of valid tokens in each prompt, BOS included.
    vocab_size: V.
  """
  count = prompts.shape[0]
  in_prompt = made = None
  if rows.sampling.features.penalties:
    position = jnp.arange(prompts.shape[1])[None, :]
    counted = (position > 0) & (position < lengths[:, None])
    ids = jnp.where(counted, prompts, vocab_size)
    in_prompt = jnp.zeros((count, vocab_size), bool)
    in_prompt = in_prompt.at[jnp.arange(count)[:, None], ids].set(True, mode='drop')
    made = jnp.zeros((count, vocab_size), jnp.int32)
  zeros = jnp.zeros(count, jnp.int32)
  recent = jnp.full((count, rows.sampling.stop.shape[2]), NOTHING, jnp.int32)
  return DecodeState(zeros, zeros, jnp.zeros(count, bool), recent, in_prompt, made)


def advance(
  rows: RowParams, state: DecodeState, logits: Float[Array, 'B V'], positions: Int[Array, ' B']
) -> tuple[DecodeState, ChosenTokens]:
  """Choose each row's next token.

  Rows that have ended keep their state; their tokens and log-probabilities are 0.

  Args:
    rows: Parameters of the rows.
    state: State before the step.
    logits: [B, V] float32.
    positions: [B] int32. Position of the chosen token in its row; BOS is at 0.

  Returns:
    The state after the step, and the chosen tokens.
  """
  features, ended = rows.sampling.features, state.ended
  biased = logits
  if features.penalties:
    assert state.in_prompt is not None and state.made is not None
    biased = penalize(biased, rows.sampling, state.in_prompt, state.made)
  early = state.counts + 1 < jnp.asarray(rows.sampling.min_new_tokens)
  if features.min_new_tokens and rows.eos_id >= 0:
    biased = biased.at[:, rows.eos_id].set(jnp.where(early, -jnp.inf, biased[:, rows.eos_id]))
  tokens = jnp.where(ended, 0, sample(biased, rows.sampling, rows.seeds, positions))
  chosen = _told(tokens, ended, logits, rows.top)
  counts = state.counts + ~ended
  end = (tokens == rows.eos_id) | (counts >= rows.limits)
  recent, made = state.recent, state.made
  if features.stop:
    shifted = jnp.concatenate([recent[:, 1:], tokens[:, None]], axis=1)
    recent = jnp.where(ended[:, None], recent, shifted)
    stopped = _ends_in_stop(jnp.asarray(rows.sampling.stop), recent)
    end |= stopped & ~early if features.min_new_tokens else stopped
  if made is not None:
    made = made.at[jnp.arange(len(tokens)), tokens].add((~ended).astype(jnp.int32))
  return DecodeState(tokens, counts, ended | end, recent, state.in_prompt, made), chosen


def _told(tokens: jax.Array, ended: jax.Array, logits: jax.Array, top: int) -> ChosenTokens:
  """Return chosen tokens with their log-probabilities, and the `top` most likely tokens."""
  normalizer = jax.nn.logsumexp(logits, axis=-1)
  log_probs = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - normalizer
  if top:
    top_logits, top_tokens = selection.most_likely(logits, top)
  else:
    top_logits = top_tokens = jnp.zeros((len(tokens), 0))
  return ChosenTokens(
    tokens,
    jnp.where(ended, 0.0, log_probs),
    top_tokens.astype(jnp.int32),
    top_logits - normalizer[:, None],
  )


def _ends_in_stop(stop: jax.Array, recent: jax.Array) -> jax.Array:
  """Return [B] bool: whether recent tokens [B, M] end in one of the stop sequences [B, N, M]."""
  return jnp.any(jnp.all((stop == ANY) | (stop == recent[:, None, :]), axis=2), axis=1)
