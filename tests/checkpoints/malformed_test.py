"""Sources that can't be converted: each is one clear error, exit code 2, and leaves no output."""

import json
import os
import pathlib
import shutil

import ml_dtypes
import msgpack
import numpy as np
import pytest

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.checkpoints.conversion import files
from t5x_inference_ext.commands import convert_checkpoint
from t5x_inference_ext.errors import CheckpointError
from tests.checkpoints import synthetic

LEAVES = synthetic.fused(synthetic.canonical())
Q_WI = 'target.decoder.decoder.q_wi_fused.kernel'
O_WO = 'decoder/decoder/o_wo_fused/kernel'


def legacy(path, change=lambda leaves: None, **options):
  leaves = {name: values.copy() for name, values in LEAVES.items()}
  change(leaves)
  return synthetic.write_legacy(path, leaves, **options)


def on_chunk(damage):
  def source(path):
    damage(legacy(path, chunks=5) / Q_WI / '1.0.0.2')
    return path

  return source


def on_index(change):
  def source(path):
    legacy(path)
    tree = msgpack.unpackb((path / 'checkpoint').read_bytes(), raw=False, strict_map_key=False)
    change(tree['optimizer']['target']['decoder'])
    (path / 'checkpoint').write_bytes(msgpack.packb(tree))
    return path

  return source


def on_zarray(**changes):
  def source(path):
    file = legacy(path) / Q_WI / '.zarray'
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return path

  return source


def put(name, index, value):
  def change(leaves):
    leaves[name][index] = value

  return lambda path: legacy(path, change)


