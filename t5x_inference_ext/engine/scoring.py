"""Log-probabilities of examples of different lengths, in batches of similar lengths."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from t5x_inference_ext.engine.length_buckets import Pack


class ScoringExample(NamedTuple):
  """Tokens to score. All three arrays have length n, which differs between examples.

  Attributes:
    inputs: [n] int32. Model inputs: the token before each target; the first is BOS if there is one.
    targets: [n] int32. Token ids to score.
    weights: [n] float32. Weight of each log-probability; 0 ignores the target.
  """

  inputs: Sequence[int]
  targets: Sequence[int]
  weights: Sequence[float]

  @classmethod
  def of(
    cls, prompt: Sequence[int], completion: Sequence[int], bos_id: int | None
  ) -> 'ScoringExample':
    """Return the example that scores a completion given its prompt.

    Args:
      prompt: Token ids without BOS.
      completion: Token ids to score. They become the last targets.
      bos_id: The id in front of each prompt; None: no BOS. The prompt must then have a token, and
        its first token is no target.
    """
    targets = [*prompt, *completion]
    weights = [0.0] * len(prompt) + [1.0] * len(completion)
    if bos_id is None:
      return cls(targets[:-1], targets[1:], weights[1:])
    return cls([bos_id, *targets][: len(targets)], targets, weights)


def tokens_read(prompt: Sequence[int], completion: Sequence[int], bos_id: int | None) -> int:
  """Return how many tokens a model reads to score a completion: BOS, and all except the last."""
  return len(prompt) + len(completion) - (bos_id is None)


def score_pack(
  log_probs: Callable, examples: Sequence[ScoringExample], pack: Pack
) -> list[tuple[int, np.ndarray]]:
  """Score the examples of one batch.

  Args:
    log_probs: Engine.log_probs.
    examples: All examples.
    pack: Indices of the examples in the batch, and its shape.

  Returns:
    Pairs of an example's index and its weighted log-probabilities, [n] float32.
  """
  scored = log_probs(*packed(examples, pack))
  found = []
  for row, item in enumerate(pack.items):
    weights = np.asarray(examples[item].weights, np.float32)
    found.append((item, scored[row, : len(weights)] * weights))
  return found


def packed(examples: Sequence[ScoringExample], pack: Pack) -> tuple[np.ndarray, np.ndarray]:
  """Return the inputs and targets of one batch, [rows, length] int32 each; see score_pack."""
  inputs, targets = np.zeros((2, pack.rows, pack.length), np.int32)
  for row, item in enumerate(pack.items):
    inputs[row, : len(examples[item].inputs)] = examples[item].inputs
    targets[row, : len(examples[item].targets)] = examples[item].targets
  return inputs, targets
