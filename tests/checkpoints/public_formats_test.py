"""Directories of safetensors and GGUF files: their values, by any slices, and their conversion."""

import json
import re
import shutil

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import convert, open_checkpoint
from t5x_inference_ext.checkpoints.conversion.verify import verify
from t5x_inference_ext.checkpoints.readers.ggml_blocks import BLOCK_TYPES
from t5x_inference_ext.checkpoints.readers.gguf import read_gguf
from t5x_inference_ext.checkpoints.readers.safetensors import read_safetensors
from t5x_inference_ext.checkpoints.readers.stored_bytes import StoredBytes
from t5x_inference_ext.errors import CheckpointError
from tests.checkpoints import gguf_families, public_files

FAMILIES = (
  'bloom',
  'codegen',
  'cohere',
  'cohere2',
  'cohere_qk_norm',
  'falcon_40b',
  'falcon_7b',
  'falcon_rw',
  'gemma',
  'gemma2',
  'gemma3',
  'gpt2',
  'gpt_bigcode',
  'gpt_neox',
  'gpt_neox_serial',
  'gptj',
  'llama31',
  'llama_untied',
  'mistral_window',
  'mpt',
  'olmo',
  'olmo2',
  'opt',
  'phi',
  'qwen2',
  'qwen3',
  'smollm2',
  'stablelm',
  'stablelm_parallel',
)


@pytest.fixture(scope='session')
def families(testdata):
  return testdata / 'families'


def rectangles(shape, rng):
  """Yield some random slices of a shape."""
  for _ in range(4):
    bounds = [sorted(rng.integers(0, n + 1, 2)) for n in shape]
    yield tuple(slice(int(b), int(e)) for b, e in bounds)


def test_the_fixtures_are_these(families):
  assert sorted(path.name for path in families.iterdir()) == sorted(FAMILIES)


@pytest.mark.parametrize('family', FAMILIES)
def test_any_slice_is_a_slice_of_the_whole(families, family):
  checkpoint = open_checkpoint(families / family)
  declared = params.parameters(checkpoint.config)
  assert checkpoint.format == 'safetensors' and list(checkpoint.tensors) == list(declared)
  rng = np.random.default_rng(0)
  for name, tensor in checkpoint.tensors.items():
    whole = tensor.read()
    assert whole.shape == tensor.shape == declared[name].shape and whole.dtype == tensor.dtype
    assert np.isfinite(whole.astype(np.float32)).all()
    for index in rectangles(tensor.shape, rng):
      np.testing.assert_array_equal(tensor.read(index), whole[index], strict=True, err_msg=name)


@pytest.mark.parametrize('family', FAMILIES)
def test_conversion_writes_the_canonical_values(families, tmp_path, family):
  """Slices so small that they cut layers, heads and fused matrices."""
  source = open_checkpoint(families / family)
  convert.convert(
    str(families / family), str(tmp_path / 'out'), weights='bfloat16', slice_bytes=4096, workers=2
  )
  written = open_checkpoint(tmp_path / 'out')
  assert written.config == source.config
  for name, tensor in source.tensors.items():
    found = written.tensors[name].read()
    np.testing.assert_array_equal(found, tensor.read().astype(found.dtype), err_msg=name)


@pytest.mark.parametrize('family', ['falcon_40b', 'gpt2', 'gemma2', 'codegen'])
def test_int8_is_the_source_rounded_and_verifies(families, tmp_path, family):
  convert.convert(str(families / family), str(tmp_path / 'out'), weights='int8', workers=2)
  source, written = open_checkpoint(families / family), open_checkpoint(tmp_path / 'out')
  declared = params.parameters(source.config)
  checked = 0
  for name, p in declared.items():
    if p.kind == 'matrix':
      scale = written.tensors[p.scale].read()[:, None]
      wanted = source.tensors[name].read().astype(np.float32)
      assert np.all(np.abs(written.tensors[name].read() * scale - wanted) <= scale * 0.501)
      checked += 1
  assert checked >= 6
  lines = verify(str(tmp_path / 'out'), str(families / family))
  assert str(families / family) in lines[-1]


