"""Adapters of requests: every row has the tokens it has alone, whatever shares the batch.

ADAPTER_MIXES=50 runs so many mixes of 32 rows of each kind, in place of one or two.
"""

import dataclasses
import functools
import os

import numpy as np
import pytest

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.adapters.adapter import Adapter, LowRank
from t5x_inference_ext.checkpoints.adapters.load import load_adapters
from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.adapters import AdapterNames
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.ranking import PromptRanker
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.errors import CheckpointError, RequestError
from t5x_inference_ext.speculation import parse_speculation
from tests import memory, reference

pytestmark = pytest.mark.usefixtures('quick_programs')
CONFIG = memory.ODD
TENSORS = reference.random_tensors(CONFIG, seed=1)
BLOCK = 32 * CONFIG.num_layers * 2 * CONFIG.d_head * 4 + 1  # bytes of a block in float32
MOST, LONGEST, LENGTH = 20, 70, 160
MIXES = int(os.environ.get('ADAPTER_MIXES', 0))  # of each kind; 0: a few
SAMPLINGS = (
  SamplingParams(),
  SamplingParams(0.8, top_k=40),
  SamplingParams(1.2, repetition_penalty=1.3, presence_penalty=0.4),
)


def adapters() -> dict[str, Adapter]:
  """Return eight adapters: LoRA of all or some matrices, (IA)^3, soft prompts."""
  rng, matrices = np.random.default_rng(3), {}
  for name, p in params.parameters(CONFIG).items():
    if p.kind == 'matrix':
      matrices[name] = p.shape

  def random(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)

  def lora(*names: str, rank: int) -> dict[str, LowRank]:
    found = {}
    for name in names:
      layers, inputs, outputs = matrices[name]
      found[name] = LowRank(random(layers, inputs, rank), random(layers, rank, outputs) * 0.3)
    return found

  layers = CONFIG.num_layers
  factors = {name: 1 + random(layers, matrices[name][2]) for name in ('key', 'value')}
  return {
    'all': Adapter('', lora(*matrices, rank=2)),
    'attention': Adapter('', lora('query', 'value', rank=4)),
    'mlp': Adapter('', lora('gate', 'mlp_output', rank=1)),
    'out': Adapter('', lora('attention_output', rank=3)),
    'factors': Adapter('', scaling={**factors, 'mlp_output': 1 + random(layers, CONFIG.d_ff)}),
    'keys': Adapter('', scaling={'key': factors['key'] * 2}),
    'prompt': Adapter('', prompt=random(33, CONFIG.d_model)),
    'hint': Adapter('', prompt=random(2, CONFIG.d_model)),
  }


@functools.cache
def engine(mesh: str = '1x1x1', prefill: str = 'ws_2d/batch', decode: str = 'ws_2d/batch'):
  plain = memory.engine(CONFIG, TENSORS, mesh, prefill=prefill, decode=decode, stacked=True)
  found = adapters()
  weights = load_adapters([*found.values()], plain.checkpoint, plain.model, plain.weights)
  names = AdapterNames.of(found, CONFIG.vocab_size)
  return dataclasses.replace(plain, weights=weights, adapters=names)


def new_scheduler(found: Engine, speculate: str | None = None, **config) -> Scheduler:
  sizes = {'prefill_chunk': 32, 'page_size': 32, 'shared_pages': 3, 'page_reads': 1}
  sizes['prefix_bytes'] = 24 * BLOCK
  options = {**sizes, 'speculate': speculate and parse_speculation(speculate), **config}
  return Scheduler(
    found.model,
    found.weights,
    SchedulerConfig(max_length=LENGTH, end_ids=(1,), **options),
    adapters=found.adapters,
  )


@functools.cache
def alone(request: Request) -> list[int]:
  """Return the tokens of a request in a static batch of one row, on one device."""
  (completion,) = engine().generate(
    [request.tokens[1:]],
    max_new_tokens=[request.limit],
    sampling=[request.sampling],
    seeds=[request.seeds[0]],
    eos_id=1,
    prompt_size=LONGEST,
    cache_size=LENGTH,
    adapter=request.adapter,
  )
  return completion.tokens


