"""The scheduler: requests that come and go, slots that are kept full, books that add up."""

import dataclasses
import functools
import threading

import numpy as np
import pytest

from t5x_inference_ext.engine import programs, scheduler_config
from t5x_inference_ext.engine.request import Request, RequestState
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.serve import serve
from t5x_inference_ext.engine.stats import PrefixStats
from t5x_inference_ext.engine.streams import Streams
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.chunks import page_shards
from t5x_inference_ext.text.grammar import Grammar
from t5x_inference_ext.text.vocabulary import ByteVocabulary
from tests import memory, reference
from tests.text.vocabularies import Characters

pytestmark = pytest.mark.usefixtures('quick_programs')

CONFIG = memory.ODD
TENSORS = reference.random_tensors(CONFIG, seed=1)
BLOCK = 32 * CONFIG.num_layers * 2 * CONFIG.d_head * 4 + 1  # float32 of one key head, and a flag


@functools.cache
def engine(mesh):
  return memory.engine(CONFIG, TENSORS, mesh, stacked=True)


def scheduler(mesh='1x1x1', vocabulary=None, **sizes):
  sizes = {'slots': 3, 'max_length': 64, 'page_size': 32, 'prefill_chunk': 16, **sizes}
  found = engine(mesh)
  config = SchedulerConfig(**{'end_ids': (), **sizes})
  return Scheduler(found.model, found.weights, config, vocabulary=vocabulary)


def finished(core, events=()):
  """Run a scheduler until it is idle; the tokens and finish reasons by request and sample, from the
  events so far on.
  """
  rows, reasons = {}, {}
  while events or not core.idle:
    events, now = (), events or core.step()
    for event in now:
      key = event.request, event.sample
      rows.setdefault(key, []).extend(event.tokens)
      if event.finish:
        assert key not in reasons
        reasons[key] = event.finish
  assert core.check_books() == []
  assert rows.keys() == reasons.keys()
  return rows, reasons


def alone(prompt, limit, **options):
  (found,) = engine('1x1x1').generate(
    [prompt], max_new_tokens=limit, eos_id=options.pop('eos_id', -1), **options
  )
  return found.tokens


@pytest.mark.parametrize('steps', [1, 5])
def test_slots_are_kept_full(steps):
  """20 requests of 1 to 12 tokens on 3 slots: hardly more slot-steps than tokens, and no prompt is
  prefilled twice.
  """
  rng = np.random.default_rng(0)
  requests = [
    Request((0, *rng.integers(3, 101, 6).tolist()), (i,), 1 + i * 7 % 12) for i in range(20)
  ]
  core = scheduler(decode_steps=steps)
  for request in requests:
    core.submit(request)
  rows, _ = finished(core)
  assert [len(rows[i, 0]) for i in range(20)] == [r.limit for r in requests]
  assert core.stats.generated == sum(r.limit - 1 for r in requests)
  assert core.stats.decoded <= 1.25 * core.stats.generated
  assert core.stats.prompt_tokens == 20 * 7 and core.stats.prefilled == 20 * 16


def test_requests_are_taken_as_slots_become_free():
  taken = []

  def requests():
    for i in range(9):
      taken.append(i)
      yield Request((0, 5, 6), (i,), 8)

  for event in serve(scheduler(), requests()):
    if event.request == 0 and not event.finish:
      assert len(taken) <= 4  # and one that it knows to be waiting
  assert len(taken) == 9


def test_first_tokens_are_told_as_soon_as_the_prompt_is_prefilled():
  core = scheduler(decode_steps=1)
  core.submit(Request((0, 5), limit=8))
  (event,) = core.step()
  assert len(event.tokens) == 1
  core.submit(Request((0, 6), limit=8))
  events = core.step()
  assert [(e.request, len(e.tokens)) for e in events] == [(0, 1), (1, 1)]
  finished(core)


