"""Whole generations: where rows end, what scores mean; batch and mesh change nothing."""

import functools

import jax
import numpy as np
import pytest

from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine import static_batch as generation
from t5x_inference_ext.engine.inputs import model_inputs
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.errors import RequestError
from tests import memory, reference

pytestmark = pytest.mark.usefixtures('quick_programs')

CONFIG = memory.ODD
TENSORS = reference.random_tensors(CONFIG, seed=1)
PROMPTS = [[5, 6, 7], [9], [], [11, 12, 13, 14, 15], [9], [44, 3], [100] * 5, [1, 2]]
SEEDS = [3, 1, 4, 1, 5, 9, 2, 6]
SAMPLER = SamplingParams(temperature=1.0, top_k=40, top_p=0.95)
NEW = 6


@functools.cache
def engine(mesh, prefill='ws_2d/batch', decode='ws_2d/batch'):
  return memory.engine(CONFIG, TENSORS, mesh, prefill=prefill, decode=decode)


@functools.cache
def sampled():
  return engine('1x1x1').generate(
    PROMPTS, max_new_tokens=NEW, sampling=SAMPLER, seeds=SEEDS, eos_id=-1, prompt_size=5
  )


@functools.cache
def greedy():
  return engine('1x1x1').generate(PROMPTS, max_new_tokens=NEW, eos_id=-1, prompt_size=5)


def raw(mesh, *, eos_id, max_new_tokens=NEW, prompts=PROMPTS):
  """generate's own result, padding included."""
  e = engine(mesh)
  tokens, lengths = model_inputs(prompts, 5)
  run = memory.quick_jit(
    generation.generate_batch,
    static_argnames=('model', 'sampling', 'max_new_tokens', 'eos_id', 'cache_size'),
  )
  return jax.device_get(
    run(
      e.model,
      e.weights,
      *programs.put(e.model, tokens, lengths, np.asarray(SEEDS[: len(prompts)], np.uint32)),
      sampling=SAMPLER,
      max_new_tokens=max_new_tokens,
      eos_id=eos_id,
      cache_size=5 + max_new_tokens,
    )
  )


def test_greedy_is_the_reference_s():
  for prompt, completion in zip(PROMPTS, greedy()):
    assert completion.tokens == reference.greedy(CONFIG, TENSORS, prompt, NEW)


def test_greedy_as_a_sampler():
  found = engine('1x1x1').generate(
    PROMPTS,
    max_new_tokens=NEW,
    sampling=SamplingParams(1.0, top_k=1),
    seeds=SEEDS,
    eos_id=-1,
    prompt_size=5,
  )
  assert [c.tokens for c in found] == [c.tokens for c in greedy()]


@pytest.mark.parametrize(
  'mesh, prefill, decode',
  [
    ('2x2x2', 'ws_2d/batch', 'ws_2d/batch'),
    ('1x2x4', 'wg_xy/heads', 'ws_2d/batch'),
    ('2x2x2', 'ws_1d/batch', 'ws_1d/heads'),
  ],
)
def test_mesh_and_layouts_change_nothing(mesh, prefill, decode):
  found = engine(mesh, prefill, decode).generate(
    PROMPTS, max_new_tokens=NEW, sampling=SAMPLER, seeds=SEEDS, eos_id=-1, prompt_size=5
  )
  assert [c.tokens for c in found] == [c.tokens for c in sampled()]
  np.testing.assert_allclose([c.score for c in found], [c.score for c in sampled()], atol=1e-4)


def test_a_row_is_the_same_anywhere_in_any_batch():
  """Reversed; alone; with other companions, a longer prompt size and a larger cache."""
  e = engine('1x1x1')
  arguments = dict(max_new_tokens=NEW, sampling=SAMPLER, eos_id=-1)
  backwards = e.generate(PROMPTS[::-1], seeds=SEEDS[::-1], prompt_size=5, **arguments)
  assert [c.tokens for c in backwards[::-1]] == [c.tokens for c in sampled()]
  (alone,) = e.generate(PROMPTS[3:4], seeds=SEEDS[3:4], **arguments)
  assert alone.tokens == sampled()[3].tokens
  mixed = e.generate([[8], PROMPTS[5], [7] * 9], seeds=[0, SEEDS[5], 0], cache_size=30, **arguments)
  assert mixed[1].tokens == sampled()[5].tokens


def test_equal_prompts_differ_by_their_seeds_alone():
  e = engine('1x1x1')
  found = e.generate(
    [[9]] * 8,
    max_new_tokens=NEW,
    sampling=SAMPLER,
    seeds=[0, 1, 2, 3, 0, 1, 2, 3],
    eos_id=-1,
    prompt_size=5,
  )
  assert found[:4] == found[4:]
  assert len({tuple(c.tokens) for c in found[:4]}) == 4


