"""The choice of rows' tokens, with log-probabilities, from whole rows of logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_inference_ext.engine import selection
from t5x_inference_ext.engine.sampling_arrays import SamplingFeatures
from t5x_inference_ext.engine.selection import when
from t5x_inference_ext.engine.state import ChosenTokens, DecodeState, RowParams
from t5x_inference_ext.engine.token_choice import (
  Restrictions,
  TokenMasks,
  choose_tokens,
  live_features,
)


def choose_for_rows(
  rows: RowParams,
  state: DecodeState,
  logits: jax.Array,
  positions: jax.Array,
  masks: TokenMasks | None,
) -> ChosenTokens:
  """Return the chosen tokens, -1 in rows that fail.

  Under shard_map, the arguments are those of the device's own rows.
  """
  live, top = ~state.ended, jnp.max(logits, axis=-1, keepdims=True)
  tokens, allowed = _drawn(rows, state, logits, top, positions, masks)
  # Computed as in jax.nn.logsumexp. Logits that are not finite make the result NaN or infinite.
  normalizer = top[:, 0] + jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1))
  made = live & allowed & jnp.isfinite(normalizer)
  chosen = _with_log_probs(rows, jnp.where(made, tokens, 0), made, logits, normalizer)
  return chosen._replace(tokens=jnp.where(made, tokens, -1))


def draw_tokens(
  rows: RowParams, state: DecodeState, logits: Float[Array, 'B V'], positions: Int[Array, ' B']
) -> Int[Array, ' B']:
  """Return the tokens [B] that rows would draw from logits, without changing any state.

  Args:
    rows: Parameters of the rows.
    state: State of the rows.
    logits: [B, V] float32.
    positions: [B] int32. Position of the drawn token in its row; BOS is at 0.
  """
  top = jnp.max(logits, axis=-1, keepdims=True)
  return _drawn(rows, state, logits, top, positions, None)[0]


def features_of(rows: RowParams, state: DecodeState, vocab_size: int) -> SamplingFeatures:
  """Return the features that live rows use."""
  early = below_min_new_tokens(rows, state)
  return live_features(rows.sampling, ~state.ended, early, vocab_size)


def below_min_new_tokens(rows: RowParams, state: DecodeState) -> jax.Array:
  """Return [B] bool: whether min_new_tokens forbids the row to end at its next token."""
  return state.counts < jnp.asarray(rows.sampling.min_new_tokens)


def _drawn(
  rows: RowParams,
  state: DecodeState,
  logits: jax.Array,
  top: jax.Array,
  positions: jax.Array,
  masks: TokenMasks | None,
) -> tuple[jax.Array, jax.Array]:
  """Return each row's draw, and whether any token was allowed."""
  live, early = ~state.ended, below_min_new_tokens(rows, state)
  features = features_of(rows, state, logits.shape[1])
  if masks is not None:
    features = features._replace(masked=jnp.any(live & jnp.asarray(masks.constrained)))
  forbidden = jnp.where(early[:, None], jnp.asarray(rows.end_ids), -1)
  restrictions = Restrictions(state.history, forbidden, masks)
  return choose_tokens(logits, top, rows.sampling, features, restrictions, rows.seeds, positions)


def _with_log_probs(
  rows: RowParams, tokens: jax.Array, made: jax.Array, logits: jax.Array, normalizer: jax.Array
) -> ChosenTokens:
  """Return chosen tokens with their log-probabilities, and the most likely tokens."""
  log_probs = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - normalizer
  width = rows.top_width

  def most_likely(logits: jax.Array, normalizer: jax.Array) -> tuple[jax.Array, jax.Array]:
    top, ids = selection.most_likely(logits, width)
    return (
      jnp.where(made[:, None], ids, 0).astype(jnp.int32),
      jnp.where(made[:, None], top - normalizer[:, None], 0),
    )

  def nothing(logits: jax.Array, normalizer: jax.Array) -> tuple[jax.Array, jax.Array]:
    del normalizer
    return jnp.zeros((len(logits), width), jnp.int32), jnp.zeros((len(logits), width))

  wanted: bool | jax.Array = False
  if width:
    wanted = jnp.any(made & (jnp.asarray(rows.top) > 0))
  top_tokens, top_log_probs = when(wanted, most_likely, nothing, logits, normalizer)
  return ChosenTokens(tokens, jnp.where(made, log_probs, 0), top_tokens, top_log_probs)
