"""Rows with grammars: the tokens that masks allow, and rows that keep to their grammars."""

import dataclasses
import importlib.util
import json
import re
from unittest import mock

import numpy as np
import pytest

from t5x_inference_ext import Engine, Request, SamplingParams
from t5x_inference_ext.engine.grammars import Grammars, mask_words, masks_of
from t5x_inference_ext.engine.request import NO_TOKEN
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.errors import RequestError, UserError
from t5x_inference_ext.text.grammar import Grammar
from t5x_inference_ext.text.vocabulary import ByteVocabulary
from tests.text import vocabularies

pytestmark = pytest.mark.usefixtures('quick_programs')

SCHEMA = {
  'type': 'object',
  'properties': {
    'name': {'type': 'string', 'maxLength': 6},
    'kind': {'enum': ['int', 'float']},
    'sizes': {'type': 'array', 'items': {'type': 'integer', 'minimum': 0, 'maximum': 99}},
  },
  'required': ['name', 'kind'],
  'additionalProperties': False,
  'x-guidance': {'whitespace_flexible': False},
}
PHONE = Grammar('regex', '[0-9]{3}-[a-f]{2}')


def allowed(mask, vocab_size):
  bits = np.unpackbits(mask.view(np.uint8), bitorder='little')[:vocab_size]
  return set(np.flatnonzero(bits).tolist())


# Grammars of few texts, with all of them.
FINITE = {
  Grammar('regex', 'x(ab|é)?[0-2]y'): {f'x{a}{b}y' for a in ('', 'ab', 'é') for b in range(3)},
  Grammar('regex', 'the?( License)?'): {'th', 'the', 'th License', 'the License'},
  Grammar('json_schema', '{"enum": ["the é", 12, true]}'): {'"the é"', '12', 'true'},
  Grammar('lark', 'start: a{1,2} | "</s>"\na: "the" | "漢"'): {
    *(a + b for a in ('the', '漢') for b in ('', 'the', '漢')),
    '</s>',
  },
}


@pytest.mark.parametrize('kind', vocabularies.KINDS)
def test_masks_allow_the_tokens_that_some_text_goes_on_with(kind):
  """Every vocabulary's tokens, a part of a character too, beside all texts of finite grammars. Ends
  are allowed after whole texts alone, and what has no text, or only a name, never.
  """
  vocabulary = vocabularies.of_kind(kind)
  vocab_size = vocabulary.size + 37
  ends = (*vocabulary.end_ids, vocab_size - 1)
  pieces = [b'' if i in ends else vocabulary.piece(i) for i in range(vocab_size)]
  grammars, rng, steps = Grammars(vocabulary, vocab_size), np.random.default_rng(0), 0
  for grammar, texts in FINITE.items():
    words = {text.encode() for text in texts}
    for matcher in grammars.matchers(grammar, 12):
      done = b''
      while True:
        left = {word[len(done) :] for word in words if word.startswith(done)}
        wanted = {i for i, p in enumerate(pieces) if p and any(word.startswith(p) for word in left)}
        if complete := left == {b''}:
          assert matcher.complete and matcher.accepting
          break
        assert not matcher.complete and matcher.accepting == (b'' in left)
        mask = masks_of([None, (matcher, ends)], vocab_size)
        assert mask.constrained.tolist() == [False, True]
        found = allowed(mask.allowed[1], vocab_size)
        assert found == wanted | (set(ends) if b'' in left else set()), (grammar, done)
        token = int(rng.choice(sorted(wanted)))
        matcher.push(token)
        done += pieces[token]
        steps += 1
      assert complete and done in words
  assert steps > 60


def test_a_grammar_beyond_its_limits_allows_nothing_and_says_why():
  grammars = Grammars(ByteVocabulary(), 384)
  (matcher,) = grammars.matchers(Grammar('lark', 'start: e\ne: e e e | e e | "a" | "b"'), 1)
  masks = np.ones((1, mask_words(384)), np.uint32)
  taken = 0
  matcher.fill(masks, 0, (1,))
  while matcher.error is None and taken < 500:
    matcher.push(ord('a') + 3)
    matcher.fill(masks, 0, (1,))
    taken += 1
  assert 10 < taken < 500 and not masks.any()
  assert matcher.error.startswith("the row's grammar can't be followed any further: ")
  assert ' items' in matcher.error and not matcher.complete
  matcher.push(ord('a') + 3)  # nothing more happens
  matcher.fill(masks, 0, (1,))
  assert not masks.any()


