import math

from t5x_inference_ext.server.token_text import TokenTexts
from t5x_inference_ext.text.vocabulary import ByteVocabulary

A, E1, E2, END = 100, 0xC3 + 3, 0xA9 + 3, 1  # a, the halves of an accented e, EOS


def test_texts():
  texts = TokenTexts(ByteVocabulary())
  assert [texts.text(t) for t in (A, E1, E2, END)] == ['a', r'bytes:\xc3', r'bytes:\xa9', '']
  assert TokenTexts(None).text(7) == 'token_id:7'


def test_of_completions():
  texts = TokenTexts(ByteVocabulary())
  told = texts.completion([A, 101], [None, -0.5], [None, [(A, -0.1), (101, -0.5)]], 3, 2)
  assert told == {
    'tokens': ['a', 'b'],
    'token_logprobs': [None, -0.5],
    'top_logprobs': [None, {'a': -0.1, 'b': -0.5}],
    'text_offset': [3, 4],
  }
  assert texts.completion([A], [-0.5], [[]], 0, 0)['top_logprobs'] is None


def test_the_chosen_token_is_always_told():
  texts = TokenTexts(ByteVocabulary())
  told = texts.completion([102], [-3.0], [[(A, -0.1)]], 0, 1)
  assert told['top_logprobs'] == [{'a': -0.1, 'c': -3.0}]


def test_of_chats():
  told = TokenTexts(ByteVocabulary()).chat([E1], [-math.inf], [[(A, -0.1)]])
  assert told == {
    'content': [
      {
        'token': '\ufffd',
        'logprob': -9999.0,
        'bytes': [0xC3],
        'top_logprobs': [{'token': 'a', 'logprob': -0.1, 'bytes': [97]}],
      }
    ],
    'refusal': None,
  }
