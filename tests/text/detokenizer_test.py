"""Text of tokens as they come, for random ids in random pieces."""

import pickle

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from t5x_inference_ext.text.detokenizer import Detokenizer
from tests.text.vocabularies import KINDS, of_kind

IDS = st.lists(st.integers(0, 700), max_size=30)


@pytest.mark.parametrize('kind', KINDS)
def test_joined_texts_are_the_decoding_of_all_ids(kind):
  vocabulary = of_kind(kind)

  @settings(max_examples=200, deadline=None)
  @given(IDS, st.lists(IDS, max_size=6))
  def check(prompt, pieces):
    detokenizer = Detokenizer(vocabulary, prompt)
    texts = [detokenizer.push(piece) for piece in pieces]
    text = ''.join(texts) + detokenizer.finish()
    whole = vocabulary.decode([*prompt, *(token for piece in pieces for token in piece)])
    # The prompt's own text is what its ids decide: an incomplete character at its end is not.
    before = Detokenizer(vocabulary).push(prompt)
    assert before + text == whole

  check()


def test_a_character_is_never_cut():
  vocabulary = of_kind('bytes')
  ids = vocabulary.encode('é漢😀')
  detokenizer = Detokenizer(vocabulary)
  assert [detokenizer.push([i]) for i in ids] == ['', 'é', '', '', '漢', '', '', '', '😀']
  assert detokenizer.finish() == ''


def test_an_incomplete_character_does_not_vanish():
  vocabulary = of_kind('bytes')
  detokenizer = Detokenizer(vocabulary)
  assert detokenizer.push(vocabulary.encode('a漢')[:-1]) == 'a'
  assert detokenizer.finish() == '\ufffd' and detokenizer.finish() == ''
  detokenizer = Detokenizer(vocabulary, vocabulary.encode('漢')[:2])
  assert detokenizer.push(vocabulary.encode('漢')[2:]) == '漢'


@pytest.mark.parametrize('kind', ['llama', 'sentencepiece'])
def test_the_first_space_of_a_completion_stays(kind):
  vocabulary = of_kind(kind)
  ids = vocabulary.encode('the License')
  split = len(vocabulary.encode('the'))
  assert Detokenizer(vocabulary, ids[:split]).push(ids[split:]) == ' License'
  assert Detokenizer(vocabulary).push(ids) == 'the License'


def test_a_push_costs_its_own_tokens(monkeypatch):
  vocabulary = of_kind('byte_level')
  counted = []
  piece = vocabulary.piece
  monkeypatch.setattr(vocabulary, 'piece', lambda token: counted.append(token) or piece(token))
  detokenizer = Detokenizer(vocabulary, list(range(2, 300)) * 50)
  assert len(counted) < 10
  for token in range(300):
    detokenizer.push([token])
  assert len(counted) < 310


def test_a_detokenizer_goes_on_after_pickle():
  vocabulary = of_kind('bytes')
  detokenizer = Detokenizer(vocabulary)
  first, second = vocabulary.encode('é')
  detokenizer.push([first])
  assert pickle.loads(pickle.dumps(detokenizer)).push([second]) == 'é'