@pytest.mark.parametrize('kind', vocabularies.KINDS)
def test_drafts_are_cut_where_the_grammar_forbids_them_or_have_the_forced_text(kind):
  """Beside a matcher that is pushed token by token; the row's own matcher stays where it is."""
  vocabulary = vocabularies.of_kind(kind)
  vocab_size = vocabulary.size + 37
  ends = (*vocabulary.end_ids, vocab_size - 1)
  grammars, rng, cut, forced_drafts = (
    Grammars(vocabulary, vocab_size),
    np.random.default_rng(1),
    0,
    0,
  )
  for grammar, texts in FINITE.items():
    for text in sorted(texts) * 2:
      tokens = vocabulary.encode(text)
      begin = rng.integers(len(tokens))
      row, beside = grammars.matchers(grammar, 2)
      for token in tokens[:begin]:
        row.push(token)
        beside.push(token)
      proposed = [*tokens[begin:], ends[0]]
      if rng.random() < 0.5:
        proposed[rng.integers(len(proposed))] = int(rng.integers(3, vocab_size))
      draft, forced = row.draft(proposed, 5)
      assert len(draft) <= 5
      if forced:  # all texts go on like this
        forced_drafts += 1
        done, more = (vocabulary.decode(x) for x in (tokens[:begin], draft))
        assert all(t.startswith(done + more) for t in texts if t.startswith(done)), (texts, draft)
      else:
        assert draft == proposed[: len(draft)]
      masks = np.zeros((6, 2, mask_words(vocab_size)), np.uint32)
      known = row.fill_draft(masks, 1, ends, [*draft, ends[0]][:5])
      assert not masks[:, 0].any()
      for i in range(known + 1):
        wanted = masks_of([(beside, ends)], vocab_size).allowed[0]
        np.testing.assert_array_equal(masks[i, 1], wanted)
        if i < len(draft):
          assert draft[i] in allowed(wanted, vocab_size)
          beside.push(draft[i])
      # Masks are known up to an end, or to a text that nothing can follow.
      assert known == len(draft) or (known < len(draft) and beside.complete)
      cut += len(draft) < len(proposed[:5]) and not forced
      again = np.zeros((1, mask_words(vocab_size)), np.uint32)
      row.fill(again, 0, ends)
      np.testing.assert_array_equal(again[0], masks[0, 1])
  assert cut > 3 and forced_drafts > 1


@pytest.fixture(scope='module')
def engine(palm_tiny):
  return Engine.load(palm_tiny, mesh='1x1x1', dtype='float32')


OPTIONS = dict(slots=4, max_length=128, share=False)


def complete(engine, prompts, **options):
  return [sample for (sample,) in engine.complete(prompts, **{**OPTIONS, **options})]


def test_rows_keep_to_their_grammars(engine):
  """Rows without a grammar, beside two that have one, keep their tokens."""
  prompts = ['def f(', 'import ', 'class A', '# ']
  plain = complete(engine, prompts, max_new_tokens=30)
  hot = SamplingParams(1.0, top_k=40)
  schema = Grammar.from_dict({'json_schema': SCHEMA})
  ids = engine.checkpoint.vocabulary.encode
  core = engine.core.streams(**OPTIONS).scheduler
  requests = [Request((0, *ids(p)), limit=30, text=True, end_ids=(1,)) for p in prompts]
  for i, grammar in ((0, PHONE), (2, schema)):
    requests[i] = dataclasses.replace(
      requests[i], grammar=grammar, sampling=hot, seeds=(1, 2, 3), limit=100
    )
  handles = [core.submit(request) for request in requests]
  first, texts, tokens = handles[0].index, {}, {}
  while not core.idle:
    for event in core.step():
      key = event.request - first, event.sample
      texts[key] = texts.get(key, '') + event.text
      tokens.setdefault(key, []).extend(event.tokens)
  for i in (1, 3):
    assert (tokens[i, 0], texts[i, 0]) == (plain[i].tokens, plain[i].text)
  for sample in range(3):
    assert re.fullmatch('[0-9]{3}-[a-f]{2}', texts[0, sample])
    found = json.loads(texts[2, sample])
    assert set(found) - {'sizes'} == {'name', 'kind'} and len(found['name']) <= 6
    assert found['kind'] in ('int', 'float')
    assert all(type(n) is int and 0 <= n <= 99 for n in found.get('sizes', []))
  # A grammar that allows nothing more ends its row: no token is needed to say so.
  assert [handle.finish_reasons for handle in handles[::2]] == [['stop'] * 3] * 2
  assert len({texts[0, sample] for sample in range(3)}) > 1
  assert core.check_books() == [] and handles[0].matchers == ()


def test_text_that_a_grammar_forces_is_drafted(engine):
  """Rows get the tokens that they get without drafts, in fewer steps."""
  schema = Grammar.from_dict({'json_schema': SCHEMA})
  hot = [SamplingParams(), SamplingParams(1.0), SamplingParams(0.5, top_k=3, min_new_tokens=2)]
  options = dict(max_new_tokens=80, grammar=schema, sampling=hot, seeds=[1, 2, 3])
  prompts = ['def f(', 'class A', '# ']
  plain, drafted = (complete(engine, prompts, **options, speculate=s) for s in (None, 'ngram:4'))
  assert [(s.tokens, s.finish_reason) for s in drafted] == [
    (s.tokens, s.finish_reason) for s in plain
  ]
  core = engine.core.streams(**OPTIONS, speculate='ngram:4').scheduler
  free = np.asarray([1.0, 1.01, 1.02][: len(core._decoder._masked.prices.prices)], np.float32)
  core._decoder._masked.prices = mock.Mock(tries_plain=False, next=lambda: free)
  tokens, before = engine.checkpoint.vocabulary.encode('def f('), core.stats.drafts
  core.submit(Request((0, *tokens), limit=80, grammar=schema, end_ids=(1,)))
  found = [token for _ in iter(lambda: core.idle, True) for e in core.step() for token in e.tokens]
  assert found == plain[0].tokens
  after = core.stats.drafts
  assert after.generated - before.generated > 1.5 * (after.row_steps - before.row_steps)