def mix(rng: np.random.Generator, most: int, rows: int = 32) -> list[Request]:
  """Return requests with all adapters and without one; many prompts begin alike."""
  names = [None, *adapters()]
  beginnings = [rng.integers(2, CONFIG.vocab_size, 40).tolist() for _ in range(2)]
  found = []
  for i in range(rows):
    prompt = rng.integers(2, CONFIG.vocab_size, rng.integers(0, 30)).tolist()
    if rng.random() < 0.6:
      prompt = [*beginnings[rng.integers(2)], *prompt]
    sampling = SAMPLINGS[rng.integers(len(SAMPLINGS))]
    limit = int(rng.integers(2, most))
    found.append(
      Request((0, *prompt), (i,), limit, sampling, adapter=names[rng.integers(len(names))])
    )
  return found


def served(scheduler: Scheduler, requests: list[Request], rng: np.random.Generator):
  """Serve requests that come at random times; return the tokens of each."""
  found, left = {}, list(requests)
  handles = []
  while left or not scheduler.idle:
    for _ in range(rng.integers(0, 8)):
      if left:
        handles.append(scheduler.submit(left.pop(0)).index)
    for event in scheduler.step():
      found.setdefault(event.request, []).extend(event.tokens)
      assert event.error is None
  return [found.get(index, []) for index in handles]


KINDS = {
  'slots': ('1x1x1', 'ws_2d/batch', 'ws_2d/batch', dict(slots=32, prefill_rows=4)),
  'preempted': ('1x1x1', 'ws_2d/batch', 'ws_2d/batch', dict(slots=6, pages=7)),
  'drafts': ('1x1x1', 'ws_2d/batch', 'ws_2d/batch', dict(slots=8, speculate='ngram:4')),
  'mesh': ('2x2x2', 'wg_xyz/batch', 'ws_2d/batch', dict(slots=8, prefill_rows=8, decode_steps=3)),
}


@pytest.mark.parametrize('kind', KINDS)
def test_each_row_of_a_mix_is_that_row_alone(kind):
  """Mixes of 32 rows with eight adapters, one scheduler: late rows, shared prefixes, preemption."""
  mesh, prefill, decode, config = KINDS[kind]
  scheduler = new_scheduler(engine(mesh, prefill, decode), **config)
  used = set()
  for seed in range(MIXES or (2 if kind == 'slots' else 1)):
    rng = np.random.default_rng([seed, len(kind)])
    requests = mix(rng, 2 * MOST if kind == 'preempted' else MOST)
    used |= {request.adapter for request in requests}
    for request, tokens in zip(requests, served(scheduler, requests, rng), strict=True):
      assert tokens == alone(request), (seed, request)
  assert len(used) > 6 and (kind != 'slots' or used == {None, *adapters()})
  assert not scheduler.check_books()
  stats = scheduler.stats
  assert stats.prefixes.hits > 5
  assert (stats.preempted > 0) == (kind == 'preempted')
  assert (stats.drafts.row_steps > 0) == (kind == 'drafts')


