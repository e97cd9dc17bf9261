"""Scores of prompts of any length, with one program for all of them."""

import numpy as np
import pytest

from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.ranking import PromptRanker
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from tests import memory, reference

pytestmark = pytest.mark.usefixtures('quick_programs')

CONFIG = memory.ODD
VOCAB_SIZE = CONFIG.vocab_size
MAX_LENGTH, CHUNK, TOP = 96, 20, 4  # chunks are no multiple of the devices, nor divide max_length


def _ranker(mesh, layout):
  tensors = reference.random_tensors(CONFIG, seed=3)
  engine = memory.engine(CONFIG, tensors, mesh, prefill=layout, stacked=mesh == '2x2x2')
  config = SchedulerConfig(
    8,
    MAX_LENGTH,
    page_size=32,
    prefill_chunk=CHUNK,
    prefill_rows=engine.model.prefilling.padded_batch(1),
    top_log_probs=TOP,
  )
  scheduler = Scheduler(engine.model, engine.weights, config)
  return tensors, scheduler, PromptRanker(scheduler, engine.weights)


def _prompts(lengths):
  rng = np.random.default_rng(0)
  return [tuple(rng.integers(0, VOCAB_SIZE, length).tolist()) for length in lengths]


def _log_probs(tensors, tokens):
  logits = reference.logits(CONFIG, tensors, np.asarray([tokens[:-1]]))[0]
  return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize(
  'mesh, layout', [('1x1x1', 'ws_2d/batch'), ('2x2x2', 'ws_2d/batch'), ('2x2x2', 'wg_xyz/batch')]
)
def test_scores_of_all_lengths_are_the_references_and_compile_once(mesh, layout):
  tensors, scheduler, ranker = _ranker(mesh, layout)
  compiled = programs.score_chunks.compiled
  assert ranker.warm_up().name == 'score_chunks'
  lengths = [0, 1, 2, CHUNK, CHUNK + 1, CHUNK + 2, 3 * CHUNK, MAX_LENGTH, 37]
  prompts = _prompts(lengths)
  if layout == 'wg_xyz/batch':  # a row decodes meanwhile
    scheduler.submit(Request((1, 2, 3), limit=40))
    for _ in range(3):
      scheduler.step()
  found = ranker.rank([(tokens, i % (TOP + 1), None) for i, tokens in enumerate(prompts)])
  assert programs.score_chunks.compiled == compiled + 1
  assert found[0] == found[1] == ([], [])
  for i, (tokens, ranked) in enumerate(zip(prompts, found)):
    if len(tokens) < 2:
      continue
    log_probs = _log_probs(tensors, tokens)
    expected = log_probs[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(ranked.log_probs, expected, atol=1e-4)
    assert len(ranked.top) == len(tokens) - 1
    for pairs, row in zip(ranked.top, log_probs):
      assert len(pairs) == i % (TOP + 1)
      np.testing.assert_allclose(
        [value for _, value in pairs], np.sort(row)[::-1][: len(pairs)], atol=1e-4
      )
      np.testing.assert_allclose(
        [row[token] for token, _ in pairs], [v for _, v in pairs], atol=1e-4
      )
