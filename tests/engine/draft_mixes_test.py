"""Random mixes of requests whose steps check drafts: each row's tokens are those it has alone,
without drafts, also with a grammar.

DRAFT_MIXES=200 runs so many mixes of each kind, in place of a few; DRAFT_MIXES=40-80 runs those
from number 40 up to 79, so that many can run in pieces.
"""

import dataclasses
import functools
import os
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest

from t5x_inference_ext.engine.draft_model import DraftModel
from t5x_inference_ext.engine.executor import DeviceExecutor
from t5x_inference_ext.engine.grammars import GrammarMatcher
from t5x_inference_ext.engine.ngram_drafts import NgramDrafter
from t5x_inference_ext.engine.open_drafter import OpenDrafter
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.rows import Row
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.speculation import Speculation
from tests import memory, reference
from tests.engine import identity_test
from tests.engine.identity_test import BLOCK, CONFIG, EOS, LENGTH, SAMPLINGS, TENSORS

pytestmark = pytest.mark.usefixtures('quick_programs')
MOST = 4
FIRST, LAST = map(int, f'0-{os.environ.get("DRAFT_MIXES", 8)}'.split('-')[-2:])
MIXES = LAST - FIRST
SIZES = dict(
  slots=5,
  prefill_rows=2,
  prefill_chunk=16,
  pages=6,
  page_size=32,
  page_reads=1,
  prefix_bytes=8 * BLOCK,
)
# Prices of steps that check none, two tokens and all four: the cheap ones run.
PRICES = ((1.0, 1.05, 1.1), (100.0, 1.0, 100.0), (100.0, 100.0, 1.0))
PLAIN = tuple(s for s in SAMPLINGS if s in (SamplingParams(), SamplingParams(0.7)))


class Kind(NamedTuple):
  """A model, and its drafts.

  Attributes:
    draft: Whether a model drafts, the same one in float32; else n-grams do.
    int8: Whether the weights are int8.
    cache: Dtype of the KV cache.
    dtype: Dtype of activations and float weights.
    tie: Rows may differ from those alone where the best two tokens are closer than this.
    samplings: How tokens are chosen. `margin` knows no penalties.
    grammars: Whether some rows have grammars.
  """

  draft: bool = False
  int8: bool = False
  cache: str | None = 'int8'
  dtype: str = 'float32'
  tie: float = 1e-4
  samplings: tuple[SamplingParams, ...] = SAMPLINGS
  grammars: bool = True


KINDS = {
  'ngram': Kind(),
  'draft': Kind(draft=True, int8=True),
  'bfloat16': Kind(cache=None, dtype='bfloat16', tie=0.05, samplings=PLAIN, grammars=False),
}


@functools.cache
def engine(kind: Kind):
  tensors = reference.quantized(CONFIG, TENSORS) if kind.int8 else TENSORS
  return memory.engine(CONFIG, tensors, '1x1x1', stacked=True, cache=kind.cache, dtype=kind.dtype)


def scheduler(kind: Kind) -> Scheduler:
  drafter = OpenDrafter(NgramDrafter(MOST))
  if kind.draft:
    float32 = engine(Kind(cache=None))
    drafter = OpenDrafter(DraftModel(float32.model, MOST), float32.weights)
  config = SchedulerConfig(
    max_length=LENGTH,
    end_ids=(EOS,),
    prefill_budget=24,
    speculate=Speculation('ngram', MOST),
    **SIZES,
  )
  found = engine(kind)
  runs = DeviceExecutor(found.model, found.weights, config, drafter)
  return Scheduler(
    found.model, found.weights, config, vocabulary=identity_test.VOCABULARY, executor=runs
  )


@functools.cache
def one_slot(kind: Kind) -> Scheduler:
  """A scheduler with room for one row, without drafts."""
  found, config = engine(kind), SchedulerConfig(1, LENGTH, end_ids=(EOS,), prefill_chunk=16)
  return Scheduler(found.model, found.weights, config, vocabulary=identity_test.VOCABULARY)


def alone(kind: Kind, request: Request, seed: int) -> list[int]:
  if request.grammar is None:
    return identity_test.alone_in(engine(kind), request, seed)
  core = one_slot(kind)
  core.submit(dataclasses.replace(request, seeds=(seed,)))
  return [token for _ in iter(lambda: core.idle, True) for e in core.step() for token in e.tokens]


def watch(monkeypatch) -> tuple[list[int], list[bool]]:
  """Lists of the numbers of tokens that rows with grammars get in a step, and of their drafts:
  whether each was forced.
  """
  counts, forced, draft, add = [], [], GrammarMatcher.draft, Row.add

  def watched_draft(self, proposed, most):
    found = draft(self, proposed, most)
    if found[0]:
      forced.append(found[1])
    return found

  def watched_add(self, tokens, *rest):
    if self.matcher is not None:
      counts.append(len(tokens))
    return add(self, tokens, *rest)

  monkeypatch.setattr(GrammarMatcher, 'draft', watched_draft)
  monkeypatch.setattr(Row, 'add', watched_add)
  return counts, forced


@pytest.mark.parametrize('name', KINDS)
def test_random_mixes_with_drafts_are_identical_to_one_at_a_time(name, monkeypatch):
  """In bfloat16, where passes of several tokens round differently, but for narrow choices."""
  kind = KINDS[name]
  found, core, margins, rows = engine(kind), scheduler(kind), [], 0
  constrained, (counts, forced) = 0, watch(monkeypatch)
  for i in range(FIRST, LAST):
    rng = np.random.default_rng(5000 + i)
    prices = np.asarray(PRICES[i % 3], np.float32)
    fixed = mock.Mock(tries_plain=False, next=lambda prices=prices: prices)
    core._decoder._prices = core._decoder._masked.prices = fixed
    requests = identity_test.mix(rng, kind.grammars, kind.samplings)
    for (index, sample), (tokens, finish) in identity_test.served(core, requests, rng).items():
      asked, seed = requests[index], requests[index].seeds[sample]
      wanted = alone(kind, asked, seed)
      rows, constrained = rows + 1, constrained + (asked.grammar is not None)
      if finish == 'cancelled':
        wanted = wanted[: len(tokens)]
      else:
        assert finish == identity_test.reason(asked, tokens)
      if tokens != wanted:
        same = wanted[: identity_test.first_difference(tokens, wanted)]
        margins.append(identity_test.margin_in(found, asked, seed, same))
        assert margins[-1] < kind.tie, (i, index, tokens, wanted)
  stats = core.stats
  print(
    f'{name}: {rows} rows, {len(margins)} differ ({len(margins) / rows:.2%}), at margins up to '
    f'{max(margins, default=0)}; {stats.preempted} preemptions, '
    f'{stats.prefixes.hits} prefix hits; {stats.drafts}; {constrained} rows '
    f'with grammars: {sum(counts)} tokens in {len(counts)} steps, {len(forced)} drafts, '
    f'{sum(forced)} of them forced'
  )
  if kind.grammars:
    assert constrained > MIXES and 0 < sum(forced) < len(forced) - MIXES
    assert sum(counts) > 1.1 * len(counts)
  assert rows > 3 * MIXES and stats.preempted >= MIXES / 8 and stats.prefixes.hits > MIXES / 2
  assert len(margins) <= rows / 100 or kind.dtype == 'bfloat16'
  assert stats.drafts.accepted > 4 * MIXES and stats.drafts.tokens_per_step > 1.1