def test_prefixes_are_shared_only_by_rows_with_equal_adapters():
  """The soft prompt and the prompt are read once; other adapters do not see them."""
  scheduler = new_scheduler(engine(), slots=2)
  prompt = tuple(range(2, 60))

  def read(adapter, salt=None):
    before = scheduler.stats.prefixes.hit_tokens
    request = Request((0, *prompt), (0,), 2, adapter=adapter, salt=salt)
    (tokens,) = served(scheduler, [request], np.random.default_rng(0))
    assert tokens == alone(dataclasses.replace(request, salt=None))
    return scheduler.stats.prefixes.hit_tokens - before

  block = scheduler.config.block_size
  assert block <= 33  # the soft prompt of `prompt` fills a block
  assert [read('prompt'), read('prompt')] == [0, (33 + 58) // block * block]
  assert [read('attention'), read(None), read('all'), read('factors')] == [0] * 4
  assert [read('attention'), read(None)] == [58 // block * block] * 2
  assert read('attention', salt='tenant') == 0
  # A tenant's salt that looks like an adapter's is another one.
  assert read(None, salt=(None, 'attention')) == 0


def test_soft_prompts_take_positions_and_are_not_text():
  found = engine()
  scheduler = new_scheduler(found, slots=2)
  request = Request(tuple(range(123)), (0,), 8, adapter='prompt')
  with pytest.raises(RequestError, match=f'156 tokens, BOS included.*max_length={LENGTH}'):
    scheduler.check(request)
  checked = scheduler.check(dataclasses.replace(request, tokens=(0, 5)))
  assert checked.request.tokens == (*range(101, 134), 0, 5)
  assert scheduler.check(checked.request).request == checked.request  # checked twice
  assert found.adapters.prompt('hint') == (134, 135)
  assert found.adapters.prompt('all') == found.adapters.prompt(None) == ()


def test_streams_chats_and_scores_with_adapters():
  found = engine()
  prompts = [[5, 6, 7], [8, 9], [5, 6, 7], [8]]
  names = ['prompt', 'all', None, 'factors']
  options = dict(max_new_tokens=6, eos_id=-1)
  rows = found.generate(prompts, adapter=names, **options)
  streamed = found.complete(prompts, adapter=names, **options)
  assert [row.tokens for row in rows] == [samples[0].tokens for samples in streamed]
  assert len({tuple(row.tokens) for row in rows}) > 1
  for prompt, name, row in zip(prompts, names, rows):
    (scores,) = found.score_completions([(prompt, row.tokens)], adapter=name)
    assert abs(sum(scores) - row.score) < 1e-4
    inputs = np.asarray([[0, *prompt, *row.tokens]], np.int32)
    best = np.argmax(found.logits(inputs, adapter=name)[0, len(prompt) : -1], axis=-1)
    assert best.tolist() == row.tokens
    chat = found.chat(max_length=40, eos_id=-1, adapter=name)
    assert list(chat.reply(prompt, max_new_tokens=6)) == row.tokens


@pytest.mark.parametrize('mesh', ['1x1x1', '2x2x2'])
def test_prompts_with_adapters_are_scored_by_one_program(mesh):
  """Beside the engine's own scores; the soft prompts have none."""
  found = engine() if mesh == '1x1x1' else engine(mesh, 'wg_xyz/batch')
  rows = found.model.prefilling.padded_batch(3)
  scheduler = new_scheduler(found, slots=8, prefill_rows=rows, top_log_probs=2)
  ranker, compiled = PromptRanker(scheduler, found.weights), programs.score_chunks.compiled
  ranker.warm_up()
  rng, prompts = np.random.default_rng(7), []
  for name in [None, *adapters()] * 2:
    tokens = (0, *rng.integers(2, CONFIG.vocab_size, rng.integers(1, 50)).tolist())
    prompts.append((tokens, name))
  ranked = ranker.rank([((*found.adapters.prompt(a), *t), 2, a) for t, a in prompts])
  assert programs.score_chunks.compiled == compiled + 1
  for (tokens, name), scores in zip(prompts, ranked):
    (wanted,) = engine().score_completions([((), tokens[1:])], adapter=name)
    np.testing.assert_allclose(scores.log_probs, wanted, atol=1e-4)
    assert len(scores.top) == len(tokens) - 1
    assert all(most[0][1] >= own - 1e-4 for most, own in zip(scores.top, wanted))


def test_names_that_are_not_loaded(repository, testdata):
  found = engine()
  with pytest.raises(RequestError, match='no adapter other is loaded; loaded are all, attention'):
    found.generate([[3]], max_new_tokens=1, adapter='other')
  with pytest.raises(RequestError, match='2 prompts need one adapter for all or 2, got 1'):
    found.stream([[3], [4]], max_new_tokens=1, adapter=['all'])
  with pytest.raises(RequestError, match='no adapter x is loaded'):
    found.chat(max_length=3, adapter='x')
  with pytest.raises(RequestError, match='no adapter x is loaded'):
    found.score(np.ones((1, 2), int), np.ones((1, 2), int), adapter='x')
  palm = repository / 'examples' / 'palm_tiny' / 'checkpoint_1000'
  with pytest.raises(RequestError, match="an adapter can't be named a b"):
    Engine.load(palm, mesh='1x1x1', adapters={'a b': palm})
  lora = testdata / 'adapters' / 'smollm2-lora-0'
  with pytest.raises(CheckpointError, match=f'{lora.name}, LoRA for families/smollm2, .*palm_tiny'):
    Engine.load(palm, mesh='1x1x1', adapters={'a': lora})


def test_programs_without_adapters_are_those_of_before():
  """An engine without adapters has no array and no operation for them."""
  plain = memory.engine(CONFIG, TENSORS, '1x1x1', stacked=True)
  assert not plain.weights.has_adapters and plain.weights.for_rows(None) == plain.weights
  assert plain.weights.soft_prompts is None and plain.weights.adapter_rows is None
