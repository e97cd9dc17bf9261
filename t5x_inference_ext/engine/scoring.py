"""Log-probabilities of given tokens, some positions at a time, and of ragged examples."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from t5x_inference_ext.engine.length_buckets import Pack
from t5x_inference_ext.model.collectives import ops

# Logits of more elements than this (256 MiB) are not made at once on a device, but some positions at a time.
MAX_LOGITS = 2**26


def target_log_probs(
  x: jax.Array,
  targets: jax.Array,
  logits: Callable[[jax.Array], jax.Array],
  shards: Sequence[str],
  width: int,
) -> jax.Array:
  """log p(target) at each position; on one shard.

  Args:
    x: [B', T', E], the shard's part of the residual stream after the last layer.
    targets: [B", T], rows split as logits are, all positions.
    logits: x at some of its positions, of each shard the same ones -> [B", those of all shards, V] float32.
    shards: the axes that x is split over by position.
    width: of one position's logits, in elements on a device, while they are made.

  Returns:
    [B", T] float32.
  """
  count, local = ops.axis_size(shards), x.shape[1]
  each = max(1, min(local, MAX_LOGITS // (width * count)))  # positions of a shard at a time
  parts = -(-local // each)
  if parts == 1:
    return _chosen(logits(x), targets)
  padding = parts * each - local
  x = jnp.pad(x, ((0, 0), (0, padding), (0, 0))).reshape(x.shape[0], parts, each, x.shape[2])
  rows = targets.shape[0]
  split = jnp.pad(targets.reshape(rows, count, local), ((0, 0), (0, 0), (0, padding)))
  split = jnp.moveaxis(split.reshape(rows, count, parts, each), 2, 0).reshape(
    parts, rows, count * each
  )
  found = lax.map(lambda part: _chosen(logits(part[0]), part[1]), (jnp.moveaxis(x, 1, 0), split))
  found = jnp.moveaxis(found.reshape(parts, rows, count, each), 0, 2).reshape(
    rows, count, parts * each
  )
  return found[:, :, :local].reshape(rows, count * local)


def _chosen(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """[B, T, V], [B, T] -> [B, T]."""
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


class ScoringExample(NamedTuple):
  """Tokens to score; all fields have one length n, which differs between examples.

  Attributes:
    inputs: [n] Model inputs: BOS, then the targets but the last.
    targets: [n] Token ids whose log-probabilities are wanted.
    weights: [n] Weight of each log-probability; 0 leaves it out.
  """

  inputs: Sequence[int]
  targets: Sequence[int]
  weights: Sequence[float]

  @classmethod
  def of(
    cls, prompt: Sequence[int], completion: Sequence[int], bos_id: int = 0
  ) -> 'ScoringExample':
    """Return the example that scores a completion after its prompt."""
    targets = [*prompt, *completion]
    return cls(
      [bos_id, *targets][: len(targets)], targets, [0.0] * len(prompt) + [1.0] * len(completion)
    )


def score_pack(
  log_probs: Callable, examples: Sequence[ScoringExample], pack: Pack
) -> list[tuple[int, np.ndarray]]:
  """Score the examples of one batch.

  Args:
    log_probs: Engine.log_probs.
    examples: All examples.
    pack: Which of them go together, and the shape of their batch.

  Returns:
    The index of each example and its weighted log-probabilities, [n] float32.
  """
  inputs, targets = np.zeros((2, pack.rows, pack.length), np.int32)
  for row, item in enumerate(pack.items):
    inputs[row, : len(examples[item].inputs)] = examples[item].inputs
    targets[row, : len(examples[item].targets)] = examples[item].targets
  scored = log_probs(inputs, targets)
  found = []
  for row, item in enumerate(pack.items):
    weights = np.asarray(examples[item].weights, np.float32)
    found.append((item, scored[row, : len(weights)] * weights))
  return found
