"""Checkpoints in a bucket: read as from a disk, and uploaded whole or not at all."""

import itertools
import json
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from t5x_inference_ext.checkpoints import convert, open_checkpoint
from t5x_inference_ext.checkpoints.conversion import files as local_files
from t5x_inference_ext.checkpoints.conversion import staging
from t5x_inference_ext.checkpoints.conversion.verify import verify
from t5x_inference_ext.checkpoints.load import load_weights
from t5x_inference_ext.checkpoints.unfinished import MARKER
from t5x_inference_ext.commands import convert_checkpoint, inspect_checkpoint
from t5x_inference_ext.errors import CheckpointError, UserError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.sharding.mesh import make_mesh, parse_mesh
from tests.checkpoints import fake_gcs, gguf_families, public_files, synthetic
from tests.checkpoints.synthetic import contents
from tests.text import vocabularies

LEAVES = synthetic.fused(synthetic.canonical())
Q_WI = 'target.decoder.decoder.q_wi_fused.kernel'


@pytest.fixture
def gcs(monkeypatch):
  server = fake_gcs.FakeGcs()
  monkeypatch.setenv('TENSORSTORE_GCS_HTTP_URL', server.url)
  monkeypatch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'token')
  monkeypatch.setenv('no_proxy', '127.0.0.1')
  yield server
  server.close()


@pytest.fixture
def source(tmp_path) -> pathlib.Path:
  return synthetic.write_legacy(tmp_path / 'source', LEAVES, chunks=5)


def run(*argv):
  return convert_checkpoint.run(['convert_checkpoint', *map(str, argv)])


SOURCES = {
  'legacy': lambda path: synthetic.write_legacy(path, LEAVES, chunks=5),
  'orbax': lambda path: synthetic.write_orbax(path, LEAVES),
  'orbax, zarr 3, no OCDBT': lambda path: synthetic.write_orbax(
    path, LEAVES, zarr3=True, ocdbt=False
  ),
}


@pytest.mark.parametrize('form', SOURCES)
def test_a_source_in_a_bucket(gcs, tmp_path, capsys, form):
  local = SOURCES[form](tmp_path / 'source')
  remote = gcs.put_directory(local, 'runs/checkpoint_7')
  convert.convert(local, tmp_path / 'expected')
  assert run(f'--input={remote}', f'--output={tmp_path}/out', '--weights=int8') == 0
  assert (tmp_path / 'out' / 'checksums.json').read_bytes() == (
    tmp_path / 'expected' / 'checksums.json'
  ).read_bytes()
  assert (
    json.loads((tmp_path / 'out' / 'serving_config.json').read_text())['source']['path'] == remote
  )
  assert verify(tmp_path / 'out', remote)[-1] == f'and what {remote} converts to'
  capsys.readouterr()
  assert inspect_checkpoint.run(['inspect_checkpoint', f'{remote}/']) == 0
  out = capsys.readouterr().out
  assert f'at {remote}, step 7' in out and 'converting takes about' in out


@pytest.mark.parametrize('form', ['safetensors', 'GGUF'])
def test_a_public_model_in_a_bucket(gcs, tmp_path, testdata, form):
  """Only the headers are fetched when it is opened, then ranges of bytes."""
  family = testdata / 'families' / 'cohere'
  if form == 'GGUF':
    local = public_files.write_gguf(tmp_path / 'm.gguf', *gguf_families.converted(family))
    gcs.put('models/m.gguf', local.read_bytes())
    remote = f'{gcs.bucket}/models/m.gguf'
  else:
    remote = gcs.put_directory(family, 'models/cohere')
  found, wanted = open_checkpoint(remote), open_checkpoint(family)
  assert found.path == remote and found.config == wanted.config
  for name, tensor in wanted.tensors.items():
    values = tensor.read().astype(np.float32)
    np.testing.assert_array_equal(found.tensors[name].read().astype(np.float32), values)


def test_the_vocabulary_of_a_public_model_in_a_bucket(gcs, tmp_path, testdata):
  shutil.copytree(testdata / 'families' / 'cohere', tmp_path / 'm')
  tokenizer = vocabularies.letters_json()
  (tmp_path / 'm' / 'tokenizer.json').write_bytes(tokenizer)
  text = open_checkpoint(gcs.put_directory(tmp_path / 'm', 'models/m')).text
  assert text.files == {'tokenizer.json': tokenizer}
  assert (text.bos_id, text.end_ids) == (1, (2,))
  assert text.vocabulary.encode('ab') == open_checkpoint(tmp_path / 'm').vocabulary.encode('ab')


