"""Log-probabilities of prompts' own tokens, with the most likely tokens in their places."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from t5x_inference_ext.engine import length_buckets, programs
from t5x_inference_ext.engine.request import TopLogProbs
from t5x_inference_ext.engine.scorer import Scorer
from t5x_inference_ext.engine.scoring import ScoringExample, packed

# Numbers of most likely tokens that there are programs for; the last is the most that can be asked.
WIDTHS = (0, 1, 20)
_TOKENS = 4096  # of a batch, padding included


class RankedPrompt(NamedTuple):
  """The scores of a prompt's tokens but the first.

  Attributes:
    log_probs: Log-probability of each, given those before it.
    top: For each the most likely tokens in its place, as pairs (id, log-probability).
  """

  log_probs: list[float]
  top: list[TopLogProbs]


def rank_prompts(
  scorer: Scorer, prompts: Sequence[tuple[Sequence[int], int]]
) -> list[RankedPrompt]:
  """Score prompts together, those of like lengths in one pass.

  Args:
    scorer: The engine.
    prompts: Pairs (token ids with BOS if the model has one, how many of the most likely tokens are
      told at each place). An empty prompt, or one of one token, has no scores.
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
