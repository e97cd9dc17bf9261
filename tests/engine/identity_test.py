"""Slot refill: a row's tokens are those it has alone, whatever else runs beside it, and on whatever
mesh; also when it comes late, is preempted, follows a cached beginning, or has a grammar.

IDENTITY_MIXES=300 runs so many mixes, in place of 48. For mixes with adapters and with drafts see
adapters_test.py and draft_mixes_test.py.
"""

import dataclasses
import functools
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.engine import selection
from t5x_inference_ext.engine.chunk_sizes import UNIT
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.grammars import Grammars, masks_of
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.text.grammar import Grammar
from tests import memory, reference
from tests.text.vocabularies import Characters

pytestmark = pytest.mark.usefixtures('quick_programs')

CONFIG = memory.ODD
TENSORS = reference.random_tensors(CONFIG, seed=1)
BLOCK = 32 * CONFIG.num_layers * 2 * CONFIG.d_head * 4 + 1  # bytes of a block in float32
SAMPLINGS = (
  SamplingParams(),
  SamplingParams(1.0, top_k=40, top_p=0.95),
  SamplingParams(0.7),
  SamplingParams(1.0, top_p=0.8),
  SamplingParams(
    2.0, repetition_penalty=1.3, frequency_penalty=0.5, stop=((7,), (9, 9)), min_new_tokens=3
  ),
  SamplingParams(0.5, logit_bias={5: 2.0, 77: -np.inf}, presence_penalty=0.3),
)
EOS, LONGEST, MOST = 1, 100, 40
LENGTH = 160


VOCABULARY = Characters()
GRAMMARS = Grammars(VOCABULARY, CONFIG.vocab_size)
# Grammars, each with a regular expression for its texts.
LANGUAGES = {
  Grammar('regex', '[a-z]{3,8}(-[0-9]{1,4})*'): '[a-z]{3,8}(-[0-9]{1,4})*',
  Grammar('regex', '[A-F][^A-F]{2,30}'): '[A-F][^A-F]{2,30}',
  Grammar('lark', 'start: "<" start ">" | /[0-9]+/'): '(<)*[0-9]+(>)*',
  Grammar(
    'json_schema',
    '{"type": "array", "items": {"enum": ["x", true, 12]}, "x-guidance": {"whitespace_flexible": '
    'false}}',
  ): r'\[(("x"|true|12)(,("x"|true|12))*)?\]',
}

# (mesh, prefill, decode, cache, config): the mixes of a kind run on one scheduler, which stays.
KINDS = [
  ('1x1x1', 'ws_2d/batch', 'ws_2d/batch', None, dict(slots=3, prefill_chunk=128, shared_pages=3)),
  # Fewer pages than five rows need: rows are preempted.
  (
    '1x1x1',
    'ws_2d/batch',
    'ws_2d/batch',
    'int8',
    dict(slots=5, prefill_rows=2, prefill_chunk=16, pages=6, prefix_bytes=0),
  ),
  (
    '2x2x2',
    'wg_xyz/batch',
    'ws_2d/batch',
    None,
    dict(slots=4, prefill_rows=2, prefill_chunk=16, pages=6, decode_steps=3, shared_pages=3),
  ),
  (
    '1x2x2',
    'ws_1d/heads',
    'ws_1d/batch',
    'int8',
    dict(slots=4, prefill_chunk=16, prefix_bytes=5 * BLOCK),
  ),
  ('2x2x1', 'ws_2d/heads', 'wg_x/heads', None, dict(slots=4, prefill_chunk=80, decode_steps=5)),
]
# Grammars take programs of their own, and so time, in each kind.
WITH_GRAMMARS = (0, 1, 2)
MIXES = int(os.environ.get('IDENTITY_MIXES', 48))  # minutes, most of them compilations
BFLOAT16_MIXES = 20