def test_weights_come_straight_from_a_bucket(gcs, palm_tiny):
  remote = gcs.put_directory(palm_tiny, 'palm')
  loaded = []
  for path in (palm_tiny, remote):
    checkpoint = open_checkpoint(path)
    model = Model(checkpoint.config, make_mesh(parse_mesh('2x2x2')), dtype='float32')
    loaded.append(load_weights(checkpoint, model))
  jax.tree.map(np.testing.assert_array_equal, *loaded)


def test_nothing_there(gcs, tmp_path, capsys):
  assert run(f'--input={gcs.bucket}/nothing', f'--output={tmp_path}/out', '--weights=int8') == 2
  assert f'no checkpoint at {gcs.bucket}/nothing' in capsys.readouterr().err
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  'damage,words',
  [
    (lambda gcs, name: gcs.objects.pop(name), 'missing'),
    (lambda gcs, name: gcs.put(name, gcs.objects[name][1][:-9]), 'the end of the file is missing'),
    (lambda gcs, name: gcs.failures['GET', name].append(403), '403'),
  ],
)
def test_a_source_that_cannot_be_read(gcs, source, tmp_path, capsys, damage, words):
  remote = gcs.put_directory(source, 'source')
  damage(gcs, f'source/{Q_WI}/1.0.0.2')
  assert run(f'--input={remote}', f'--output={tmp_path}/out', '--weights=int8') == 2
  err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith('convert:')]
  assert len(err) == 1 and words in err[0] and f'{remote}/{Q_WI}/1.0.0.2' in err[0], err
  assert not (tmp_path / 'out').exists()


def test_an_index_that_may_not_be_read(gcs, source, tmp_path, capsys):
  remote = gcs.put_directory(source, 'source')
  gcs.failures['GET', 'source/serving_config.json'].append(403)
  assert run(f'--input={remote}', f'--output={tmp_path}/out', '--weights=int8') == 2
  err = capsys.readouterr().err
  assert f"can't read {remote}/serving_config.json" in err and '403' in err


def test_a_server_that_fails_once(gcs, source, tmp_path):
  remote = gcs.put_directory(source, 'source')
  name = f'source/{Q_WI}/0.0.0.0'
  gcs.failures['GET', name].append(503)
  assert convert.convert(remote, tmp_path / 'out').finished
  assert gcs.requests.count(('GET', name)) == 3  # the chunk and its trailer, one of them twice


@pytest.mark.parametrize('form', ['serving', 't5x_int8'])
def test_an_output_in_a_bucket(gcs, source, tmp_path, capsys, form):
  convert.convert(source, tmp_path / 'local', format=form)
  out = f'{gcs.bucket}/deep/out'
  command = [
    f'--input={source}',
    f'--output={out}/',
    f'--format={form}',
    '--weights=int8',
    f'--staging={tmp_path}/s',
  ]
  assert run(*command) == 0
  said = capsys.readouterr()
  assert (
    'taking disk space until all is uploaded' in said.out
    and f'wrote and verified {out}' in said.out
    and 'upload: ' in said.err
  )
  assert gcs.below('deep/out') == contents(tmp_path / 'local')
  assert list((tmp_path / 's').iterdir()) == []
  header = 'checkpoint' if form == 't5x_int8' else 'serving_config.json'
  assert gcs.uploads()[0] == f'deep/out/{MARKER}' and gcs.uploads()[-1] == f'deep/out/{header}'
  assert gcs.uploads().count(f'deep/out/{header}') == 1
  assert open_checkpoint(out).weights == 'int8'
  assert run('--verify', f'--output={out}', f'--input={source}') == 0
  # Once more: it is there.
  before = dict(gcs.objects)
  assert run(*command) == 2
  assert f'{out} exists already' in capsys.readouterr().err and gcs.objects == before


