"""Drawing a token from a part of the vocabulary, exactly and without sorting it.

A draw is the largest of logit + Gumbel noise (the Gumbel-max trick). The noise of a token follows from the row's seed, the
position and the token's id alone, so that whatever way a token is found, and on whatever mesh, it is the same one.
"""

import jax
from jax.extend.random import threefry2x32_p
import jax.numpy as jnp

# The vocabulary is searched for its largest logits in blocks of so many.
BLOCK = 128


def gumbel(seeds: jax.Array, positions: jax.Array, ids: jax.Array, vocabulary: int) -> jax.Array:
  """The noise of tokens: seeds [B] uint32, positions [B] int32, ids [B, N] int32 -> [B, N] float32.

  Threefry with a key of its own (seed, then position), whatever generator jax is configured with.
  """
  zeros = jnp.zeros_like(seeds)
  keys = threefry2x32_p.bind(seeds, zeros, positions.astype(jnp.uint32), zeros)
  first, second = (jnp.broadcast_to(k[:, None], ids.shape) for k in keys)
  # One hash makes two words: of a token in the lower half of the ids, and of one in the upper.
  half = (vocabulary + 1) // 2
  upper = ids >= half
  counter = jnp.where(upper, ids - half, ids).astype(jnp.uint32)
  return _gumbel_of(jnp.where(upper, *_hash(first, second, counter)[::-1]))


def gumbel_of_all(seeds: jax.Array, positions: jax.Array, vocabulary: int) -> jax.Array:
  """The noise of every token, [B, V] float32."""
  half = (vocabulary + 1) // 2
  zeros = jnp.zeros_like(seeds)
  keys = threefry2x32_p.bind(seeds, zeros, positions.astype(jnp.uint32), zeros)
  first, second = (jnp.broadcast_to(k[:, None], (len(seeds), half)) for k in keys)
  counter = jnp.broadcast_to(jnp.arange(half, dtype=jnp.uint32)[None, :], first.shape)
  return _gumbel_of(jnp.concatenate(_hash(first, second, counter), axis=1)[:, :vocabulary])


def _hash(first, second, counter):
  return threefry2x32_p.bind(first, second, counter, jnp.zeros_like(counter))


def _gumbel_of(bits: jax.Array) -> jax.Array:
  uniform = (
    (bits >> 8).astype(jnp.float32) + 0.5
  ) * 2.0**-24  # never 0; 1 only by rounding, of the last
  return -jnp.log(-jnp.log(jnp.minimum(uniform, 1 - 2.0**-24)))


def most_likely(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """The largest logits of [B, V], [B, count] from the largest, and their ids; ties in order of id.

  None of them lies outside the `count` blocks whose maxima are largest: of the whole vocabulary only the maxima of blocks
  are taken.
  """
  rows, vocabulary = logits.shape
  blocks = -(-vocabulary // BLOCK)
  if count >= blocks // 2:
    return jax.lax.top_k(logits, count)
  x = jnp.pad(logits, ((0, 0), (0, blocks * BLOCK - vocabulary)), constant_values=-jnp.inf).reshape(
    rows, blocks, BLOCK
  )
  _, best = jax.lax.top_k(jnp.max(x, axis=-1), count)
  best = jnp.sort(best, axis=-1)  # ids ascend among the candidates, as ties need
  candidates = jnp.take_along_axis(x, best[:, :, None], axis=1).reshape(rows, -1)
  values, at = jax.lax.top_k(candidates, count)
  return values, jnp.take_along_axis(best, at // BLOCK, axis=1) * BLOCK + at % BLOCK


def draw_from_few(
  logits: jax.Array, ids: jax.Array, noise: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
  """A token of each row.

  Args:
    logits: [B, N], divided by the temperature, from the largest: at least those that top_k keeps.
    ids: [B, N].
    noise: [B, N].
    top_k: [B] int32, at least 1.
    top_p: [B] float32, a share of what top_k keeps.

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


def draw_from_all(
  logits: jax.Array, noise: jax.Array, top_k: jax.Array, top_p: jax.Array, both: bool
) -> jax.Array:
  """A token of each row, where a row may keep any number of the vocabulary.

  The token with the largest noisy logit is the draw if it is among those kept: fewer than top_k tokens come before it, and
  these have less than top_p. One pass over the logits tells. If it is not, neither is any token after it, and the next
  largest among those before it is looked at. Few are: most of the probability is kept, and every look drops a good
  part of what is not.

  Args:
    logits: [B, V], divided by the temperature.
    noise: [B, V].
    top_k: [B] int32; V keeps all.
    top_p: [B] float32; 1 keeps all. Of what top_k keeps.
    both: whether a row has both, so that what top_k keeps has to be summed.

  Returns:
    [B] int32.
  """
  ids = jnp.arange(logits.shape[1])[None, :]
  top = jnp.max(logits, axis=-1, keepdims=True)
  weights = jnp.exp(logits - top)
  total = _weight_of_top(logits, weights, top_k) if both else jnp.sum(weights, axis=-1)
  limit = jnp.where(top_p < 1, top_p * total, jnp.inf)
  perturbed = logits + noise

  def look(state):
    token, _, allowed = state
    token = jnp.where(
      allowed[1], token, jnp.argmax(jnp.where(allowed[0], perturbed, -jnp.inf), axis=-1)
    )
    value = jnp.take_along_axis(logits, token[:, None], axis=1)
    before = (logits > value) | ((logits == value) & (ids < token[:, None]))  # [B, V]
    count = jnp.sum(before, axis=-1, dtype=jnp.int32)
    kept = (count < top_k) & (jnp.sum(jnp.where(before, weights, 0), axis=-1) < limit)
    kept |= (
      count == 0
    )  # the first always is, though a top_p of next to nothing rounds to 0, or logits are no numbers
    return token, jnp.all(kept), (before, kept)

  everything = jnp.ones(logits.shape, bool), jnp.zeros(logits.shape[0], bool)
  token, _, _ = jax.lax.while_loop(
    lambda state: ~state[1],
    look,
    (jnp.zeros(logits.shape[0], jnp.int32), jnp.asarray(False), everything),
  )
  return token


def _weight_of_top(logits, weights, count):
  """The summed weights [B, V] of each row's count [B] largest logits: the threshold's bits are found one after another."""
  bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
  order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(2**31))  # ascends with the logit

  def set_bit(i, found):
    tried = found | (jnp.uint32(2**31) >> i.astype(jnp.uint32))
    enough = jnp.sum(order >= tried[:, None], axis=-1, dtype=jnp.int32) >= count
    return jnp.where(enough, tried, found)

  threshold = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(logits.shape[0], jnp.uint32))[:, None]
  above = order > threshold
  ties = (count - jnp.sum(above, axis=-1, dtype=jnp.int32)).astype(jnp.float32)
  tied = jnp.max(jnp.where(order == threshold, weights, 0), axis=-1)
  return jnp.sum(jnp.where(above, weights, 0), axis=-1) + ties * tied
