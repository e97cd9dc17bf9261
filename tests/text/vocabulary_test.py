"""Vocabularies of every kind beside their libraries, and what damaged ones say."""

import dataclasses
import json
import pickle
import re

import pytest
import sentencepiece
import tokenizers

from t5x_inference_ext.errors import CheckpointError, RequestError
from t5x_inference_ext.text.sentencepiece_model import SentencePieceVocabulary
from t5x_inference_ext.text.settings import (
  TextSettings,
  assumed_settings,
  settings_of_vocabulary,
  unknown_vocabulary,
)
from t5x_inference_ext.text.tokenizer_json import TokenizerVocabulary
from t5x_inference_ext.text.vocabulary import ByteVocabulary, encode_pair
from t5x_inference_ext.text.vocabulary_files import choose_settings, open_settings
from tests.text import vocabularies
from tests.text.vocabularies import KINDS, of_kind

TEXTS = [
  '',
  'the License',
  ' a',
  'def f(x):\n\treturn x',
  'é ß 漢字 😀',
  '\x00\x7f',
  '12 345  end ',
]


@pytest.mark.parametrize('text', ['', 'def f(x):\n\treturn x', 'é ß 漢字 😀', '\x00\x7f'])
def test_bytes_are_seqios(text):
  import seqio  # seconds, that other tests here need not wait for

  ours, theirs = ByteVocabulary(), seqio.ByteVocabulary()
  assert ours.encode(text) == list(theirs.encode(text))
  for ids in (ours.encode(text), [2, 0, 300, *ours.encode(text), 1]):
    assert ours.decode(ids) == theirs.decode(ids)
  assert (ours.size, ours.end_ids) == (theirs.vocab_size, (theirs.eos_id,))


def _library(kind):
  """Functions (encode, decode) of the library itself."""
  if kind.startswith('sentencepiece'):
    options = {} if kind == 'sentencepiece' else vocabularies.PLAIN
    model = sentencepiece.SentencePieceProcessor(
      model_proto=vocabularies.sentencepiece_model(**options)
    )
    return model.encode, model.decode
  data = vocabularies.byte_level_json() if kind == 'byte_level' else vocabularies.llama_json()
  tokenizer = tokenizers.Tokenizer.from_str(data.decode())
  return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode


@pytest.mark.parametrize('kind', KINDS[1:])
@pytest.mark.parametrize('text', TEXTS)
def test_ids_and_texts_are_the_librarys(kind, text):
  vocabulary, (encode, decode) = of_kind(kind), _library(kind)
  ids = vocabulary.encode(text)
  assert ids == encode(text)
  assert all(0 <= i < vocabulary.size for i in ids)
  assert vocabulary.decode(ids) == decode(ids)
  if kind != 'sentencepiece':  # which writes several spaces as one
    assert vocabulary.decode(ids) == text


def test_decoding_random_ids_is_the_librarys():
  """Where a library replaces wrong bytes one by one, or by runs, only their number differs."""
  import random

  chance = random.Random(3)
  for kind in KINDS[1:]:
    vocabulary, (_, decode) = of_kind(kind), _library(kind)
    for _ in range(200):
      ids = [chance.randrange(vocabulary.size) for _ in range(chance.randrange(12))]
      ours, theirs = vocabulary.decode(ids), decode(ids)
      if kind == 'byte_level':
        assert ours == theirs
      elif '\ufffd' not in ours + theirs:
        assert ours == theirs, (kind, ids)


@pytest.mark.parametrize('kind', KINDS)
def test_a_vocabulary_comes_back_from_its_files_and_from_pickle(kind):
  vocabulary = of_kind(kind)
  settings = settings_of_vocabulary(vocabulary, chat_template='{{ 1 }}')
  fields = json.loads(json.dumps(settings.to_dict()))
  read = TextSettings.from_dict(fields, 600, 'here', vocabulary.files().__getitem__)
  for other in (read.vocabulary, pickle.loads(pickle.dumps(vocabulary))):
    assert (other.size, other.bos_id, other.end_ids) == (
      vocabulary.size,
      vocabulary.bos_id,
      vocabulary.end_ids,
    )
    for text in TEXTS:
      assert other.encode(text) == vocabulary.encode(text)
  assert read.chat.render([]) == '1' and read.source == 'recorded'


@pytest.mark.parametrize('kind', KINDS)
def test_a_lone_surrogate_is_refused(kind):
  with pytest.raises(UnicodeEncodeError):
    of_kind(kind).encode('a\ud800')