@functools.cache
def engine(mesh, prefill='ws_2d/batch', decode='ws_2d/batch', cache=None, dtype='float32'):
  layouts = dict(prefill=prefill, decode=decode)
  return memory.engine(CONFIG, TENSORS, mesh, **layouts, stacked=True, cache=cache, dtype=dtype)


@functools.cache
def scheduler(kind, dtype='float32'):
  mesh, prefill, decode, cache, sizes = KINDS[kind]
  model = engine(mesh, prefill, decode, cache, dtype)
  config = {
    'page_size': 32,
    'prefix_bytes': 12 * BLOCK,
    'shared_pages': 3,
    'prefill_budget': 24,
    **sizes,
  }
  return Scheduler(
    model.model,
    model.weights,
    SchedulerConfig(max_length=LENGTH, end_ids=(EOS,), **config),
    vocabulary=VOCABULARY,
  )


@functools.cache
def one_slot(cache):
  """A scheduler with room for one row."""
  model, config = engine('1x1x1', cache=cache), SchedulerConfig(1, LENGTH, end_ids=(EOS,))
  return Scheduler(model.model, model.weights, config, vocabulary=VOCABULARY)


_ROWS_ALONE: dict[tuple, list[list[int]]] = {}  # by engine (they all stay), prompt and seed


def alone_each(found: Engine, tokens: tuple[int, ...], seed: int) -> list[list[int]]:
  """The row of each of SAMPLINGS: a static batch, so that all of them share one compilation."""
  key = id(found), tokens, seed
  if key not in _ROWS_ALONE:
    completions = found.generate(
      [tokens[1:]] * len(SAMPLINGS),
      max_new_tokens=[MOST] * len(SAMPLINGS),
      sampling=SAMPLINGS,
      seeds=[seed] * len(SAMPLINGS),
      eos_id=EOS,
      prompt_size=LONGEST,
    )
    _ROWS_ALONE[key] = [completion.tokens for completion in completions]
  return _ROWS_ALONE[key]


def alone_in(found: Engine, request: Request, seed: int) -> list[int]:
  """The tokens that an engine gives a request, one of SAMPLINGS, alone."""
  rows = alone_each(found, request.tokens, seed)
  return rows[SAMPLINGS.index(request.sampling)][: request.limit]


def alone(request: Request, seed: int, cache: str | None, dtype: str = 'float32') -> list[int]:
  if request.grammar is not None:
    core = one_slot(cache)
    core.submit(dataclasses.replace(request, seeds=(seed,)))
    return [token for _ in iter(lambda: core.idle, True) for e in core.step() for token in e.tokens]
  return alone_in(engine('1x1x1', cache=cache, dtype=dtype), request, seed)