@pytest.mark.parametrize('mesh', ['1x1x1', '2x2x2'])
def test_eos_ends_a_row_and_zeros_follow(mesh):
  """The others go on. Scores count EOS, and nothing after it."""
  free = sampled()
  eos = free[1].tokens[2]
  result = raw(mesh, eos_id=eos)
  ended = 0
  assert not result.failed.any()
  for row, length, score, whole in zip(result.tokens, result.lengths, result.scores, free):
    cut = whole.tokens[: whole.tokens.index(eos) + 1] if eos in whole.tokens else whole.tokens
    ended += len(cut) < NEW
    assert length == len(cut)
    assert row.tolist() == cut + [0] * (NEW - len(cut))
    assert score == pytest.approx(whole.score, abs=1e-4) if len(cut) == NEW else score > whole.score
  assert 1 <= ended < len(PROMPTS)


def test_scores_are_the_model_s_own_log_probs():
  """Under temperature 1 and all tokens, whatever the sampler: recomputed in one pass over prompt
  and completion.
  """
  e = engine('1x1x1')
  hot = SamplingParams(temperature=3.0, top_k=20)
  free = e.generate(
    PROMPTS, max_new_tokens=NEW, sampling=hot, seeds=SEEDS, eos_id=-1, prompt_size=5
  )
  found = e.generate(
    PROMPTS, max_new_tokens=NEW, sampling=hot, seeds=SEEDS, eos_id=free[0].tokens[3], prompt_size=5
  )
  assert len(found[0].tokens) <= 4
  targets, weights = np.zeros((8, 5 + NEW), np.int32), np.zeros((8, 5 + NEW), np.float32)
  for i, (prompt, completion) in enumerate(zip(PROMPTS, found)):
    sequence = prompt + completion.tokens
    targets[i, : len(sequence)] = sequence
    weights[i, len(prompt) : len(sequence)] = 1
  inputs = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
  np.testing.assert_allclose([c.score for c in found], e.score(inputs, targets, weights), atol=1e-4)


def test_one_new_token():
  """No decode step at all: the first of what a longer run gives."""
  result = raw('1x1x1', eos_id=-1, max_new_tokens=1)
  assert result.tokens.tolist() == [c.tokens[:1] for c in sampled()]
  assert result.lengths.tolist() == [1] * 8
  assert np.all(result.scores < 0)
  eos_first = raw('1x1x1', eos_id=int(result.tokens[0, 0]), prompts=PROMPTS[:1])
  assert eos_first.tokens.tolist() == [[result.tokens[0, 0]] + [0] * (NEW - 1)]
  assert eos_first.lengths.tolist() == [1]
  assert eos_first.scores[0] == pytest.approx(result.scores[0], abs=1e-5)


def test_max_length_ends_each_row_when_prompt_and_new_tokens_reach_it():
  """The same tokens, of longer prompts fewer; rows that go on are not disturbed by those that
  ended.
  """
  rows = engine('1x1x1').generate(
    PROMPTS,
    max_new_tokens=NEW,
    sampling=SAMPLER,
    seeds=SEEDS,
    eos_id=-1,
    prompt_size=5,
    max_length=8,
    cache_size=8,
  )
  for row, whole, prompt in zip(rows, sampled(), PROMPTS, strict=True):
    assert row.tokens == whole.tokens[: 8 - len(prompt)]


def test_a_prompt_that_fills_max_length_is_refused():
  with pytest.raises(RequestError, match='prompt 3 has 5 tokens: max_length=5 leaves no room'):
    engine('1x1x1').generate(PROMPTS, max_new_tokens=NEW, max_length=5)


def test_a_prefill_in_chunks_changes_nothing():
  e = engine('2x2x2', 'wg_xy/heads', 'ws_2d/batch')
  found = e.generate(
    PROMPTS,
    max_new_tokens=NEW,
    sampling=SAMPLER,
    seeds=SEEDS,
    eos_id=-1,
    prompt_size=5,
    prefill_chunk=4,
  )
  assert [c.tokens for c in found] == [c.tokens for c in sampled()]


