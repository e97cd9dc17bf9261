"""Slot refill: a row's tokens are those it has alone, whatever else runs beside it, and on whatever
mesh.
"""

import functools

import numpy as np
import pytest

from t5x_inference_ext.engine import scheduler_config, selection, shared_prefix
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.errors import RequestError
from tests import memory, reference

CONFIG = memory.ODD
TENSORS = reference.random_tensors(CONFIG, seed=1)
SAMPLERS = (
  SamplingParams(),
  SamplingParams(1.0, top_k=40, top_p=0.95),
  SamplingParams(0.7),
  SamplingParams(1.0, top_p=0.8),
  SamplingParams(
    2.0, repetition_penalty=1.3, frequency_penalty=0.5, stop=((7,), (9, 9)), min_new_tokens=3
  ),
)
EOS, LONGEST, MOST = 1, 20, 12

# (mesh, prefill, decode, slots, prompts, chunk): mixes of one kind share their compilations.
KINDS = [
  ('1x1x1', 'ws_2d/batch', 'ws_2d/batch', 3, 1, 4),
  ('1x1x1', 'ws_2d/batch', 'ws_2d/batch', 5, 2, 16),
  ('2x2x2', 'wg_xyz/batch', 'ws_2d/batch', 4, 2, 8),
  ('1x2x2', 'ws_1d/heads', 'ws_1d/batch', 2, 1, 32),
  ('2x2x1', 'ws_2d/heads', 'wg_x/heads', 4, 1, 5),
]
MIXES = 200  # about two minutes


@functools.cache
def engine(mesh, prefill='ws_2d/batch', decode='ws_2d/batch'):
  return memory.engine(CONFIG, TENSORS, mesh, prefill=prefill, decode=decode, stacked=True)


@functools.cache
def alone(request: Request, seed: int) -> list[int]:
  (found,) = engine('1x1x1').generate(
    [request.tokens[1:]],
    max_new_tokens=[MOST],
    sampling=[request.sampling],
    seeds=[seed],
    eos_id=EOS,
    prompt_size=LONGEST,
  )
  return found.tokens[: request.limit]


def mix(rng, sampling_arrays=SAMPLERS):
  """Requests, most of which begin alike: with different parts of one beginning."""
  beginning = rng.integers(3, CONFIG.vocab_size, 12).tolist()
  requests = []
  for _ in range(rng.integers(1, 9)):
    begin = beginning[: rng.integers(0, 13)] if rng.random() < 0.7 else []
    own = rng.integers(3, CONFIG.vocab_size, rng.integers(0, LONGEST - len(begin) + 1)).tolist()
    seeds = tuple(rng.integers(0, 2**32, 1 + (rng.random() < 0.2)).tolist())
    limit, sampling = (
      int(rng.integers(1, MOST + 1)),
      sampling_arrays[rng.integers(len(sampling_arrays))],
    )
    requests.append(Request((0, *begin, *own), seeds, limit, sampling))
  return requests


def served(scheduler, requests):
  found = {}
  for event in scheduler.run(requests):
    assert len(event.tokens) == len(event.log_probs)
    tokens, ended = found.setdefault((event.request, event.sample), ([], []))
    assert not any(ended)
    tokens += event.tokens
    ended.append(event.ended)
  assert sorted(found) == [(i, j) for i, r in enumerate(requests) for j in range(len(r.seeds))]
  assert all(ended[-1] for _, ended in found.values())
  return {key: tokens for key, (tokens, _) in found.items()}


def near_tie(request, seed, tokens):
  """Whether the two best perturbed logits after these tokens are within 1e-4."""
  whole = [*request.tokens, *tokens]
  inputs = np.zeros((1, 1 + LONGEST + MOST), np.int32)
  inputs[0, : len(whole)] = whole
  logits = engine('1x1x1').logits(inputs)[0, len(whole) - 1]
  if request.sampling.temperature:
    noise = selection.gumbel_of_all(
      *map(np.asarray, ([np.uint32(seed)], [np.int32(len(whole))])), CONFIG.vocab_size
    )
    logits = logits / request.sampling.temperature + np.asarray(noise)[0]
  second, first = np.sort(logits)[-2:]
  return first - second < 1e-4