def test_files_in_shards(families, tmp_path):
  """Three files and an index give what one file does."""
  arrays = public_files.read_safetensors(families / 'smollm2' / 'model.safetensors')
  shutil.copy(families / 'smollm2' / 'config.json', tmp_path)
  names, index = list(arrays), {}
  for i in range(3):
    file = f'model-{i + 1:05}-of-00003.safetensors'
    public_files.write_safetensors(tmp_path / file, {n: arrays[n] for n in names[i::3]})
    index |= dict.fromkeys(names[i::3], file)
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))
  one, three = open_checkpoint(families / 'smollm2'), open_checkpoint(tmp_path)
  assert three.config == one.config and three.index_crc32 != one.index_crc32
  for name, tensor in one.tensors.items():
    np.testing.assert_array_equal(three.tensors[name].read(), tensor.read(), err_msg=name)
  by_file = open_checkpoint(tmp_path / 'model.safetensors.index.json')
  assert by_file.config == one.config


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_other_dtypes(families, tmp_path, dtype):
  arrays = public_files.read_safetensors(families / 'cohere' / 'model.safetensors')
  shutil.copy(families / 'cohere' / 'config.json', tmp_path)
  changed = {name: values.astype(dtype) for name, values in arrays.items()}
  public_files.write_safetensors(tmp_path / 'model.safetensors', changed)
  found, one = open_checkpoint(tmp_path), open_checkpoint(families / 'cohere')
  assert (found.weights, one.weights) == ('float32', 'bfloat16')
  for name, tensor in one.tensors.items():
    wanted = tensor.read().astype(np.float32)
    np.testing.assert_allclose(found.tensors[name].read(), wanted, rtol=1e-3, atol=1e-7)


def test_names_without_their_prefix(families, tmp_path):
  """GPT-2's first files have no `transformer.` in front, and hold masks."""
  arrays = public_files.read_safetensors(families / 'gpt2' / 'model.safetensors')
  shutil.copy(families / 'gpt2' / 'config.json', tmp_path)
  short = {name.removeprefix('transformer.'): values for name, values in arrays.items()}
  short['h.0.attn.bias'] = np.ones((1, 1, 4, 4), bool)
  public_files.write_safetensors(tmp_path / 'model.safetensors', short)
  found, one = open_checkpoint(tmp_path), open_checkpoint(families / 'gpt2')
  for name, tensor in one.tensors.items():
    np.testing.assert_array_equal(found.tensors[name].read(), tensor.read(), err_msg=name)


def test_ids_of_text(families, tmp_path):
  shutil.copytree(families / 'smollm2', tmp_path / 'm')
  text = open_checkpoint(tmp_path / 'm').text
  assert str(text) == (
    'none (no tokenizer.json or tokenizer.model is beside the model), no BOS, rows end with 2'
  )
  file = tmp_path / 'm' / 'generation_config.json'
  file.write_text(json.dumps({'bos_token_id': None, 'eos_token_id': [7, 9, 131]}))
  (tmp_path / 'm' / 'tokenizer_config.json').write_text(json.dumps({'add_bos_token': True}))
  text = open_checkpoint(tmp_path / 'm').text
  assert (text.bos_id, text.end_ids) == (1, (7, 9))  # the model has no row 131
  config = {
    'add_bos_token': True,
    'bos_token': {'content': '<s>'},
    'added_tokens_decoder': {'x': {'content': '<s>'}, '4': {'content': '<s>'}, '5': 7},
    'chat_template': 'x',
  }
  (tmp_path / 'm' / 'tokenizer_config.json').write_text(json.dumps(config))
  text = open_checkpoint(tmp_path / 'm').text
  assert (text.bos_id, text.end_ids, text.chat_template) == (4, (7, 9), 'x')