def test_a_budget_lets_rows_go_on_while_prompts_wait():
  """One row decodes while a long prompt enters: with a budget of a chunk, a step between any two
  chunks.
  """
  core = scheduler(prefill_budget=1, decode_steps=1)
  requests = [Request((0, 5), (1,), 12), Request((0, *range(3, 50)), (2,), 2)]
  events = list(serve(core, requests))
  before = [event.request for event in events].index(1)
  assert before == 4  # its first token, and one beside each of three chunks of 16
  assert [sum(len(e.tokens) for e in events if e.request == i) for i in (0, 1)] == [12, 2]


def test_a_run_that_is_left_makes_room_for_the_next():
  core = scheduler()
  left = serve(core, [Request((0, 5), (i,), 12) for i in range(5)])
  next(left)
  left.close()
  core.submit(Request((0, 9), limit=4))
  rows, reasons = finished(core)
  (tokens,) = [rows[key] for key, reason in reasons.items() if reason == 'length']
  assert tokens == alone([9], 4)
  assert sum(reason == 'cancelled' for reason in reasons.values()) >= 3


def test_top_log_probabilities_for_those_who_ask():
  core = scheduler(top_log_probs=3, decode_steps=5)
  asked = [Request((0, 5), limit=4, top_log_probs=3), Request((0, 9), limit=3, top_log_probs=1)]
  seen = 0
  for event in serve(core, [*asked, Request((0, 7), limit=3)]):
    for token, log_prob, top in zip(event.tokens, event.log_probs, event.top):
      assert len(top) == (3, 1, 0)[event.request]
      if top:
        assert top[0] == (token, log_prob) and log_prob == max(p for _, p in top)
        seen += 1
  assert seen == 7


def test_samples_share_their_prompt_s_prefill():
  sampling = SamplingParams(0.7)
  core = scheduler(prefix_bytes=4 * BLOCK, shared_pages=2)
  core.submit(Request((0, *range(3, 40)), (1, 2, 3, 4), 6, sampling))
  rows, _ = finished(core)
  assert core.stats.prefilled == 48
  assert len(set(map(tuple, rows.values()))) > 1
  for (_, sample), tokens in rows.items():
    assert tokens == alone([*range(3, 40)], 6, sampling=[sampling], seeds=[sample + 1])


def test_a_cached_beginning_is_not_prefilled_again():
  core = scheduler(prefix_bytes=4 * BLOCK, shared_pages=2, prefill_rows=1)
  prompt = [0, *range(3, 45)]
  for last in (50, 51, 52):
    core.submit(Request((*prompt, last), limit=3))
  rows, _ = finished(core)
  stats = core.stats.prefixes
  assert (stats.queries, stats.hits, stats.hit_tokens) == (3, 2, 64)
  assert stats.bytes == BLOCK
  assert core.stats.prompt_tokens == 3 * 44 - 64
  for i, last in enumerate((50, 51, 52)):
    assert rows[i, 0] == alone([*prompt[1:], last], 3)
  core.submit(Request((*prompt, 50), limit=3, salt='another tenant'))
  finished(core)
  assert core.stats.prefixes.hits == 2


def test_a_prefix_cache_without_room_for_a_block_is_none():
  core = scheduler(prefix_bytes=BLOCK - 1)
  prompt = [*range(3, 45)]
  for _ in range(2):
    core.submit(Request((0, *prompt), limit=3))
  rows, _ = finished(core)
  assert core.stats.prefixes == PrefixStats()
  assert set(map(tuple, rows.values())) == {tuple(alone(prompt, 3))}


def test_states_and_finish_reasons():
  sampling = SamplingParams(3.0)
  third = alone([5], 3, sampling=[sampling])[2]
  core = scheduler(slots=1, decode_steps=1)
  stop = SamplingParams(3.0, stop=((third,),))
  stopped = core.submit(Request((0, 5), limit=8, sampling=stop))
  ended = core.submit(Request((0, 5), limit=8, sampling=sampling, end_ids=(third,)))
  full = core.submit(Request((0, 5), limit=2, sampling=sampling))
  handles = stopped, ended, full
  assert {h.state for h in handles} == {RequestState.WAITING}
  events = core.step()
  assert [h.state.value for h in handles] == ['decoding', 'waiting', 'waiting']
  rows, _ = finished(core, events)
  assert {h.state for h in handles} == {RequestState.FINISHED}
  assert [h.finish_reasons for h in handles] == [['stop'], ['eos'], ['length']]
  assert [len(rows[i, 0]) for i in range(3)] == [3, 3, 2]


