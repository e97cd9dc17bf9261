"""Log-probabilities of given tokens on one shard, without the logits of all positions at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.sharding.layout import Axes

# Maximum number of float32 logits that a device holds at once (256 MiB): logits are computed for a
# part of the positions at a time.
MAX_LOGITS = 2**26


class RankedTokens(NamedTuple):
  """Log-probabilities of given tokens, and the most likely tokens at each position.

  Attributes:
    log_probs: [rows, T] float32. Log-probability of each given token.
    top_tokens: [rows, T, top] int32. The most likely ids, in order.
    top_log_probs: [rows, T, top] float32. Their log-probabilities.
  """

  log_probs: jax.Array
  top_tokens: jax.Array
  top_log_probs: jax.Array


def target_log_probs(
  x: Float[Array, 'b t e'],
  targets: Int[Array, 'rows T'],
  logits: Callable[[jax.Array], jax.Array],
  axes: Axes,
  width: int,
  top: int = 0,
) -> Float[Array, 'rows T'] | RankedTokens:
  """Return log p(target) at each position, computing logits for a part of the positions at a time.

  Args:
    x: [b, t, e]. This shard's part of the residual stream after the last layer.
    targets: [rows, T] int32. Targets at all positions, for this shard's rows of the logits.
    logits: Function from x at some positions to float32 logits [rows, positions of all shards, V].
      Every shard must call it with the same local positions.
    axes: Mesh axes that split the positions of x.
    width: Number of logits per position on one device while they are computed.
    top: How many of the most likely tokens are returned with each target.

  Returns:
    [rows, T] float32; with `top`, RankedTokens.
  """

  def scores(inputs: tuple[jax.Array, jax.Array]) -> Any:
    x, targets = inputs
    return _ranked(logits(x), targets, top) if top else _gather_log_probs(logits(x), targets)

  shards, length = ops.axis_size(axes), x.shape[1]
  chunk = max(1, min(length, MAX_LOGITS // (width * shards)))  # positions of a shard at a time
  chunks = -(-length // chunk)
  if chunks == 1:
    return scores((x, targets))
  padding = chunks * chunk - length
  x = jnp.pad(x, ((0, 0), (0, padding), (0, 0))).reshape(x.shape[0], chunks, chunk, x.shape[2])
  rows = targets.shape[0]
  split = jnp.pad(targets.reshape(rows, shards, length), ((0, 0), (0, 0), (0, padding)))
  split = jnp.moveaxis(split.reshape(rows, shards, chunks, chunk), 2, 0)
  split = split.reshape(chunks, rows, shards * chunk)

  def whole(found: jax.Array) -> jax.Array:
    rest = found.shape[3:]
    found = jnp.moveaxis(found.reshape(chunks, rows, shards, chunk, *rest), 0, 2)
    found = found.reshape(rows, shards, chunks * chunk, *rest)
    return found[:, :, :length].reshape(rows, shards * length, *rest)

  return jax.tree.map(whole, lax.map(scores, (jnp.moveaxis(x, 1, 0), split)))


def _gather_log_probs(
  logits: Float[Array, 'rows t V'], targets: Int[Array, 'rows t']
) -> Float[Array, 'rows t']:
  target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return target_logits - jax.nn.logsumexp(logits, axis=-1)


def _ranked(
  logits: Float[Array, 'rows t V'], targets: Int[Array, 'rows t'], top: int
) -> RankedTokens:
  most, ids = lax.top_k(logits, top)
  likely = most - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  return RankedTokens(_gather_log_probs(logits, targets), ids, likely)
