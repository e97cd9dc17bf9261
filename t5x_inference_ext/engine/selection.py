"""Exact sampling of a token under top_k and top_p, without sorting the vocabulary.

A draw is the token with the largest logit + Gumbel noise (the Gumbel-max trick). A token's noise
depends only on the row's seed, the position and the token's id. So every search for the draw, on
any mesh, finds the same token.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend.random import threefry2x32_p
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

# Tokens in a block: the search for the largest logits divides the vocabulary into blocks.
BLOCK = 128


def when(flag: bool | jax.Array, function: Callable, otherwise: Callable, *operands: Any) -> Any:
  """Return function(*operands) if the flag is true, else otherwise(*operands).

  A Python bool decides when the program is compiled, an array when it runs.
  """
  if isinstance(flag, bool):
    return function(*operands) if flag else otherwise(*operands)
  return lax.cond(flag, function, otherwise, *operands)


def gumbel(
  seeds: UInt32[Array, ' B'], positions: Int[Array, ' B'], ids: Int[Array, 'B N'], vocab_size: int
) -> Float[Array, 'B N']:
  """Return the Gumbel noise of given tokens of each row.

  The generator is always Threefry with the key (seed, position); jax's default does not matter.

  Args:
    seeds: [B] uint32. Seeds of the sampling noise.
    positions: [B] int32. Position of the chosen token in its row.
    ids: [B, N] int32. Token ids.
    vocab_size: V.

  Returns:
    [B, N] float32.
  """
  zeros = jnp.zeros_like(seeds)
  keys = threefry2x32_p.bind(seeds, zeros, positions.astype(jnp.uint32), zeros)
  first, second = (jnp.broadcast_to(k[:, None], ids.shape) for k in keys)
  # One hash makes two words: one for an id in the lower half of the vocabulary, one for an id in
  # the upper half.
  half = (vocab_size + 1) // 2
  upper = ids >= half
  counter = jnp.where(upper, ids - half, ids).astype(jnp.uint32)
  lower_half, upper_half = _hash(first, second, counter)
  return _gumbel_of(jnp.where(upper, upper_half, lower_half))


def gumbel_of_all(
  seeds: UInt32[Array, ' B'], positions: Int[Array, ' B'], vocab_size: int
) -> Float[Array, 'B V']:
  """Return the Gumbel noise of the whole vocabulary, [B, V] float32; see `gumbel`."""
  half = (vocab_size + 1) // 2
  zeros = jnp.zeros_like(seeds)
  keys = threefry2x32_p.bind(seeds, zeros, positions.astype(jnp.uint32), zeros)
  first, second = (jnp.broadcast_to(k[:, None], (len(seeds), half)) for k in keys)
  counter = jnp.broadcast_to(jnp.arange(half, dtype=jnp.uint32)[None, :], first.shape)
  return _gumbel_of(jnp.concatenate(_hash(first, second, counter), axis=1)[:, :vocab_size])


def _hash(first: jax.Array, second: jax.Array, counter: jax.Array) -> list[jax.Array]:
  return threefry2x32_p.bind(first, second, counter, jnp.zeros_like(counter))


def _gumbel_of(bits: jax.Array) -> jax.Array:
  uniform = (
    (bits >> 8).astype(jnp.float32) + 0.5
  ) * 2.0**-24  # never 0; only the largest rounds to 1
  return -jnp.log(-jnp.log(jnp.minimum(uniform, 1 - 2.0**-24)))


def most_likely(
  logits: Float[Array, 'B V'], count: int
) -> tuple[Float[Array, 'B N'], Int[Array, 'B N']]:
  """Return the `count` largest logits of each row, in descending order, and their ids: [B, count].

  The logits are [B, V]; equal logits are in order of id. The `count` blocks with the largest maxima
  contain the result, so only the maximum of each block is computed over the whole vocabulary.
  """
  rows, vocab_size = logits.shape
  blocks = -(-vocab_size // BLOCK)
  if count >= blocks // 2:
    values, ids = jax.lax.top_k(logits, count)
    return values, ids
  x = jnp.pad(logits, ((0, 0), (0, blocks * BLOCK - vocab_size)), constant_values=-jnp.inf).reshape(
    rows, blocks, BLOCK
  )
  _, best = jax.lax.top_k(jnp.max(x, axis=-1), count)
  best = jnp.sort(best, axis=-1)  # candidates in order of id, for ties
  candidates = jnp.take_along_axis(x, best[:, :, None], axis=1).reshape(rows, -1)
  values, at = jax.lax.top_k(candidates, count)
  return values, jnp.take_along_axis(best, at // BLOCK, axis=1) * BLOCK + at % BLOCK


def draw_from_few(
  logits: Float[Array, 'B N'],
  ids: Int[Array, 'B N'],
  noise: Float[Array, 'B N'],
  top_k: Int[Array, ' B'],
  top_p: Float[Array, ' B'],
) -> Int[Array, ' B']:
  """Draw a token for each row from its most likely ones.

  Args:
    logits: [B, N] float32. Logits divided by the temperature, in descending order, including all
      those that top_k keeps.
    ids: [B, N] int32. Token ids of the logits.
    noise: [B, N] float32. Gumbel noise of the logits.
    top_k: [B] int32. At least 1.
    top_p: [B] float32. Share to keep of the total probability of the tokens that top_k keeps.

  Returns:
    [B] int32.
  """
  kept = jnp.arange(logits.shape[1])[None, :] < top_k[:, None]
  logits = jnp.where(kept, logits, -jnp.inf)
  probabilities = jax.nn.softmax(logits, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  kept &= (before < top_p[:, None]) | (top_p[:, None] >= 1)
  at = jnp.argmax(jnp.where(kept, logits + noise, -jnp.inf), axis=-1)
  return jnp.take_along_axis(ids, at[:, None], axis=1)[:, 0]


# State of draw_from_all after one trial: each row's token; whether all rows' tokens are kept; the
# tokens that each row may try next; whether each row's token is kept.
_Look = tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]


def draw_from_all(
  logits: Float[Array, 'B V'],
  noise: Float[Array, 'B V'],
  top_k: Int[Array, ' B'],
  top_p: Float[Array, ' B'],
  both: bool | jax.Array,
) -> Int[Array, ' B']:
  """Draw a token for each row, where rows may keep any number of tokens.

  The first candidate is the token with the largest logit + noise. It is drawn if top_k and top_p
  keep it: if fewer than top_k tokens are more likely, and if those tokens hold less than top_p of
  the probability. One pass over the logits decides that. If a candidate is not kept, no less likely
  token is kept either; the next candidate has the largest logit + noise among the more likely
  tokens. Few trials are needed: the kept tokens hold most of the probability, and each trial drops
  a good part of the other tokens.

  Args:
    logits: [B, V] float32. Logits divided by the temperature.
    noise: [B, V] float32. Gumbel noise.
    top_k: [B] int32. V keeps all tokens.
    top_p: [B] float32. Share to keep of the total probability of the tokens that top_k keeps; 1
      keeps all.
    both: Whether some row has both top_k and top_p, so that the probabilities of the tokens that
      top_k keeps must be summed. A Python bool, or a traced scalar.

  Returns:
    [B] int32.
  """
  ids = jnp.arange(logits.shape[1])[None, :]
  top = jnp.max(logits, axis=-1, keepdims=True)
  weights = jnp.exp(logits - top)
  total = when(
    both,
    _weight_of_top,
    lambda logits, weights, top_k: jnp.sum(weights, axis=-1),
    logits,
    weights,
    top_k,
  )
  limit = jnp.where(top_p < 1, top_p * total, jnp.inf)
  perturbed = logits + noise

  def look(state: _Look) -> _Look:
    token, _, allowed = state
    token = jnp.where(
      allowed[1], token, jnp.argmax(jnp.where(allowed[0], perturbed, -jnp.inf), axis=-1)
    )
    value = jnp.take_along_axis(logits, token[:, None], axis=1)
    before = (logits > value) | ((logits == value) & (ids < token[:, None]))  # [B, V]
    count = jnp.sum(before, axis=-1, dtype=jnp.int32)
    kept = (count < top_k) & (jnp.sum(jnp.where(before, weights, 0), axis=-1) < limit)
    # The most likely token is always kept: a tiny top_p may round to 0, and logits may be NaN.
    kept |= count == 0
    return token, jnp.all(kept), (before, kept)

  everything = jnp.ones(logits.shape, bool), jnp.zeros(logits.shape[0], bool)
  token, _, _ = jax.lax.while_loop(
    lambda state: ~state[1],
    look,
    (jnp.zeros(logits.shape[0], jnp.int32), jnp.asarray(False), everything),
  )
  return token


def _weight_of_top(logits: jax.Array, weights: jax.Array, count: jax.Array) -> jax.Array:
  """Return [B]: the sum of the weights [B, V] of each row's `count` [B] largest logits [B, V].

  A binary search finds the smallest of these logits, one bit at a time.
  """
  bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
  # Unsigned integers in the same order as the logits.
  order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(2**31))

  def set_bit(i: jax.Array, found: jax.Array) -> jax.Array:
    tried = found | (jnp.uint32(2**31) >> i.astype(jnp.uint32))
    enough = jnp.sum(order >= tried[:, None], axis=-1, dtype=jnp.int32) >= count
    return jnp.where(enough, tried, found)

  threshold = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(logits.shape[0], jnp.uint32))[:, None]
  above = order > threshold
  ties = (count - jnp.sum(above, axis=-1, dtype=jnp.int32)).astype(jnp.float32)
  tied = jnp.max(jnp.where(order == threshold, weights, 0), axis=-1)
  return jnp.sum(jnp.where(above, weights, 0), axis=-1) + ties * tied