def near_edge(rng, least, most):
  """A number of tokens after BOS, often where a block or chunk ends, or a token before or after."""
  if rng.random() < 0.5:
    return int(rng.integers(least, most + 1))
  edge = UNIT * rng.integers(0, most // UNIT + 1) + rng.integers(-2, 1)
  return int(np.clip(edge, least, most))


def mix(rng, grammars, samplings=SAMPLINGS):
  """Requests, most of which begin alike with parts of one beginning, and some have grammars."""
  beginning = np.random.default_rng(rng.integers(3)).integers(3, CONFIG.vocab_size, 90).tolist()
  requests = []
  for _ in range(rng.integers(2, 7)):
    begin = beginning[: near_edge(rng, 0, 90)] if rng.random() < 0.7 else []
    own = near_edge(rng, len(begin), LONGEST) - len(begin)
    own = rng.integers(3, CONFIG.vocab_size, own).tolist()
    seeds = tuple(rng.integers(0, 2**32, 1 + (rng.random() < 0.2)).tolist())
    limit = int(rng.integers(1, MOST + 1))
    sampling = samplings[rng.integers(len(samplings))]
    grammar = None
    if grammars and rng.random() < 0.4:
      grammar = [*LANGUAGES][rng.integers(len(LANGUAGES))]
    keep = {'grammar': grammar, 'cache_reply': bool(rng.random() < 0.6)}
    requests.append(Request((0, *begin, *own), seeds, limit, sampling, **keep))
  return requests


def next_turn(rng, request, reply):
  """A prompt that continues a reply; None if the two are too long for another."""
  tokens = *request.tokens, *reply, *rng.integers(3, CONFIG.vocab_size, rng.integers(1, 9)).tolist()
  return None if len(tokens) > LONGEST else dataclasses.replace(request, tokens=tokens)


def served(core: Scheduler, requests, rng):
  """Serve requests that come late, some of which are cancelled: their rows and finish reasons.

  The next turns of replies in the prefix cache are added to the requests.
  """
  queue = list(requests)
  handles, cancelled, rows = [], set(), {}
  for _ in range(100000):
    while queue and rng.random() < 0.5:
      handles.append(core.submit(queue.pop(0)))
    if handles and rng.random() < 0.02:
      handle = handles[rng.integers(len(handles))]
      cancelled.add(handle.index)
      core.cancel(handle)
    if core.idle and not queue:
      break
    for event in core.step():
      tokens, finish = rows.setdefault((event.request, event.sample), ([], []))
      assert len(event.tokens) == len(event.log_probs) == len(event.top) and not finish
      tokens += event.tokens
      if event.finish:
        finish.append(event.finish)
        request = requests[event.request - handles[0].index]
        if request.cache_reply and rng.random() < 0.3 and event.finish in ('eos', 'stop', 'length'):
          turn = next_turn(rng, request, tokens)
          if turn is not None:
            requests.append(turn)
            queue.append(turn)
  assert core.check_books() == []
  first = handles[0].index
  assert sorted(rows) == [
    (first + i, j) for i, request in enumerate(requests) for j in range(len(request.seeds))
  ]
  found = {}
  for (index, sample), (tokens, finish) in rows.items():
    assert len(finish) == 1 and (finish != ['cancelled'] or index in cancelled)
    found[index - first, sample] = tokens, finish[0]
  return found


def margin(request, seed, tokens, cache, dtype='float32'):
  return margin_in(engine('1x1x1', cache=cache, dtype=dtype), request, seed, tokens)


def margin_in(found: Engine, request, seed, tokens):
  """The best perturbed logit after these tokens less the next one, both without penalties."""
  whole = [*request.tokens, *tokens]
  inputs = np.zeros((1, 1 + LONGEST + MOST), np.int32)
  inputs[0, : len(whole)] = whole
  logits = np.array(found.logits(inputs)[0, len(whole) - 1], np.float32)
  if request.grammar is not None:
    logits[~allowed(request.grammar, tokens)] = -np.inf
  if request.sampling.temperature:
    noise = selection.gumbel_of_all(
      jnp.asarray([seed], jnp.uint32), jnp.asarray([len(whole)], jnp.int32), CONFIG.vocab_size
    )
    logits = logits / request.sampling.temperature + np.asarray(noise)[0]
  second, first = np.sort(logits)[-2:]
  return first - second


def allowed(grammar, tokens):
  """[V] bool: the tokens that a grammar allows after these."""
  (matcher,) = GRAMMARS.matchers(grammar, 1)
  for token in tokens:
    matcher.push(token)
  mask = masks_of([(matcher, (EOS,))], CONFIG.vocab_size).allowed
  return np.unpackbits(mask.view(np.uint8), bitorder='little')[: CONFIG.vocab_size].astype(bool)


def complete(request, tokens):
  """Whether a row's tokens satisfy its grammar, and none can follow."""
  (matcher,) = GRAMMARS.matchers(request.grammar, 1)
  for token in tokens:
    matcher.push(token)
  return matcher.complete


def reason(request, tokens):
  """The finish reason of a row that nobody cancelled."""
  if tokens[-1] == EOS:
    return 'eos'
  if request.grammar is not None and complete(request, tokens):
    return 'stop'
  stops = [tuple(tokens[-len(stop) :]) == stop for stop in request.sampling.stop]
  return 'stop' if any(stops) else 'length'


def first_difference(row, other):
  """The index of the first token that differs between two rows, or is in one alone."""
  return next(i for i, (a, b) in enumerate(zip([*row, None], [*other, None])) if a != b)


def test_random_mixes_are_identical_to_one_at_a_time():
  rows = ties = ended_early = constrained = satisfied = 0
  for i in range(MIXES):
    rng = np.random.default_rng(i)
    kind = i % len(KINDS)
    cache, requests = KINDS[kind][3], mix(rng, grammars=kind in WITH_GRAMMARS)
    for (index, sample), (tokens, finish) in served(scheduler(kind), requests, rng).items():
      asked = requests[index]
      wanted = alone(asked, asked.seeds[sample], cache)
      rows += 1
      if asked.grammar is not None:
        constrained += 1
        # An end, and a grammar that allows nothing more, come only after a whole text.
        if finish == 'eos' or (finish == 'stop' and complete(asked, tokens)):
          text = VOCABULARY.decode(tokens)
          assert re.fullmatch(LANGUAGES[asked.grammar], text), (asked.grammar, text)
          satisfied += 1
      if finish == 'cancelled':
        ended_early += 1
        wanted = wanted[: len(tokens)]
      else:
        assert finish == reason(asked, tokens)
      if tokens != wanted:
        same = wanted[: first_difference(tokens, wanted)]
        where = i, index, tokens, wanted
        assert margin(asked, asked.seeds[sample], same, cache) < 1e-4, where
        ties += 1
  stats = [scheduler(kind).stats for kind in range(len(KINDS))]
  preempted, hits = sum(s.preempted for s in stats), sum(s.prefixes.hits for s in stats)
  evictions = sum(
    scheduler(kind)._prefixes.tree.evictions
    for kind in range(len(KINDS))
    if stats[kind].prefixes.queries
  )
  print(
    f'{rows} rows of {MIXES} mixes, {ended_early} of them cancelled, {constrained} with grammars, '
    f'{satisfied} of which satisfied these; {preempted} preemptions, '
    f'{hits} prefix hits, {evictions} evictions; {ties} differ, at near ties'
  )
  assert rows > 3 * MIXES and ties <= rows / 100
  assert (
    ended_early > MIXES / 6
    and preempted > MIXES / 24
    and hits > MIXES / 3
    and evictions > MIXES / 6
  )
  assert constrained > MIXES / 2 and satisfied > MIXES / 8


def test_in_bfloat16_rows_differ_from_those_alone_only_where_two_tokens_are_close():
  """Layouts round differently: each row goes its own way only after a choice that was narrow."""
  kind, dtype, margins, rows = 2, 'bfloat16', [], 0
  samplings = [s for s in SAMPLINGS if s in (SamplingParams(), SamplingParams(0.7))]
  for i in range(BFLOAT16_MIXES):
    rng = np.random.default_rng(1000 + i)
    requests = mix(rng, grammars=False, samplings=samplings)
    for (index, sample), (tokens, finish) in served(scheduler(kind, dtype), requests, rng).items():
      asked, seed = requests[index], requests[index].seeds[sample]
      wanted = alone(asked, seed, None, dtype)
      rows += 1
      if finish == 'cancelled':
        wanted = wanted[: len(tokens)]
      if tokens != wanted:
        same = wanted[: first_difference(tokens, wanted)]
        margins.append(margin(asked, seed, same, None, dtype))
        assert margins[-1] < 0.05, (i, index, tokens, wanted)
  print(f'{rows} rows, {len(margins)} of which differ, at margins up to {max(margins, default=0)}')
  assert rows > 3 * BFLOAT16_MIXES
