"""Log-probabilities of the tokens of prompts, and of the most likely tokens at each position."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from t5x_inference_ext.engine import length_buckets, programs
from t5x_inference_ext.engine.request import TopLogProbs
from t5x_inference_ext.engine.scorer import Scorer
from t5x_inference_ext.engine.scoring import ScoringExample, packed

# How many most likely tokens a program returns: one program for each number here. The last is the
# maximum that a request may ask for.
WIDTHS = (0, 1, 20)
_TOKENS = 4096  # of a batch, padding included


class RankedPrompt(NamedTuple):
  """The scores of all tokens of a prompt except the first.

  Attributes:
    log_probs: Log-probability of each token, given the tokens before it.
    top: For each token, the most likely tokens at its position, as pairs (id, log-probability).
  """

  log_probs: list[float]
  top: list[TopLogProbs]


def rank_prompts(
  scorer: Scorer, prompts: Sequence[tuple[Sequence[int], int]]
) -> list[RankedPrompt]:
  """Score prompts; prompts of similar lengths share a pass.

  Args:
    scorer: The engine.
    prompts: Pairs (token ids with BOS if the model has one, number of most likely tokens to return
      at each position). A prompt of 0 or 1 tokens has no scores.
  """
  most = min(max((top for _, top in prompts), default=0), scorer.model.config.vocab_size)
  width = min(next(w for w in WIDTHS if w >= most), scorer.model.config.vocab_size)
  found = [RankedPrompt([], []) for _ in prompts]
  scored = [i for i, (tokens, _) in enumerate(prompts) if len(tokens) > 1]
  examples = [ScoringExample.of(prompts[i][0], (), None) for i in scored]
  packer = length_buckets.packer(scorer.model, _TOKENS)
  for pack in packer.pack([len(example.targets) for example in examples]):
    arrays = programs.put(scorer.model, *packed(examples, pack))
    result = programs.log_probs(scorer.model, scorer.weights, *arrays, top=width)
    log_probs, ids, likely = map(np.asarray, result if width else (result, None, None))
    for row, item in enumerate(pack.items):
      tokens, top = prompts[scored[item]]
      count = len(tokens) - 1
      pairs: list[TopLogProbs] = [[] for _ in range(count)]
      if top:
        shown = ids[row, :count, :top].tolist(), likely[row, :count, :top].tolist()
        pairs = [list(zip(*each)) for each in zip(*shown)]
      found[scored[item]] = RankedPrompt(log_probs[row, :count].tolist(), pairs)
  return found
