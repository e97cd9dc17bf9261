"""Turns of a chat: the replies are those of one long prompt, and no turn prefills the whole blocks
of earlier turns and their replies.
"""

import itertools

import numpy as np
import pytest

from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.errors import RequestError
from tests import memory, reference

pytestmark = pytest.mark.usefixtures('quick_programs')

TENSORS = reference.random_tensors(memory.ODD, seed=1)
SAMPLER = SamplingParams(1.0, top_k=40, repetition_penalty=1.2)


@pytest.mark.parametrize(
  'mesh, prefill, decode',
  [
    ('1x1x1', 'ws_2d/batch', 'ws_2d/batch'),
    ('2x2x2', 'wg_xyz/batch', 'ws_2d/batch'),
    ('2x2x1', 'ws_2d/heads', 'wg_x/heads'),
  ],
)
def test_replies_are_those_of_one_long_prompt(mesh, prefill, decode):
  engine = memory.engine(memory.ODD, TENSORS, mesh, prefill=prefill, decode=decode)
  alone = memory.engine(memory.ODD, TENSORS, '1x1x1')
  chat = engine.chat(max_length=200, eos_id=-1, prefill_chunk=64)
  core = engine.core.streams(max_length=201, slots=1, prefill_chunk=64).scheduler
  said, cached = [], 0
  for turn, new in (([5, 6, 7], 20), ([9] * 40, 3), ([], 4), ([11], 1)):
    before = core.stats.prompt_tokens
    reply = list(chat.reply(turn, max_new_tokens=new, sampling=SAMPLER, seed=3))
    said += turn
    (wanted,) = alone.generate(
      [said], max_new_tokens=20, sampling=SAMPLER, seeds=[3], eos_id=-1, prompt_size=100
    )
    assert reply == wanted.tokens[:new]
    said += reply
    assert chat.tokens == said
    # BOS and all tokens so far, without the whole blocks of earlier turns and their replies.
    prompt = 1 + len(said) - len(reply)
    assert core.stats.prompt_tokens - before == prompt - cached // 32 * 32
    cached = len(said)  # BOS and all but the last token, which no step has taken


def test_a_reply_that_is_not_taken_is_not_said():
  engine = memory.engine(memory.ODD, TENSORS, '1x1x1')
  chat = engine.chat(max_length=100, eos_id=-1)
  reply = chat.reply([5, 6, 7], max_new_tokens=40)
  heard = list(itertools.islice(reply, 5))
  reply.close()
  assert chat.tokens == [5, 6, 7, *heard]
  (wanted,) = engine.generate([[5, 6, 7, *heard, 8]], max_new_tokens=6, eos_id=-1)
  assert list(chat.reply([8], max_new_tokens=6)) == wanted.tokens


def test_a_turn_ends_the_reply_before_it():
  """One that is under way, and one that was never begun; a turn may be an array."""
  engine = memory.engine(memory.ODD, TENSORS, '1x1x1')
  chat = engine.chat(max_length=100, eos_id=-1)
  first = chat.reply([5, 6, 7], max_new_tokens=40)
  heard = list(itertools.islice(first, 5))
  never = chat.reply(np.array([8]), max_new_tokens=6)
  (wanted,) = engine.generate([[5, 6, 7, *heard, 8, 9]], max_new_tokens=6, eos_id=-1)
  assert list(chat.reply([9], max_new_tokens=6)) == wanted.tokens
  assert not list(first) and not list(never)
  assert chat.tokens == [5, 6, 7, *heard, 8, 9, *wanted.tokens]


def test_eos_ends_a_reply():
  engine = memory.engine(memory.ODD, TENSORS, '1x1x1')
  free = list(
    engine.chat(max_length=100, eos_id=-1).reply([5, 9], max_new_tokens=30, sampling=SAMPLER)
  )
  chat = engine.chat(max_length=100, eos_id=free[20])
  assert (
    list(chat.reply([5, 9], max_new_tokens=30, sampling=SAMPLER))
    == free[: free.index(free[20]) + 1]
  )


def test_what_does_not_fit_is_refused():
  chat = memory.engine(memory.ODD, TENSORS, '1x1x1').chat(max_length=20)
  with pytest.raises(
    RequestError,
    match='0 tokens so far, 15 of this turn and 6 new ones do not fit into max_length=20',
  ):
    chat.reply([5] * 15, max_new_tokens=6)
  with pytest.raises(RequestError, match='the turn holds token 101, outside the vocabulary of 101'):
    chat.reply([101], max_new_tokens=6)
  for options, says in (
    (dict(max_new_tokens=0), 'max_new_tokens must be at least 1'),
    (dict(seed=-1), 'seeds must be whole'),
    (dict(sampling=SamplingParams(stop=((101,),))), 'logit_bias or stop holds token 101'),
  ):
    with pytest.raises(RequestError, match=says):
      chat.reply([5], **{'max_new_tokens': 6, **options})
  assert chat.tokens == []
  with pytest.raises(RequestError, match='prefill_chunk must be at least 1'):
    memory.engine(memory.ODD, TENSORS, '1x1x1').chat(max_length=20, prefill_chunk=0)
