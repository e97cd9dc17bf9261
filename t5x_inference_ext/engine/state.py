"""Per-row state of decoding, and the tokens that a step chooses. See advance.py."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import numpy as np

from t5x_inference_ext.engine.sampling_arrays import NOTHING, SamplingArrays
from t5x_inference_ext.engine.selection import when
from t5x_inference_ext.engine.token_choice import live_features


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowParams:
  """Parameters of B rows that do not change while the rows decode.

  Attributes:
    sampling: Sampling parameters of each row.
    seeds: [B] uint32. Seed of each row's sampling noise.
    limits: [B] int32. Maximum number of new tokens of each row.
    end_ids: [B, N] int32. Tokens that end the row, such as EOS; -1 never does.
    top: [B] int32. How many of the most likely tokens each row wants with each chosen token.
    top_width: Number of most likely tokens that are returned for every row, if any row wants some.
      Static.
  """

  sampling: SamplingArrays
  seeds: jax.Array | np.ndarray
  limits: jax.Array | np.ndarray
  end_ids: jax.Array | np.ndarray
  top: jax.Array | np.ndarray
  top_width: int = dataclasses.field(default=0, metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """State of B rows that each decode step changes.

  Attributes:
    tokens: [B] int32. The last generated token; 0 after a row's end.
    counts: [B] int32. Tokens generated so far.
    ended: [B] bool. Whether the row has ended.
    failed: [B] bool. Whether the row has ended because no token could be chosen: its logits were
      not finite, or every token was forbidden.
    recent: [B, M] int32. The last M generated tokens, where M is the length of the longest stop
      sequence that a row may have.
    history: [B, V] int32. For each token, 2 x how often the row generated it, plus 1 if it is in
      the prompt. None in programs without penalties. Counted only while some row has penalties.
  """

  tokens: jax.Array
  counts: jax.Array
  ended: jax.Array
  failed: jax.Array
  recent: jax.Array
  history: jax.Array | None


class ChosenTokens(NamedTuple):
  """The tokens that one step chose for B rows.

  Log-probabilities are the unmodified model's: at temperature 1, without top_k, top_p, penalties,
  bias or grammar.

  Attributes:
    tokens: [B] int32. Chosen ids.
    log_probs: [B] float32. Their log-probabilities.
    top_tokens: [B, top_width] int32. The most likely ids, in order.
    top_log_probs: [B, top_width] float32. Their log-probabilities.
  """

  tokens: jax.Array
  log_probs: jax.Array
  top_tokens: jax.Array
  top_log_probs: jax.Array


def initial_state(
  rows: RowParams,
  prompts: Int[Array, 'B T'],
  lengths: Int[Array, ' B'],
  vocab_size: int,
  generated: Int[Array, ' B'] | None = None,
  soft_prompts: bool = False,
) -> DecodeState:
  """Return the state of rows before their next token.

  Args:
    rows: Parameters of the rows.
    prompts: [B, T] int32. Model inputs, BOS first. Penalties do not count BOS.
    lengths: [B] int32. Number of valid tokens in each prompt, BOS included.
    vocab_size: V.
    generated: [B] int32. How many of the last tokens of `prompts` each row generated before it was
      preempted; None: 0. Such a row goes on as if it had never stopped.
    soft_prompts: Whether prompts may begin with ids from V on, those of soft prompts.
  """
  count, features = prompts.shape[0], rows.sampling.features
  generated = jnp.zeros(count, jnp.int32) if generated is None else generated
  history = None
  if features is None or features.penalties:
    arrays, history = rows.sampling, jnp.zeros((count, vocab_size), jnp.int32)
    # A constant where there are no soft prompts, so that the program has no operand for it.
    first = jnp.argmax(prompts < vocab_size, axis=1)[:, None] if soft_prompts else 0
    everyone, nobody = jnp.ones(count, bool), jnp.zeros(count, bool)
    history = when(
      live_features(arrays, everyone, nobody, vocab_size).penalties,
      functools.partial(_count, first=first),
      lambda history, *_: history,
      history,
      prompts,
      lengths,
      generated,
    )
  width = rows.sampling.stop.shape[2]
  at = lengths[:, None] - width + jnp.arange(width)[None, :]
  last = jnp.take_along_axis(prompts, jnp.clip(at, 0, prompts.shape[1] - 1), axis=1)
  recent = jnp.where(at >= (lengths - generated)[:, None], last, NOTHING)
  zeros, nobody = jnp.zeros(count, jnp.int32), jnp.zeros(count, bool)
  return DecodeState(zeros, generated, nobody, nobody, recent, history)


def _count(
  history: jax.Array,
  prompts: jax.Array,
  lengths: jax.Array,
  generated: jax.Array,
  first: jax.Array | int,
) -> jax.Array:
  """Return the empty history [B, V] with the tokens of prompts [B, T] after `first` counted."""
  row, position = jnp.arange(len(prompts))[:, None], jnp.arange(prompts.shape[1])[None, :]
  valid, given = position < lengths[:, None], position < (lengths - generated)[:, None]
  outside = history.shape[1]
  in_prompt = jnp.where((position > first) & given, prompts, outside)
  history = history.at[row, in_prompt].set(1, mode='drop')
  return history.at[row, jnp.where(valid & ~given, prompts, outside)].add(2, mode='drop')