def flipped(file, places):
  data = bytearray(file.read_bytes())
  for place in places:
    data[len(data) * place // 100] ^= 0x55
  file.write_bytes(data)


def garbage(path, data):
  legacy(path)
  (path / 'checkpoint').write_bytes(data)
  return path


def loop(path):
  shutil.rmtree(legacy(path) / Q_WI)
  (path / Q_WI).symlink_to(path / 'again')
  (path / 'again').symlink_to(path / Q_WI)
  return path


def layers(change):
  def source(path):
    leaves = synthetic.per_layer(LEAVES)
    change(leaves)
    return synthetic.write_legacy(path, leaves)

  return source


def of_dtype(name, dtype):
  def change(leaves):
    leaves[name] = leaves[name].astype(dtype)

  return lambda path: legacy(path, change)


def orbax(damage, **options):
  def source(path):
    damage(synthetic.write_orbax(path, LEAVES, **options))
    return path

  return source


def twice(leaves):
  """The same layer scanned and by itself."""
  leaves.update(LEAVES)


def quantized(change):
  def source(path):
    leaves = synthetic.quantized(LEAVES)
    change(leaves)
    return synthetic.write_legacy(path, leaves)

  return source


KV = 'decoder/decoder/kv_fused'
# name: (makes the source, a word of the error)
SOURCES = {
  'nothing there': (lambda path: path, 'no such directory'),
  'a file': (lambda path: path.write_text('') or path, 'this is a file'),
  'an empty directory': (lambda path: path.mkdir() or path, 'not a checkpoint'),
  'truncated chunk': (on_chunk(lambda f: f.write_bytes(f.read_bytes()[:-9])), Q_WI),
  'empty chunk': (on_chunk(lambda f: f.write_bytes(b'')), Q_WI),
  'chunk of something else': (on_chunk(lambda f: f.write_bytes(b'not gzip at all')), Q_WI),
  'flipped bytes in the middle': (on_chunk(lambda f: flipped(f, (40, 50, 60))), Q_WI),
  'flipped bytes in the checksum': (on_chunk(lambda f: flipped(f, (95,))), Q_WI),
  'missing chunk': (on_chunk(pathlib.Path.unlink), 'missing'),
  'chunk that is a directory': (on_chunk(lambda f: (f.unlink(), f.mkdir())), Q_WI),
  'missing array': (lambda path: shutil.rmtree(legacy(path) / Q_WI) or path, Q_WI),
  'symlink loop': (loop, Q_WI),
  'chunk that is a symlink loop': (on_chunk(lambda f: (f.unlink(), f.symlink_to(f))), Q_WI),
  'metadata that is not JSON': (
    lambda path: (legacy(path) / Q_WI / '.zarray').write_text('{') and path,
    Q_WI,
  ),
  'unknown compressor': (on_zarray(compressor={'id': 'rle'}), Q_WI),
  'wrong dtype': (on_zarray(dtype='<f8'), 'damaged'),
  'dtype that weights never have': (on_zarray(dtype='|S4'), Q_WI),
  'other shape than the index': (on_zarray(shape=[8, 2, 3, 19]), 'different checkpoints'),
  'empty index': (lambda path: garbage(path, b''), 'checkpoint'),
  'index of random bytes': (
    lambda path: garbage(path, np.random.default_rng(0).bytes(500)),
    'checkpoint',
  ),
  'index cut short': (
    lambda path: garbage(path, (legacy(path.parent / 'a') / 'checkpoint').read_bytes()[:300]),
    'damaged',
  ),
  'index with a string for an array': (
    on_index(lambda d: d['decoder_norm'].update(scale='x')),
    'neither an array',
  ),
  'index with a cut array that lacks its pieces': (
    lambda path: garbage(
      path, msgpack.packb({'target': {'x': {'__msgpack_chunked_array__': True}}})
    ),
    'damaged',
  ),
  'index whose shape is no list': (
    on_index(lambda d: d['decoder_norm']['scale']['metadata'].update(shape=8)),
    'different checkpoints',
  ),
  'index that leads out of the directory': (
    on_index(lambda d: d['decoder_norm']['scale']['kvstore'].update(path='../')),
    'decoder_norm/scale: no readable zarr',
  ),
  'missing parameter': (
    on_index(lambda d: d.pop('token_embedder')),
    'lacks target/decoder/token_embedder',
  ),
  'unknown parameter': (
    on_index(lambda d: d.update(bias=d['decoder_norm']['scale'])),
    'does not use',
  ),
  'duplicated layer': (layers(twice), 'two models in one tree'),
  'missing layer': (
    layers(lambda leaves: [leaves.pop(n) for n in list(leaves) if 'layers_0' in n]),
    'layers_0',
  ),
  'layer of another shape': (
    layers(
      lambda leaves: leaves.update(
        {'decoder/layers_1/kv_fused/kernel': np.ones((8, 1, 6), np.float32)}
      )
    ),
    '[8, 1, 6]',
  ),
  'chunks larger than any memory': (on_zarray(chunks=[2**40, 2, 3, 20]), 'GB each'),
  'whole numbers for floats': (
    of_dtype('decoder/decoder/q_wi_fused/kernel', np.int32),
    'holds int32 values',
  ),
  'int8 without scales': (
    of_dtype('decoder/decoder/kv_fused/kernel', np.int8),
    'holds int8 values',
  ),
  'an embedding of booleans': (
    of_dtype('decoder/token_embedder/embedding', bool),
    'holds bool values',
  ),
  'infinite as bfloat16': (
    put('decoder/token_embedder/embedding', (5, 5), 3.4e38),
    'embedding: 1 values above 3.39e+38, which become infinite in bfloat16',
  ),
  'infinite as int8': (
    put(O_WO, (1, 1, 5, 3), -3.4e38),
    'which become infinite in int8 in layer 1',
  ),
  'NaN': (put(O_WO, (1, 0, 5, 3), np.nan), 'NaN or infinite values in layer 0'),
  'infinity': (
    put('decoder/token_embedder/embedding', (5, 5), -np.inf),
    'embedding: 1 NaN or infinite',
  ),
  'NaN in a scale': (
    quantized(lambda leaves: leaves[f'{KV}/qscale'].__setitem__((0, 1, 0, 2), np.nan)),
    'key_scale',
  ),
  'quantized values out of range': (
    quantized(
      lambda leaves: leaves.update(
        {f'{KV}/qkernel': leaves[f'{KV}/qkernel'].astype(np.float32) * 3}
      )
    ),
    'should hold int8 values',
  ),
  'qkernel without qscale': (quantized(lambda leaves: leaves.pop(f'{KV}/qscale')), 'lacks'),
  'Orbax without manifest': (
    orbax(lambda path: (path / 'state' / 'manifest.ocdbt').unlink()),
    'partly copied',
  ),
  'Orbax with damaged data': (
    orbax(
      lambda path: [f.write_bytes(f.read_bytes()[:20]) for f in (path / 'state' / 'd').iterdir()]
    ),
    'state',
  ),
  'Orbax metadata cut short': (
    orbax(lambda path: (path / 'state' / '_METADATA').write_text('{"tree')),
    'damaged',
  ),
  'Orbax chunk missing': (
    orbax(lambda path: (path / 'state' / Q_WI / '0.0.0.0').unlink(), ocdbt=False),
    'missing',
  ),
}


def run(*argv):
  return convert_checkpoint.run(['convert_checkpoint', *map(str, argv)])


def is_clear(err: str, word: str) -> None:
  lines = [line for line in err.splitlines() if not line.startswith(('convert:', 'verify:'))]
  assert len(lines) == 1 and lines[0].startswith('error: ') and word in lines[0], err


@pytest.mark.parametrize('name', SOURCES)
def test_source(tmp_path, capsys, name):
  make, word = SOURCES[name]
  source = make(tmp_path / 'source')
  out = tmp_path / 'out'
  assert run(f'--input={source}', f'--output={out}', '--weights=int8') == 2
  is_clear(capsys.readouterr().err, word)
  assert not os.path.lexists(out)
  for path in (f'{out}.unfinished', f'{out}.unfinished/checkpoint'):
    with pytest.raises(CheckpointError):
      open_checkpoint(path)


def test_there_are_enough():
  assert len(SOURCES) >= 20


def test_read_only_destination(tmp_path, capsys, monkeypatch):
  """Also for a user who may write everywhere: the system call's own error."""
  source = legacy(tmp_path / 'source')
  monkeypatch.setattr(
    os,
    'mkdir',
    lambda path, *_, **__: (_ for _ in ()).throw(OSError(30, 'Read-only file system', path)),
  )
  assert run(f'--input={source}', f'--output={tmp_path}/out', '--weights=int8') == 2
  is_clear(capsys.readouterr().err, 'Read-only file system')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['source']


def test_destination_below_a_file(tmp_path, capsys):
  source = legacy(tmp_path / 'source')
  assert run(f'--input={source}', f'--output={source}/checkpoint/out', '--weights=int8') == 2
  is_clear(capsys.readouterr().err, "can't write to")


def test_full_disk_is_found_before_anything_is_read(tmp_path, capsys, monkeypatch):
  source = legacy(tmp_path / 'source')
  monkeypatch.setattr(
    files.os, 'posix_fallocate', lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left'))
  )
  assert run(f'--input={source}', f'--output={tmp_path}/out', '--weights=int8') == 2
  is_clear(capsys.readouterr().err, 'No space left')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['source']


@pytest.mark.parametrize('step', [np.float32('nan'), np.zeros(2, np.int32), np.complex64(1)])
def test_a_step_that_is_none(tmp_path, step):
  """It is not needed, and so not recorded."""
  source = legacy(tmp_path / 'source')
  tree = msgpack.unpackb((source / 'checkpoint').read_bytes(), raw=False, strict_map_key=False)
  tree['optimizer']['state']['step'] = synthetic.pack_array(step)
  (source / 'checkpoint').write_bytes(msgpack.packb(tree))
  assert open_checkpoint(source).step is None


@pytest.mark.parametrize(
  'form',
  [
    'scanned',
    {'layers': 'EncoderLayer', 'layer_axis': 1, 'per_layer': False, 'kernels': {}},
    {'layers': 'DecoderLayer'},
  ],
)
def test_serving_checkpoint_of_no_arrangement(tmp_path, capsys, form):
  assert (
    run(f'--input={legacy(tmp_path / "source")}', f'--output={tmp_path}/serving', '--weights=int8')
    == 0
  )
  synthetic.rewrite_header(tmp_path / 'serving', lambda header: header['source'].update(form=form))
  capsys.readouterr()
  assert run(f'--input={tmp_path}/serving', f'--output={tmp_path}/out', '--format=t5x_float') == 2
  is_clear(capsys.readouterr().err, 'source.form in serving_config.json')


def test_bfloat16_is_no_malformed_source(tmp_path):
  source = synthetic.write_legacy(
    tmp_path / 'source',
    {name: values.astype(ml_dtypes.bfloat16) for name, values in LEAVES.items()},
  )
  assert run(f'--input={source}', f'--output={tmp_path}/out', '--weights=int8') == 0