def test_a_greedy_row_has_the_likeliest_token_that_its_grammar_allows(engine):
  """Beside the model's own logits, one position after another; scores are the model's own, too."""
  ids = engine.checkpoint.vocabulary.encode
  prompt = ids('x = ')
  bias = SamplingParams(logit_bias={ids('d')[0]: 3.0, ids('-')[0]: -2.0})
  for sampling in (SamplingParams(), bias):
    (row,) = complete(engine, [prompt], max_new_tokens=12, grammar=PHONE, sampling=sampling)
    inputs = np.asarray([[0, *prompt, *row.tokens]])
    logits = np.array(engine.logits(inputs)[0, len(prompt) :])
    for token, value in sampling.logit_bias:
      logits[:, token] += value
    for step, token in enumerate(row.tokens):
      may = ids('-') if step == 3 else ids('0123456789' if step < 3 else 'abcdef')
      assert token == max(may, key=lambda t: logits[step, t])
    assert len(row.tokens) == 6 and row.finish_reason == 'stop'
    (scores,) = engine.score_completions([(prompt, row.tokens)])
    np.testing.assert_allclose(row.log_probs, scores, atol=1e-4)


def test_ends_of_rows_with_grammars(engine):
  eos = SamplingParams(logit_bias={1: 1e9})
  (row,) = complete(engine, ['a'], max_new_tokens=9, grammar=PHONE, sampling=eos)
  assert row.finish_reason == 'stop' and len(row.tokens) == 6  # EOS would end the text too early
  word = Grammar('regex', '[a-f]+')
  (row,) = complete(engine, ['a'], max_new_tokens=9, grammar=word, sampling=eos)
  assert row.finish_reason == 'eos' and len(row.tokens) == 2 and row.tokens[-1] == 1
  later = dataclasses.replace(eos, min_new_tokens=3)
  (row,) = complete(engine, ['a'], max_new_tokens=9, grammar=word, sampling=later)
  assert row.finish_reason == 'eos' and len(row.tokens) == 4
  (row,) = complete(engine, ['a'], max_new_tokens=9, grammar=word)
  assert row.finish_reason == 'length' and re.fullmatch('[a-f]{9}', row.text)
  (row,) = complete(engine, ['a'], max_new_tokens=9, grammar=word, sampling=eos, eos_id=())
  assert row.finish_reason == 'length' and re.fullmatch('[a-f]{9}', row.text)
  (row,) = complete(engine, ['a'], max_new_tokens=9, grammar=PHONE, stop=['-'])
  assert row.finish_reason == 'stop' and re.fullmatch('[0-9]{3}', row.text)


@pytest.mark.parametrize('steps', [1, 5])
def test_a_row_that_can_get_no_token_fails_alone(engine, steps):
  """Also where single steps are the exception."""
  digits = dict.fromkeys(engine.checkpoint.vocabulary.encode('0123456789'), -np.inf)
  samplings = [SamplingParams(), SamplingParams(logit_bias=digits), SamplingParams()]
  core = engine.core.streams(**OPTIONS, decode_steps=steps).scheduler
  handles = [
    core.submit(Request((0, 70), limit=12, sampling=s, grammar=PHONE if i else None))
    for i, s in enumerate(samplings)
  ]
  errors = {e.request: e.error for _ in iter(lambda: core.idle, True) for e in core.step()}
  assert [handle.finish_reasons for handle in handles] == [['length'], ['error'], ['stop']]
  assert errors[handles[1].index] == NO_TOKEN and errors[handles[2].index] is None


def test_what_grammars_need(engine, monkeypatch):
  request = Request((0, 5), limit=9, grammar=PHONE)
  config = SchedulerConfig(slots=1, max_length=64)
  core = Scheduler(engine.model, engine.weights, config)
  with pytest.raises(RequestError, match='a grammar needs a vocabulary, and this engine has none'):
    core.submit(request)
  core = engine.core.streams(**OPTIONS).scheduler
  with pytest.raises(RequestError, match='grammar: the regex is not one that can be used'):
    core.submit(dataclasses.replace(request, grammar=Grammar('regex', '[')))
  find = importlib.util.find_spec
  missing = lambda name, *rest: None if name == 'llguidance' else find(name, *rest)
  monkeypatch.setattr(importlib.util, 'find_spec', missing)
  with pytest.raises(UserError, match=r"grammars need llguidance: pip install '.*\[structured\]'"):
    core.submit(request)
  with pytest.raises(UserError, match='grammars need llguidance'):
    engine.stream(['a'], max_new_tokens=3, grammar=PHONE, **OPTIONS)
  assert core.idle