@pytest.mark.parametrize('after', range(5))
def test_cancelling_frees_a_slot_within_a_step(after):
  core = scheduler(slots=1, prefill_budget=1)
  handle = core.submit(Request((0, *range(3, 40)), limit=20))
  events = [event for _ in range(after) for event in core.step()]
  core.cancel(handle)
  other = core.submit(Request((0, 9), limit=4))
  events += core.step()
  assert handle.state is RequestState.FINISHED and handle.finish_reasons == ['cancelled']
  core.cancel(handle)  # again: nothing
  rows, _ = finished(core, events)
  assert rows[other.index, 0] == alone([9], 4)


def test_preempted_rows_go_on_with_the_same_tokens():
  """Four rows of two pages each on five pages."""
  core = scheduler(slots=4, pages=6, decode_steps=1)
  sampling = SamplingParams(0.8, repetition_penalty=1.2)
  for i in range(4):
    core.submit(Request((0, 5 + i, 6), (i,), 50, sampling))
  rows, _ = finished(core)
  assert core.stats.preempted > 0
  for i in range(4):
    assert rows[i, 0] == alone([5 + i, 6], 50, sampling=[sampling], seeds=[i])


def test_a_row_that_is_not_finite_ends_alone():
  """The MLP overflows for token 50 alone: other rows, later and in the same slot, are as alone."""
  tensors = {name: np.array(x) for name, x in TENSORS.items()}
  # A direction of the residual stream that only token 50 has, and that gate and linear blow up.
  tensors['embedding'][:, 0] = 0
  tensors['embedding'][50] = 0
  tensors['embedding'][50, 0] = 1
  for name in ('attention_output', 'mlp_output'):
    tensors[name][:, :, 0] = 0
  for name in ('gate', 'linear'):
    tensors[name][:, 0, :] = 1e25
  found = memory.engine(CONFIG, tensors, '1x1x1', stacked=True)
  config = SchedulerConfig(1, 64, page_size=32, end_ids=(), prefix_bytes=4 * BLOCK)
  core = Scheduler(found.model, found.weights, config)
  broken = (0, *[50] * 40)
  prompts = [broken, (0, 3, 4, 5), broken, (0, 7, 8, 9, 10)]
  errors, rows = [], {}
  for event in serve(core, [Request(tokens, limit=4) for tokens in prompts]):
    rows.setdefault(event.request, []).extend(event.tokens)
    if event.error:
      errors.append((event.request, event.finish, event.error))
  assert [(index, finish) for index, finish, _ in errors] == [(0, 'error'), (2, 'error')]
  assert 'are not finite' in errors[0][2]
  for index in (1, 3):
    assert (
      rows[index] == found.generate([prompts[index][1:]], max_new_tokens=4, eos_id=-1)[0].tokens
    )
  assert core.check_books() == []


def test_text_comes_in_whole_characters_and_ends_before_a_stop_text():
  config = dataclasses.replace(CONFIG, vocab_size=384)
  tensors = reference.random_tensors(config, seed=2)
  found = memory.engine(config, tensors, '1x1x1', stacked=True)
  vocabulary = ByteVocabulary()
  config = SchedulerConfig(2, 64, page_size=32, end_ids=())
  core = Scheduler(found.model, found.weights, config, vocabulary=vocabulary)
  # Three bytes, two of which are one character, in any order.
  bias = {3 + byte: 1e4 for byte in 'aé'.encode()}
  sampling = SamplingParams(100.0, logit_bias=bias)
  texts = {0: '', 1: ''}
  tokens = {0: [], 1: []}
  requests = [
    Request((0,), (1,), 40, sampling, text=True),
    Request((0,), (1,), 40, sampling, stop_texts=('aa',)),
  ]
  for event in serve(core, requests):
    texts[event.request] += event.text
    tokens[event.request] += event.tokens
  assert texts[0] == vocabulary.decode(tokens[0])
  at = texts[0].index('aa')
  assert texts[1] == texts[0][:at]
  assert tokens[1] == tokens[0][: len(tokens[1])] and vocabulary.decode(tokens[1]).endswith('aa')