def test_random_mixes_are_identical_to_one_at_a_time():
  rows = ties = 0
  for i in range(MIXES):
    rng = np.random.default_rng(i)
    mesh, prefill, decode, slots, prompts, chunk = KINDS[i % len(KINDS)]
    requests, model = mix(rng), engine(mesh, prefill, decode)
    config = SchedulerConfig(
      slots,
      LONGEST + MOST + 1,
      LONGEST + 1,
      LONGEST + 1,
      SAMPLERS,
      EOS,
      prefill_chunk=chunk,
      prefill_rows=prompts,
      prefill_budget=int(rng.integers(1, 40)),
      decode_steps=5,
    )
    # What is stored compiles for its length: one of two.
    shared = shared_prefix.find_shared_prefix([r.tokens for r in requests], least=3)[:8]
    shared = shared if len(shared) == 8 and i % 2 else ()
    for (request, sample), tokens in served(
      Scheduler(model.model, model.weights, config, shared), requests
    ).items():
      asked = requests[request]
      wanted = alone(asked, asked.seeds[sample])
      rows += 1
      if tokens != wanted:
        first = next(n for n, (a, b) in enumerate(zip([*tokens, None], [*wanted, None])) if a != b)
        assert near_tie(asked, asked.seeds[sample], wanted[:first]), (i, request, tokens, wanted)
        ties += 1
  print(f'{rows} rows of {MIXES} mixes; {ties} differ, at near ties')
  assert rows > 4 * MIXES and ties <= rows / 100


def test_slots_are_kept_full():
  """20 requests of 1 to 12 tokens on 3 slots: hardly more slot-steps than tokens, and no prompt is
  prefilled twice.
  """
  e, rng = engine('1x1x1'), np.random.default_rng(0)
  requests = [
    Request((0, *rng.integers(3, 101, 6).tolist()), (i,), 1 + i * 7 % 12) for i in range(20)
  ]
  scheduler = Scheduler(
    e.model, e.weights, SchedulerConfig(3, 40, 21, 21, eos_id=-1, prefill_chunk=4, decode_steps=5)
  )
  found = served(scheduler, requests)
  assert [len(found[i, 0]) for i in range(20)] == [r.limit for r in requests]
  stats = scheduler.stats
  assert stats.generated == sum(r.limit - 1 for r in requests)
  assert stats.decoded <= 1.25 * stats.generated
  assert stats.prompt_tokens == 20 * 7 and stats.prefilled == 20 * 8


def test_requests_are_taken_as_slots_become_free():
  e, taken = engine('1x1x1'), []

  def requests():
    for i in range(9):
      taken.append(i)
      yield Request((0, 5, 6), (i,), 8)

  for event in Scheduler(
    e.model, e.weights, SchedulerConfig(3, 40, 21, 21, eos_id=-1, prefill_chunk=4, decode_steps=5)
  ).run(requests()):
    if event.request == 0 and not event.ended:
      assert len(taken) <= 4  # and one that it knows to be waiting
  assert len(taken) == 9


def test_a_budget_lets_rows_go_on_while_prompts_wait():
  """One row decodes while a long prompt enters: with a budget of a chunk, a step between any two
  chunks.
  """
  e = engine('1x1x1')
  requests = [Request((0, 5), (1,), 12), Request((0, *range(3, 23)), (2,), 2)]
  events = list(
    Scheduler(
      e.model,
      e.weights,
      SchedulerConfig(3, 40, 21, 21, eos_id=-1, prefill_chunk=4, prefill_budget=1, decode_steps=5),
    ).run(requests)
  )
  before = [event.request for event in events].index(1)
  # A step of the first row alone; 21 positions in chunks of 4 take 6 passes, a step after each.
  assert before == 7
  assert [sum(len(e.tokens) for e in events if e.request == i) for i in (0, 1)] == [12, 2]


def test_a_run_that_is_left_makes_room_for_the_next():
  e = engine('1x1x1')
  scheduler = Scheduler(
    e.model, e.weights, SchedulerConfig(3, 40, 21, 21, eos_id=-1, prefill_chunk=4, decode_steps=5)
  )
  left = scheduler.run([Request((0, 5), (i,), 12) for i in range(5)])
  next(left)
  left.close()
  before = scheduler.stats.decoded
  found = served(scheduler, [Request((0, 9), limit=4)])
  assert found[0, 0] == e.generate([[9]], max_new_tokens=4, eos_id=-1)[0].tokens
  assert scheduler.stats.decoded - before == 3 * 3


