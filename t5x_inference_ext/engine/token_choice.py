"""The choice of each row's token from its logits, on the devices.

A row's choice depends only on its own logits, seed, position, parameters and earlier tokens. A
feature that no row of a batch uses is skipped: when the program is compiled, if
SamplingArrays.features says so, or else by a conditional when it runs. The conditional around the
draw returns only the chosen tokens: a conditional that returned logits would copy them.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32
import numpy as np

from t5x_inference_ext.engine import selection
from t5x_inference_ext.engine.sampling import LARGEST, SMALLEST
from t5x_inference_ext.engine.sampling_arrays import (
  MAX_CANDIDATES,
  SamplingArrays,
  SamplingFeatures,
)
from t5x_inference_ext.engine.selection import when
from t5x_inference_ext.model.best_tokens import first_of_largest

# The numbers of candidates that a program for slots can draw from.
CANDIDATES = (MAX_CANDIDATES // 4, MAX_CANDIDATES)


def live_features(
  rows: SamplingArrays, live: Bool[Array, ' B'], early: Bool[Array, ' B'], vocab_size: int
) -> SamplingFeatures:
  """Return the features that live rows use: the static ones of `rows`, or traced scalars.

  Args:
    rows: Sampling parameters.
    live: [B] bool. Whether the row has not ended.
    early: [B] bool. Whether min_new_tokens forbids the row to end at this token.
    vocab_size: V.
  """
  if rows.features is not None:
    return rows.features
  top_k, top_p = jnp.asarray(rows.top_k), jnp.asarray(rows.top_p)
  hot = live & (jnp.asarray(rows.temperature) > 0)
  fewer, likelier = top_k < vocab_size, top_p < 1
  most = jnp.max(jnp.where(hot, top_k, 1))
  penalizes = (
    (jnp.asarray(rows.repetition_penalty) != 1)
    | (jnp.asarray(rows.frequency_penalty) != 0)
    | (jnp.asarray(rows.presence_penalty) != 0)
  )
  return SamplingFeatures(
    sampled=jnp.any(hot),
    few=tuple((n, most <= n) for n in sorted({min(vocab_size, n) for n in CANDIDATES})),
    limited=jnp.any(hot & (fewer | likelier)),
    both=jnp.any(hot & fewer & likelier),
    bias=jnp.any(live[:, None] & (jnp.asarray(rows.bias_ids) < vocab_size)),
    penalties=jnp.any(live & penalizes),
    min_new_tokens=jnp.any(live & early),
  )


class TokenMasks(NamedTuple):
  """Tokens that the grammars of B rows allow next.

  Attributes:
    allowed: [B, W] uint32, with 32 W at least V. Bit i of word w stands for token 32 w + i.
    constrained: [B] bool. Whether the row has a grammar. Rows without one may choose any token.
  """

  allowed: jax.Array | np.ndarray
  constrained: jax.Array | np.ndarray


class Restrictions(NamedTuple):
  """Restrictions on the next token that follow from the row's earlier tokens.

  Attributes:
    history: [B, V] int32. For each token, 2 x how often the row generated it, plus 1 if it is in
      the prompt; None if no row has penalties.
    forbidden: [B, N] int32. Ids that may not be chosen; negative ids are ignored.
    masks: Tokens that grammars allow; None if no row has a grammar.
  """

  history: jax.Array | None
  forbidden: jax.Array
  masks: TokenMasks | None = None


def choose_tokens(
  logits: Float[Array, 'B V'],
  top: Float[Array, 'B 1'],
  rows: SamplingArrays,
  features: SamplingFeatures,
  restrictions: Restrictions,
  seeds: UInt32[Array | np.ndarray, ' B'],
  positions: Int[Array | np.ndarray, ' B'],
) -> tuple[Int[Array, ' B'], Bool[Array, ' B']]:
  """Choose a token for each row. Ties go to the lowest id.

  Args:
    logits: [B, V] float32.
    top: [B, 1] float32. The largest logit of each row.
    rows: Sampling parameters.
    features: Features that the live rows use. Rows that use other features get arbitrary tokens.
    restrictions: See Restrictions.
    seeds: [B] uint32. Seeds of the sampling noise.
    positions: [B] int32. Position of the chosen token in its row.

  Returns:
    Tokens [B] int32, and [B] bool: whether any token was allowed.
  """
  changes = features.penalties | features.min_new_tokens | features.bias
  if features.masked is not False:  # programs without grammars contain no trace of masks
    changes |= features.masked

  def changed(logits: jax.Array) -> jax.Array:
    logits = when(
      features.penalties, lambda x: penalize(x, rows, restrictions.history), _unchanged, logits
    )
    logits = when(
      features.min_new_tokens, lambda x: _forbid(x, restrictions.forbidden), _unchanged, logits
    )
    logits = when(features.masked, lambda x: _mask(x, restrictions.masks), _unchanged, logits)
    return when(features.bias, lambda x: add_bias(x, rows), _unchanged, logits)

  def anything(logits: jax.Array, top: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = when(changes, changed, _unchanged, logits)
    top = jnp.max(logits, axis=-1, keepdims=True)
    chosen = _draw(logits, top, rows, features, jnp.asarray(seeds), jnp.asarray(positions))
    return chosen, top[:, 0] > -jnp.inf

  def greedy(logits: jax.Array, top: jax.Array) -> tuple[jax.Array, jax.Array]:
    return first_of_largest(logits, top), jnp.ones(len(logits), bool)

  # Most batches are greedy, or sample from unchanged logits. If a conditional around the changes
  # also contained the draw, the draw would be compiled twice, and it takes most of a program's
  # compile time.
  return when(changes | features.sampled, anything, greedy, logits, top)


def _unchanged(logits: jax.Array) -> jax.Array:
  return logits


def penalize(
  logits: Float[Array, 'B V'], rows: SamplingArrays, history: Int[Array, 'B V'] | None
) -> Float[Array, 'B V']:
  """Return the logits [B, V] float32 with all penalties applied; `history` as in Restrictions."""
  assert history is not None
  repetition, frequency, presence = (
    jnp.asarray(x)[:, None]
    for x in (rows.repetition_penalty, rows.frequency_penalty, rows.presence_penalty)
  )
  generated = history >> 1
  repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
  penalized = jnp.where(history > 0, repeated, logits)
  penalized = penalized - frequency * generated - jnp.where(generated > 0, presence, 0)
  # Clip, so that a penalty makes no logit infinite: infinite logits have no order, and -inf means
  # forbidden.
  return jnp.where(jnp.isinf(logits), logits, jnp.clip(penalized, -LARGEST, LARGEST))


def _forbid(logits: jax.Array, forbidden: jax.Array) -> jax.Array:
  """Return the logits [B, V], -inf for forbidden ids [B, N]."""
  row = jnp.arange(len(logits))[:, None]
  ids = jnp.where(forbidden < 0, logits.shape[1], forbidden)
  return logits.at[row, ids].set(-jnp.inf, mode='drop')


def _mask(logits: jax.Array, masks: TokenMasks | None) -> jax.Array:
  """Return the logits [B, V] with -inf for tokens that the row's grammar forbids."""
  assert masks is not None
  bits = jnp.asarray(masks.allowed)[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]
  allowed = (bits & 1).reshape(len(logits), -1)[:, : logits.shape[1]] > 0
  return jnp.where(allowed | ~jnp.asarray(masks.constrained)[:, None], logits, -jnp.inf)