def test_shards_into_a_bucket(gcs, source, tmp_path):
  convert.convert(source, tmp_path / 'local')
  out = f'{gcs.bucket}/out'
  convert_shard = lambda shard: convert.convert(
    source, out, staging=tmp_path / 's', num_shards=2, shard_id=shard, slice_bytes=1
  )
  assert not convert_shard(1).finished and set(gcs.below('out')) == {MARKER}
  report = convert_shard(0)
  assert report.finished and report.output == out
  assert gcs.below('out')['checksums.json'] == (tmp_path / 'local' / 'checksums.json').read_bytes()


def opens(path: str) -> bool:
  try:
    open_checkpoint(path)
    return True
  except CheckpointError as e:
    assert 'an unfinished upload' in str(e)
    return False


def test_an_upload_goes_on_where_it_was_interrupted(gcs, source, tmp_path):
  """At every one of its requests."""
  convert.convert(source, tmp_path / 'local')
  names = sorted(contents(tmp_path / 'local'))
  out, interrupted = f'{gcs.bucket}/out', 0
  for i, name in enumerate(names):  # some can't be uploaded, some can't be read back
    gcs.failures['GET' if i % 2 and '/' in name else 'POST', f'out/{name}'].append(403)
  while True:
    try:
      report = convert.convert(source, out, staging=tmp_path / 's', workers=1)
      break
    except CheckpointError as e:
      assert '403' in str(e)
      interrupted += 1
    assert not opens(out)
  assert interrupted == len(names) and report.finished
  assert gcs.below('out') == contents(tmp_path / 'local') and list((tmp_path / 's').iterdir()) == []
  # Once more for each failure, and no more.
  assert all(gcs.uploads().count(f'out/{name}') == 2 for name in names)


