"""Log-probabilities of the tokens of prompts, and of the most likely tokens at each position."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.request import TopLogProbs
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.warm_up import CompiledProgram, timed_run
from t5x_inference_ext.model.log_probs import RankedTokens
from t5x_inference_ext.model.weights import Weights


class RankedPrompt(NamedTuple):
  """The scores of all tokens of a prompt except the first.

  Attributes:
    log_probs: Log-probability of each token, given the tokens before it.
    top: For each token, the most likely tokens at its position, as pairs (id, log-probability).
  """

  log_probs: list[float]
  top: list[TopLogProbs]


class PromptRanker:
  """Scores prompts of any length beside a scheduler, with one program.

  The program scores as many prompts at once as the scheduler prefills together. It runs as many
  chunks, of the scheduler's largest first size, as the longest prompt needs. So prompts of all
  lengths share one compilation.

  Args:
    scheduler: Its config limits the lengths of prompts and the number of most likely tokens, which
      is taken as at least 1.
    weights: Weights on the mesh of the scheduler's model.
  """

  def __init__(self, scheduler: Scheduler, weights: Weights) -> None:
    self._scheduler, self._weights, config = scheduler, weights, scheduler.config
    self._rows, self._top = config.prefill_rows, config.top_log_probs
    self._size = config.first_chunks[-1]
    self._length = -(-config.max_length // self._size) * self._size

  def rank(self, prompts: Sequence[tuple[Sequence[int], int, str | None]]) -> list[RankedPrompt]:
    """Score prompts.

    Args:
      prompts: Triples (token ids, number of most likely tokens to return at each position, name of
        an adapter or None). The ids begin with the adapter's soft prompt, which has no scores, and
        with BOS if the model has one. An empty prompt, or one of one token, has no scores.
    """
    found, names = [RankedPrompt([], []) for _ in prompts], self._scheduler.adapters
    soft = [len(names.prompt(adapter)) for _, _, adapter in prompts]
    scored = [i for i, (tokens, _, _) in enumerate(prompts) if len(tokens) - soft[i] > 1]
    for first in range(0, len(scored), self._rows):
      group = scored[first : first + self._rows]
      ranked = self._run([(prompts[i][0], prompts[i][2]) for i in group])
      for row, i in enumerate(group):
        tokens, top, _ = prompts[i]
        found[i] = _ranked_prompt(ranked, row, slice(soft[i], len(tokens) - 1), top)
    return found

  def warm_up(self) -> CompiledProgram:
    """Compile the program, and return it."""
    done: list[CompiledProgram] = []
    on_host = lambda: None  # the scores are host arrays: there is nothing to wait for
    timed_run(done, 'score_chunks', lambda: self._run([((0, 0), None)]), on_host, size=self._size)
    return done[0]

  def _run(self, prompts: Sequence[tuple[Sequence[int], str | None]]) -> RankedTokens:
    """Return the scores of prompts of 2 tokens or more, with their adapters, as host arrays."""
    inputs, targets = np.zeros((2, self._rows, self._length), np.int32)
    adapters: list[str | None] = [None] * self._rows
    for row, (tokens, adapter) in enumerate(prompts):
      inputs[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
      adapters[row] = adapter
    longest = max(len(tokens) for tokens, _ in prompts)
    count = np.int32(-(-(longest - 1) // self._size))
    self._scheduler.executor.settle()
    model = self._scheduler.model
    targets[targets >= model.config.vocab_size] = 0  # soft prompts have no scores
    arrays = programs.put(model, inputs, targets, count)
    weights = self._scheduler.adapters.weights_for(self._weights, model, adapters)
    scores = programs.score_chunks(model, weights, *arrays, size=self._size, top=self._top)
    return jax.device_get(scores)


def _ranked_prompt(ranked: RankedTokens, row: int, at: slice, top: int) -> RankedPrompt:
  """Return the scores of a row's positions `at`, with `top` of the most likely tokens."""
  ids = ranked.top_tokens[row, at, :top].tolist()
  likely = ranked.top_log_probs[row, at, :top].tolist()
  pairs = [list(zip(*each)) for each in zip(ids, likely)]
  return RankedPrompt(ranked.log_probs[row, at].tolist(), pairs)