@pytest.mark.parametrize('kind', BLOCK_TYPES)
def test_blocks_are_dequantized_as_ggml_does(tmp_path, kind):
  """Random bytes, and any slices of them."""
  block, rng = BLOCK_TYPES[kind], np.random.default_rng(1)
  data = rng.integers(0, 256, (3, 5, 2 * block.nbytes), dtype=np.uint8)
  scales = np.array([0, 2]) if kind != 'Q6_K' else np.array([208])
  for row in data.reshape(-1, block.nbytes):  # no NaN
    row[scales + 1] &= 0xBF
  shape = (3, 5, 2 * block.values)
  path = public_files.write_gguf(
    tmp_path / 'x.gguf', {'a': 1}, {'t': data}, types={'t': kind}, shapes={'t': shape}
  )
  _, tensors, types = read_gguf(str(path))
  wanted = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
  assert types == {'t': kind} and tensors['t'].shape == wanted.shape == shape
  np.testing.assert_array_equal(tensors['t'].read(), wanted, strict=True)
  for index in rectangles(shape, rng):
    np.testing.assert_array_equal(tensors['t'].read(index), wanted[index])


@pytest.mark.parametrize('family', gguf_families.ARCHITECTURES)
def test_gguf_gives_the_same_model(families, tmp_path, family):
  metadata, arrays = gguf_families.converted(families / family)
  path = public_files.write_gguf(tmp_path / 'model.gguf', metadata, arrays)
  found, wanted = open_checkpoint(path), open_checkpoint(families / family)
  assert found.format == 'gguf' and found.weights == 'float32'
  tied = 'output.weight' not in arrays  # some architectures' files repeat a tied head
  config = {**wanted.config.to_dict(), **({} if tied else {'tied_head': False})}
  if family == 'llama31':  # of its four frequencies, several lengths scale the same ones
    config['rope_original_length'] = 128
  assert found.config.to_dict() == config
  tensors = dict(found.tensors)
  if wanted.config.tied_head and not tied:
    np.testing.assert_array_equal(tensors.pop('head').read(), wanted.tensors['embedding'].read())
  assert list(tensors) == list(wanted.tensors)
  for name, tensor in wanted.tensors.items():
    np.testing.assert_array_equal(
      tensors[name].read(), tensor.read().astype(np.float32), err_msg=name
    )


def test_gguf_metadata_are_read_as_written(tmp_path):
  written = {'a': 1, 'b': 1e-5, 'c': True, 'd': 'text', 'e': ['x', '\u2581y'], 'f': [1.5, 2.5]}
  path = public_files.write_gguf(tmp_path / 'x.gguf', written, {'t': np.zeros((2, 3), np.float32)})
  header, _, _ = read_gguf(str(path))
  numbers = header.metadata.pop('f')
  assert header.metadata == {k: v for k, v in written.items() if k != 'f'}
  np.testing.assert_array_equal(numbers, written['f'])
  fields = gguf.GGUFReader(path).fields
  assert fields['b'].contents() == pytest.approx(1e-5) and fields['e'].contents() == written['e']


def test_gguf_text(tmp_path, families):
  metadata, arrays = gguf_families.converted(families / 'smollm2')
  metadata |= {
    'tokenizer.ggml.tokens': ['a', 'b'],
    'tokenizer.ggml.bos_token_id': 5,
    'tokenizer.ggml.eos_token_id': 6,
    'tokenizer.ggml.eot_token_id': 7,
  }
  path = public_files.write_gguf(tmp_path / 'model.gguf', metadata, arrays)
  text = open_checkpoint(path).text
  assert text.kind == 'tokenizer.json' and text.vocabulary.size == 2
  assert (text.bos_id, text.end_ids) == (None, (6, 7))
  assert open_checkpoint(tmp_path).path == str(path)  # the only one in its directory


