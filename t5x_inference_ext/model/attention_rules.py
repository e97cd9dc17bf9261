"""Changes to attention's logits before the softmax: soft cap, position biases, windows.

The rules need the positions of queries and keys, which every kind of cache provides. A model
without these features has no rules, and its programs contain none of this code.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import ml_dtypes
import numpy as np

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.model.vectors import take_heads
from t5x_inference_ext.sharding.activations import ActivationSharding


class TokenPositions(NamedTuple):
  """Positions of the new tokens of one pass, on one shard.

  Attributes:
    queries: [b, m] int32. Positions of this shard's queries.
    keys: [b, t] int32. Positions of all new tokens.
  """

  queries: jax.Array
  keys: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionRules:
  """The rules of one layer on one shard.

  Attributes:
    config: The model.
    positions: Positions of the new tokens.
    by_head: Position biases of this shard's query heads: ALiBi slopes [heads], or T5 biases
      [heads, distances]. None if the model has neither.
    local: Whether the layer is local. A traced bool if one program runs both kinds of layers.
  """

  config: ModelConfig
  positions: TokenPositions
  by_head: jax.Array | None
  local: jax.Array | bool = False

  def with_positions(self, positions: TokenPositions) -> 'AttentionRules':
    """Return the same rules with other positions."""
    return dataclasses.replace(self, positions=positions)

  def apply(
    self,
    logits: Float[Array, 'b k n s'],
    visible: Bool[Array, '#b 1 #n s'],
    queries: Int[Array, 'b m'],
    keys: Int[Array, '#b s'],
  ) -> tuple[Float[Array, 'b k n s'], Bool[Array, '#b 1 #n s']]:
    """Return the changed logits and the mask of visible keys.

    Args:
      logits: [b, k, n, s] float32, scaled. The n rows are m positions of the query heads that share
        a key head, with heads fastest.
      visible: Mask of keys that exist and are not after the query.
      queries: [b, m]. Positions of the queries.
      keys: [b or 1, s]. Positions of the keys.
    """
    c, m = self.config, queries.shape[1]
    if c.attention_soft_cap is not None:
      logits = c.attention_soft_cap * jnp.tanh(logits / c.attention_soft_cap)
    distance = queries[:, :, None] - keys[:, None, :]  # [b, m, s]
    if self.by_head is not None:
      group = logits.shape[2] // m
      by_head = self.by_head.reshape(logits.shape[1], group, *self.by_head.shape[1:])
      logits += _bias(by_head, distance, keys, c).reshape(logits.shape)
    if self.local is not False:
      assert c.window is not None, 'local layers have a window'
      group = logits.shape[2] // m
      inside = jnp.repeat(distance < c.window, group, axis=1)[:, None]
      visible = visible & (inside if self.local is True else inside | ~self.local)
    return logits, visible


def _bias(
  by_head: jax.Array, distance: Int[Array, 'b m s'], keys: Int[Array, '#b s'], config: ModelConfig
) -> jax.Array:
  """Return the bias [b, k, m, group, s] of each query head at each key.

  Args:
    by_head: [k, group] or [k, group, distances]; see AttentionRules.
    distance: [b, m, s]. Position of each query minus position of each key.
    keys: [b or 1, s]. Positions of the keys.
    config: The model.
  """
  if config.positions == 'relative':
    largest = by_head.shape[2] - 1  # all larger distances have one bias
    found = jnp.take(by_head, jnp.clip(distance, 0, largest), axis=2)  # [k, group, b, m, s]
    return jnp.transpose(found, (2, 0, 3, 1, 4))
  slopes = by_head[None, :, None, :, None]
  if config.alibi_slopes.startswith('falcon'):
    # The softmax ignores a constant added to all keys, so Falcon uses positions instead of
    # distances. Rounded to bfloat16, the two differ.
    places = jnp.broadcast_to(keys[:, None, :], distance.shape).astype(jnp.float32)
    rounded = _bfloat16(slopes * _bfloat16(places)[:, None, :, None, :])
    times = 2 if config.alibi_slopes == 'falcon_eager' else 1
    return rounded * (times * config.d_head**-0.5)
  return slopes * -distance.astype(jnp.float32)[:, None, :, None, :]


def _bfloat16(x: jax.Array) -> jax.Array:
  """Round float32 numbers to bfloat16, in a form that XLA may not optimize away."""
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def pass_rules(
  config: ModelConfig,
  sharding: ActivationSharding,
  relative_bias: Float[Array, 'H buckets'] | None,
  positions: TokenPositions,
) -> AttentionRules | None:
  """Return the rules of one pass on this shard, or None for a model without rules.

  Args:
    config: The model.
    sharding: Sharding of the pass's activations.
    relative_bias: T5's table, or None.
    positions: Positions of the new tokens.
  """
  if not config.has_attention_rules:
    return None
  by_head: jax.Array | None = None
  if config.positions == 'alibi':
    by_head = jnp.asarray(alibi_slopes(config))
  elif relative_bias is not None:
    by_head = jnp.take(relative_bias, relative_buckets(config), axis=1)
  if by_head is not None:
    rows = by_head.reshape(config.num_heads, -1)
    rows = take_heads(rows, sharding.heads.queries(), sharding.attention_heads)
    by_head = rows.reshape(-1, *by_head.shape[1:])
  return AttentionRules(config, positions, by_head)


def alibi_slopes(config: ModelConfig) -> np.ndarray:
  """Return ALiBi's slopes [H] float32: how much a logit falls with each position of distance.

  For H a power of two, the slopes are 2**(-m / H), 2**(-2 m / H), ... 2**-m, with m = alibi_max.
  For other H, with n the next lower power of two, the first n slopes are those of n heads, and the
  rest are the first, third, ... slopes of 2 n heads.
  """
  heads = config.num_heads
  power = 2 ** math.ceil(math.log2(heads))
  slopes = (2.0 ** (-config.alibi_max / power * np.arange(1, power + 1))).astype(np.float32)
  if power != heads:
    slopes = np.concatenate([slopes[1::2], slopes[::2]])[:heads]
  if config.alibi_slopes.startswith('falcon'):
    slopes = slopes.astype(ml_dtypes.bfloat16).astype(np.float32)
  return slopes


def relative_buckets(config: ModelConfig) -> np.ndarray:
  """Return T5's bucket of each distance from 0 to relative_max_distance, int32.

  Each bucket of the first half holds one distance. The widths of the other buckets grow with the
  distance, computed in float32 as in T5. The last bucket holds all larger distances.
  """
  buckets, largest = config.relative_buckets, config.relative_max_distance
  exact = buckets // 2
  distance = np.arange(largest + 1)
  ratio = distance.astype(np.float32) / exact + np.finfo(np.float32).eps
  wide = exact + (np.log(ratio) / np.log(largest / exact) * (buckets - exact)).astype(np.int32)
  return np.where(distance < exact, distance, np.minimum(wide, buckets - 1)).astype(np.int32)
