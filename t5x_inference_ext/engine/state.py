"""What rows ask for, how far they are, and the step from logits to each row's next token: one code for every loop."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_inference_ext.engine import selection
from t5x_inference_ext.engine.sampling import ANY, NOTHING, SamplingArrays, penalize, sample


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowParams:
  """What B rows ask for.

  Attributes:
    samplers: how they choose.
    seeds: [B] uint32.
    limits: [B] int32, new tokens at most.
    eos_id: ends a row; -1 never does.
    top: how many of the most likely tokens are told with each choice.
  """

  sampling_arrays: SamplingArrays
  seeds: jax.Array
  limits: jax.Array
  eos_id: int = dataclasses.field(metadata=dict(static=True))
  top: int = dataclasses.field(default=0, metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """How far B rows are.

  Attributes:
    tokens: [B] int32, the last one generated; 0 after a row's end.
    counts: [B] int32, generated so far.
    ended: [B] bool.
    recent: [B, M] int32, the last ones, where a row has stop sequences, of at most M tokens.
    in_prompt: [B, V] bool, and
    made: [B, V] int32, how often each was generated, where a row has penalties; else None.
  """

  tokens: jax.Array
  counts: jax.Array
  ended: jax.Array
  recent: jax.Array
  in_prompt: jax.Array | None
  made: jax.Array | None


class ChosenTokens(NamedTuple):
  """One step's tokens: ids [B], log-probabilities [B], and of the `top` most likely, in order, ids and log-probabilities
  [B, top]. Log-probabilities are the model's own: temperature 1, nothing dropped, no penalties or bias.
  """

  tokens: jax.Array
  log_probs: jax.Array
  top_tokens: jax.Array
  top_log_probs: jax.Array


def initial_state(
  rows: RowParams, prompts: jax.Array, lengths: jax.Array, vocabulary: int
) -> DecodeState:
  """Rows that have generated nothing. prompts [B, T] and lengths [B] are model inputs, BOS first; it does not count."""
  count = prompts.shape[0]
  in_prompt = made = None
  if rows.sampling_arrays.plan.penalties:
    where = jnp.arange(prompts.shape[1])[None, :]
    ids = jnp.where((where > 0) & (where < lengths[:, None]), prompts, vocabulary)
    in_prompt = (
      jnp.zeros((count, vocabulary), bool)
      .at[jnp.arange(count)[:, None], ids]
      .set(True, mode='drop')
    )
    made = jnp.zeros((count, vocabulary), jnp.int32)
  nothing = jnp.zeros(count, jnp.int32)
  recent = jnp.full((count, rows.sampling_arrays.stop.shape[2]), NOTHING, jnp.int32)
  return DecodeState(nothing, nothing, jnp.zeros(count, bool), recent, in_prompt, made)


def advance(
  rows: RowParams, progress: DecodeState, logits: jax.Array, positions: jax.Array
) -> tuple[DecodeState, ChosenTokens]:
  """Each row's next token. Rows that have ended stay as they are: their tokens are 0, with log-probability 0.

  Args:
    rows: what they ask for.
    progress: so far.
    logits: [B, V] float32.
    positions: [B] int32, of the tokens chosen, BOS being at 0.
  """
  plan, ended = rows.sampling_arrays.plan, progress.ended
  biased = logits
  if plan.penalties:
    biased = penalize(biased, rows.sampling_arrays, progress.in_prompt, progress.made)
  early = (
    progress.counts + 1 < jnp.asarray(rows.sampling_arrays.min_new_tokens) if plan.least else None
  )
  if plan.least and rows.eos_id >= 0:
    biased = biased.at[:, rows.eos_id].set(jnp.where(early, -jnp.inf, biased[:, rows.eos_id]))
  token = jnp.where(ended, 0, sample(biased, rows.sampling_arrays, rows.seeds, positions))
  normal = jax.nn.logsumexp(logits, axis=-1)
  log_prob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - normal
  top, top_ids = (
    selection.most_likely(logits, rows.top) if rows.top else (jnp.zeros((len(token), 0)),) * 2
  )
  chosen = ChosenTokens(
    token, jnp.where(ended, 0.0, log_prob), top_ids.astype(jnp.int32), top - normal[:, None]
  )
  counts = progress.counts + ~ended
  end = (token == rows.eos_id) | (counts >= rows.limits)
  recent, made = progress.recent, progress.made
  if plan.stop:
    recent = jnp.where(
      ended[:, None], recent, jnp.concatenate([recent[:, 1:], token[:, None]], axis=1)
    )
    stop = jnp.asarray(rows.sampling_arrays.stop)
    stopped = jnp.any(jnp.all((stop == ANY) | (stop == recent[:, None, :]), axis=2), axis=1)
    end |= stopped & ~early if plan.least else stopped
  if plan.penalties:
    made = made.at[jnp.arange(len(token)), token].add((~ended).astype(jnp.int32))
  return DecodeState(token, counts, ended | end, recent, progress.in_prompt, made), chosen
