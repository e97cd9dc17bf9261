"""A GGUF file's lists as a vocabulary, beside the tokenizers that the lists were taken from."""

import json

import pytest
import sentencepiece
import tokenizers

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.text.gguf_lists import PRE_TOKENIZERS, vocabulary_of_lists
from tests.text import vocabularies

TEXTS = ['the License', ' and  12 3456\n\n x', "it's é ß 漢字 😀", '</s>a<s>', '(a) [b], c!\t']


def _lists():
  content = json.loads(vocabularies.byte_level_json())
  vocab = content['model']['vocab']
  tokens = sorted(vocab, key=vocab.get)
  special = {token['content'] for token in content['added_tokens']}
  types = [3 if token in special else 1 for token in tokens]
  merges = [
    merge if isinstance(merge, str) else ' '.join(merge) for merge in content['model']['merges']
  ]
  return tokens, types, merges


@pytest.mark.parametrize('text', TEXTS)
def test_byte_level_lists_encode_as_their_tokenizer(text):
  tokens, types, merges = _lists()
  vocabulary = vocabulary_of_lists('x.gguf', tokens, types, merges=merges, pre='smollm')
  other = tokenizers.Tokenizer.from_str(vocabularies.byte_level_json().decode())
  assert vocabulary.encode(text) == other.encode(text, add_special_tokens=False).ids
  assert vocabulary.decode(vocabulary.encode(text), special=True) == text


@pytest.mark.parametrize('pre', PRE_TOKENIZERS)
def test_every_pre_tokenizer_keeps_the_text(pre):
  tokens, types, merges = _lists()
  vocabulary = vocabulary_of_lists('x.gguf', tokens, types, merges=merges, pre=pre)
  for text in TEXTS:
    assert vocabulary.decode(vocabulary.encode(text), special=True) == text


def test_sentencepiece_lists_encode_as_their_model():
  model = sentencepiece.SentencePieceProcessor(
    model_proto=vocabularies.sentencepiece_model(
      model_type='bpe', normalization_rule_name='identity', remove_extra_whitespaces=False
    )
  )
  ids = range(model.get_piece_size())
  types = [
    2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
    for i in ids
  ]
  vocabulary = vocabulary_of_lists(
    'x.gguf',
    [model.id_to_piece(i) for i in ids],
    types,
    scores=[model.get_score(i) for i in ids],
    model='llama',
    bos_id=1,
    end_ids=(2,),
  )
  assert (vocabulary.bos_id, vocabulary.end_ids) == (1, (2,))
  for text in TEXTS[:3] + TEXTS[4:]:
    assert vocabulary.encode(text) == model.encode(text)
    assert vocabulary.decode(vocabulary.encode(text)) == text


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'pre': 'x\x1b'}, r'has the pre-tokenizer "x\\x1b", which is not known: known are gpt-2'),
    ({'model': 'bert'}, 'model "bert", which is not known'),
    ({'token_types': [1]}, 'tokens have 1 types'),
    ({'tokens': ['a', 'a'], 'token_types': []}, 'holds the token "a" twice'),
    ({'tokens': ['a', 5], 'token_types': []}, 'damaged'),
    ({'merges': ['a']}, 'the merge "a" is not two tokens'),
    ({'merges': ['a b c']}, 'is not two tokens'),
    ({'merges': ['zzz yyy']}, 'is not a tokenizer.json that can be used'),
    ({'model': 'llama', 'scores': [1.0]}, 'have 1 scores'),
  ],
)
def test_lists_that_contradict_each_other_are_one_sentence(change, message):
  tokens, types, merges = _lists()
  given = {'tokens': tokens, 'token_types': types, 'merges': merges, **change}
  with pytest.raises(RequestError, match=message):
    vocabulary_of_lists('x.gguf', **given)