def add_bias(logits: Float[Array, 'B V'], rows: SamplingArrays) -> Float[Array, 'B V']:
  """Return the logits plus each row's bias, minus the row's largest sum: [B, V] float32.

  The differences are exact: float32 can't tell the sums 1e9 + 1 and 1e9 + 2 apart, but it can hold
  their differences to the largest sum. A two-sum (Knuth) finds each sum's rounding error, which is
  added to the difference.
  """
  row, ids, bias = jnp.arange(len(logits))[:, None], jnp.asarray(rows.bias_ids), rows.bias
  own = logits.at[row, ids].get(mode='clip')
  total = jnp.clip(own + bias, -jnp.inf, LARGEST)
  part = total - own
  error = (own - (total - part)) + (bias - part)
  error = jnp.where(jnp.abs(total) < LARGEST, error, 0)
  logits = logits.at[row, ids].set(total, mode='drop')
  top = jnp.max(logits, axis=-1, keepdims=True)
  top = jnp.where(top > -jnp.inf, top, 0)
  logits = (logits - top).at[row, ids].set((total - top) + error, mode='drop')
  top = jnp.max(logits, axis=-1, keepdims=True)
  return logits - jnp.where(top > -jnp.inf, top, 0)


def _draw(
  logits: jax.Array,
  top: jax.Array,
  rows: SamplingArrays,
  features: SamplingFeatures,
  seeds: jax.Array,
  positions: jax.Array,
) -> jax.Array:
  """Draw a token for each row from its logits [B, V]; `top` [B, 1] holds each row's largest."""
  vocab_size = logits.shape[1]
  temperature = jnp.asarray(rows.temperature)
  hot = (temperature > 0)[:, None]
  top_k, top_p = jnp.asarray(rows.top_k), jnp.asarray(rows.top_p)

  def scaled(logits: jax.Array, top: jax.Array) -> jax.Array:
    return _scaled(temperature, logits, top)

  def from_few(count: int, logits: jax.Array, top: jax.Array) -> jax.Array:
    found, ids = selection.most_likely(scaled(logits, top), count)
    noise = jnp.where(hot, selection.gumbel(seeds, positions, ids, vocab_size), 0)
    return selection.draw_from_few(found, ids, noise, top_k, top_p)

  def noise_of_all() -> jax.Array:
    return jnp.where(hot, selection.gumbel_of_all(seeds, positions, vocab_size), 0)

  def from_part(logits: jax.Array, top: jax.Array) -> jax.Array:
    return selection.draw_from_all(scaled(logits, top), noise_of_all(), top_k, top_p, features.both)

  def from_all(logits: jax.Array, top: jax.Array) -> jax.Array:
    # The barrier keeps XLA from computing the noise in both searches.
    noisy = lax.optimization_barrier(scaled(logits, top) + noise_of_all())
    return first_of_largest(noisy, jnp.max(noisy, axis=-1, keepdims=True))

  sampled = functools.partial(when, features.limited, from_part, from_all)
  for count, enough in reversed(features.few):
    sampled = functools.partial(when, enough, functools.partial(from_few, count), sampled)
  return when(features.sampled, sampled, first_of_largest, logits, top)