@pytest.mark.parametrize('kind', KINDS)
def test_special_tokens_write_nothing_unless_asked(kind):
  vocabulary = of_kind(kind)
  (end,) = vocabulary.end_ids
  ids = [*vocabulary.encode('the'), end]
  assert vocabulary.decode(ids) == 'the'
  assert vocabulary.decode(ids, special=True) == ('the' if kind == 'bytes' else 'the</s>')
  assert vocabulary.piece(10**6) == vocabulary.piece(-1) == b''


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
  ('prompt', 'completion'),
  [('the', ' License'), ('the Lic', 'ense'), ('the ', 'License'), ('', ' a'), ('é', 'é漢')],
)
def test_prompt_and_completion_are_encoded_as_one_text(kind, prompt, completion):
  vocabulary = of_kind(kind)
  first, second = encode_pair(vocabulary, prompt, completion)
  assert first + second == vocabulary.encode(prompt + completion)
  whole = b''.join(vocabulary.piece(i) for i in vocabulary.encode(prompt))
  # All of the prompt's tokens end in the prompt, and no more do.
  assert whole.startswith(b''.join(map(vocabulary.piece, first)))
  assert len(b''.join(map(vocabulary.piece, [*first, second[0]]))) > len(whole)


def test_a_token_across_the_boundary_is_the_completions():
  vocabulary = of_kind('byte_level')
  (token,) = vocabulary.encode(' the')
  assert encode_pair(vocabulary, 'of t', 'he') == (vocabulary.encode('of'), [token])


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (b'', 'is not a tokenizer.json that can be used'),
    (b'[]', 'is not a tokenizer.json that can be used'),
    (b'{}', 'is not a tokenizer.json that can be used'),
    (b'\xff\xfe', 'is not a tokenizer.json that can be used'),
    (b'[' * 100_000, 'is not a tokenizer.json that can be used'),
    (b'{"a":' * 100_000, 'is not a tokenizer.json that can be used'),
    (b'{"model":{"type":"BPE","vocab":{"a":0},"merges":["a c"]}}', 'can be used'),
    (b'{"model":{"type":"BPE","vocab":{"a":0},"merges":[]}}', 'a decoder that is not known, None'),
    (
      b'{"model":{"type":"BPE","vocab":{"a":0},"merges":[]},"decoder":{"type":"WordPiece",'
      b'"prefix":"##","cleanup":true}}',
      'a decoder that is not known, .*WordPiece.*: known are ByteLevel',
    ),
  ],
)
def test_damaged_tokenizers_are_one_sentence(data, message):
  with pytest.raises(RequestError, match=message) as error:
    TokenizerVocabulary('x/tokenizer.json', data)
  assert '\n' not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize('cut', [0, 1, 10, 5000, -1])
def test_part_of_a_sentencepiece_model_is_one_sentence(cut):
  with pytest.raises(RequestError, match='x.model is not a SentencePiece model, or only part'):
    SentencePieceVocabulary('x.model', vocabularies.sentencepiece_model()[:cut])


def test_vocabulary_that_is_not_known():
  recorded = assumed_settings(32128)
  assert choose_settings(None, recorded, 32128, needed=False) == recorded
  assert (recorded.vocabulary, recorded.bos_id, recorded.end_ids) == (None, 0, (1,))
  assert str(recorded) == 'none (not known for 32128 rows), BOS 0, rows end with 1'
  message = r'is not known \(not known for 32128 rows\): give --vocabulary=FILE.model'
  with pytest.raises(RequestError, match=message):
    choose_settings(None, recorded, 32128, needed=True)


def _given(tmp_path, recorded, **files):
  """BOS and ends of a run that is given a tokenizer.json whose own BOS is 1."""
  _directory(tmp_path, **files)
  found = choose_settings(str(tmp_path / 'tokenizer.json'), recorded, 600, needed=True)
  assert found.vocabulary.bos_id == found.bos_id
  return found.bos_id, found.end_ids


def test_a_given_vocabulary_and_what_the_model_says_itself(tmp_path):
  t5x, public = assumed_settings(600), unknown_vocabulary(bos_id=None, end_ids=(5, 6))
  ends = {'generation_config': {'eos_token_id': 2}}
  assert _given(tmp_path, t5x) == (0, ())  # T5X's BOS; EOS is the vocabulary's
  assert _given(tmp_path, t5x, **ends) == (0, (2,))
  assert _given(tmp_path, public) == (1, (5, 6))  # a public model's is the vocabulary's
  assert _given(tmp_path, dataclasses.replace(public, end_ids=()), **ends) == (1, (2,))
  assert _given(tmp_path, dataclasses.replace(public, bos_id=3)) == (3, (5, 6))
  recorded = dataclasses.replace(open_settings('bytes'), bos_id=None)
  assert _given(tmp_path, recorded, **ends) == (None, (2,))


def test_a_sentencepiece_model_of_a_public_model_has_its_own_bos(tmp_path):
  (tmp_path / 'tokenizer.model').write_bytes(vocabularies.sentencepiece_model())
  settings = open_settings(str(tmp_path / 'tokenizer.model'))
  assert (settings.bos_id, settings.end_ids) == (1, (2,))
  config = {'add_bos_token': False, 'eos_token': '<s>', 'chat_template': 'x'}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  settings = open_settings(str(tmp_path / 'tokenizer.model'))
  assert (settings.bos_id, settings.end_ids, settings.chat_template) == (None, (1,), 'x')
  # Beside a file of another name, no file of transformers is read.
  (tmp_path / 'words.model').write_bytes(vocabularies.sentencepiece_model())
  settings = open_settings(str(tmp_path / 'words.model'))
  assert (settings.bos_id, settings.end_ids, settings.chat_template) == (1, (2,), None)


