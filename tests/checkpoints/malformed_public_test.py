"""Public models that can't be read: each is one sentence that names the file, and no output."""

import json
import pathlib
import struct

import numpy as np
import pytest

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.commands import convert_checkpoint
from t5x_inference_ext.errors import CheckpointError
from tests.checkpoints import gguf_families, public_files

FAMILIES = pathlib.Path(__file__).resolve().parent.parent / 'testdata' / 'families'
ARRAYS = public_files.read_safetensors(FAMILIES / 'smollm2' / 'model.safetensors')
CONFIG = json.loads((FAMILIES / 'smollm2' / 'config.json').read_text())
NORM = 'model.norm.weight'
GATE = 'model.layers.1.mlp.gate_proj.weight'


def model(path, *, config=None, arrays=None, header=None, data=None):
  """Write a directory; the arguments replace its sound parts."""
  path.mkdir(exist_ok=True)
  content = CONFIG if config is None else config
  text = content if isinstance(content, bytes) else json.dumps(content).encode()
  (path / 'config.json').write_bytes(text)
  file = path / 'model.safetensors'
  public_files.write_safetensors(file, ARRAYS if arrays is None else arrays, header)
  if data is not None:
    file.write_bytes(data(file.read_bytes()))
  return path


def with_config(**changes):
  return lambda path: model(path, config={**CONFIG, **changes})


def without(*names):
  config = {k: v for k, v in CONFIG.items() if k not in names}
  return lambda path: model(path, config=config)


def with_entry(name=NORM, **changes):
  header = public_files.safetensors_header(ARRAYS)
  header[name] = {**header[name], **changes}
  return lambda path: model(path, header=header)


def with_arrays(**changes):
  arrays = {**ARRAYS, **{name.replace('__', '.'): x for name, x in changes.items()}}
  arrays = {name: values for name, values in arrays.items() if values is not None}
  return lambda path: model(path, arrays=arrays)


def with_data(change):
  return lambda path: model(path, data=change)


def with_header(text):
  return lambda path: model(path, header=text)


def shifted(by, data=None):
  header = public_files.safetensors_header(ARRAYS)
  begin, end = header[NORM]['data_offsets']
  header[NORM]['data_offsets'] = [begin + by, end + by]
  return lambda path: model(path, header=header, data=data)


def sharded(index, **files):
  def source(path):
    model(path)
    (path / 'model.safetensors').unlink()
    for name, arrays in files.items():
      public_files.write_safetensors(path / f'{name}.safetensors', arrays)
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    (path / 'model.safetensors.index.json').write_bytes(text)
    return path

  return source


def only_file(name, data=b'x'):
  def source(path):
    path.mkdir()
    (path / 'config.json').write_text(json.dumps(CONFIG))
    (path / name).write_bytes(data)
    return path

  return source


