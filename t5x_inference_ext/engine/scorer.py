"""Scores and logits of given tokens: the scoring methods of Engine."""

from collections.abc import Sequence
import dataclasses
import functools

import numpy as np

from t5x_inference_ext.checkpoints import Checkpoint
from t5x_inference_ext.engine import length_buckets, programs, scoring
from t5x_inference_ext.engine.adapters import NO_ADAPTERS, AdapterNames
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
    adapters: Names of the adapters beside the weights.
  """

  checkpoint: Checkpoint
  model: Model
  weights: Weights
  adapters: AdapterNames = dataclasses.field(default=NO_ADAPTERS, kw_only=True)

  def score(
    self,
    inputs: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    adapter: str | None = None,
  ) -> np.ndarray:
    """Return the sum over positions of weight * log p(target | inputs so far).

    Args:
      inputs: [B, T] model inputs: targets shifted right, BOS first.
      targets: [B, T] token ids.
      weights: [B, T] float32; None: 0 where a target is 0 (padding), 1 elsewhere.
      adapter: Name of the adapter of all rows; None: the model itself.

    Returns:
      [B] float32.

    Raises:
      RequestError: Empty arrays or arrays of different shapes, ids outside the vocabulary, or an
        adapter that is not loaded.
    """
    check_arrays(self.model.config.vocab_size, inputs, targets, weights=weights)
    weights = np.asarray(np.asarray(targets) != 0 if weights is None else weights, np.float32)
    return np.sum(self.log_probs(inputs, targets, adapter=adapter) * weights, axis=1)

  def log_probs(
    self, inputs: np.ndarray, targets: np.ndarray, *, adapter: str | None = None
  ) -> np.ndarray:
    """Return log p(target | inputs so far) at each position, [B, T] float32; see `score`."""
    check_arrays(self.model.config.vocab_size, inputs, targets)
    weights, inputs, first = self._adapted(inputs, adapter)
    targets = np.pad(np.asarray(targets, np.int32), ((0, 0), (first, 0)))
    arrays = programs.put(self.model, inputs, targets)
    return np.asarray(programs.log_probs(self.model, weights, *arrays))[:, first:]

  def _adapted(self, inputs: np.ndarray, adapter: str | None) -> tuple[Weights, np.ndarray, int]:
    """Return the weights for rows with an adapter, their inputs, and the soft prompt's length."""
    inputs = np.asarray(inputs, np.int32)
    rows = self.adapters.of_rows(adapter, len(inputs))
    first = len(self.adapters.prompt(adapter))
    if first:
      inputs, _ = self.adapters.inputs(inputs, np.zeros(len(inputs), np.int32), rows)
    return self.adapters.weights_for(self.weights, self.model, rows), inputs, first

  def score_completions(
    self,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    tokens: int = 8192,
    adapter: str | None = None,
  ) -> list[list[float]]:
    """Return the log-probabilities of each completion's tokens after its prompt.

    Their sum is the completion's score. Pairs of similar lengths are scored together.

    Args:
      pairs: Pairs (prompt, completion) of token ids without BOS.
      tokens: Maximum number of tokens of a batch, padding included.
      adapter: See `score`.

    Raises:
      RequestError: Ids outside the vocabulary, more tokens than the model has positions, an empty
        prompt where the model has no BOS, or an adapter that is not loaded. The message names the
        pair, counted from 0.
    """
    check_at_least(1, tokens=tokens)
    config, bos_id = self.model.config, self.checkpoint.bos_id
    pairs = plain_pairs(pairs, config.vocab_size)
    for i, (prompt, completion) in enumerate(pairs):
      check_start(f'the prompt of pair {i}', prompt, bos_id)
      read = scoring.tokens_read(prompt, completion, bos_id) + len(self.adapters.prompt(adapter))
      check_positions(f'pair {i}', read, config)
    examples = [scoring.ScoringExample.of(*pair, bos_id) for pair in pairs]
    packer = length_buckets.packer(self.model, tokens)
    found: dict[int, np.ndarray] = {}
    for pack in packer.pack([len(example.targets) for example in examples]):
      log_probs = functools.partial(self.log_probs, adapter=adapter)
      found.update(scoring.score_pack(log_probs, examples, pack))
    scored = (found[i].tolist() for i in range(len(pairs)))
    return [each[len(each) - len(completion) :] for each, (_, completion) in zip(scored, pairs)]

  def logits(self, inputs: np.ndarray, *, adapter: str | None = None) -> np.ndarray:
    """Return the logits after each position of model inputs [B, T]: [B, T, V] float32."""
    check_arrays(self.model.config.vocab_size, inputs)
    weights, inputs, first = self._adapted(inputs, adapter)
    tokens = programs.put(self.model, inputs)
    return np.asarray(programs.logits(self.model, weights, *tokens))[:, first:]