@pytest.mark.parametrize(
  ('changes', 'reason'),
  [
    ({}, 'the file has no tokenizer.ggml.tokens'),
    ({'ggml.tokens': ['a', 'a']}, 'holds the token "a" twice'),
    ({'ggml.tokens': 'a'}, 'tokenizer.ggml.tokens is a, not of the expected type'),
    ({'ggml.tokens': ['a'], 'ggml.token_type': ['1']}, 'token_type is .* not of the expected type'),
    ({'ggml.tokens': ['a'], 'ggml.model': 5}, 'ggml.model is 5, not of the expected type'),
    ({'ggml.tokens': ['a'], 'ggml.model': 'bert'}, 'of the model "bert", which is not known'),
    ({'ggml.tokens': list(map(str, range(132)))}, 'has 132 ids and the model 131 rows'),
  ],
)
def test_a_gguf_vocabulary_that_cannot_be_used(tmp_path, families, changes, reason):
  """The model takes ids; its end tokens and its chat template stay."""
  metadata, arrays = gguf_families.converted(families / 'smollm2')
  more = {'ggml.bos_token_id': 5, 'ggml.eos_token_id': 6, 'chat_template': 'x', **changes}
  metadata |= {f'tokenizer.{name}': value for name, value in more.items()}
  path = public_files.write_gguf(tmp_path / 'model.gguf', metadata, arrays)
  text = open_checkpoint(path).text
  assert (text.kind, text.vocabulary, text.chat_template) == ('none', None, 'x')
  assert (text.bos_id, text.end_ids) == (None, (6,)) and re.search(reason, text.source)
  path = public_files.write_gguf(path, {**metadata, 'tokenizer.ggml.add_bos_token': True}, arrays)
  assert open_checkpoint(path).bos_id == 5


def test_a_gguf_chat_template_that_is_no_text(tmp_path, families):
  metadata, arrays = gguf_families.converted(families / 'smollm2')
  metadata |= {'tokenizer.chat_template': 5}
  path = public_files.write_gguf(tmp_path / 'model.gguf', metadata, arrays)
  with pytest.raises(CheckpointError, match='model.gguf: tokenizer.chat_template is not text'):
    open_checkpoint(path)


def test_only_the_bytes_asked_for_are_read(families, monkeypatch):
  """A slice of a few columns of one layer reads these rows, not the matrix or other layers."""
  checkpoint = open_checkpoint(families / 'llama_untied')
  read = []
  into = StoredBytes.read_into
  monkeypatch.setattr(
    StoredBytes, 'read_into', lambda self, b, out: (read.append(out.nbytes), into(self, b, out))
  )
  checkpoint.tensors['linear'].read((slice(1, 2), slice(None), slice(5, 9)))
  assert sum(read) == 4 * checkpoint.config.d_model * 2 and len(read) == 1
  read.clear()
  checkpoint.tensors['linear'].read((slice(0, 2), slice(8, 24), slice(0, 3)))
  assert sum(read) == 2 * 16 * 3 * 2


def test_arguments_can_only_agree(families):
  config = open_checkpoint(families / 'smollm2').config
  assert open_checkpoint(families / 'smollm2', config=config, norm_scale='one').config == config
  for arguments in (
    {'norm_scale': 'zero'},
    {'rescale_logits': False},
    {'config': type(config)(**{**vars(config), 'rope_max_timescale': 7.0})},
  ):
    with pytest.raises(CheckpointError, match='smollm2'):
      open_checkpoint(families / 'smollm2', **arguments)


def test_headers_of_safetensors_are_read_as_the_library_does(families):
  stored, _ = read_safetensors(str(families / 'mpt'))
  found = safetensors.numpy.load_file(families / 'mpt' / 'model.safetensors')
  assert set(found) == set(stored) and len(stored) > 10
  for name, values in found.items():
    assert values.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(stored[name].read(), values)
