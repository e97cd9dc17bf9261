"""Sampling on the devices: the parameters of many rows as arrays, and the choice of their tokens.

A row's choice depends only on its own logits, seed, position and parameters.
"""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32
import numpy as np

from t5x_inference_ext.engine import selection
from t5x_inference_ext.engine.sampling import SMALLEST, SamplingParams
from t5x_inference_ext.errors import RequestError

# Rows that keep at most this many tokens draw from candidates, found without sorting the
# vocabulary.
MAX_CANDIDATES = 256
LARGEST_INT32 = 2**31 - 1
# Fillers for stop sequences and for the recent tokens compared with them. None is a token id.
ANY, NEVER, NOTHING = -1, -2, -3


class SamplingFeatures(NamedTuple):
  """The features that a compiled choice of tokens must support, because some row uses them.

  Attributes:
    sampled: Whether a row has a temperature above 0.
    candidates: Most tokens that top_k keeps for a row with a temperature above 0, rounded up to a
      power of two; 0 if they are more than MAX_CANDIDATES.
    limited: Whether top_k or top_p drops tokens of a row.
    both: Whether a row has both top_k and top_p.
    penalties: Whether a row has a penalty.
    min_new_tokens: Whether a row has min_new_tokens.
    stop: Whether a row has stop sequences.
  """

  sampled: bool = False
  candidates: int = 0
  limited: bool = False
  both: bool = False
  penalties: bool = False
  min_new_tokens: bool = False
  stop: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
  """The sampling parameters of B rows, as arrays.

  Attributes:
    temperature: [B] float32.
    top_k: [B] int32; V where all tokens are kept.
    top_p: [B] float32.
    repetition_penalty: [B] float32.
    frequency_penalty: [B] float32.
    presence_penalty: [B] float32.
    min_new_tokens: [B] int32.
    bias_ids: [B, N] int32; unused ids are V.
    bias: [B, N] float32.
    stop: [B, N, M] int32. Stop sequences, aligned at their ends. Positions before a sequence hold
      ANY; unused sequences hold NEVER.
    features: SamplingFeatures of these rows. Static.
  """

  temperature: jax.Array | np.ndarray
  top_k: jax.Array | np.ndarray
  top_p: jax.Array | np.ndarray
  repetition_penalty: jax.Array | np.ndarray
  frequency_penalty: jax.Array | np.ndarray
  presence_penalty: jax.Array | np.ndarray
  min_new_tokens: jax.Array | np.ndarray
  bias_ids: jax.Array | np.ndarray
  bias: jax.Array | np.ndarray
  stop: jax.Array | np.ndarray
  features: SamplingFeatures = dataclasses.field(metadata=dict(static=True))


def stack_params(
  rows: Sequence[SamplingParams], vocab_size: int, like: Sequence[SamplingParams] = ()
) -> SamplingArrays:
  """Return the sampling parameters of rows as numpy arrays.

  Args:
    rows: Parameters of each row.
    vocab_size: V.
    like: Other parameters that the arrays' widths and features must also cover, so that batches
      share a compilation.

  Raises:
    RequestError: A logit_bias or stop sequence with ids outside the vocabulary.
  """
  every = {*rows, *like}
  for params in every:
    _check_ids(params, vocab_size)
  biases = max(len(p.logit_bias) for p in every)
  stops = max(len(p.stop) for p in every)
  longest = max((len(sequence) for p in every for sequence in p.stop), default=0)
  bias_ids = np.full((len(rows), biases), vocab_size, np.int32)
  bias = np.zeros((len(rows), biases), np.float32)
  stop = np.full((len(rows), stops, longest), NEVER, np.int32)
  for i, params in enumerate(rows):
    for j, (token, value) in enumerate(params.logit_bias):
      bias_ids[i, j], bias[i, j] = token, value
    for j, sequence in enumerate(params.stop):
      stop[i, j] = [ANY] * (longest - len(sequence)) + list(sequence)

  def floats(name: str) -> np.ndarray:
    return np.asarray([getattr(p, name) for p in rows], np.float32)

  return SamplingArrays(
    temperature=floats('temperature'),
    top_k=np.asarray([_kept(p, vocab_size) for p in rows], np.int32),
    top_p=floats('top_p'),
    repetition_penalty=floats('repetition_penalty'),
    frequency_penalty=floats('frequency_penalty'),
    presence_penalty=floats('presence_penalty'),
    min_new_tokens=np.asarray([min(p.min_new_tokens, LARGEST_INT32) for p in rows], np.int32),
    bias_ids=bias_ids,
    bias=bias,
    stop=stop,
    features=_features(every, vocab_size),
  )