def _scaled(temperature: jax.Array, logits: jax.Array, top: jax.Array) -> jax.Array:
  """Return (logits - top) / temperature; where the temperature is 0, logits - top."""
  # The largest logit is subtracted first: a temperature near 0 then sends the others to -inf, and
  # none to inf.
  scale = jnp.where(temperature > 0, jnp.maximum(temperature, SMALLEST), 1)
  return (logits - top) / scale[:, None]


def perturbed(
  vocab_size: int,
  temperature: Float[Array, ' b'],
  seeds: UInt32[Array, ' b'],
  positions: Int[Array, ' b'],
  logits: Float[Array, 'b v'],
  top: Float[Array, 'b 1'],
  ids: Int[Array, '1 v'],
) -> Float[Array, 'b v']:
  """Return the scores of tokens, of which a row without top_k and top_p draws the highest.

  Args:
    vocab_size: V.
    temperature: [b] float32.
    seeds: [b] uint32. Seeds of the sampling noise.
    positions: [b] int32. Position of the chosen token in its row.
    logits: [b, v] float32. Logits of some tokens.
    top: [b, 1] float32. The largest logit of each row among all tokens.
    ids: [1, v] int32. Ids of the tokens.
  """
  ids = jnp.broadcast_to(ids, logits.shape)
  noise = selection.gumbel(seeds, positions, ids, vocab_size)
  noise = jnp.where((temperature > 0)[:, None], noise, 0)
  # The barrier keeps XLA from computing the noise in both searches: that for the largest score,
  # and that for its token.
  return lax.optimization_barrier(_scaled(temperature, logits, top) + noise)
