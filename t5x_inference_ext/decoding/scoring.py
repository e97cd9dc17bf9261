"""Log-probabilities of given tokens, some positions at a time; and ragged examples packed by length."""

from typing import Callable, Iterator, NamedTuple, Sequence

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from t5x_inference_ext.collectives import plain

# Logits of more elements than this (256 MiB) are not made at once on a device, but some positions at a time.
MAX_LOGITS = 2**26
SHORTEST = 16


def target_log_probs(
    x: jax.Array, targets: jax.Array, logits: Callable[[jax.Array], jax.Array], shards: Sequence[str], width: int
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
  count, local = plain.axis_size(shards), x.shape[1]
  each = max(1, min(local, MAX_LOGITS // (width * count)))  # positions of a shard at a time
  parts = -(-local // each)
  if parts == 1:
    return _chosen(logits(x), targets)
  padding = parts * each - local
  x = jnp.pad(x, ((0, 0), (0, padding), (0, 0))).reshape(x.shape[0], parts, each, x.shape[2])
  rows = targets.shape[0]
  split = jnp.pad(targets.reshape(rows, count, local), ((0, 0), (0, 0), (0, padding)))
  split = jnp.moveaxis(split.reshape(rows, count, parts, each), 2, 0).reshape(parts, rows, count * each)
  found = lax.map(lambda part: _chosen(logits(part[0]), part[1]), (jnp.moveaxis(x, 1, 0), split))
  found = jnp.moveaxis(found.reshape(parts, rows, count, each), 0, 2).reshape(rows, count, parts * each)
  return found[:, :, :local].reshape(rows, count * local)


def _chosen(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """[B, T, V], [B, T] -> [B, T]."""
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


class Pack(NamedTuple):
  """Examples that are scored together.

  Attributes:
    items: their places.
    rows: of the batch, padding included.
    length: that all are padded to.
  """

  items: list[int]
  rows: int
  length: int


def pack(lengths: Sequence[int], tokens: int, padded_batch: Callable[[int], int]) -> Iterator[Pack]:
  """Batches of examples of like lengths, so that little of a batch is padding, and few shapes are compiled.

  Lengths are padded to powers of two or halfway between. All batches of a length but its last have as many rows.

  Args:
    lengths: of the examples.
    tokens: of a batch, at most, before its rows are rounded up to what the mesh takes.
    padded_batch: Model.padded_batch.
  """
  buckets: dict[int, list[int]] = {}
  for item, length in enumerate(lengths):
    buckets.setdefault(padded(length), []).append(item)
  for length, items in sorted(buckets.items()):
    most = padded_batch(max(1, tokens // length))
    for i in range(0, len(items), most):
      some = items[i:i + most]
      # The last batch of a length: a power of two of its rows, for as few shapes.
      yield Pack(some, min(most, padded_batch(1 << (len(some) - 1).bit_length())), length)


def padded(length: int) -> int:
  """The smallest of 16, 24, 32, 48, 64, 96, ... that is enough."""
  size = SHORTEST
  while size < length:
    if size * 3 // 2 >= length:
      return size * 3 // 2
    size *= 2
  return size



class Example(NamedTuple):
  """What is scored: targets given what comes before them, and what each counts for. All [n], of any n."""

  inputs: Sequence[int]
  targets: Sequence[int]
  weights: Sequence[float]

  @classmethod
  def of(cls, prompt: Sequence[int], completion: Sequence[int], bos_id: int = 0) -> 'Example':
    """A completion after its prompt."""
    targets = [*prompt, *completion]
    return cls([bos_id, *targets][:len(targets)], targets, [0.] * len(prompt) + [1.] * len(completion))


def score(
    log_probs: Callable, examples: Sequence[Example], tokens: int, padded_batch: Callable[[int], int]
) -> Iterator[tuple[int, np.ndarray]]:
  """The place of an example and its log-probabilities [n], weighted: batch by batch, of like lengths.

  Args:
    log_probs: Engine.log_probs.
    examples: in any order.
    tokens, padded_batch: as pack's.
  """
  for some in pack([len(e.targets) for e in examples], tokens, padded_batch):
    inputs, targets = np.zeros((2, some.rows, some.length), np.int32)
    for row, item in enumerate(some.items):
      inputs[row, :len(examples[item].inputs)] = examples[item].inputs
      targets[row, :len(examples[item].targets)] = examples[item].targets
    scored = log_probs(inputs, targets)
    for row, item in enumerate(some.items):
      weights = np.asarray(examples[item].weights, np.float32)
      yield item, scored[row, :len(weights)] * weights