def test_each_row_has_its_own_sampler():
  """The same as rows that all have it."""
  e = engine('1x1x1')
  mixed = [SAMPLER, SamplingParams(), SamplingParams(0.7)] * 2 + [SAMPLER, SamplingParams()]
  arguments = dict(max_new_tokens=NEW, seeds=SEEDS, eos_id=-1, prompt_size=5)
  found = e.generate(PROMPTS, sampling=mixed, **arguments)
  warm = e.generate(PROMPTS, sampling=SamplingParams(0.7), **arguments)
  for row, sampling, *wanted in zip(found, mixed, sampled(), greedy(), warm):
    assert (
      row.tokens == wanted[(SAMPLER, SamplingParams(), SamplingParams(0.7)).index(sampling)].tokens
    )
  with pytest.raises(RequestError, match='8 prompts need as many sampling parameters, got 2'):
    e.generate(PROMPTS, sampling=mixed[:2], **arguments)


def test_each_row_has_its_own_limit():
  limits = [1, 6, 2, 3, 6, 4, 5, 1]
  found = engine('1x1x1').generate(
    PROMPTS, max_new_tokens=limits, sampling=SAMPLER, seeds=SEEDS, eos_id=-1, prompt_size=5
  )
  assert [c.tokens for c in found] == [c.tokens[:n] for c, n in zip(sampled(), limits)]
  with pytest.raises(RequestError, match='8 prompts need as many limits, got 3'):
    engine('1x1x1').generate(PROMPTS, max_new_tokens=[1, 2, 3])
  with pytest.raises(RequestError, match='max_new_tokens must be at least 1, got 0'):
    engine('1x1x1').generate(PROMPTS, max_new_tokens=[0] * 8)


def test_options_reach_the_loop():
  """A stop sequence, a least number of tokens, a penalty: told by what they do to the free greedy
  rows.
  """
  e = engine('1x1x1')
  free = greedy()[0].tokens
  pair = tuple(free[1:3])
  (row,) = e.generate(
    PROMPTS[:1], max_new_tokens=NEW, sampling=SamplingParams(stop=(pair,)), eos_id=-1, prompt_size=5
  )
  assert row.tokens == free[: next(i for i in range(2, 4) if tuple(free[i - 2 : i]) == pair)]
  banned = SamplingParams(
    repetition_penalty=1e9
  )  # of equal ids none is taken twice, nor any of the prompt
  (row,) = e.generate(PROMPTS[:1], max_new_tokens=NEW, sampling=banned, eos_id=-1, prompt_size=5)
  assert len({*row.tokens, *PROMPTS[0]}) == NEW + len(PROMPTS[0])
  (row,) = e.generate(
    PROMPTS[:1],
    max_new_tokens=NEW,
    sampling=SamplingParams(min_new_tokens=2),
    eos_id=free[0],
    prompt_size=5,
  )
  assert row.tokens[0] != free[0]


def test_values_of_parameters_share_a_compilation():
  """Temperatures, seeds, penalties, biases, end ids: one program for each set of features."""
  e = engine('1x1x1')
  arguments = dict(max_new_tokens=NEW, prompt_size=5)
  e.generate(PROMPTS, sampling=SamplingParams(0.5, top_k=33, logit_bias={3: 1.0}), **arguments)
  (jitted,) = programs.generate_batch.jitted.values()
  before = jitted._cache_size()
  for i in range(4):
    sampling = SamplingParams(0.6 + i / 10, top_k=34 + i, logit_bias={5 + i: -1.0})
    e.generate(PROMPTS, sampling=sampling, eos_id=7 + i, **arguments)
  assert jitted._cache_size() == before


def test_a_reason_for_each_end():
  e, free = engine('1x1x1'), greedy()
  pair = tuple(free[0].tokens[1:3])
  arguments = dict(max_new_tokens=NEW, prompt_size=5)
  found = e.generate(
    PROMPTS, sampling=SamplingParams(stop=(pair,)), eos_id=free[3].tokens[1], **arguments
  )
  assert found[0].finish_reason == 'stop' and found[3].finish_reason == 'eos'
  assert {c.finish_reason for c in free} == {'length'}
  everything = dict.fromkeys(range(CONFIG.vocab_size), -np.inf)
  everything.pop(9)
  (row,) = e.generate(
    PROMPTS[:1],
    sampling=SamplingParams(logit_bias=everything, min_new_tokens=2),
    eos_id=9,
    **arguments,
  )
  assert row[:3] == ([], 0.0, 'error')


@pytest.mark.parametrize('least, length', [(0, 1), (1, 2), (2, 3), (4, 5)])
def test_min_new_tokens_is_that_of_others(least, length):
  """Where EOS is as good as certain, as in transformers and vLLM."""
  forced = SamplingParams(logit_bias={9: 1e9}, min_new_tokens=least)
  (row,) = engine('1x1x1').generate(
    PROMPTS[:1], max_new_tokens=NEW, sampling=forced, eos_id=9, prompt_size=5
  )
  assert len(row.tokens) == length and row.finish_reason == 'eos'
