"""The most likely token of each row, found where its logits lie: on the shards of the vocabulary.

Greedy decoding needs only this token. Shards exchange three numbers for each row; any other choice
would need all logits of a row on one device.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.sharding.layout import Axes


class BestTokens(NamedTuple):
  """The most likely token of each of B rows.

  Attributes:
    ids: [B] int32. Id of the token, the lowest if several are equally likely; 0 if a logit of the
      row is NaN.
    logits: [B] float32. Logit of the token.
    normalizers: [B] float32. Logarithm of the sum of exp over all logits of the row. Logits that
      are not finite make it NaN or infinite.
  """

  ids: jax.Array
  logits: jax.Array
  normalizers: jax.Array


def first_of_largest(x: Float[Array, 'B V'], top: Float[Array, 'B 1']) -> Int[Array, ' B']:
  """Return [B] int32: the lowest id at which a row of x [B, V] has its largest value `top` [B, 1].

  The result equals that of jnp.argmax, which takes 7 times as long on CPU, where XLA does not
  vectorize it. A row in which no value equals `top`, such as a row of NaN, gets id 0.
  """
  ids = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
  first = jnp.min(jnp.where(x == top, ids, x.shape[1]), axis=-1)
  return jnp.where(first < x.shape[1], first, 0)


def best_tokens(
  logits: Float[Array, 'b v'],
  rows: Axes,
  vocabulary: Axes,
  score: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
) -> BestTokens:
  """Find the most likely tokens of all rows, or those of the highest score; every shard gets them.

  Args:
    logits: [b, v] float32. The logits of some rows and a part of the vocabulary on this shard; -inf
      at padding of the vocabulary.
    rows: Mesh axes that split the rows.
    vocabulary: Mesh axes that split the vocabulary.
    score: Function of logits [b, v], each row's largest logit in the whole vocabulary [b, 1] and
      the token ids [1, v], which returns scores [b, v]. None: the score of a token is its logit.
  """
  top = jnp.max(logits, axis=-1, keepdims=True)
  # A shard may hold padding alone, whose largest logit is -inf.
  total = jnp.sum(jnp.exp(logits - jnp.where(top > -jnp.inf, top, 0)), axis=-1)
  first_id = ops.shard_index(vocabulary) * logits.shape[1]
  scores, best = logits, top
  if score is not None:
    largest = jnp.max(ops.all_gather(top, vocabulary, 1), axis=1, keepdims=True)
    scores = score(logits, largest, first_id + jnp.arange(logits.shape[1])[None, :])
    best = jnp.max(scores, axis=-1, keepdims=True)
  at = first_of_largest(scores, best)
  # Ids are sent as float32, which is exact below 2^24.
  numbers = [best[:, 0], (at + first_id).astype(jnp.float32), total]
  if score is not None:
    numbers += [top[:, 0], jnp.take_along_axis(logits, at[:, None], axis=1)[:, 0]]
  found = ops.all_gather(jnp.stack(numbers)[None], vocabulary, 0)  # [shards, numbers, b]
  found = jnp.moveaxis(ops.all_gather(found, rows, 2), 1, 0)
  scores, ids, totals = found[:3]
  tops, values = (scores, scores) if score is None else found[3:]
  best, largest = jnp.max(scores, axis=0), jnp.max(tops, axis=0)
  first = jnp.min(jnp.where(scores == best[None], ids, jnp.inf), axis=0)
  chosen = jnp.max(jnp.where(ids == first[None], values, -jnp.inf), axis=0)
  total = jnp.sum(totals * jnp.exp(tops - largest[None]), axis=0)
  return BestTokens(
    jnp.where(first < jnp.inf, first, 0).astype(jnp.int32), chosen, largest + jnp.log(total)
  )