def sizes_of_programs():
  """How many times each program has been compiled."""
  return [
    program.compiled for program in vars(programs).values() if isinstance(program, programs.Program)
  ]


@pytest.mark.parametrize('mesh', ['1x1x1', '2x2x2'])
def test_any_request_uses_the_programs_of_warm_up(mesh):
  core = scheduler(
    mesh,
    slots=4,
    max_length=640,
    page_reads=2,
    prefix_bytes=16 * BLOCK,
    shared_pages=4,
    top_log_probs=5,
    vocabulary=Characters(),
  )
  done = core.warm_up()
  assert len(done) >= 8 and core.check_books() == []
  named = core.config.programs_text(page_shards(core.model, 4), grammars=True)
  assert named.startswith(f'{len(done)}: ')
  compiled = sizes_of_programs()
  assert sum(compiled) >= len(done)
  rng = np.random.default_rng(0)
  shared = rng.integers(3, 101, 600).tolist()
  for i in range(40):
    length = int(rng.integers(1, 600))
    prompt = shared[:length] if rng.random() < 0.5 else rng.integers(3, 101, length).tolist()
    sampling = SamplingParams(
      temperature=float(rng.choice([0, rng.random() * 2])),
      top_k=int(rng.choice([0, rng.integers(1, 101)])),
      top_p=float(rng.choice([1, rng.random()])),
      frequency_penalty=float(rng.choice([0, rng.random()])),
      logit_bias={int(rng.integers(101)): 1.0} if rng.random() < 0.3 else {},
      stop=((int(rng.integers(101)),),) if rng.random() < 0.3 else (),
      min_new_tokens=int(rng.integers(4)),
    )
    limit = int(rng.integers(1, 642 - len(prompt) - 1))
    core.submit(
      Request(
        (0, *prompt),
        tuple(range(i, i + 1 + int(rng.integers(2)))),
        min(limit, 12),
        sampling,
        end_ids=tuple(rng.integers(101, size=rng.integers(5)).tolist()),
        top_log_probs=int(rng.integers(6)),
        grammar=Grammar('regex', '[a-z]+( [0-9]{2})?') if rng.random() < 0.3 else None,
        cache_reply=bool(rng.random() < 0.5),
      )
    )
  finished(core)
  assert sizes_of_programs() == compiled


def test_a_long_prompt_that_is_cancelled_is_not_prefilled_to_its_end():
  core = scheduler(max_length=640, prefill_budget=32)
  handle = core.submit(Request((0, *[5] * 599), limit=4))
  assert core.step() == [] and core.stats.prefilled == 32
  core.cancel(handle)
  (event,) = core.step()
  assert event.finish == 'cancelled' and core.idle
  assert core.stats.prefilled == 32


@pytest.mark.parametrize('chunk', [1, 16, 100, 256, 2000])
@pytest.mark.parametrize('max_length', [2, 512, 640, 1024, 2048, 2080, 8192, 10**6])
def test_programs_are_few(max_length, chunk):
  """A server has one more, which scores prompts."""
  config = SchedulerConfig(
    256, max_length, prefill_chunk=chunk, prefix_bytes=1, shared_pages=32, top_log_probs=20
  )
  assert int(config.programs_text(1, grammars=True).partition(':')[0]) + 1 <= 24
  assert config.first_chunks[-1] == min(chunk, 1 << (max_length - 1).bit_length())
  assert config.prefill_reads[0] == 0 and config.prefill_reads[-1] == max_length
  assert config.prefill_reads == sorted({*config.prefill_reads})
  assert len(config.prefill_reads) < 3 or config.prefill_reads[1] % 32 == 0