def test_a_chat_template_is_compiled_once():
  settings = dataclasses.replace(open_settings('bytes'), chat_template='{{ 1 }}')
  assert settings.chat is settings.chat and settings.chat.render([]) == '1'
  assert pickle.loads(pickle.dumps(settings)) == settings


def test_vocabulary_that_does_not_fit(tmp_path):
  with pytest.raises(RequestError, match='vocabulary bytes has 259 ids and the model 128 rows'):
    choose_settings('bytes', assumed_settings(128), 128, needed=True)
  (tmp_path / 'not.model').write_text('nothing')
  with pytest.raises(RequestError, match='not.model is not a SentencePiece model'):
    choose_settings(str(tmp_path / 'not.model'), assumed_settings(384), 384, needed=True)
  with pytest.raises(RequestError, match='no vocabulary at .*tokenizer.json: --vocabulary is'):
    choose_settings(str(tmp_path / 'tokenizer.json'), assumed_settings(384), 384, needed=True)
  (tmp_path / 'tokenizer.json').write_bytes(vocabularies.llama_json())
  with pytest.raises(RequestError, match='has 500 ids and the model 384 rows'):
    choose_settings(str(tmp_path / 'tokenizer.json'), assumed_settings(384), 384, needed=True)


def _directory(path, **files):
  (path / 'tokenizer.json').write_bytes(vocabularies.llama_json())
  for name, content in files.items():
    (path / f'{name}.json').write_text(json.dumps(content))
  return open_settings(str(path / 'tokenizer.json'))


def test_files_beside_a_tokenizer_say_bos_end_template_and_defaults(tmp_path):
  settings = _directory(tmp_path)
  assert (settings.bos_id, settings.end_ids, settings.chat_template) == (1, (), None)
  settings = _directory(
    tmp_path,
    tokenizer_config={
      'add_bos_token': False,
      'eos_token': {'content': '</s>'},
      'chat_template': '{{ messages[0].content }}',
    },
  )
  assert (settings.bos_id, settings.end_ids) == (None, (2,))
  assert settings.chat.render([{'role': 'user', 'content': 'hi'}]) == 'hi'
  settings = _directory(
    tmp_path,
    tokenizer_config={'add_bos_token': True, 'bos_token': '<s>'},
    config={'eos_token_id': 5},
    generation_config={
      'eos_token_id': [2, 7],
      'do_sample': True,
      'temperature': 0.6,
      'top_p': 0.9,
      'x': 1,
    },
  )
  assert (settings.bos_id, settings.end_ids) == (1, (2, 7))
  assert settings.generation_defaults == {'temperature': 0.6, 'top_p': 0.9}
  (tmp_path / 'chat_template.jinja').write_text('file')
  assert open_settings(str(tmp_path / 'tokenizer.json')).chat_template == 'file'


@pytest.mark.parametrize('content', ['[', '[]', '[' * 2000, '{"eos_token_id": "x"}'])
def test_a_damaged_file_beside_a_tokenizer_is_named(tmp_path, content):
  (tmp_path / 'tokenizer.json').write_bytes(vocabularies.llama_json())
  (tmp_path / 'generation_config.json').write_text(content)
  with pytest.raises(CheckpointError, match=r'generation_config.json(: eos_token_id)? is '):
    open_settings(str(tmp_path / 'tokenizer.json'))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'kind': 'x'}, 'form of the text settings'),
    ({'extra': 1}, 'form of the text settings'),
    ({'files': ['../x']}, 'files of the vocabulary'),
    ({'bos_id': 'x'}, 'must be ids'),
    ({'bos_id': True}, 'must be ids'),
    ({'end_ids': 5}, 'must be ids'),
    ({'end_ids': [600]}, 'outside the vocabulary of 600 rows'),
    ({'bos_id': -1}, 'outside the vocabulary'),
    ({'chat_template': 5}, 'chat template is not a text'),
    ({'generation_defaults': {'temperature': float('nan')}}, 'generation_defaults must be'),
    ({'generation_defaults': {'temperature': 'x'}}, 'generation_defaults must be'),
    ({'generation_defaults': {'other': 1}}, 'generation_defaults must be'),
    ({'generation_defaults': []}, 'generation_defaults must be'),
    ({'name': 5}, 'name of the vocabulary'),
  ],
)
def test_a_damaged_section_on_text_is_one_sentence(change, message):
  fields = {**TextSettings('bytes').to_dict(), **change}
  with pytest.raises(ValueError, match=re.escape(message)):
    TextSettings.from_dict(fields, 600, 'here', lambda name: b'')
