"""Scores and logits of given tokens: the scoring methods of Engine."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from t5x_inference_ext.checkpoints import Checkpoint
from t5x_inference_ext.engine import length_buckets, programs, scoring
from t5x_inference_ext.engine.inputs import (
  check_arrays,
  check_at_least,
  check_positions,
  check_start,
  plain_pairs,
)
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights


@dataclasses.dataclass(frozen=True)
class Scorer:
  """Scores given tokens with a model whose weights are on a mesh.

  Attributes:
    checkpoint: The checkpoint that the weights were loaded from.
    model: Functions of the model, and the mesh.
    weights: Weights on the mesh.
  """

  checkpoint: Checkpoint
  model: Model
  weights: Weights

  def score(
    self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None
  ) -> np.ndarray:
    """Return the sum over positions of weight * log p(target | inputs so far).

    Args:
      inputs: [B, T] model inputs: targets shifted right, BOS first.
      targets: [B, T] token ids.
      weights: [B, T] float32; None: 0 where a target is 0 (padding), 1 elsewhere.

    Returns:
      [B] float32.

    Raises:
      RequestError: Empty arrays or arrays of different shapes, or ids outside the vocabulary.
    """
    check_arrays(self.model.config.vocab_size, inputs, targets, weights=weights)
    weights = np.asarray(np.asarray(targets) != 0 if weights is None else weights, np.float32)
    return np.sum(self.log_probs(inputs, targets) * weights, axis=1)

  def log_probs(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return log p(target | inputs so far) at each position, [B, T] float32; see `score`."""
    check_arrays(self.model.config.vocab_size, inputs, targets)
    inputs, targets = np.asarray(inputs, np.int32), np.asarray(targets, np.int32)
    return np.asarray(
      programs.log_probs(self.model, self.weights, *programs.put(self.model, inputs, targets))
    )

  def score_completions(
    self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, tokens: int = 8192
  ) -> list[list[float]]:
    """Return the log-probabilities of each completion's tokens after its prompt.

    Their sum is the completion's score. Pairs of similar lengths are scored together.

    Args:
      pairs: Pairs (prompt, completion) of token ids without BOS.
      tokens: Maximum number of tokens of a batch, padding included.

    Raises:
      RequestError: Ids outside the vocabulary, more tokens than the model has positions, or an
        empty prompt where the model has no BOS. The message names the pair, counted from 0.
    """
    check_at_least(1, tokens=tokens)
    config, bos_id = self.model.config, self.checkpoint.bos_id
    pairs = plain_pairs(pairs, config.vocab_size)
    for i, (prompt, completion) in enumerate(pairs):
      check_start(f'the prompt of pair {i}', prompt, bos_id)
      check_positions(f'pair {i}', scoring.tokens_read(prompt, completion, bos_id), config)
    examples = [scoring.ScoringExample.of(*pair, bos_id) for pair in pairs]
    packer = length_buckets.packer(self.model, tokens)
    found: dict[int, np.ndarray] = {}
    for pack in packer.pack([len(example.targets) for example in examples]):
      found.update(scoring.score_pack(self.log_probs, examples, pack))
    scored = (found[i].tolist() for i in range(len(pairs)))
    return [each[len(each) - len(completion) :] for each, (_, completion) in zip(scored, pairs)]

  def logits(self, inputs: np.ndarray) -> np.ndarray:
    """Return the logits after each position of model inputs [B, T]: [B, T, V] float32."""
    check_arrays(self.model.config.vocab_size, inputs)
    tokens = programs.put(self.model, np.asarray(inputs, np.int32))
    return np.asarray(programs.logits(self.model, self.weights, *tokens))