def test_threads_share_a_scheduler():
  streams = Streams(scheduler(slots=2))
  found = {}

  def follow(i):
    tokens = []
    with streams.open([Request((0, 5 + i), (i,), 6)]) as stream:
      for event in stream:
        tokens += event.tokens
        if i % 4 == 3:
          return  # leaves: the request is cancelled
    found[i] = tokens

  threads = [threading.Thread(target=follow, args=(i,)) for i in range(12)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=60)
  assert sorted(found) == [i for i in range(12) if i % 4 != 3]
  for i, tokens in found.items():
    assert tokens == alone([5 + i], 6, seeds=[i])
  finished(streams.scheduler)


def test_many_requests_leave_nothing_behind():
  core = scheduler(slots=3)
  rng = np.random.default_rng(0)
  left = 300
  handles = []
  while left or not core.idle:
    while left and core.wanted:
      handles.append(core.submit(Request((0, int(rng.integers(3, 101))), limit=3)))
      left -= 1
      if rng.random() < 0.2:
        core.cancel(handles[-1])
    core.step()
  assert core.check_books() == []
  assert {h.state for h in handles} == {RequestState.FINISHED}
  assert not len(core._open) and not core._waiting


def test_a_config_fits_its_requests():
  model = engine('2x2x2').model
  requests = [Request((0, *range(3, 40), i), (0, 1), 30) for i in range(5, 9)] + [
    Request((0, 4), limit=200)
  ]
  config = scheduler_config.config_for(model, requests, slots=7, prefill_chunk=32)
  assert (config.slots, config.max_length, config.page_size) == (8, 224, 128)
  assert config.prefix_bytes > 0 and config.shared_pages > 0
  assert scheduler_config.config_for(model, requests, share=False).prefix_bytes == 0
  assert scheduler_config.config_for(model, requests[:1], slots=32).slots == 2
  assert scheduler_config.config_for(model, requests[:1], slots=32, max_length=900).slots == 32


@pytest.mark.parametrize(
  'request_, says',
  [
    (Request((0,) * 30), '30 tokens, BOS included, and 64 new ones do not fit into max_length=64'),
    (Request((0, 5), seeds=()), 'at least 1 token and 1 seed, got 2 and 0'),
    (Request((), limit=2), 'at least 1 token and 1 seed, got 0 and 1'),
    (Request((0, 5), limit=0), 'max_new_tokens must be at least 1, got 0'),
    (Request((0, 5), limit=2, text=True), 'this engine has none'),
    (Request((0, 5), limit=2, top_log_probs=1), 'at most 0 of the most likely tokens'),
    (Request((0, 5), limit=2, end_ids=(1, 2, 3, 4, 5)), 'at most 4 token ids can end a row'),
    (
      Request((0, 5), limit=2, sampling=SamplingParams(logit_bias={999: 1.0})),
      'token 999, outside the vocabulary of 101',
    ),
  ],
)
def test_a_request_that_does_not_fit_fails_alone(request_, says):
  core = scheduler()
  core.submit(Request((0, 9), limit=4))
  with pytest.raises(RequestError, match=says):
    core.submit(request_)
  rows, _ = finished(core)
  assert rows == {(0, 0): alone([9], 4)}


@pytest.mark.parametrize(
  'sizes, says',
  [
    (dict(decode_steps=0), 'decode_steps must be at least 1'),
    (dict(page_size=40), 'page_size must be a multiple of 32, got 40'),
    (dict(page_size=64, block_size=96), 'block_size=96 must divide page_size=64'),
    (dict(pages=2), 'a cache of 2 pages is too small for one row of max_length=64'),
  ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, says):
  with pytest.raises(RequestError, match=says):
    SchedulerConfig(**{'slots': 2, 'max_length': 64, 'page_size': 32, **sizes})