def _check_ids(params: SamplingParams, vocab_size: int) -> None:
  biased = [token for token, _ in params.logit_bias]
  stopping = [token for sequence in params.stop for token in sequence]
  wrong = [token for token in (*biased, *stopping) if not 0 <= token < vocab_size]
  if wrong:
    raise RequestError(
      f'logit_bias or stop holds token {wrong[0]}, outside the vocabulary of {vocab_size}'
    )


def _kept(params: SamplingParams, vocab_size: int) -> int:
  """Return how many tokens top_k keeps."""
  return min(params.top_k or vocab_size, vocab_size)


def _features(every: set[SamplingParams], vocab_size: int) -> SamplingFeatures:
  sampled = [p for p in every if p.temperature > 0]
  most = max((_kept(p, vocab_size) for p in sampled), default=1)
  candidates = min(vocab_size, 1 << (most - 1).bit_length()) if most <= MAX_CANDIDATES else 0
  return SamplingFeatures(
    sampled=bool(sampled),
    candidates=candidates,
    limited=any(_kept(p, vocab_size) < vocab_size or p.top_p < 1 for p in sampled),
    both=any(_kept(p, vocab_size) < vocab_size and p.top_p < 1 for p in sampled),
    penalties=any(p.penalizes for p in every),
    min_new_tokens=any(p.min_new_tokens for p in every),
    stop=any(p.stop for p in every),
  )


def sample(
  logits: Float[Array, 'B V'],
  rows: SamplingArrays,
  seeds: UInt32[Array | np.ndarray, ' B'],
  positions: Int[Array | np.ndarray, ' B'],
) -> Int[Array, ' B']:
  """Choose a token for each row. Applies its bias, but not its penalties (see `penalize`).

  Ties go to the lowest id.

  Args:
    logits: [B, V] float32.
    rows: Sampling parameters.
    seeds: [B] uint32. Seeds of the sampling noise.
    positions: [B] int32. Position of the chosen token in its row.

  Returns:
    [B] int32.
  """
  features = rows.features
  if rows.bias.shape[1]:
    row = jnp.arange(len(logits))[:, None]
    logits = logits.at[row, rows.bias_ids].add(rows.bias, mode='drop')
  if not features.sampled:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  vocab_size = logits.shape[1]
  seeds, positions = jnp.asarray(seeds), jnp.asarray(positions)
  hot = jnp.asarray(rows.temperature > 0)[:, None]
  # Logits relative to the largest: a temperature near 0 then sends the others to -inf, none to inf.
  scale = jnp.where(hot, jnp.maximum(jnp.asarray(rows.temperature), SMALLEST)[:, None], 1)
  logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / scale
  top_k, top_p = jnp.asarray(rows.top_k), jnp.asarray(rows.top_p)
  if features.candidates:
    logits, ids = selection.most_likely(logits, features.candidates)
    noise = jnp.where(hot, selection.gumbel(seeds, positions, ids, vocab_size), 0)
    return selection.draw_from_few(logits, ids, noise, top_k, top_p)
  noise = jnp.where(hot, selection.gumbel_of_all(seeds, positions, vocab_size), 0)
  if not features.limited:
    return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
  return selection.draw_from_all(logits, noise, top_k, top_p, features.both)


def penalize(
  logits: Float[Array, 'B V'],
  rows: SamplingArrays,
  in_prompt: Bool[Array, 'B V'],
  made: Int[Array, 'B V'],
) -> Float[Array, 'B V']:
  """Return the logits with all penalties applied.

  Args:
    logits: [B, V] float32.
    rows: Sampling parameters.
    in_prompt: [B, V] bool. Whether the prompt has the token.
    made: [B, V] int32. How often the row generated the token.

  Returns:
    [B, V] float32.
  """
  repetition, frequency, presence = (
    jnp.asarray(x)[:, None]
    for x in (rows.repetition_penalty, rows.frequency_penalty, rows.presence_penalty)
  )
  repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
  logits = jnp.where(in_prompt | (made > 0), repeated, logits)
  return logits - frequency * made - jnp.where(made > 0, presence, 0)
