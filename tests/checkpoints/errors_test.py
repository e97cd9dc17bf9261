"""What is wrong with a checkpoint is said in one sentence, naming the parameter and the file."""

import json
import os
import pathlib
import re
import shutil
import tracemalloc

import msgpack
import numpy as np
import pytest

from t5x_inference_ext.checkpoints import convert, open_checkpoint, serving
from t5x_inference_ext.commands import inspect_checkpoint
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError, RequestError
from tests.checkpoints import synthetic

SCANNED = synthetic.fused(synthetic.canonical())
Q_WI = 'decoder/decoder/q_wi_fused/kernel'
KV = 'decoder/decoder/kv_fused/kernel'
O_WO = 'decoder/decoder/o_wo_fused/kernel'


@pytest.fixture
def legacy(tmp_path) -> pathlib.Path:
  return synthetic.write_legacy(tmp_path / 'c', SCANNED)


def fails(path, *words, **arguments):
  """open_checkpoint raises one line with all these words; returns it."""
  with pytest.raises(CheckpointError) as caught:
    open_checkpoint(path, **arguments)
  message = str(caught.value)
  assert '\n' not in message
  for word in words:
    assert str(word) in message
  return message


def read_fails(path, name, *words):
  """The checkpoint opens, and reading `name` raises one line with all these words."""
  tensor = open_checkpoint(path).tensors[name]
  with pytest.raises(CheckpointError) as caught:
    tensor.read()
  assert '\n' not in str(caught.value)
  for word in words:
    assert str(word) in str(caught.value)


def config(**changes) -> ModelConfig:
  return ModelConfig(**{**synthetic.CONFIG.to_dict(), **changes})


def test_missing_path(tmp_path):
  fails(tmp_path / 'no' / 'such', f'no checkpoint at {tmp_path}/no/such', 'no such directory')
  fails('s3://bucket/checkpoint', 's3:// is not supported', 'gs://')


def test_directory_that_can_not_be_read(tmp_path, monkeypatch):
  monkeypatch.setattr(os, 'access', lambda path, mode: False)
  fails(tmp_path, f"can't read {tmp_path}: permission denied")


def test_missing_step_names_the_others(legacy):
  fails(
    legacy.parent / 'checkpoint_9', 'no such directory', f'{legacy.parent} holds c: pass that one'
  )


def test_directory_above_a_checkpoint(legacy):
  fails(legacy.parent, 'is not a checkpoint', 'holds c: pass that one')


