"""What a serving checkpoint carries about text, and what its header's checksum notices."""

import json
import random
import shutil

import pytest

from t5x_inference_ext.checkpoints import convert, open_checkpoint
from t5x_inference_ext.checkpoints.conversion.verify import verify
from t5x_inference_ext.commands import convert_checkpoint, inspect_checkpoint
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError, RequestError, UserError
from tests.checkpoints import synthetic
from tests.text import vocabularies

CONFIG = ModelConfig(**{**synthetic.CONFIG.to_dict(), 'vocab_size': 600})


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A T5X checkpoint of 600 rows, with vocabularies beside it."""
  root = tmp_path_factory.mktemp('text')
  (root / 'tokenizer.json').write_bytes(vocabularies.llama_json())
  config = {'chat_template': '{{ messages[0].content }}', 'eos_token': '</s>'}
  (root / 'tokenizer_config.json').write_text(json.dumps(config))
  defaults = {'do_sample': True, 'temperature': 0.6, 'top_p': 0.9}
  (root / 'generation_config.json').write_text(json.dumps(defaults))
  (root / 'words.model').write_bytes(vocabularies.sentencepiece_model())
  leaves = synthetic.fused(synthetic.canonical(CONFIG), CONFIG)
  synthetic.write_legacy(root / 'source', leaves)
  return root


@pytest.fixture(scope='module')
def finished(source):
  """A serving checkpoint with a tokenizer.json, not to be changed."""
  path = source / 'finished'
  convert.convert(source / 'source', path, vocabulary=str(source / 'tokenizer.json'))
  return path


@pytest.fixture
def copy(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / 'copy')


def test_a_tokenizer_travels_with_all_that_goes_with_it(finished):
  checkpoint = open_checkpoint(finished)
  ids = checkpoint.vocabulary.encode('the License')
  assert ids == vocabularies.of_kind('llama').encode('the License')
  assert checkpoint.vocabulary.decode(ids) == 'the License'
  # BOS is the model's: T5X begins rows with 0, whatever the tokenizer would do.
  assert (checkpoint.bos_id, checkpoint.end_ids) == (0, (2,))
  assert checkpoint.chat_template.render([{'role': 'user', 'content': 'hi'}]) == 'hi'
  assert checkpoint.text.generation_defaults == {'temperature': 0.6, 'top_p': 0.9}
  assert (finished / 'tokenizer.json').read_bytes() == vocabularies.llama_json()
  assert len(verify(finished, finished.parent / 'source')) == 2


def test_a_sentencepiece_model_travels(source):
  convert.convert(source / 'source', source / 'words', vocabulary=str(source / 'words.model'))
  checkpoint = open_checkpoint(source / 'words')
  assert checkpoint.vocabulary.encode('the') == vocabularies.of_kind('sentencepiece').encode('the')
  assert (checkpoint.bos_id, checkpoint.end_ids, checkpoint.chat_template) == (0, (2,), None)


def test_bytes_are_recorded_and_what_is_not_known_is_not(source, finished, tmp_path):
  convert.convert(source / 'source', tmp_path / 'bytes', vocabulary='bytes')
  assert open_checkpoint(tmp_path / 'bytes').text.source == 'recorded'
  convert.convert(source / 'source', tmp_path / 'none')
  checkpoint = open_checkpoint(tmp_path / 'none')
  assert (checkpoint.vocabulary, checkpoint.bos_id, checkpoint.end_ids) == (None, 0, (1,))
  assert checkpoint.chat_template is None and checkpoint.text.generation_defaults == {}
  # A serving checkpoint as the source keeps its own, and another replaces it.
  convert.convert(finished, tmp_path / 'again')
  assert open_checkpoint(tmp_path / 'again').vocabulary.kind == 'tokenizer.json'
  convert.convert(finished, tmp_path / 'other', vocabulary='bytes')
  assert open_checkpoint(tmp_path / 'other').vocabulary.kind == 'bytes'


def test_bytes_are_assumed_for_384_rows_and_recorded_as_assumed(palm_tiny, tmp_path):
  assert open_checkpoint(palm_tiny).text.source == 'assumed from 384 rows'
  convert.convert(palm_tiny, tmp_path / 'out')
  text = open_checkpoint(tmp_path / 'out').text
  assert (text.kind, text.source) == ('bytes', 'assumed from 384 rows')
  # A checkpoint of version 1 has no section on text.
  synthetic.rewrite_header(tmp_path / 'out', lambda h: (h.pop('text'), h.update(version=1)))
  assert open_checkpoint(tmp_path / 'out').text.source == 'assumed from 384 rows'


def test_a_public_model_without_a_tokenizer_keeps_its_end_ids(testdata, tmp_path):
  """Converted, converted again, and in the first headers of version 2, which lost them."""
  family = testdata / 'families' / 'smollm2'
  for source, name in ((family, 'out'), (tmp_path / 'out', 'again')):
    convert.convert(source, tmp_path / name, weights='bfloat16')
    checkpoint = open_checkpoint(tmp_path / name)
    assert (checkpoint.vocabulary, checkpoint.bos_id, checkpoint.end_ids) == (None, None, (2,))
    assert checkpoint.text == open_checkpoint(family).text
  synthetic.rewrite_header(tmp_path / 'out', lambda h: h.update(text=None))
  text = open_checkpoint(tmp_path / 'out').text
  assert (text.kind, text.bos_id, text.end_ids) == ('none', None, ())
  assert 'convert again' in str(text)


def test_a_tokenizer_that_cannot_be_used_leaves_ids(testdata, tmp_path):
  shutil.copytree(testdata / 'families' / 'smollm2', tmp_path / 'm')
  (tmp_path / 'm' / 'tokenizer.json').write_bytes(vocabularies.llama_json()[:-1])
  text = open_checkpoint(tmp_path / 'm').text
  assert (text.kind, text.bos_id, text.end_ids) == ('none', None, (2,))
  assert 'tokenizer.json that can be used' in text.source
  (tmp_path / 'm' / 'tokenizer.json').write_bytes(vocabularies.llama_json())
  assert 'has 500 ids and the model 131 rows' in open_checkpoint(tmp_path / 'm').text.source
  (tmp_path / 'm' / 'tokenizer_config.json').write_text('{')
  with pytest.raises(CheckpointError, match='m/tokenizer_config.json is damaged'):
    open_checkpoint(tmp_path / 'm')


def test_the_first_headers_of_t5x_checkpoints(source, tmp_path):
  """Null stood for T5X's BOS and EOS."""
  convert.convert(source / 'source', tmp_path / 'out')
  synthetic.rewrite_header(tmp_path / 'out', lambda h: h.update(text=None))
  checkpoint = open_checkpoint(tmp_path / 'out')
  assert (checkpoint.vocabulary, checkpoint.bos_id, checkpoint.end_ids) == (None, 0, (1,))


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('nothing.model', 'no vocabulary at'),
    ('tokenizer_config.json', 'is not a tokenizer.json that can be used'),
  ],
)
def test_a_wrong_vocabulary_is_refused_before_the_work(source, tmp_path, name, message):
  with pytest.raises(RequestError, match=message):
    convert.convert(source / 'source', tmp_path / 'out', vocabulary=str(source / name))
  assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_beyond_the_model_and_t5x_formats_are_refused(source, tmp_path):
  small = synthetic.write_legacy(tmp_path / 'small', synthetic.fused(synthetic.canonical()))
  with pytest.raises(RequestError, match='has 500 ids and the model 12 rows'):
    convert.convert(small, tmp_path / 'out', vocabulary=str(source / 'tokenizer.json'))
  with pytest.raises(UserError, match="T5X's format holds no vocabulary"):
    convert.convert(small, tmp_path / 'out', format='t5x_int8', vocabulary='bytes')