def test_top_log_probabilities():
  e = engine('1x1x1')
  scheduler = Scheduler(
    e.model,
    e.weights,
    SchedulerConfig(2, 40, 21, 21, eos_id=-1, prefill_chunk=4, decode_steps=5, top_log_probs=3),
  )
  for event in scheduler.run([Request((0, 5), limit=4), Request((0, 9), limit=3)]):
    for token, log_prob, top in zip(event.tokens, event.log_probs, event.top):
      assert len(top) == 3 and top[0] == (token, log_prob) and log_prob == max(p for _, p in top)


def test_samples_share_their_prompt_s_prefill():
  e = engine('1x1x1')
  config = SchedulerConfig(2, 40, 21, 21, SAMPLERS[2:3], eos_id=-1, prefill_chunk=4, decode_steps=5)
  scheduler = Scheduler(e.model, e.weights, config)
  found = served(scheduler, [Request((0, 5, 9), (1, 2, 3, 4), 6, SAMPLERS[2])])
  assert scheduler.stats.prefilled == 4
  assert len(set(map(tuple, found.values()))) > 1
  for (_, sample), tokens in found.items():
    assert (
      tokens
      == e.generate(
        [[5, 9]], max_new_tokens=6, sampling=SAMPLERS[2], seeds=[sample + 1], eos_id=-1
      )[0].tokens
    )


@pytest.mark.parametrize(
  'prompts, least, wanted',
  [
    ([], 1, ()),
    ([(0, 5, 6)], 1, ()),
    ([(0, 5, 6, 7), (0, 5, 6, 8)], 1, (0, 5, 6)),
    ([(0, 5, 6)] * 3, 1, (0, 5)),  # the last token of a prompt is never shared
    ([(0, 5, 6, 7), (0, 5, 6, 8)], 4, ()),
    ([(0, 5, 6, 7), (0, 5, 6, 8), (0, 9, 9, 9)], 1, (0, 5, 6)),
    ([(0, 1, 1, 1, 1, 2), (0, 1, 1, 1, 1, 3), (0, 4, 2), (0, 4, 3), (0, 4, 4)], 1, (0, 4)),
    ([(0,), (0,)], 1, ()),
  ],
)
def test_what_is_shared(prompts, least, wanted):
  assert shared_prefix.find_shared_prefix(prompts, least) == wanted


def test_common():
  assert shared_prefix.common_length((0, 5, 6), (0, 5, 6, 7)) == 3
  assert shared_prefix.common_length((0, 5, 6), (0, 5, 6)) == 2
  assert shared_prefix.common_length((0, 5, 6), (0, 7, 6, 6)) == 1
  assert shared_prefix.common_length((), (0, 7)) == 0


def test_a_plan_fits_its_requests():
  model = engine('2x2x2').model
  requests = [Request((0, *range(3, 40), i), (0, 1), 30) for i in range(5, 9)] + [
    Request((0, 4), limit=200)
  ]
  config, shared = scheduler_config.config_for(
    model, requests, slots=7, eos_id=-1, prefill_chunk=32
  )
  assert shared == (0, *range(3, 40))
  assert (config.slots, config.cache_size, config.prompt_size, config.rest_size) == (8, 208, 48, 16)
  assert scheduler_config.config_for(model, requests, share=False)[1] == ()
  assert scheduler_config.config_for(model, requests[:1], slots=32)[0].slots == 2


@pytest.mark.parametrize(
  'request_, says',
  [
    (
      Request((0,) * 22),
      'request 0 has 22 tokens, BOS included, a limit of 64 new tokens, and 0 shared tokens: '
      'there is room for 21 prompt tokens',
    ),
    (Request((0, 5), limit=99), 'for 40 unshared and new ones, not counting the last new one'),
    (Request((0, 5), seeds=()), 'at least 1 new token and one seed are needed'),
    (Request((0, 5), limit=0), 'request 0 has limit 0 and 1 seeds'),
    (
      Request((0, 5), limit=2, sampling=SamplingParams(3.0)),
      'is not among the sampling parameters that the run was compiled for',
    ),
  ],
)
def test_what_does_not_fit_is_refused(request_, says):
  e = engine('1x1x1')
  with pytest.raises(RequestError, match=says):
    list(
      Scheduler(
        e.model,
        e.weights,
        SchedulerConfig(2, 40, 21, 21, eos_id=-1, prefill_chunk=4, decode_steps=5),
      ).run([request_])
    )
  with pytest.raises(RequestError, match='decode_steps must be at least 1'):
    SchedulerConfig(2, 40, 21, 21, decode_steps=0)