def test_not_a_checkpoint(tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  fails(tmp_path, 'is not a checkpoint', 'serving_config.json', 'holds config.json')
  fails(tmp_path / 'config.json', 'is not a checkpoint', 'this is a file')
  (tmp_path / 'adapter_config.json').write_text('{}')
  fails(tmp_path, 'is an adapter, not a checkpoint', '--adapters=NAME=DIR')


@pytest.mark.parametrize(
  'index',
  [
    b'',
    b'text',
    b'\xc1',
    msgpack.packb([1]),
    msgpack.packb({'optimizer': {}}),
    msgpack.packb({'target': {'decoder': {'kernel': 'a string'}}}),
    msgpack.packb({'a': msgpack.ExtType(1, b'123')}),
  ],
)
def test_not_an_index(tmp_path, index):
  (tmp_path / 'checkpoint').write_bytes(index)
  fails(tmp_path, f'{tmp_path}/checkpoint')


def test_truncated_index(legacy):
  data = (legacy / 'checkpoint').read_bytes()
  (legacy / 'checkpoint').write_bytes(data[: len(data) // 2])
  fails(legacy, f'{legacy}/checkpoint', 'damaged')


@pytest.mark.parametrize('metadata', ['', '{', '[]', '{"tree_metadata": {"a": {}}}'])
def test_damaged_orbax_metadata(tmp_path, metadata):
  path = synthetic.write_orbax(tmp_path / 'c', SCANNED)
  (path / 'state' / '_METADATA').write_text(metadata)
  fails(path, f'{path}/state/_METADATA', 'damaged')


def test_orbax_checkpoint_of_something_else(tmp_path):
  path = synthetic.write_orbax(tmp_path / 'c', SCANNED, prefix='params/')
  fails(path, 'no parameters under `target`', 'params')


def test_partly_copied_orbax_checkpoint(tmp_path):
  path = synthetic.write_orbax(tmp_path / 'c', SCANNED)
  (path / 'state' / 'manifest.ocdbt').unlink()
  fails(path, 'manifest.ocdbt', 'partly copied')


@pytest.mark.parametrize('write', [synthetic.write_legacy, synthetic.write_orbax])
def test_missing_parameters(tmp_path, write):
  leaves = {n: v for n, v in SCANNED.items() if n not in (KV, 'decoder/decoder_norm/scale')}
  fails(
    write(tmp_path / 'c', leaves),
    tmp_path / 'c',
    'lacks',
    f'target/{KV}',
    'target/decoder/decoder_norm/scale',
  )


def test_missing_parameter_of_one_layer(tmp_path):
  leaves = synthetic.per_layer(SCANNED)
  del leaves['decoder/layers_0/kv_fused/kernel']
  fails(
    synthetic.write_legacy(tmp_path / 'c', leaves), 'lacks target/decoder/layers_0/kv_fused/kernel'
  )


@pytest.mark.parametrize(
  'extra',
  [
    'decoder/decoder/q_wi_fused/bias',
    'decoder/decoder/relpos_bias/rel_embedding',
    'decoder/logits_dense/bias',
    'encoder/x/kernel',
    Q_WI.replace('kernel', 'qscale'),
  ],
)
def test_extra_parameters(tmp_path, extra):
  path = synthetic.write_legacy(tmp_path / 'c', {**SCANNED, extra: np.ones(3, np.float32)})
  fails(path, path, f'does not use: target/{extra}', 'no biases')


@pytest.mark.parametrize(
  'extra,words',
  [
    ('decoder/logits_dense/kernel', ('shape [3]', 'needs [8, 12]')),
    ('decoder/relpos_bias/rel_embedding', ('shape [3]', 'expected [heads, buckets]')),
  ],
)
def test_shapes_of_what_a_model_may_have(tmp_path, extra, words):
  path = synthetic.write_legacy(tmp_path / 'c', {**SCANNED, extra: np.ones(3, np.float32)})
  fails(path, path, extra, *words, relative_max_distance=128)


def test_another_architecture_names_what_differs(tmp_path):
  leaves = {'decoder/layers_0/experts/kernel': np.ones((4, 4), np.float32)}
  fails(
    synthetic.write_legacy(tmp_path / 'c', leaves),
    'lacks target/decoder/',
    'q_wi_fused',
    'does not use',
    'target/decoder/layers_*/experts/kernel',
  )


def test_scanned_and_per_layer_in_one(tmp_path):
  path = synthetic.write_legacy(tmp_path / 'c', {**SCANNED, **synthetic.per_layer(SCANNED)})
  fails(path, 'two models in one tree')


@pytest.mark.parametrize(
  'changes,name,stored,needed',
  [
    ({'d_model': 16}, 'decoder/token_embedder/embedding', [12, 8], [12, 16]),
    ({'vocab_size': 13}, 'decoder/token_embedder/embedding', [12, 8], [13, 8]),
    ({'d_ff': 48}, Q_WI, [8, 2, 3, 20], [8, 2, 3, 36]),
    ({'num_layers': 4}, 'decoder/decoder/layer_norm/scale', [8, 2], [8, 4]),
  ],
)
def test_wrong_shape(legacy, changes, name, stored, needed):
  """Against the model asked for."""
  fails(
    legacy,
    f'target/{name}',
    stored,
    needed,
    legacy / f'target.{name.replace("/", ".")}',
    config=config(**changes),
  )


@pytest.mark.parametrize(
  'name,shape',
  [
    (O_WO, (3, 2, 12, 7)),
    (O_WO, (3, 2, 11, 8)),
    ('decoder/decoder_norm/scale', (9,)),
    ('decoder/decoder/layer_norm/scale', (8, 3)),
  ],
)
def test_wrong_shape_within_a_checkpoint(tmp_path, name, shape):
  """Without a model given, against the checkpoint's other parameters."""
  path = synthetic.write_orbax(tmp_path / 'c', {**SCANNED, name: np.ones(shape, np.float32)})
  fails(
    path,
    f'target/{name}',
    list(shape),
    list(SCANNED[name].shape),
    f'{path}/state/target.{name.replace("/", ".")}',
  )


@pytest.mark.parametrize(
  'name,shape,words',
  [
    (KV, (8, 2, 1, 7), ['kv_fused', '[8, 1, 7]']),
    (KV, (8, 2, 1, 40), ['q_wi_fused', '[8, 1, 40]']),
    (KV, (8, 2, 8), ['3 axes', '[8, 2, 8]']),
    (KV, (8, 2, 2, 8), ['num_kv_heads=2', 'num_heads=3']),
    ('decoder/decoder/layer_norm/scale', (8,), ['1 axes, expected 2']),
  ],
)
def test_shapes_that_no_model_has(tmp_path, name, shape, words):
  fails(
    synthetic.write_legacy(tmp_path / 'c', {**SCANNED, name: np.ones(shape, np.float32)}), *words
  )


def test_wrong_shape_of_one_layer(tmp_path):
  leaves = synthetic.per_layer(SCANNED)
  leaves['decoder/layers_1/kv_fused/kernel'] = np.ones((8, 1, 6), np.float32)
  path = synthetic.write_legacy(tmp_path / 'c', leaves)
  fails(path, 'target/decoder/layers_1/kv_fused/kernel', '[8, 1, 6]', '[8, 1, 8]')


def test_array_of_another_shape_than_the_index_says(legacy, tmp_path):
  other = synthetic.write_legacy(
    tmp_path / 'other', {**SCANNED, KV: np.ones((8, 2, 1, 16), np.float32)}
  )
  name = f'target.{KV.replace("/", ".")}'
  shutil.rmtree(legacy / name)
  shutil.copytree(other / name, legacy / name)
  fails(legacy, f'target/{KV}', legacy / name, '[8, 2, 1, 16]', '[8, 2, 1, 8]')


def test_missing_array(legacy):
  directory = legacy / f'target.{KV.replace("/", ".")}'
  shutil.rmtree(directory)
  fails(legacy, f'target/{KV}', directory)


@pytest.mark.parametrize(
  'damage,word',
  [
    (lambda f: f.write_bytes(f.read_bytes()[:-20]), ''),  # truncated
    (lambda f: f.write_bytes(b''), ''),
    (lambda f: f.write_bytes(f.read_bytes()[:40] + bytes(20) + f.read_bytes()[60:]), ''),  # corrupt
    (lambda f: f.unlink(), 'missing'),  # which tensorstore by itself reads as zeros
  ],
)
def test_damaged_chunk(tmp_path, damage, word):
  path = synthetic.write_legacy(tmp_path / 'c', SCANNED, chunks=5)
  chunk = path / f'target.{Q_WI.replace("/", ".")}' / '1.0.0.2'  # columns 10 to 14 of each head
  damage(chunk)
  assert open_checkpoint(path).tensors['query'].read().shape == (2, 8, 12)  # columns 0 to 3
  read_fails(path, 'gate', f'target/{Q_WI}', chunk, word)


def test_missing_and_damaged_data_of_an_orbax_store(tmp_path):
  path = synthetic.write_orbax(tmp_path / 'c', SCANNED, ocdbt=False)
  (path / 'state' / f'target.{KV.replace("/", ".")}' / '0.0.0.0').unlink()
  read_fails(path, 'key', f'target/{KV}', 'missing')
  path = synthetic.write_orbax(tmp_path / 'ocdbt', SCANNED)
  for file in (path / 'state' / 'd').iterdir():
    file.write_bytes(file.read_bytes()[:20])
  with pytest.raises(CheckpointError, match=re.escape(str(path))):
    open_checkpoint(path).tensors['key'].read()


def test_zeros_are_not_mistaken_for_missing(tmp_path):
  """Norm scales around zero start as zeros: stored, and read."""
  leaves = {**SCANNED, 'decoder/decoder/layer_norm/scale': np.zeros((8, 2), np.float32)}
  paths = (
    synthetic.write_legacy(tmp_path / 'a', leaves),
    synthetic.write_orbax(tmp_path / 'b', leaves, zarr3=True),
  )
  for path in paths:
    assert not open_checkpoint(path).tensors['layer_norm'].read().any()


@pytest.mark.parametrize(
  'told,words',
  [
    ({'norm_scale': 'two'}, "norm_scale must be one of zero, one, got 'two'"),
    ({'mlp': 'gelu,linear'}, "mlp must be one of swiglu, geglu, .*, got 'gelu,linear'"),
    ({'rescale_logits': 'no'}, 'rescale_logits must be True or False or None'),
    ({'num_heads': 0}, 'num_heads must be a whole number, 1 or more, got 0'),
  ],
)
def test_conventions_that_no_model_has(legacy, told, words):
  with pytest.raises(RequestError, match=words):
    open_checkpoint(legacy, **told)


def test_index_that_refers_to_another_driver(legacy):
  tree = msgpack.unpackb((legacy / 'checkpoint').read_bytes(), raw=False)
  tree['optimizer']['target']['decoder']['decoder']['kv_fused']['kernel']['driver'] = 'n5'
  (legacy / 'checkpoint').write_bytes(msgpack.packb(tree))
  fails(legacy, f'target/{KV}', 'n5', 'T5X does not write')


HOSTILE = {
  'control characters': (
    '\x1b[31mred\nerror: a line of its own\r\x85',
    'x1b[31mred\\nerror: a line',
  ),
  'too long': ('x' * 100_000, 'xxx...'),
  'surrogates': ('a\udc80b', '\\udc80'),
  'right to left': ('a\u202eb', '\\u202e'),
}


@pytest.mark.parametrize('what', HOSTILE)
def test_names_are_printed_escaped_and_cut(tmp_path, what):
  name, shown = HOSTILE[what]
  leaves = {f'target/decoder/{name}': synthetic.pack_array(np.ones(2, np.float32))}
  index = synthetic.nest({f'optimizer/{n}': v for n, v in leaves.items()})
  (tmp_path / 'checkpoint').write_bytes(msgpack.packb(index, unicode_errors='surrogatepass'))
  if what == 'surrogates':  # msgpack decodes strictly
    fails(tmp_path, 'is damaged')
    return
  message = fails(tmp_path, shown, 'does not use')
  assert message.isprintable() and len(message) < 5000
  for line in inspect_checkpoint.describe_checkpoint(tmp_path):
    assert line.isprintable() and len(line) < 5000


@pytest.mark.parametrize('what', HOSTILE)
@pytest.mark.parametrize('key', ['format', 'version', 'weights', 'model', 'written_by'])
def test_headers_are_quoted_escaped_and_cut(tmp_path, what, key):
  header = {'format': serving.SERVING_FORMAT, 'version': 3, 'written_by': 'me', 'model': {}}
  header[key] = {HOSTILE[what][0]: 1} if key == 'model' else HOSTILE[what][0]
  header['version'] = header['version'] if key in ('version', 'written_by') else 1
  (tmp_path / 'serving_config.json').write_text(json.dumps(header))
  message = fails(tmp_path, 'serving_config.json')
  assert message.isprintable() and len(message) < 2000


def test_names_in_orbax_metadata(tmp_path):
  path = synthetic.write_orbax(tmp_path / 'c', SCANNED)
  metadata = json.loads((path / 'state' / '_METADATA').read_text())
  tree = metadata['tree_metadata']
  for name, (hostile, _) in HOSTILE.items():
    keys = [{'key': key, 'key_type': 2} for key in ('params', hostile)]
    tree = {name: {'key_metadata': keys[::-1], 'value_metadata': {}}}
    text = json.dumps({**metadata, 'tree_metadata': tree})
    (path / 'state' / '_METADATA').write_text(text)
    message = fails(path, 'no parameters under `target`')
    assert message.isprintable() and len(message) < 2000


def test_one_large_layer_number_takes_no_memory(tmp_path):
  kernel = np.ones((8, 1, 8), np.float32)
  for number in (10_000_000, 999_999_999):
    leaves = {f'decoder/layers_{i}/kv_fused/kernel': kernel for i in (0, number)}
    path = synthetic.write_legacy(tmp_path / str(number), leaves, inline=True)
    tracemalloc.start()
    fails(path, 'lacks target/decoder/layers_1/kv_fused/kernel', f' and {number - 13} more')
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


@pytest.mark.parametrize('number', ['01', '1' * 5000, '\u0661'])
def test_what_is_no_layer_number(tmp_path, number):
  """Two spellings of one number would be one layer, with the values of either."""
  leaves = {**synthetic.per_layer(SCANNED)}
  leaves[f'decoder/layers_{number}/kv_fused/kernel'] = np.ones((8, 1, 8), np.float32)
  path = synthetic.write_legacy(tmp_path / 'c', leaves, inline=True)
  fails(path, 'does not use', f'target/decoder/layers_{number[:10]}')


@pytest.mark.parametrize('value', [0.0, 1e-40])
def test_scales_to_divide_by_that_are_zero(tmp_path, value):
  leaves = synthetic.quantized(SCANNED)
  leaves[KV.replace('kernel', 'qscale')][0, 1, 0, 2] = value
  path = synthetic.write_legacy(tmp_path / 'c', leaves)
  read_fails(path, 'key_scale', 'key_scale', 'kv_fused.qscale', 'scales of 0')
  with pytest.raises(CheckpointError, match='key_scale: .*scales of 0') as caught:
    convert.convert(path, tmp_path / 'out')
  assert 'diverged' not in str(caught.value)


@pytest.mark.parametrize(
  'name', ['checkpoint_7.orbax-checkpoint-tmp-1717171717', 'checkpoint_7.orbax-checkpoint-tmp']
)
def test_a_save_of_orbax_that_has_not_finished(tmp_path, name):
  path = synthetic.write_orbax(tmp_path / name, SCANNED)
  fails(path, str(path), 'Orbax is still writing it, or was interrupted')
  fails(path / 'state', str(path), 'Orbax is still writing it, or was interrupted')


@pytest.mark.parametrize('depth', [900, 940, 960, 980, 990, 1000, 100_000])
@pytest.mark.parametrize('opening,closing', [('[', ']'), ('{"a":', '}')])
def test_json_nested_too_deep(tmp_path, opening, closing, depth):
  deep = opening * depth + '1' + closing * depth
  fails(write_file(tmp_path / 'a' / 'serving_config.json', deep), 'serving_config.json')
  header = json.dumps({'format': 0}).replace('0', deep)
  fails(write_file(tmp_path / 'b' / 'serving_config.json', header), 'serving_config.json')
  fails(write_file(tmp_path / 'c' / '_METADATA', deep), '_METADATA')
  path = synthetic.write_orbax(tmp_path / 'd', SCANNED)
  fails(write_file(path / 'state' / '_METADATA', f'{{"tree_metadata": {deep}}}'), '_METADATA')


@pytest.mark.parametrize('depth', [900, 940, 960, 980, 990, 1000, 100_000])
@pytest.mark.parametrize('element', [b'\x91', b'\x81\xa1a'], ids=['list', 'dict'])
def test_msgpack_nested_too_deep(tmp_path, element, depth):
  deep = element * depth + b'\x01'
  fails(write_file(tmp_path / 'a' / 'checkpoint', deep), 'checkpoint')
  index = msgpack.packb({'target': {'decoder': 0}})[:-1] + deep
  fails(write_file(tmp_path / 'b' / 'checkpoint', index), 'checkpoint')
  path = synthetic.write_orbax(tmp_path / 'c', SCANNED, ocdbt=False)
  (path / 'state' / '_METADATA').unlink()
  fails(write_file(path / 'state' / 'checkpoint', deep), 'checkpoint')


def write_file(path, content):
  """Writes a file. Returns its directory."""
  path.parent.mkdir(exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path.parent