def test_commands_take_and_print_it(source, tmp_path, capsys):
  flags = (f'--input={source}/source', f'--output={tmp_path}/out', '--weights=int8')
  vocabulary = f'--vocabulary={source}/tokenizer.json'
  assert convert_checkpoint.run(['convert', *flags, vocabulary]) == 0
  line = '500 ids, BOS 0, rows end with 2, a chat template, temperature 0.6, top_p 0.9'
  assert f'vocabulary: tokenizer.json (given), {line}' in capsys.readouterr().out
  assert inspect_checkpoint.run(['inspect', str(tmp_path / 'out')]) == 0
  assert f'vocabulary: tokenizer.json (recorded), {line}' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (lambda path: path.unlink(), 'tokenizer.json is missing'),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), 'tokenizer.json is damaged'),
    (lambda path: path.write_bytes(b''), 'tokenizer.json is damaged'),
  ],
)
def test_a_damaged_vocabulary_is_refused(copy, damage, message):
  damage(copy / 'tokenizer.json')
  with pytest.raises(CheckpointError, match=message):
    open_checkpoint(copy)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda h: h['text'].update(bos_id='x'), 'must be ids'),
    (lambda h: h['text'].update(files=['../source/checkpoint']), 'files of the vocabulary'),
    (lambda h: h.pop('files'), 'tokenizer.json is damaged'),
    (lambda h: h['text'].pop('kind'), 'form of the text settings'),
  ],
)
def test_a_section_that_was_written_wrongly_is_one_sentence(copy, change, message):
  synthetic.rewrite_header(copy, change)
  with pytest.raises(CheckpointError, match=message):
    open_checkpoint(copy)


@pytest.mark.parametrize(
  ('old', 'new'), [('10000.0', '90000.0'), ('"bos_id": 0', '"bos_id": 3'), ('"crc32"', '"crc33"')]
)
def test_a_header_that_was_edited_is_refused(copy, old, new):
  path = copy / 'serving_config.json'
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new))
  with pytest.raises(CheckpointError, match='serving_config.json has changed since it was written'):
    open_checkpoint(copy)


def test_no_flipped_bit_of_the_header_opens_as_another_model(copy):
  path, chance = copy / 'serving_config.json', random.Random(5)
  data, checkpoint = path.read_bytes(), open_checkpoint(copy)
  for _ in range(300):
    place = chance.randrange(8 * len(data))
    damaged = bytearray(data)
    damaged[place // 8] ^= 1 << place % 8
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError):
      opened = open_checkpoint(copy)
      pytest.fail(f'bit {place} opens, model equal: {opened.config == checkpoint.config}')