def test_killed_while_uploading(gcs, source, tmp_path, repository):
  convert.convert(source, tmp_path / 'local')
  out, original, killed = f'{gcs.bucket}/out', gcs.store, 0
  command = [
    sys.executable,
    '-m',
    't5x_inference_ext.convert_checkpoint',
    f'--input={source}',
    f'--output={out}',
    '--weights=int8',
    f'--staging={tmp_path}/s',
  ]
  for last in (1, 3, 8, 20, None):  # uploads that a process lives to see
    with subprocess.Popen(
      command, cwd=repository, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
      seen = itertools.count(1)

      def store(name, value, seen=seen, last=last, process=process):
        if next(seen) == last:
          process.kill()
        return original(name, value)

      gcs.store = store
    if last is None:
      assert process.returncode == 0
    else:
      killed += process.returncode == -signal.SIGKILL
      assert not opens(out)
  assert killed == 4
  assert gcs.below('out') == contents(tmp_path / 'local') and list((tmp_path / 's').iterdir()) == []


def interrupt(gcs, source, tmp_path, name='serving_config.json', **options) -> str:
  """An upload that has all but `name`."""
  out = f'{gcs.bucket}/out'
  gcs.failures['POST', f'out/{name}'].append(403)
  with pytest.raises(CheckpointError, match=f"can't write to {out}/{name}: .*403"):
    convert.convert(source, out, staging=tmp_path / 's', workers=1, **options)
  assert not opens(out)
  return out


def test_what_was_lost_since_is_uploaded_again(gcs, source, tmp_path):
  out = interrupt(gcs, source, tmp_path)
  gcs.objects.pop('out/gate/0.0.0')
  gcs.put('out/linear/0.0.0', b'something else')
  before = len(gcs.uploads())
  assert convert.convert(source, out, staging=tmp_path / 's').finished
  assert sorted(gcs.uploads()[before:]) == [
    'out/gate/0.0.0',
    'out/linear/0.0.0',
    'out/serving_config.json',
  ]
  verify(out, source)


def test_other_options_start_over(gcs, source, tmp_path):
  out = interrupt(gcs, source, tmp_path)
  assert any(name.startswith('query_scale/') for name in gcs.below('out'))
  assert convert.convert(source, out, 'bfloat16', staging=tmp_path / 's').finished
  convert.convert(source, tmp_path / 'local', 'bfloat16')
  assert gcs.below('out') == contents(tmp_path / 'local')


def test_a_bucket_that_keeps_something_else(gcs, source, tmp_path):
  gcs.store = lambda name, value: value[:-1] + b'?' if name.endswith('gate/0.0.0') else value
  out = f'{gcs.bucket}/out'
  with pytest.raises(CheckpointError, match=f'{out}/gate/0.0.0 changed right after it was written'):
    convert.convert(source, out, staging=tmp_path / 's')
  assert not opens(out)


def test_somebody_else_s_objects_are_left_alone(gcs, source, tmp_path):
  gcs.put('out/notes.txt', b'mine')
  with pytest.raises(CheckpointError, match='exists already, with notes.txt in it'):
    convert.convert(source, f'{gcs.bucket}/out', staging=tmp_path / 's')
  assert gcs.below('out') == {'notes.txt': b'mine'} and not (tmp_path / 's').exists()


def test_two_conversions_into_one_place(gcs, source, tmp_path):
  """From different machines: the one that began last wins."""
  out = interrupt(gcs, source, tmp_path)
  assert not opens(out)
  interrupt(gcs, source, tmp_path / 'other')
  with pytest.raises(CheckpointError, match='another one is writing to'):
    convert.convert(source, out, staging=tmp_path / 's')
  assert not opens(out)
  assert convert.convert(source, out, staging=tmp_path / 'other' / 's').finished
  verify(out, source)


def test_killed_between_the_last_two_steps(gcs, source, tmp_path, monkeypatch):
  out = f'{gcs.bucket}/out'
  with monkeypatch.context() as patched:
    patched.setattr(
      staging.Staging, 'remove', lambda self: (_ for _ in ()).throw(CheckpointError('killed'))
    )
    with pytest.raises(CheckpointError, match='killed'):
      convert.convert(source, out, staging=tmp_path / 's')
  before = len(gcs.uploads())
  with pytest.raises(CheckpointError, match='exists already, made from another source'):
    convert.convert(source, out, 'bfloat16', staging=tmp_path / 's')
  lines = []
  assert convert.convert(source, out, staging=tmp_path / 's', planned=lines.append).finished
  assert lines == [f'{out} is already complete'] and len(gcs.uploads()) == before
  assert list((tmp_path / 's').iterdir()) == []
  verify(out, source)


def test_a_source_that_cannot_be_converted_leaves_nothing(gcs, tmp_path):
  leaves = {name: values.copy() for name, values in LEAVES.items()}
  leaves['decoder/decoder/o_wo_fused/kernel'][1, 0, 5, 3] = np.nan
  source = synthetic.write_legacy(tmp_path / 'source', leaves)
  with pytest.raises(CheckpointError, match='NaN'):
    convert.convert(source, f'{gcs.bucket}/out', staging=tmp_path / 's')
  assert gcs.objects == {} and list((tmp_path / 's').iterdir()) == []


def test_a_full_disk_leaves_nothing(gcs, source, tmp_path, monkeypatch):
  monkeypatch.setattr(
    local_files.os,
    'posix_fallocate',
    lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left')),
  )
  with pytest.raises(CheckpointError, match=f"can't write to {tmp_path}/s/out-.*No space left"):
    convert.convert(source, f'{gcs.bucket}/out', staging=tmp_path / 's')
  assert gcs.objects == {} and list((tmp_path / 's').iterdir()) == []


def test_a_bucket_that_takes_nothing(gcs, source, tmp_path):
  """Is found before anything is converted."""
  gcs.failures['POST', f'out/{MARKER}'].append(403)
  seen = []
  with pytest.raises(CheckpointError, match=f"can't write to {gcs.bucket}/out/{MARKER}: .*403"):
    convert.convert(
      source, f'{gcs.bucket}/out', staging=tmp_path / 's', progress=lambda *_: seen.append(1)
    )
  assert seen == []


def test_staging_is_for_buckets(gcs, source, tmp_path):
  with pytest.raises(UserError, match='give --staging=DIR, a local directory'):
    convert.convert(source, f'{gcs.bucket}/out')
  with pytest.raises(UserError, match='is for outputs in a bucket'):
    convert.convert(source, tmp_path / 'out', staging=tmp_path / 's')
  with pytest.raises(CheckpointError, match='must be on a local disk'):
    convert.convert(source, f'{gcs.bucket}/out', staging=f'{gcs.bucket}/s')
  with pytest.raises(CheckpointError, match='is no directory in a bucket'):
    convert.convert(source, gcs.bucket, staging=tmp_path / 's')