ALL = dict.fromkeys(ARRAYS, 'a.safetensors')
SAFETENSORS = {
  'empty file': (with_data(lambda data: b''), 'bytes'),
  'file of 7 bytes': (with_data(lambda data: data[:7]), '7 bytes'),
  'header length beyond the file': (
    with_data(lambda data: struct.pack('<Q', len(data)) + data[8:]),
    'cut off',
  ),
  'header length 2**63': (with_data(lambda data: struct.pack('<Q', 2**63) + data[8:]), 'cut off'),
  'header length 0': (with_data(lambda data: struct.pack('<Q', 0) + data[8:]), 'damaged'),
  'header no JSON': (with_header(b'{"a": '), 'damaged'),
  'header no UTF-8': (with_header(b'{"\xff": 1}'), 'damaged'),
  'header a list': (with_header(b'[]'), 'not a JSON object'),
  'header nested 100,000 deep': (with_header(b'[' * 100_000), 'nested too deeply'),
  'header with a number of 5000 digits': (with_header(b'{"a": ' + b'9' * 5000 + b'}'), 'damaged'),
  'name twice': (with_header(b'{"a": {}, "a": {}}'), "'a' is given twice"),
  'entry no object': (with_header(b'{"a": 5}'), 'not an object'),
  'entry without dtype': (with_entry(dtype=None), 'unknown dtype'),
  'unknown dtype': (with_entry(dtype='F4'), 'unknown dtype F4'),
  'dtype with an escape': (with_entry(dtype='\x1b[31m\nerror: fake'), '\\x1b'),
  'shape negative': (with_entry(shape=[-48]), 'shape'),
  'shape true': (with_entry(shape=[True]), 'shape'),
  'shape of fractions': (with_entry(shape=[4.8e1]), 'shape'),
  'shape with huge sizes': (with_entry(shape=[2**62, 2**62]), 'takes'),
  'shape of another size': (with_entry(shape=[47]), 'takes 94 bytes'),
  "shape that is not the model's": (with_entry(shape=[6, 8]), '[6, 8]'),
  'offsets backwards': (with_entry(data_offsets=[96, 0]), 'data_offsets'),
  'offsets of strings': (with_entry(data_offsets=['0', '96']), 'data_offsets'),
  'offsets beyond the file': (shifted(2**40), 'cut off'),
  'offsets that overlap': (shifted(-2), 'overlap'),
  'bytes of no array': (shifted(2, lambda data: data + b'12'), 'belong to no array'),
  'file cut off': (with_data(lambda data: data[:-5]), 'cut off'),
  'file too long': (with_data(lambda data: data + b'1234'), 'damaged'),
  'tensor missing': (with_arrays(**{GATE.replace('.', '__'): None}), GATE),
  'tensor too many': (
    with_arrays(model__layers__0__self_attn__sinks=np.zeros(6, np.float32)),
    'self_attn.sinks',
  ),
  'name with an escape': (with_arrays(**{'\x1b]0;\n': np.zeros(1, np.float32)}), '\\x1b'),
  'tensor of integers': (with_arrays(model__norm__weight=np.zeros(48, np.int64)), 'int64'),
  'NaN': (
    with_arrays(model__norm__weight=np.full(48, np.nan, np.float32)),
    'NaN or infinite values',
  ),
  'no config.json': (
    lambda path: [model(path), (path / 'config.json').unlink()][0],
    'no config.json',
  ),
  'config.json no JSON': (lambda path: model(path, config=b'{'), 'config.json is damaged'),
  'config.json a list': (lambda path: model(path, config=b'[1]'), 'not a JSON object'),
  'config.json nested': (lambda path: model(path, config=b'[' * 5000), 'nested too deeply'),
  'no model_type': (without('model_type'), 'model_type'),
  'unknown family': (with_config(model_type='llama9'), 'the nearest is llama'),
  'family with an escape': (with_config(model_type='\x1b[2J'), '\\x1b'),
  'family no name': (with_config(model_type=['llama']), 'not a known family'),
  'unknown activation': (with_config(hidden_act='xielu'), 'hidden_act is xielu'),
  'unknown rotary scaling': (
    with_config(rope_parameters={'rope_type': 'yarn', 'factor': 4.0}),
    'rope_type is yarn',
  ),
  'rotary scaling without its factor': (
    with_config(rope_parameters={'rope_type': 'linear'}),
    'lacks factor',
  ),
  'quantization': (with_config(quantization_config={'quant_method': 'awq'}), 'quantization_config'),
  'experts': (with_config(num_local_experts=8), 'num_local_experts is 8'),
  'multiplier': (with_config(residual_multiplier=0.22), 'residual_multiplier is 0.22'),
  'layers missing': (without('num_hidden_layers'), 'lacks num_hidden_layers'),
  'layers huge': (with_config(num_hidden_layers=2**30), 'num_hidden_layers'),
  'layers more than stored': (with_config(num_hidden_layers=9000), 'model.layers.3.'),
  'layers fewer than stored': (with_config(num_hidden_layers=2), 'model.layers.2.'),
  'layers a fraction': (with_config(num_hidden_layers=3.0), 'whole number'),
  'heads huge': (with_config(num_attention_heads=2**30, head_dim=8), 'shape'),
  'heads of 5000 digits': (with_config(num_attention_heads=10**4000), 'whole number'),
  'heads no multiple': (with_config(num_key_value_heads=4), 'num_kv_heads'),
  'epsilon NaN': (with_config(rms_norm_eps=float('nan')), 'rms_norm_eps'),
  'epsilon beyond float32': (with_config(rms_norm_eps=1e39), 'in the range of float32'),
  'epsilon almost 0': (with_config(rms_norm_eps=1e-60), 'in the range of float32'),
  'epsilon text': (with_config(rms_norm_eps='1e-5'), 'rms_norm_eps'),
  'base negative': (with_config(rope_parameters={'rope_theta': -5.0}), 'rope_theta'),
  'tied a number': (with_config(tie_word_embeddings=1), 'tie_word_embeddings'),
  'untied without its head': (with_config(tie_word_embeddings=False), 'lm_head.weight'),
  'vocabulary of another size': (with_config(vocab_size=132), '[132, 48]'),
  'EOS no id': (with_config(eos_token_id='</s>'), 'eos_token_id'),
  'EOS negative': (with_config(eos_token_id=[2, -1]), 'eos_token_id'),
  'index no JSON': (sharded(b'{'), 'index.json is damaged'),
  'index without a map': (sharded({'metadata': {}}), 'weight_map'),
  'index with an empty map': (sharded({'weight_map': {}}), 'weight_map'),
  'shard missing': (sharded({'weight_map': ALL}), 'lacks a.safetensors'),
  'shard that climbs out': (
    sharded({'weight_map': {NORM: '../a.safetensors'}}),
    '../a.safetensors',
  ),
  'shard with a whole path': (sharded({'weight_map': {NORM: '/etc/passwd'}}), '/etc/passwd'),
  'shard no name': (sharded({'weight_map': {NORM: 5}}), 'not a name'),
  'shard with a zero byte': (sharded({'weight_map': {NORM: 'a\0b'}}), 'not a name'),
  'shard without its tensor': (
    sharded({'weight_map': ALL}, a={n: x for n, x in ARRAYS.items() if n != NORM}),
    f'lacks {NORM}',
  ),
  'shard with more': (
    sharded({'weight_map': ALL}, a={**ARRAYS, 'b': np.zeros(1, np.float32)}),
    'does not place there',
  ),
  'pickle': (only_file('pytorch_model.bin'), 'pickles'),
  'pickles': (only_file('pytorch_model.bin.index.json'), 'save_pretrained'),
  'pickle of torch': (only_file('consolidated.00.pth'), 'pickles'),
  'safetensors of another name': (only_file('adapter_model.safetensors'), 'neither'),
  'two GGUF files': (
    lambda path: [only_file('a.gguf')(path), (path / 'b.gguf').touch()][0],
    'name the one you mean',
  ),
}


