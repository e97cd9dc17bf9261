"""Stop texts in a text that comes in pieces, beside str.find on the whole text."""

import pickle

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.text.stop_texts import StopTexts, cut_at_stop, likely_stop_ids
from tests.text.vocabularies import of_kind

FEW = st.text('ab\n', min_size=1, max_size=4)


def _expected(text, stops):
  """The first end of any stop, the longest of those that end there."""
  ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
  return min(ends)[1:] if ends else (len(text), None)


@settings(max_examples=500, deadline=None)
@given(st.lists(FEW, max_size=4), st.lists(st.text('ab\nc', max_size=6), max_size=8))
def test_the_first_stop_is_found_however_the_text_is_cut(stops, pieces):
  text = ''.join(pieces)
  begin, stop = _expected(text, stops)
  finder, released, found = StopTexts(stops), '', None
  for piece in pieces:
    delta, found = finder.push(piece)
    released += delta
    assert text.startswith(released)
    if found is not None:
      break
    # No more is held than may become a stop.
    held = ''.join(pieces)[len(released) :]
    assert len(text[: len(released)]) <= begin or stop is None, held
  if found is None:
    released += finder.finish()
  assert (released, found) == (text[:begin], stop)
  assert cut_at_stop(text, stops) == text[:begin]


@settings(max_examples=200, deadline=None)
@given(st.lists(FEW, min_size=1, max_size=3), st.text('abc', max_size=12))
def test_no_more_is_held_back_than_may_become_a_stop(stops, text):
  finder = StopTexts(stops)
  released, found = finder.push(text)
  if found is None:
    held = text[len(released) :]
    longest = max(
      (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0
    )
    assert len(held) == longest


def test_stops_that_do_not_count_yet_are_text():
  finder = StopTexts(['ab'])
  assert finder.push('xab', may_stop=False) == ('xab', None)
  assert finder.push('a', may_stop=False) == ('', None)
  assert finder.push('b') == ('', 'ab')
  assert cut_at_stop('abxab', ['ab'], begin=2) == 'abx'


def test_it_goes_on_after_pickle():
  finder = StopTexts(['stop'])
  assert finder.push('a st') == ('a ', None)
  assert pickle.loads(pickle.dumps(finder)).push('opx') == ('', 'stop')
  assert finder.finish() == 'st'


@pytest.mark.parametrize('stops', ['ab', [''], [5]])
def test_what_is_no_stop_text_is_refused(stops):
  with pytest.raises(RequestError, match='stop must be texts that are not empty'):
    StopTexts(stops)
  with pytest.raises(RequestError, match='lone surrogate'):
    StopTexts(['\ud800'])


@pytest.mark.parametrize('kind', ['bytes', 'byte_level', 'llama', 'sentencepiece'])
def test_likely_ids_write_the_stop_text(kind):
  vocabulary = of_kind(kind)
  found = likely_stop_ids(vocabulary, 'or')
  assert vocabulary.encode('or') in found
  assert vocabulary.encode('Lor')[-len(found[-1]) :] == found[-1]
  assert all('or' in vocabulary.decode(ids) for ids in found)
  assert len(found) == (2 if kind in ('llama', 'sentencepiece') else 1)


def test_a_text_that_a_vocabulary_writes_differently_has_no_likely_ids():
  assert likely_stop_ids(of_kind('sentencepiece'), '\n\n') == []