METADATA, TENSORS = gguf_families.converted(FAMILIES / 'smollm2')
BLOCKS = np.zeros((2, 18), np.uint8)


def gguf_file(*, metadata=None, arrays=None, data=None, **options):
  """Write a file; the arguments replace its sound parts, and `data` changes its bytes."""

  def source(path):
    path = path.with_suffix('.gguf')
    public_files.write_gguf(
      path,
      METADATA if metadata is None else metadata,
      TENSORS if arrays is None else arrays,
      **options,
    )
    if data is not None:
      path.write_bytes(data(path.read_bytes()))
    return path

  return source


def with_key(**changes):
  merged = {**METADATA, **{k.replace('__', '.'): v for k, v in changes.items()}}
  return gguf_file(metadata={k: v for k, v in merged.items() if v is not None})


def with_bytes(keys, more_keys=1):
  return gguf_file(keys=keys, more_keys=more_keys)


def array_of(kind, count):
  return public_files.gguf_string('k') + struct.pack('<IIQ', 9, kind, count)


NAME = 'blk.1.ffn_up.weight'
GGUF = {
  'empty file': (gguf_file(data=lambda data: b''), 'not a GGUF file'),
  'another magic': (gguf_file(data=lambda data: b'GGML' + data[4:]), 'not a GGUF file'),
  'only a magic': (gguf_file(data=lambda data: data[:4]), 'cut off'),
  'version 1': (gguf_file(version=1), 'version 1'),
  'big-endian': (gguf_file(version=0x03000000), 'big-endian'),
  'tensors beyond the file': (gguf_file(counts=(10**6, 1)), 'tensors'),
  'tensors 2**63': (gguf_file(counts=(2**63, 1)), 'tensors'),
  'keys 2**60': (gguf_file(counts=(1, 2**60)), 'keys'),
  'one tensor more': (gguf_file(counts=(len(TENSORS) + 1, len(METADATA))), 'cut off'),
  'header cut off': (gguf_file(data=lambda data: data[:300]), 'damaged'),
  'data cut off': (gguf_file(data=lambda data: data[:-4000]), 'cut off'),
  'key twice': (
    with_bytes(public_files.gguf_string('general.architecture') + public_files.gguf_value('llama')),
    'general.architecture twice',
  ),
  'key with an escape': (
    with_bytes(2 * (public_files.gguf_string('\x1b[31m') + public_files.gguf_value(1)), 2),
    '\\x1b',
  ),
  'string of 2**62 characters': (
    with_bytes(public_files.gguf_string('k') + struct.pack('<IQ', 8, 2**62)),
    'characters',
  ),
  'key of an unknown type': (
    with_bytes(public_files.gguf_string('k') + struct.pack('<I', 77)),
    'unknown type 77',
  ),
  'array of arrays': (with_bytes(array_of(9, 1)), 'unknown type 9'),
  'array of 2**61 numbers': (with_bytes(array_of(4, 2**61)), 'numbers'),
  'array of 2**61 strings': (with_bytes(array_of(8, 2**61)), 'strings'),
  'five axes': (gguf_file(shapes={NAME: (1, 1, 1, 104, 48)}), 'axes'),
  'an axis of 0': (gguf_file(shapes={NAME: (0, 48)}), 'sizes'),
  'axes of 2**62': (gguf_file(shapes={NAME: (2**62, 2**62)}), 'sizes'),
  'another shape': (gguf_file(shapes={NAME: (48, 104)}), '[48, 104]'),
  'offset beyond the file': (gguf_file(offsets={NAME: 2**40}), 'cut off'),
  'offset 2**63': (gguf_file(offsets={NAME: 2**63}), 'cut off'),
  'offset of another tensor': (gguf_file(offsets={NAME: 0}), 'overlap'),
  'offset between': (gguf_file(offsets={NAME: 4}), 'multiple'),
  'alignment 0': (with_key(general__alignment=0), 'alignment'),
  'alignment text': (with_key(general__alignment='32'), 'alignment'),
  'type 99': (gguf_file(types={NAME: 99}), 'number 99'),
  'type Q3_K': (gguf_file(types={NAME: 11}), 'Q3_K'),
  'rows that are no blocks': (
    gguf_file(arrays={**TENSORS, NAME: BLOCKS}, types={NAME: 'Q4_0'}, shapes={NAME: (2, 33)}),
    'no multiple of the 32',
  ),
  'blocks cut off': (
    gguf_file(arrays={**TENSORS, 'z': BLOCKS}, types={'z': 'Q8_0'}, shapes={'z': (64, 32)}),
    'cut off',
  ),
  'tensor missing': (
    gguf_file(arrays={n: x for n, x in TENSORS.items() if n != NAME}),
    f'lacks {NAME}',
  ),
  'tensor too many': (gguf_file(arrays={**TENSORS, 'z': BLOCKS.astype(np.float32)}), 'z'),
  'no embedding': (
    gguf_file(arrays={n: x for n, x in TENSORS.items() if n != 'token_embd.weight'}),
    'token_embd.weight',
  ),
  'unknown architecture': (with_key(general__architecture='llama4'), 'the nearest is llama'),
  'no architecture': (with_key(general__architecture=None), 'general.architecture'),
  'several files': (with_key(split__count=3), 'llama-gguf-split'),
  'experts': (with_key(llama__expert_count=8), 'num_local_experts'),
  'heads by layer': (with_key(**{'llama__attention.head_count': [6, 6, 6]}), 'num_attention_heads'),
  'yarn': (
    with_key(**{'llama__rope.scaling.type': 'yarn', 'llama__rope.scaling.factor': 4.0}),
    'yarn',
  ),
  'frequencies of their own': (
    gguf_file(arrays={**TENSORS, 'rope_freqs.weight': np.array([1, 2, 3, 9], np.float32)}),
    'rope_freqs.weight',
  ),
  'frequencies of another size': (
    gguf_file(arrays={**TENSORS, 'rope_freqs.weight': np.ones(7, np.float32)}),
    'rope_freqs.weight',
  ),
  'EOS no id': (with_key(**{'tokenizer__ggml.eos_token_id': 'x'}), 'eos_token_id'),
  'layers missing': (with_key(llama__block_count=None), 'num_hidden_layers'),
}
SOURCES = {
  **{f'safetensors: {name}': source for name, source in SAFETENSORS.items()},
  **{f'GGUF: {name}': source for name, source in GGUF.items()},
}


def test_there_are_enough():
  assert len(SAFETENSORS) >= 40 and len(GGUF) >= 40


@pytest.mark.parametrize('name', SOURCES)
def test_is_one_sentence(tmp_path, capsys, name):
  make, words = SOURCES[name]
  path = make(tmp_path / 'source')
  out = tmp_path / 'out'
  code = convert_checkpoint.run(
    ['convert', f'--input={path}', f'--output={out}', '--weights=int8', '--workers=1']
  )
  printed = capsys.readouterr()
  error = printed.err.strip()
  assert code == 2 and words in error, error
  assert str(path) in error and error.count('\n') == 0 and '\x1b' not in error
  assert len(error) < 1500 and 'Traceback' not in error
  assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_a_pickle_alone(tmp_path):
  file = tmp_path / 'model.pt'
  file.write_bytes(b'x')
  with pytest.raises(CheckpointError, match='is a pickle'):
    open_checkpoint(file)


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
  checkpoint = open_checkpoint(model(tmp_path / 'm'))
  file = tmp_path / 'm' / 'model.safetensors'
  with open(file, 'r+b') as f:
    f.truncate(9000)
  with pytest.raises(CheckpointError, match='ends at byte'):
    checkpoint.tensors['mlp_output'].read()
